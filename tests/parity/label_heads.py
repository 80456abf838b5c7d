"""One process of ours beside transformers' class with a head for labels, with the padding that such heads get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from megatron_ds.engine.base import weights_of
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.family import Family
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.label_head import MULTI_LABEL, SINGLE_LABEL, LabelHeadConfig
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.verify.compare import difference, root_mean_square, smallest_norm
from tests.parallel.axes import ALONE
from tests.parity.cases import SEQ, VOCAB
from tests.parity.reference import make_model

ROWS = 5


@dataclass(frozen=True)
class HeadRun:
    """Relative errors of ours, and what the export lacks or adds.

    Attributes:
        logits, loss, gradient: errors of the outputs, of transformers' own loss, and of the worst gradient.
        others: name of a change of the head -> error of the logits with it.
        misfits: keys that transformers misses or does not know in what we write.
        config: whether the export's config.json gives the same head.
    """

    logits: float
    loss: float
    gradient: tuple[str, float]
    others: Mapping[str, float]
    misfits: list[str]
    config: bool

    def within_bounds(self) -> bool:
        return self.logits < 1e-5 and self.loss < 1e-5 and self.gradient[1] < 1e-4


def measure_all(cases: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, HeadRun | str]:
    """Measure cases in one process: importing transformers' code of a type takes longer than they do."""
    found: dict[str, HeadRun | str] = {}
    for case, config in cases.items():
        try:
            found[case] = measure(config, folder / case)
        except Exception as problem:  # told by the case's own test
            found[case] = repr(problem)
    return found


def measure(config: dict[str, Any], directory: Path) -> HeadRun:
    """Save a random model, run both sides on one batch, and write the model back."""
    make_model(config).save_pretrained(directory)
    weights = HFWeights(directory, read_model(directory))
    core = weights.model.core.without_dropout()
    columns = label_columns(core)
    labels = draw_labels(head_of_model(core))
    theirs = load_reference(directory, weights.model, torch.float32)
    logits = predict(theirs, weights.model, columns)["logits"]
    cache = {"use_cache": False} if core.decodes else {}
    loss = theirs(**{name: one.long() for name, one in columns.items()}, **cache, labels=labels).loss
    loss.backward()
    ours, our_loss, gradients = run_ours(core, weights, columns, labels)
    rewrite(directory, directory / "again")
    again = read_model(directory / "again")
    name = weights.model.architecture
    _, report = getattr(transformers, name).from_pretrained(directory / "again", output_loading_info=True)
    return HeadRun(
        logits=difference(seen_of(core, ours, columns), seen_of(core, logits, columns)).relative,
        loss=abs(our_loss / float(loss.detach()) - 1),
        gradient=worst_gradient(gradients, theirs, core, weights.model.family),
        others={
            change: difference(run_logits(core, head, weights, columns), logits).relative
            for change, head in other_heads(head_of_model(core)).items()
        },
        misfits=[str(key) for kind in ("missing_keys", "unexpected_keys") for key in report[kind]],
        config=again.core == weights.model.core and again.config.id2label == weights.model.config.id2label,
    )


