"""Inspection of data: counts, lengths, and samples as text with the tokens that carry loss marked."""
