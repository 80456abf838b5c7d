"""Training objectives: the head over a model, the labels that it reads, and the training samples.

`train.objective` names one. Another package adds its own by registering a function that makes it for a run:

    Z_LOSS = HeadSpec(("targets",), ("loss", "z"), lambda labels: count_entries(labels).repeat(2), ("accuracy",))

    @OBJECTIVES.register("z_loss")
    def z_loss(model: LoadedModel, data: DataSection, seed: int) -> Objective:
        return Objective(Causal(), lambda layers, ctx: with_head(layers, ZLossHead, Z_LOSS))

where `ZLossHead` is a `LanguageModelHead` whose `losses` returns both sums and the metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ds.config import DataSection
from megatron_ds.data import FORMATS, Causal, DataObjective, Labelled, Masked, Seq2Seq, check_labels
from megatron_ds.errors import ConfigError, show
from megatron_ds.hf.config import HFModel
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import ChangeLayers, own_layers
from megatron_ds.registry import Registry
from megatron_ds.runtime.loaded_model import LoadedModel

# Keys of `data` that affect only some kinds of models.
_OBJECTIVE_KEYS = ("bos", "mask_rate", "whole_words", "mean_span", "target_length")
_DATA_OBJECTIVES: dict[str, type[DataObjective]] = {
    "causal": Causal,
    "masked": Masked,
    "seq2seq": Seq2Seq,
    "labelled": Labelled,
}
_USED: dict[type[DataObjective], tuple[str, ...]] = {
    Causal: ("bos",),
    Masked: ("mask_rate", "whole_words"),
    Seq2Seq: ("mask_rate", "mean_span", "target_length"),
    Labelled: (),
}
# Keys that affect plain text only: examples with pairs are complete. BERT examples without `labels` are masked.
_TEXT_ONLY: dict[type[DataObjective], tuple[str, ...]] = {Seq2Seq: ("mask_rate", "mean_span")}


@dataclass(frozen=True)
class Objective:
    """The training objective of one run: the samples, and the layers over which the loss is computed.

    Attributes:
        data: the columns of a sample, and the noise that hides tokens; a data format makes its columns accordingly.
        layers: (the model's own layers, build context) -> the layers to train. `with_head` puts another head over the
            same parameters; a new layer spec may add parameters, which are initialized randomly. The `HeadSpec` of the
            last layer names the label columns that every sample must have; `megatron_ds.columns` declares new ones.
    """

    data: DataObjective
    layers: ChangeLayers = own_layers


OBJECTIVES: Registry[Callable[[LoadedModel, DataSection, int], Objective]] = Registry("objective")
"""Name -> function (model, `data` section, seed) that makes an objective or raises ConfigError."""


def find_objective(name: str, model: LoadedModel, data: DataSection, seed: int) -> Objective:
    """Make an objective by its name.

    Args:
        name: a name in OBJECTIVES.
        model: the model to train.
        data: the `data` section.
        seed: seed of the noise in samples.

    Raises:
        ConfigError: no objective has this name, the model has no head to train, the format does not have its labels, or
            a key of `data` is set that has no effect on this kind of data or in this format.
    """
    objective = OBJECTIVES.get(name, field="train.objective")(model, data, seed)
    check_labels(data.format, objective.data)
    kind = type(objective.data)
    cuts_spans = FORMATS.get(data.format, "data.format").cuts_spans
    used = set(_USED[kind]) - (set() if cuts_spans else set(_TEXT_ONLY.get(kind, ())))
    for key in _OBJECTIVE_KEYS:
        value, default = getattr(data, key), type(data).model_fields[key].default
        if value != default and key not in used:
            where = f" with data.format={data.format}" if key in _USED[kind] else ""
            raise ConfigError(
                f"data.{key}={show(value)} has no effect for a {model.hf.family.model_type} model{where}; remove it"
            )
    if isinstance(objective.data, Causal):  # those from outside do not know of it
        return replace(objective, data=replace(objective.data, bos=data.bos))
    return objective


@OBJECTIVES.register("auto")
def own_objective(model: LoadedModel, data: DataSection, seed: int) -> Objective:
    """Make the pretraining objective of a model's kind, over the model's own head.

    Raises:
        ConfigError: the model has no head to train.
    """
    core, path = model.hf.core, model.section.path
    name = core.data_objective
    if name is None:
        raise ConfigError(
            f"{'model.config' if path is None else f'model.path={path}'} is a "
            f"{model.hf.architecture}, without a head to train; nearest: {model.hf.family.architecture}"
        )
    kind = _DATA_OBJECTIVES[name]
    options: dict[str, Any] = {key: getattr(data, key) for key in _USED[kind]}
    if kind in (Masked, Seq2Seq):
        options["seed"] = seed
    if core.labels is not None:
        _check_padding(model)
        options["classes"] = tuple(str(model.hf.config.id2label[number]) for number in range(core.labels.num_labels))
    return Objective(kind(**options, **core.data_objective_options))


def _check_padding(model: LoadedModel) -> None:
    """Refuse a head that finds the last token by the id of padding, if there is no such id."""
    labels, vocab_size = model.hf.core.labels, model.hf.core.vocab_size
    assert labels is not None
    if labels.pick == "last" and (labels.pick_id is None or not 0 <= labels.pick_id < vocab_size):
        end = getattr(model.hf.config, "eos_token_id", None)
        example = end[0] if isinstance(end, list) else end
        fix = "set it in config.json" if model.section.head is None else "set model.head.pad_token_id"
        near = f", such as eos_token_id={example}" if example is not None else ""
        raise ConfigError(
            f"pad_token_id={labels.pick_id} is no id of the vocabulary, and the head of a {model.hf.architecture} "
            f"reads the last token that is not padding; {fix}{near}"
        )


def new_parameters(model: HFModel, objective: Objective) -> list[str]:
    """Return the names of the parameters that an objective adds to a model. Allocates no memory for them."""
    ctx = BuildContext()
    own = model.core.build_layers(ctx)
    added = []
    for spec in objective.layers(own, ctx):
        if spec in own:
            continue
        with torch.device("meta"):
            layer = spec.build()
        names = {name: spec.tied.get(name, f"{spec.name}.{name}") for name, _ in layer.named_parameters()}
        added += [name for name in names.values() if name not in model.table]
    return added
