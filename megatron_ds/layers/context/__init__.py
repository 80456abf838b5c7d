"""Attention over context ranks, which divide the sequence: exchanges of heads, of keys and values, and the ring."""
