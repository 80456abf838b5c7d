"""Rows of a few positions whose attention is cut into tiles of queries, as that of long rows is."""

import pytest

from megatron_ds.layers import attention_masks


def set_queries_of_a_tile(patch: pytest.MonkeyPatch, queries: int) -> None:
    """Have tiles of this number of queries, in this process and in ranks that are forked from it."""
    for name in ("LEAST_QUERIES", "MOST_QUERIES"):
        patch.setattr(attention_masks, name, queries)
