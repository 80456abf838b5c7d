"""Weights that are written in a wider dtype than a run computes in, because its source has them so.

A directory may hold some tensors in fp32 among others in bf16. A run in bf16 rounds all of them, and yet they are
written in fp32: what was trained from its fp32 master, what is frozen from the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megatron_ds.engine import Engine
from megatron_ds.engine.optimizer_shards import master_shard
from megatron_ds.hf.family import Part
from megatron_ds.hf.weights import HFWeights


@dataclass(frozen=True)
class WeightSource:
    """The directory that a run reads its weights from.

    Attributes:
        weights: reader of it; None = the run began with random weights.
        frozen: native names of the parameters that are not trained.
    """

    weights: HFWeights | None = None
    frozen: frozenset[str] = frozenset()


class WideWeights:
    """The parameters of a live model that are written in a wider dtype than its own.

    Args:
        engine: the live engine.
        source: of its weights.
        live: native name -> dtype in the run, of all stages.

    Attributes:
        dtypes: Hugging Face name -> dtype that is written, of all tensors of these parameters.
        masters: native name -> function of the parameter that returns this rank's shard in fp32; collective over shard.
    """

    def __init__(self, engine: Engine, source: WeightSource, live: Mapping[str, torch.dtype]) -> None:
        self.dtypes: dict[str, torch.dtype] = {}
        self.masters: dict[str, Callable[[nn.Parameter], Tensor]] = {}
        self._weights, self._frozen = source.weights, set[str]()
        mixed = source.weights.mixed_dtypes if source.weights is not None else {}
        table = source.weights.model.table if source.weights is not None else {}
        for native, dtype in live.items():
            row = table.get(native)
            names = [name for name in row.names if name in mixed] if row is not None else []
            wider = {name: mixed[name] for name in names if mixed[name].itemsize > dtype.itemsize}
            if row is None or not wider:
                continue
            self.dtypes |= {name: wider.get(name, dtype) for name in row.names}
            self.dtypes |= dict.fromkeys(row.copies, self.dtypes[row.names[0]])
            if native in source.frozen:
                self._frozen.add(native)
            else:
                self.masters[native] = partial(master_shard, engine)

    def from_source(self, part: Part) -> Tensor | None:
        """Return a frozen parameter, or one expert of it, as the source has it; None for others."""
        if part.name not in self._frozen:
            return None
        assert self._weights is not None
        return self._weights.part(part)


def live_dtypes(inventory: Iterable[Iterable[tuple[str, object, torch.dtype]]]) -> dict[str, torch.dtype]:
    """Return native name -> dtype of a run's parameters, from `Engine.inventory`."""
    return {name: dtype for stage in inventory for name, _, dtype in stage}
