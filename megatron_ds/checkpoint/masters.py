"""Check that the fp32 masters of a checkpoint round to the weights that are saved with them.

A weight is its master in the run's dtype, rounded to nearest, bit for bit. If one is not, the checkpoint holds the
master of another parameter: it looks complete, but a resumed run or an export would be another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.state_keys import MASTER
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.family import Part
from megatron_ds.hf.peft.adapters import read_adapters
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, named_base
from megatron_ds.hf.peft.new_head import read_base
from megatron_ds.hf.peft.reader import AdapterReader
from megatron_ds.hf.weights import HFWeights

_SAMPLED_PARAMETERS = 16
_SAMPLED_ELEMENTS = 2**22  # of the largest parameter in a sample


def rounds_to(master: Tensor, weight: Tensor) -> bool:
    """Return whether an fp32 tensor rounds to a tensor of the same shape in another dtype; NaN equals NaN."""
    rounded = master.to(weight.dtype)
    return bool(((rounded == weight) | (rounded.isnan() & weight.isnan())).all())


def check_masters(reader: StateReader, *, sampled: bool) -> None:
    """Compare the masters in a checkpoint with its weights. Adapters are compared if their base model is here.

    Args:
        reader: of the checkpoint.
        sampled: compare a few parameters of moderate size instead of all.

    Raises:
        CheckpointError: a master does not round to its weight.
        ConversionError: the weights cannot be read.
    """
    weights = _open_weights(reader.directory)
    if weights is None:
        return
    parts = [weights.parts_of(name) for name in reader.progress.trained if reader.has(MASTER, name)]
    for part in _sample(reader, parts) if sampled else chain.from_iterable(parts):
        weight = weights.read(part)
        master = reader.read_part(MASTER, part, tuple(weight.shape))
        compare_with_master(reader, part.name, weight, weights.rounded(part, master))


def compare_with_master(reader: StateReader, name: str, weight: Tensor, master: Tensor) -> None:
    """Compare a full parameter in a checkpoint with its master, or with the master rounded as its tensors are.

    Raises:
        CheckpointError: the master does not round to it.
    """
    if rounds_to(master, weight):
        return
    dtype, apart = str(weight.dtype).removeprefix("torch."), float((master - weight.float()).abs().max())
    raise CheckpointError(
        f"{reader.directory}: the fp32 master of {name} does not round to its {dtype} weight (they differ by up to "
        f"{apart:.3g}), so the training state belongs to other parameters; its weights alone can be used: export "
        f"without --dtype, or start a run with model.path={reader.directory}"
    )


class _Weights(NamedTuple):
    """The weights of a checkpoint.

    Attributes:
        parts_of: native name -> its parts that are read one by one.
        read: such a part -> its full tensor.
        rounded: such a part, and its master -> the master as its tensors hold it; see `HFWeights.rounded`.
    """

    parts_of: Callable[[str], list[Part]]
    read: Callable[[Part], Tensor]
    rounded: Callable[[Part, Tensor], Tensor]


def _open_weights(checkpoint: Path) -> _Weights | None:
    """Open the weights of a checkpoint; None for adapters whose base model is elsewhere."""
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        weights = HFWeights(checkpoint, read_model(checkpoint))
        return _Weights(lambda name: weights.model.table[name].parts, weights.part, weights.rounded)
    base = named_base(checkpoint)
    if not isinstance(base, str) or not Path(base, "config.json").is_file():
        return None
    model = HFWeights(base, read_base(checkpoint, base)).model
    adapters = AdapterReader(checkpoint, read_adapters(checkpoint, model, base))
    return _Weights(lambda name: [Part(name)], lambda part: adapters.full(part.name), lambda part, master: master)


def _sample(reader: StateReader, parts: list[list[Part]]) -> Iterator[Part]:
    """Yield a few parts, evenly over the parameters and their experts, that are quickly read.

    Args:
        reader: of the checkpoint.
        parts: of each parameter.
    """
    small = [own for own in parts if reader.elements(MASTER, own[0].name) <= _SAMPLED_ELEMENTS * len(own)]
    step = max(1, len(small) // _SAMPLED_PARAMETERS)
    yield from (own[number % len(own)] for number, own in enumerate(small[::step]))
