"""Layers: the math, with the tensor axis as a constructor argument.

Dim legend: S sequence, B batch (one micro-batch), H hidden, F feed-forward, V vocabulary, N query heads, K key/value
heads, G = N/K query heads per group, D head dim; t is the size of the tensor axis. Hidden states are (S, B, H).
"""
