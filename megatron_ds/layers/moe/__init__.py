"""Mixtures of experts: routing, the exchange of tokens between ranks, and the experts' products."""
