"""One head for classes and scores of a text, or of each of its tokens: pick -> [dense, activation, norm] -> out.

The heads of Hugging Face's `*ForSequenceClassification` and `*ForTokenClassification` differ in the position that they
pick, and in what stands between it and the last projection; reward models and cross-encoders have one label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX, LABEL, LABEL_SCORES, TOKEN_LABEL
from megatron_ds.errors import DataError
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.linear import ReplicatedLinear
from megatron_ds.layers.mlp import ACTIVATIONS
from megatron_ds.layers.norm import Norm, NormStyle
from megatron_ds.models.context import BuildContext
from megatron_ds.models.label_metrics import (
    classification_metrics,
    multi_label_tallies,
    num_tallies,
    regression_metrics,
    single_label_tallies,
)
from megatron_ds.models.probe import Probe, right_padded, seeded, some_labels
from megatron_ds.models.sequential import HIDDEN, Activations, HeadResult, HeadSpec, LayerSpec, OutputHead
from megatron_ds.parallel.collectives import reduce_from
from megatron_ds.parallel.tensor import TensorParallel

SINGLE_LABEL, MULTI_LABEL, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
PICKS = ("first", "last", "mean", "last_eos", "each")


@dataclass(frozen=True, kw_only=True)
class LabelHeadConfig:
    """A head that predicts labels.

    Attributes:
        pick: the state that it reads: of the "first" position; of the "last" one whose id is not `pick_id`, whatever
            the mask says; the "mean" over the attention mask; of the last position whose id is `pick_id` ("last_eos");
            or "each" position's.
        pick_id: the id of padding, or of the end; None = no such id, and the last position is picked.
        num_labels: L.
        problem: one of `PROBLEMS`; None = a regression of one label, else a choice of one among several.

        dense: a projection (H -> H) before the last one; `dense_bias`: it has a bias.
        activation: after `dense`, a name in `layers.mlp.ACTIVATIONS`, or "tanh".
        norm: after the activation; None = no norm.
        bias: of the last projection.
        late: everything is computed at each position, and the mean is of the logits.

        inner_dropout, dropout: probabilities, before `dense` and before the last projection.
        std: standard deviation of its weights at initialisation.
    """

    pick: str
    num_labels: int
    pick_id: int | None = None
    problem: str | None = None

    dense: bool = False
    dense_bias: bool = True
    activation: str = "tanh"
    norm: NormStyle | None = None
    bias: bool = True
    late: bool = False

    inner_dropout: float = 0.0
    dropout: float = 0.0
    std: float = 0.02

    def __post_init__(self) -> None:
        assert self.pick in PICKS and self.problem in (None, *PROBLEMS), self
        assert self.pick == "mean" or not self.late, self
        assert self.num_labels > 0, self

    @property
    def loss(self) -> str:
        """The problem that its loss solves, one of `PROBLEMS`."""
        return self.problem or (REGRESSION if self.num_labels == 1 else SINGLE_LABEL)

    @property
    def label_column(self) -> str:
        """Name of the column of labels that its loss reads."""
        if self.pick == "each":
            return TOKEN_LABEL.name
        return LABEL.name if self.loss == SINGLE_LABEL else LABEL_SCORES.name

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Names of the columns of the batch that it reads besides hidden states, where the batch has them."""
        return {"last": ("input_ids",), "last_eos": ("input_ids",), "mean": ("attention_mask",)}.get(self.pick, ())

    @property
    def padding_id(self) -> int | None:
        """An id that the head passes over behind a text; None = it takes every id for text."""
        if self.pick == "last":
            return self.pick_id
        return 1 if self.pick == "last_eos" and self.pick_id == 0 else 0

    def check_ids(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse a micro-batch, in host memory, in which the picked position is not defined.

        Raises:
            DataError: several rows, and no padding id; or rows with different numbers of ends.
        """
        ids = batch["input_ids"]
        if self.pick == "last" and self.pick_id is None and len(ids) > 1:
            raise DataError(
                f"pad_token_id=None: the last token of {len(ids)} rows is found by the id of padding; add pad_token_id "
                "to config.json, or try micro_batch_size=1"
            )
        if self.pick == "last_eos":
            counts = ids.eq(self.pick_id).sum(1).tolist() if self.pick_id is not None else [0] * len(ids)
            if counts[0] == 0 or len(set(counts)) > 1:
                row = next((row for row, count in enumerate(counts) if count in (0, 1)), 0)
                raise DataError(
                    f"row {row} of a batch has {counts[row]} ids eos_token_id={self.pick_id}, the rows have {counts}; "
                    "all must have the same number, at least 1; try one at the end of each text"
                )

    def without_dropout(self) -> LabelHeadConfig:
        """Return the same head, which computes the same on every run."""
        return replace(self, dropout=0.0, inner_dropout=0.0)


def label_layer(config: LabelHeadConfig, width: int, ctx: BuildContext, like: LayerSpec) -> LayerSpec:
    """Return the spec of the head.

    Args:
        config: of the head.
        width: length of the hidden states that it takes.
        ctx: the build context.
        like: a spec with the hidden states that it takes.
    """
    return LayerSpec(
        "head",
        partial(LabelHead, config, width, ctx),
        hidden=like.hidden,
        columns=config.input_columns,
        head=_declaration(config),
        cost=float(width * (width * config.dense + config.num_labels)) * (config.pick == "each" or config.late),
    )


def _declaration(config: LabelHeadConfig) -> HeadSpec:
    """Return the declaration of the head: its loss term, and the counts or predictions from which metrics follow."""
    column, count = config.label_column, config.num_labels
    plain = HeadSpec((column,), (column,), check=config.check_ids, padding_id=config.padding_id)
    if config.loss == REGRESSION:
        return replace(plain, num_kept=2 * count, summarize=regression_metrics)
    return replace(plain, num_tallies=num_tallies(count), summarize=classification_metrics)


def label_probe(config: LabelHeadConfig, name: str, ids: Tensor, with_gradients: bool) -> Probe:
    """Return a probe of a decoder: rows without padding, with padding behind and with padding before the text.

    No mask hides the padding, which the head does not look at: a position that sees nothing, behind a window's length
    of padding, is computed differently by each implementation of attention.

    Args:
        config: of the head.
        name: of the probe.
        ids: (B, S) random ids; with a padding id, its rows get padding. Without one, the first row is the probe.
        with_gradients: see `Probe`.
    """
    if config.pick == "last" and config.pick_id is None:
        ids = ids[:1]
    batch, length = ids.shape
    if config.pick == "last" and config.pick_id is not None and batch > 1:
        text = right_padded(3, length)
        text[2] = text[2].flip(0)
        ids = torch.cat([ids, ids[:1]]).masked_fill(~text, config.pick_id)
    seen = torch.ones(ids.shape, dtype=torch.bool)
    return Probe(name, {"input_ids": ids}, probe_labels(config, seen), with_gradients)


def probe_labels(config: LabelHeadConfig, seen: Tensor) -> dict[str, Tensor]:
    """Draw labels of a batch of which the positions `seen` (B, S) have a token; one row of several has none."""
    (batch, length), generator = seen.shape, seeded(6)
    shape = (batch, length) if config.pick == "each" else (batch,)
    classes = torch.randint(0, config.num_labels, shape, generator=generator)
    if config.pick == "each":
        return {config.label_column: some_labels(classes, seen)}
    if config.loss == SINGLE_LABEL:
        classes[1:2] = IGNORE_INDEX
        return {config.label_column: classes}
    scores = torch.randn(batch, config.num_labels, generator=generator)
    return {config.label_column: (scores > 0).float() if config.loss == MULTI_LABEL else scores}


class LabelHead(OutputHead):
    """Scores of a text, (B, L), or of each token, (B, S, L), and their loss.

    A picked state is equal on all ranks that divide the sequence, and so is all that follows. One of them has the
    position, or each has a part of a mean; see `TensorParallel.total` for what is communicated, (B, H). Scores of each
    token are computed on the rank that has it.

    Args:
        config: of the head.
        width: H, length of the hidden states that it takes.
        ctx: the build context.
    """

    def __init__(self, config: LabelHeadConfig, width: int, ctx: BuildContext) -> None:
        super().__init__()
        self.config, self.tp = config, ctx.tp
        self.is_local = config.pick == "each" or config.late
        enter = None if self.is_local else _identity
        differs = self.is_local and ctx.tp.splits_sequence
        if config.dense:
            self.inner_dropout = HiddenDropout(config.inner_dropout, ctx.rng, differs)
            self.dense = ReplicatedLinear(width, width, ctx.tp, std=config.std, bias=config.dense_bias, enter=enter)
            self.activation = torch.tanh if config.activation == "tanh" else ACTIVATIONS[config.activation]
        self.norm = Norm(width, config.norm, ctx.tp, enter) if config.norm is not None else None
        self.dropout = HiddenDropout(config.dropout, ctx.rng, differs)
        self.out = ReplicatedLinear(
            width, config.num_labels, ctx.tp, std=config.std, bias=config.bias, enter=enter, is_output=True
        )

    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        """One term, the sum over the labels that carry loss; fp32. With it what its metrics follow from."""
        name = self.config.label_column
        logits, given = self._logits(activations).float(), labels[name]
        if self.config.pick == "each":
            local = given.t()[self.tp.sequence_slice(given.shape[1])]
            flat = logits.flatten(0, 1), local.flatten()
            total, tallies = label_loss(*flat, SINGLE_LABEL), single_label_tallies(flat[0].detach(), flat[1])
            if self.tp.splits_sequence:
                total, tallies = reduce_from(total, self.tp.axis), reduce_from(tallies, self.tp.axis)
            return HeadResult({name: total}, tallies=tallies)
        terms, predicted = {name: label_loss(logits, given, self.config.loss)}, logits.detach()
        if self.config.loss == REGRESSION:
            return HeadResult(terms, kept=torch.cat([predicted, given], dim=1))
        count = single_label_tallies if self.config.loss == SINGLE_LABEL else multi_label_tallies
        return HeadResult(terms, tallies=count(predicted, given))

    def outputs(self, activations: Activations) -> Activations:
        """Return `logits`, (B, L), or (B, S, L) of each token."""
        logits = self._logits(activations)
        return {"logits": logits if self.config.pick != "each" else self.tp.gather(logits.detach()).transpose(0, 1)}

    def _logits(self, activations: Activations) -> Tensor:
        """Return the logits, (B, L); or (S, B, L), (S/t, B, L) under sequence parallelism, of each token."""
        hidden = activations[HIDDEN]
        if self.config.pick == "each":
            return self._project(hidden)
        if self.config.late:
            return mean_state(self._project(hidden), activations.get("attention_mask"), self.tp)
        return self._project(self._picked(hidden, activations))

    def _project(self, x: Tensor) -> Tensor:
        if self.config.dense:
            x = self.activation(self.dense(self.inner_dropout(x)))
        if self.norm is not None:
            x = self.norm(x)
        return self.out(self.dropout(x))

    def _picked(self, hidden: Tensor, activations: Activations) -> Tensor:
        """(S, B, H), or (S/t, B, H) under sequence parallelism -> (B, H), equal on all tensor ranks."""
        if self.config.pick == "mean":
            return mean_state(hidden, activations.get("attention_mask"), self.tp)
        rows = torch.full((hidden.shape[1],), self.tp.full_length(hidden) - 1, device=hidden.device)
        return state_at(hidden, picked_positions(self.config, activations.get("input_ids"), rows), self.tp)


def picked_positions(config: LabelHeadConfig, ids: Tensor | None, ends: Tensor) -> Tensor:
    """Return the position of each row that a head reads, (B,) int64.

    Args:
        config: of the head, with the pick "first", "last" or "last_eos".
        ids: (B, S); None if the head does not read them.
        ends: (B,), the last position of each row.
    """
    if config.pick == "first":
        return torch.zeros_like(ends)
    if config.pick_id is None:
        return ends
    assert ids is not None, "the head reads ids"
    wanted = ids != config.pick_id if config.pick == "last" else ids == config.pick_id
    return last_marked(wanted)


def last_marked(marked: Tensor) -> Tensor:
    """Return the last position of each row that is marked: (B, S) bool -> (B,) int64; 0 if none is."""
    return (torch.arange(marked.shape[1], device=marked.device) * marked).amax(1)


def label_loss(logits: Tensor, labels: Tensor, problem: str) -> Tensor:
    """Return the sum of the losses of labels.

    Args:
        logits: (N, L) fp32.
        labels: (N,) classes, -100 = no label; or (N, L) numbers, NaN = no label.
        problem: one of `PROBLEMS`: cross entropy, binary cross entropy of each label, or squared error.
    """
    if problem == SINGLE_LABEL:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    missing = labels.isnan()
    known = labels.float().masked_fill(missing, 0.0)
    each = F.mse_loss if problem == REGRESSION else F.binary_cross_entropy_with_logits
    return each(logits, known, reduction="none").masked_fill(missing, 0.0).sum()


def state_at(hidden: Tensor, positions: Tensor, tp: TensorParallel) -> Tensor:
    """Return one position's state of each row: (S, B, H), or this rank's part of it -> (B, H), equal on all ranks.

    See `TensorParallel.total` for what is communicated where the sequence is divided, (B, H).

    Args:
        hidden: the states.
        positions: (B,), in the full sequence.
        tp: the ranks that divide the sequence.
    """
    rows = torch.arange(hidden.shape[1], device=hidden.device)
    if tp.num_parts == 1:
        return hidden[positions, rows]
    length = tp.full_length(hidden)
    own = torch.arange(length, device=hidden.device)[tp.positions(length, hidden.device)]
    is_it = own[:, None] == positions
    found = hidden[is_it.int().argmax(0), rows]
    return tp.total(found.masked_fill(~is_it.any(0)[:, None], 0.0))


def mean_state(hidden: Tensor, mask: Tensor | None, tp: TensorParallel) -> Tensor:
    """Return the mean over the tokens of each row: (S, B, H), or this rank's part of it -> (B, H), equal on all ranks.

    See `TensorParallel.total` for what is communicated where the sequence is divided, (B, H).

    Args:
        hidden: the states.
        mask: (B, S), nonzero where a token is; None = everywhere.
        tp: the ranks that divide the sequence.
    """
    length = tp.full_length(hidden)
    if mask is None:
        total, count = hidden.sum(0), torch.full((), length, device=hidden.device)
    else:
        local = mask.t()[tp.positions(length, hidden.device)]
        total = (hidden * local[..., None]).sum(0)
        count = mask.sum(1, dtype=torch.int64)[:, None]
    return tp.total(total) / count


def _identity(parameter: Tensor) -> Tensor:
    return parameter
