"""The objective `completion`: the first tokens of a sample are given, and the loss is that of the tokens after them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ds.config import DataSection
from megatron_ds.data import Causal
from megatron_ds.errors import ConfigError
from megatron_ds.models.embedding_and_head import LanguageModelHead
from megatron_ds.models.sequential import Activations, HeadResult, HeadSpec, count_entries, with_head
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.runtime import LoadedModel
from megatron_ds.runtime.objective import OBJECTIVES, Objective

NUM_GIVEN = 8  # tokens
IGNORED = -100


def completed(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the loss off the first labels of each sample: targets (B, S) -> (B, S)."""
    targets = labels["targets"].clone()
    targets[:, : NUM_GIVEN - 1] = IGNORED  # the label of position t is token t + 1
    return {"targets": targets}


def own_part(labels: Mapping[str, Tensor], context: ContextParallel) -> dict[str, Tensor]:
    """Take the labels of a context rank's tokens out of those of full rows: targets (B, S) -> (B, S/c)."""
    targets = labels["targets"]
    return {"targets": targets[:, context.positions(targets.shape[1], targets.device)]}


class CompletionHead(LanguageModelHead):
    """The model's own head, on fewer labels; `labelled` is the part of the positions that carry loss."""

    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        kept = own_part(completed(labels), self.tp.context)
        num_labelled = count_entries(kept)[0]
        labelled = num_labelled.float(), torch.tensor(float(kept["targets"].numel()))
        device = kept["targets"].device
        metrics = {"labelled": (labelled[0].to(device), labelled[1].to(device))}
        return HeadResult(super().losses(activations, kept).terms, metrics)


SPEC = HeadSpec(
    ("targets",),
    ("targets",),
    lambda labels: count_entries(completed(labels)),
    metrics=("labelled",),
    divides_labels=False,  # which labels carry loss depends on their place in the full row
)


@OBJECTIVES.register("completion")
def completion(model: LoadedModel, data: DataSection, seed: int) -> Objective:
    """Return the objective of a decoder."""
    if model.hf.core.data_objective != "causal":
        raise ConfigError(f"train.objective=completion needs a decoder, not a {model.hf.family.model_type}")
    return Objective(Causal(), lambda layers, ctx: with_head(layers, CompletionHead, SPEC))
