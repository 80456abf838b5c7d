"""Word embedding and language-model head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ds.layers.cross_entropy import LogitFinish, VocabShard, gather_logits, head_loss
from megatron_ds.layers.embedding import VocabParallelEmbedding
from megatron_ds.layers.param_spec import ParamSpec, make_parameter, over_tensor
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import HIDDEN, Activations, HeadResult, OutputHead, positions_of
from megatron_ds.parallel.collectives import copy_to, gather_sequence
from megatron_ds.parallel.regions import EMBEDDING, profiled


class WordEmbedding(VocabParallelEmbedding):
    """ids (B, S) -> hidden states of this rank's tokens, (S/c, B, E), or (S/(c t), B, E) under sequence parallelism.

    Args:
        column: name of the ids among the activations.
        args, options: see `VocabParallelEmbedding`.
        keeps_ids: whether a later layer reads the ids too.
    """

    def __init__(self, column: str, *args: Any, keeps_ids: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.column, self.keeps_ids = column, keeps_ids

    def forward(self, activations: Activations) -> Activations:  # type: ignore[override]
        kept = {name: tensor for name, tensor in activations.items() if name != self.column or self.keeps_ids}
        ids = activations[self.column].t()
        if self.tp.context.axis.size > 1:
            ids = ids[self.tp.context.positions(len(ids), ids.device)]
        with profiled(EMBEDDING):
            return {**kept, HIDDEN: super().forward(ids)}


class LanguageModelHead(OutputHead):
    """Cross entropy of each position's label over a vocabulary divided over the tensor axis.

    Args:
        vocab_size: V.
        width: length of the hidden states that it takes.
        ctx: the build context.
        std: standard deviation of the weight's initialisation.
        bias: whether the logits have one.
        finish: multiplier and bound of the logits; None = neither.

    Attributes:
        picked: index of the only position whose logits `outputs` returns, or of that of each row, (B,); None = those of
            all positions.
    """

    picked: int | Tensor | None = None

    def __init__(
        self,
        vocab_size: int,
        width: int,
        ctx: BuildContext,
        *,
        std: float,
        bias: bool = False,
        finish: LogitFinish | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.tp, self.finish = vocab_size, ctx.tp, finish or LogitFinish()
        self.kernel = ctx.kernels.cross_entropy
        self.weight = make_parameter(ParamSpec((vocab_size, width), over_tensor(0), std=std), ctx.tp.axes)
        spec = ParamSpec((vocab_size,), over_tensor(0), decay=False)
        self.bias = make_parameter(spec, ctx.tp.axes) if bias else None

    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        """One term, `targets`: the sum of the labelled positions' losses."""
        hidden, positions = self.enter(activations[HIDDEN]), labels.get(positions_of("targets"))
        return HeadResult({"targets": head_loss(hidden, self.local(), labels["targets"].t(), positions)})

    def outputs(self, activations: Activations) -> Activations:
        """Return `logits` (B, S, V), gathered over tensor and context; of one position (B, 1, V)."""
        with torch.no_grad():
            hidden = self.enter(activations[HIDDEN])
            if self.picked is not None:
                whole, rows = self.tp.gather_context(hidden), torch.arange(hidden.shape[1], device=hidden.device)
                one = whole[self.picked] if isinstance(self.picked, int) else whole[self.picked, rows]
                return {"logits": gather_logits(one[None], self.local()).transpose(0, 1)}
            logits = gather_logits(hidden, self.local())
            return {"logits": self.tp.gather_context(logits).transpose(0, 1)}

    def enter(self, hidden: Tensor) -> Tensor:
        """(S, B, H), or (S/t, B, H) under sequence parallelism -> (S, B, H).

        Forward identity or all-gather over the tensor axis, backward all-reduce or reduce-scatter.
        """
        return gather_sequence(hidden, self.tp.axis) if self.tp.splits_sequence else copy_to(hidden, self.tp.axis)

    def local(self) -> VocabShard:
        """Return this rank's shard of the head."""
        return VocabShard(self.weight, self.bias, self.vocab_size, self.tp.axis, self.finish, self.kernel)
