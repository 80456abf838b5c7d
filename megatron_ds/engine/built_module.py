"""A rank's layers with all that they were built with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from megatron_ds.engine.experts import FoldedExperts
from megatron_ds.engine.mpu import Mpu
from megatron_ds.engine.pipeline.module import PipelinedModel
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec, SequentialModel
from megatron_ds.parallel.random import RngStreams


@dataclass(frozen=True)
class BuiltModule:
    """A rank's part of a model, with its weights.

    Attributes:
        module: a `SequentialModel`, or a `PipelinedModel` if there are several pipeline stages.
        specs: the specs of all layers of the model.
        context: the build context of these.
        rng: its random streams.
        mpu: the groups of ranks as DeepSpeed asks for them.
        folded: the ranks of experts that DeepSpeed must know; None = it need not.
    """

    module: SequentialModel | PipelinedModel
    specs: Sequence[LayerSpec]
    context: BuildContext
    rng: RngStreams
    mpu: Mpu
    folded: FoldedExperts | None

    @property
    def first(self) -> int:
        """Index of this rank's first layer among `specs`."""
        return self.module._local_start if isinstance(self.module, PipelinedModel) else 0

    @property
    def layers(self) -> list[nn.Module]:
        """This rank's layers in order."""
        return list(self.module.forward_funcs if isinstance(self.module, PipelinedModel) else self.module.order)
