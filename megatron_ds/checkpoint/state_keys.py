"""What the tensors of the training state are called: kind, parameter, and where their box begins."""

from __future__ import annotations

from megatron_ds.checkpoint.tensor_slices import Box

MASTER, STEPS = "master", "step"
KINDS = (MASTER, "exp_avg", "exp_avg_sq")
"""What there is of every element that is trained: the weight in fp32 and AdamW's two moments (Kingma and Ba 2015)."""


def key_of(kind: str, name: str, box: Box) -> str:
    """How a box of a parameter is called in a file of the training state: `exp_avg/blocks.0.norm.weight/0,64`."""
    return f"{kind}/{name}/{','.join(map(str, box.start))}"


def parse_key(key: str, shape: tuple[int, ...]) -> tuple[str, str, Box]:
    """What `key_of` was given."""
    kind, name, start = key.split("/")
    return kind, name, Box(tuple(int(part) for part in start.split(",") if part), shape)