def seen_of(core: ModelConfig, logits: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """Return a text's logits, or those of its tokens that the mask does not hide."""
    return logits[columns["attention_mask"]] if head_of_model(core).pick == "each" else logits


def head_of_model(core: ModelConfig) -> LabelHeadConfig:
    assert core.labels is not None
    return core.labels


def label_columns(core: ModelConfig) -> dict[str, Tensor]:
    """Rows without padding, with padding behind and before the text, of padding alone, and with a mask of other ids.

    A mask is never false for all positions that a row's first tokens see: eager attention makes something of its own
    of such rows.
    """
    head = head_of_model(core)
    ids = torch.randint(0, VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(99))
    ids[0, 12:20] = torch.arange(8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    padding = getattr(core, "padding_id", None) if head.pick != "last" else head.pick_id
    if head.pick == "last_eos":
        assert head.pick_id is not None
        ids[ids == head.pick_id] = head.pick_id + 1
        ids[torch.arange(ROWS), torch.tensor([SEQ - 1, 20, 9, 14, SEQ - 3])] = head.pick_id
        mask[1, 21:] = False
        return {"input_ids": ids, "attention_mask": mask}
    ids[:, -1] = 7
    if padding is not None:
        mask[1, 20:] = False
        ids.masked_fill_(~mask, padding)
        if core.decodes:
            mask[2, :9] = False
            ids[2, :9] = padding
            ids[3] = padding
    mask[4, -3:] = False
    return {"input_ids": ids, "attention_mask": mask}


def draw_labels(head: LabelHeadConfig) -> Tensor:
    """Labels of the batch, as transformers takes them; one row, and most of the tokens, have none."""
    generator = torch.Generator().manual_seed(5)
    if head.pick == "each":
        labels = torch.randint(0, head.num_labels, (ROWS, SEQ), generator=generator)
        labels[torch.rand(ROWS, SEQ, generator=generator) < 0.7] = -100
        labels[1, 20:], labels[2, :9], labels[4, -3:] = -100, -100, -100
        labels[3] = -100
        return labels
    if head.loss == SINGLE_LABEL:
        return torch.tensor([0, head.num_labels - 1, 1, -100, 0])
    scores = torch.randn(ROWS, head.num_labels, generator=generator)
    return (scores > 0).float() if head.loss == MULTI_LABEL else scores


def run_ours(
    core: ModelConfig, weights: HFWeights, columns: Mapping[str, Tensor], labels: Tensor
) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Return our logits, loss, and gradients by transformers' names."""
    model = build(core, weights)
    head = model.order[-1].spec
    given = {head_of_model(core).label_column: labels}
    loss = model(columns, given)[0] / head.count_labels(given)[0]
    loss.backward()
    to_hf, gradients = ToHF(weights.model), {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients.update({theirs: part.clone() for theirs, part in to_hf.add(name, parameter.grad)})
    with torch.no_grad():
        return model(columns)["logits"], float(loss.detach()), gradients


def build(core: ModelConfig, weights: HFWeights) -> SequentialModel:
    """Return our model with the weights of a directory, as far as it has such parameters."""
    model = SequentialModel(core.build_layers()).eval()
    with torch.no_grad():
        for name, weight in weights_of(model):
            weight.copy_(weights.shard(name, spec_of(weight), ALONE))
    return model


def run_logits(core: ModelConfig, head: LabelHeadConfig, weights: HFWeights, columns: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return build(replace(core, labels=head), weights)(columns)["logits"]


def worst_gradient(
    gradients: Mapping[str, Tensor], theirs: Any, core: ModelConfig, family: Family
) -> tuple[str, float]:
    """Return name and error of the gradient that is off most; no gradient is without its counterpart."""
    reference = {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}
    if any(stack.moe is not None for stack in core.stacks.values()) or family.other_rows:
        reference = revert_weight_conversion(theirs, reference)  # of each expert by itself, and by the hub's names
    typical = root_mean_square(list(reference.values()))
    assert gradients.keys() == reference.keys(), gradients.keys() ^ reference.keys()
    errors = {
        name: difference(one, reference[name], smallest_norm(one.numel(), typical)).relative
        for name, one in gradients.items()
    }
    worst: Callable[[str], float] = errors.__getitem__
    name = max(errors, key=worst)
    return name, errors[name]


def other_heads(head: LabelHeadConfig) -> dict[str, LabelHeadConfig]:
    """Return changes of a head that a case must see, else it would prove nothing about them."""
    found = {}
    if head.pick == "last":
        found["no padding"] = replace(head, pick_id=None)
        found["another id of padding"] = replace(head, pick_id=7)
    if head.pick != "each":
        found["another pick"] = replace(head, pick="first" if head.pick != "first" else "mean", late=False)
    if head.dense:
        found["another activation"] = replace(head, activation="silu")
    if head.pick == "mean":
        found["early" if head.late else "late"] = replace(head, late=not head.late)
    return found
