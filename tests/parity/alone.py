"""One process of ours beside one of transformers, on the same weights and the same batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.hf.config import config_json, read_model
from megatron_ds.hf.reference import load_reference
from megatron_ds.hf.weights import HFWeights, ToHF
from megatron_ds.layers.parameter import spec_of
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.config import DecoderConfig
from megatron_ds.models.gpt import decoder_stages
from megatron_ds.models.stages import StageModel
from megatron_ds.verify.compare import difference, root_mean_square, smallest_norm
from tests.parity.cases import SEQ, VOCAB, shifted
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.reference import make_model

BATCH = 3
LOGITS_BOUND = 1e-5
GRADIENT_BOUND = 1e-4

# Options of the decoder that leave its parameters as they are, and the value that leaves them out.
LEFT_OUT: dict[str, Any] = {
    "padding_id": None,
    "embedding_multiplier": 1.0,
    "rotary": (),
    "alibi": None,
    "residual_multiplier": 1.0,
    "attention_scale": None,
    "scale_by_layer": False,
    "attention_softcap": None,
    "windows": (),
    "logit_multiplier": 1.0,
    "logit_softcap": None,
}


@dataclass(frozen=True)
class Apart:
    """Relative L2 errors of ours; `gradients` by Hugging Face name.

    A gradient that is zero in exact arithmetic is noise on both sides (a key bias without rotation moves all scores of
    a query alike). No gradient counts as smaller than a hundredth of the model's root mean square.
    """

    logits: float
    loss: float
    gradients: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.gradients.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))

    def within_bounds(self) -> bool:
        return self.logits < LOGITS_BOUND and self.loss < LOGITS_BOUND and self.worst[1] < GRADIENT_BOUND


@dataclass(frozen=True)
class Batch:
    """Ids, targets (-100 = none) and, where rows are padded on the left, the mask (B, S)."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None


def make_batch(padded: bool) -> Batch:
    generator = torch.Generator().manual_seed(99)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    ids[0, 12:20] = torch.arange(8)  # every case's padding id, which does not learn as an input
    labels = ids.clone()
    labels[0, :9] = -100
    if not padded:
        return Batch(ids, shifted(labels), None)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 11)):
        mask[row, :padding] = 0
        labels[row, : padding + 1] = -100  # a position of padding predicts nothing
    return Batch(ids, shifted(labels), mask)


@dataclass(frozen=True)
class _Run:
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def _run_theirs(directory: Path, batch: Batch) -> _Run:
    family = read_model(directory).family
    model = load_reference(directory, family.reference_attention, torch.float32)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    loss.backward()
    found = {
        # the only parameter that transformers renames on disk
        name.replace("lm_head.", "embed_out.") if family.model_type == "gpt_neox" else name: parameter.grad
        for name, parameter in model.named_parameters()
    }
    return _Run(logits.detach(), float(loss.detach()), found)


def _run_ours(decoder: DecoderConfig, weights: HFWeights, batch: Batch) -> _Run:
    model = StageModel(decoder_stages(decoder)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.share(name, spec_of(parameter), 0, 1))
    wire = (batch.ids,) if batch.mask is None else (batch.ids, batch.mask)
    loss = model(wire, batch.targets)
    loss.backward()
    with torch.no_grad():
        logits = model(wire)
    to_hf, gradients = ToHF(weights.model), {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients.update({theirs: part.clone() for theirs, part in to_hf.add(name, parameter.grad)})
    return _Run(logits, float(loss.detach()), gradients)


def compare(ours: _Run, theirs: _Run, batch: Batch) -> Apart:
    typical = root_mean_square(list(theirs.gradients.values()))
    assert ours.gradients.keys() == theirs.gradients.keys(), ours.gradients.keys() ^ theirs.gradients.keys()
    seen = batch.mask.bool() if batch.mask is not None else torch.ones_like(batch.ids, dtype=torch.bool)
    return Apart(
        logits=difference(ours.logits[seen], theirs.logits[seen]).relative,
        loss=abs(ours.loss / theirs.loss - 1),
        gradients={
            name: difference(ours.gradients[name], gradient, smallest_norm(gradient.numel(), typical)).relative
            for name, gradient in theirs.gradients.items()
        },
    )


def without_each_option(decoder: DecoderConfig) -> dict[str, DecoderConfig]:
    """Name of an option that a case sets -> the same model without it."""
    changed = {
        option: replace(decoder, **{option: default})
        for option, default in LEFT_OUT.items()
        if getattr(decoder, option) != default and not (option == "windows" and set(decoder.windows) == {None})
    }
    plain = tuple(rope and RotaryConfig(rope.dim, rope.theta) for rope in decoder.rotary)
    if plain != decoder.rotary:
        changed["scaling and pairs of rotary"] = replace(decoder, rotary=plain)
    return changed


@dataclass(frozen=True)
class Found:
    """All that is measured of one case.

    Attributes:
        apart: ours as it should be.
        padded: the same where rows have padding on the left; there nothing is compared.
        without: name of an option -> ours without it.
        config_is_right: whether transformers' logits with the config that we write are bit by bit the same.
    """

    apart: Apart
    padded: Apart
    without: Mapping[str, Apart]
    config_is_right: bool


def measure_family(model_type: str, directory: Path) -> dict[str, Found]:
    """All cases of a family in one process: importing its code takes longer than they do."""
    cases = [case for case, config in FAMILY_CASES.items() if config["model_type"] == model_type]
    return {case: measure(case, directory / case) for case in cases}


def measure(case: str, directory: Path) -> Found:
    """Save a random model of a case to `directory`, run both sides and compare."""
    make_model(FAMILY_CASES[case]).save_pretrained(directory)
    weights = HFWeights(directory, read_model(directory))
    decoder, plain, padded = weights.model.decoder, make_batch(padded=False), make_batch(padded=True)
    theirs, theirs_padded = _run_theirs(directory, plain), _run_theirs(directory, padded)
    apart = compare(_run_ours(decoder, weights, plain), theirs, plain)
    without = {
        name: compare(_run_ours(changed, weights, plain), theirs, plain)
        for name, changed in without_each_option(decoder).items()
    }
    apart_padded = compare(_run_ours(decoder, weights, padded), theirs_padded, padded)
    (directory / "config.json").write_text(json.dumps(config_json(weights.model, "float32")))
    return Found(apart, apart_padded, without, torch.equal(_run_theirs(directory, plain).logits, theirs.logits))
