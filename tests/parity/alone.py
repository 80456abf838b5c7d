"""One process of ours beside one of transformers, on the same weights and the same batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from megatron_ds.engine.base import weights_of
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.verify.compare import difference, root_mean_square, smallest_norm
from megatron_ds.verify.loss import mean_loss
from tests.parallel.axes import ALONE
from tests.parity.alone_batches import Batch, make_batch
from tests.parity.left_out import Variant, without_each_option
from tests.parity.reference import make_model

OUTPUT_BOUND = 1e-5
GRADIENT_BOUND = 1e-4


@dataclass(frozen=True)
class Apart:
    """Relative L2 errors of ours: of the loss, of the worst output, and of gradients by Hugging Face name.

    A gradient that is zero in exact arithmetic is noise on both sides (a key bias without rotation moves all scores of
    a query alike). No gradient counts as smaller than a hundredth of the model's root mean square.
    """

    outputs: float
    loss: float
    gradients: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.gradients.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))

    def within_bounds(self) -> bool:
        return self.outputs < OUTPUT_BOUND and self.loss < OUTPUT_BOUND and self.worst[1] < GRADIENT_BOUND


@dataclass(frozen=True)
class _Run:
    outputs: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]


def _run_theirs(directory: Path, batch: Batch) -> _Run:
    """The loss is transformers' own where a model has one for such labels, else written out."""
    model = HFWeights(directory, read_model(directory)).model  # which heads there are, the weights tell
    theirs = load_reference(directory, model, torch.float32)
    outputs = predict(theirs, model, batch.columns)
    if isinstance(model.core, DecoderConfig) or "targets" not in batch.labels:
        loss = mean_loss(outputs, batch.labels)
    else:
        names = {"targets": "labels"}
        loss = theirs(**_integers(batch), **{names.get(name, name): label for name, label in batch.labels.items()}).loss
    loss.backward()
    gradients = {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}
    if (
        any(stack.moe is not None for stack in model.core.stacks.values())
        or model.family.passes_through
        or model.family.other_rows
    ):
        gradients = revert_weight_conversion(theirs, gradients)  # of each expert by itself, and by the hub's names
    found = {
        # the only parameter that transformers renames on disk, and those that it may name by their copies
        name.replace("lm_head.", "embed_out.")
        if model.family.model_type == "gpt_neox"
        else model.family.aliases.get(name, name): gradient
        for name, gradient in gradients.items()
    }
    return _Run({name: output.detach() for name, output in outputs.items()}, float(loss.detach()), found)


def _integers(batch: Batch) -> dict[str, Tensor]:
    return {name: column.long() for name, column in batch.columns.items()}


def _build_ours(variant: Variant, weights: HFWeights) -> SequentialModel:
    model = SequentialModel(variant.core.build_layers()).eval()
    with torch.no_grad():
        for name, weight in weights_of(model):
            weight.copy_(weights.shard(name, spec_of(weight), ALONE))
    variant.change(model)
    return model


def _run_ours(variant: Variant, weights: HFWeights, model: SequentialModel | None = None) -> _Run:
    model = model or _build_ours(variant, weights)
    columns, labels = variant.batch.columns, variant.batch.labels
    counts = [label.numel() if label.is_floating_point() else (label != -100).sum() for label in labels.values()]
    loss = (model(columns, labels) / torch.tensor(counts)).sum()
    loss.backward()
    with torch.no_grad():
        outputs = model(columns)
    to_hf, gradients = ToHF(weights.model), {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients.update({theirs: part.clone() for theirs, part in to_hf.add(name, parameter.grad)})
    return _Run(outputs, float(loss.detach()), gradients)


def compare(ours: _Run, theirs: _Run, batch: Batch) -> Apart:
    """Of gradients those that both have: an option that is left out may leave out its parameters."""
    typical = root_mean_square(list(theirs.gradients.values()))
    return Apart(
        outputs=_outputs_apart(ours.outputs, theirs, batch),
        loss=abs(ours.loss / theirs.loss - 1),
        gradients={
            name: difference(gradient, theirs.gradients[name], smallest_norm(gradient.numel(), typical)).relative
            for name, gradient in ours.gradients.items()
        },
    )


def _outputs_apart(ours: Mapping[str, Tensor], theirs: _Run, batch: Batch) -> float:
    assert ours.keys() == theirs.outputs.keys()
    seen = slice(None) if batch.compared is None else batch.compared
    return max(difference(ours[name][seen], theirs.outputs[name][seen]).relative for name in ours)


def _compare_without(variant: Variant, weights: HFWeights, theirs: _Run, batch: Batch) -> Apart:
    """Compare ours without an option: by its outputs alone if they show it, else by its loss and gradients too."""
    model = _build_ours(variant, weights)
    with torch.no_grad():
        outputs = _outputs_apart(model(variant.batch.columns), theirs, batch)
    if outputs >= OUTPUT_BOUND:
        return Apart(outputs, loss=0.0, gradients={})
    return compare(_run_ours(variant, weights, model), theirs, batch)


@dataclass(frozen=True)
class Found:
    """All that is measured of one case.

    Attributes:
        apart: ours as it should be.
        padded: the same where rows have padding; what lies behind it is not compared in decoders.
        without: name of an option -> ours without it.
        config_is_right: whether transformers' outputs with the config that we write are bit by bit the same.
    """

    apart: Apart
    padded: Apart
    without: Mapping[str, Apart]
    config_is_right: bool


def measure_family(cases: Mapping[str, dict[str, Any]], directory: Path) -> dict[str, Found]:
    """All cases of a family in one process: importing its code takes longer than they do."""
    return {case: measure(config, directory / case) for case, config in cases.items()}


def measure(config: dict[str, Any], directory: Path) -> Found:
    """Save a random model to `directory`, run both sides and compare."""
    make_model(config).save_pretrained(directory)
    weights = HFWeights(directory, read_model(directory))
    core = weights.model.core
    plain, padded = make_batch(core, padded=False), make_batch(core, padded=True)
    theirs, theirs_padded = _run_theirs(directory, plain), _run_theirs(directory, padded)
    ours, ours_padded = (_run_ours(Variant(core, batch), weights) for batch in (plain, padded))
    assert ours.gradients.keys() == theirs.gradients.keys(), ours.gradients.keys() ^ theirs.gradients.keys()
    # padding makes no difference to a decoder's options, but some of an encoder's show there alone
    base, reference = (plain, theirs) if isinstance(core, DecoderConfig) else (padded, theirs_padded)
    without = {
        name: _compare_without(variant, weights, reference, base)
        for name, variant in without_each_option(core, base).items()
    }
    (directory / "config.json").write_text(json.dumps(config_json(weights.model, "float32")))
    again = _run_theirs(directory, plain).outputs
    return Found(
        apart=compare(ours, theirs, plain),
        padded=compare(ours_padded, theirs_padded, padded),
        without=without,
        config_is_right=all(torch.equal(again[name], output) for name, output in theirs.outputs.items()),
    )
