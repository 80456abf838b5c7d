"""Names of the tensors of the training state: the kind, the parameter, and where the slice begins."""

from __future__ import annotations

from megatron_ds.layers.tensor_slices import TensorSlice

MASTER, STEPS, EMA = "master", "step", "ema"
"""The weights in fp32, the number of updates of a parameter, and an average of the weights. All other kinds are the
optimizer's own names of its state."""


def key_of(kind: str, name: str, part: TensorSlice) -> str:
    """Return the name of a slice of a parameter in a file of the state: `exp_avg/blocks.0.norm.weight/0,64`."""
    return f"{kind}/{name}/{','.join(map(str, part.start))}"


def parse_key(key: str, shape: tuple[int, ...]) -> tuple[str, str, TensorSlice]:
    """Return the arguments that `key_of` was called with, given the shape of the tensor of this name."""
    kind, name, start = key.split("/")
    return kind, name, TensorSlice(tuple(int(number) for number in start.split(",") if number), shape)
