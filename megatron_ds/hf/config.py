"""Hugging Face configs, read strictly. `config_writing.py` has those of exports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_ds import untrusted
from megatron_ds.config.rope_section import RopeSection
from megatron_ds.config.run_config import HeadSection
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.family import HEAD, Family, Row
from megatron_ds.hf.label_classes import headless, label_classes, labelled
from megatron_ds.hf.missing_config import why_missing
from megatron_ds.hf.model_type import (
    base_class,
    class_names,
    find_family,
    in_present_words,
    present_classes,
    with_heads,
)
from megatron_ds.hf.quantised import FIELDS as QUANTISED
from megatron_ds.hf.quantised import Quantisation, find_quantisation
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.sentence_modules import gives_vectors
from megatron_ds.hf.size_limits import check_parameters, check_sizes
from megatron_ds.hf.weight_files import has_weights, open_directory
from megatron_ds.log import log_once
from megatron_ds.models.config import ModelConfig
from megatron_ds.untrusted import is_missing
from megatron_ds.untrusted.limits import MODEL_SETTINGS, Limits


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face model's config, its translation, and its family.

    Attributes:
        family: the family, with its table.
        config: transformers' config object, defaults filled in.
        core: the translation of the config.
        unread: fields without effect, which transformers' code of the family does not read.
        quantisation: how its weights on disk are quantised; None = they are not.
        reworded: whether the config on disk has other words than `config`, which transformers would not understand.
        on_disk: the content of config.json.
        passed_through: names on disk of the tensors that exports have byte for byte, in the order on disk; the weights
            show them.
        replaced: the model with the head that a new one takes the place of; None = the head is its own.
        rope: the rotation of positions that the run file gives it in place of that on disk; None = its own.
    """

    family: Family
    config: Any
    core: ModelConfig
    unread: Mapping[str, Any] = field(default_factory=dict)
    quantisation: Quantisation | None = None
    reworded: bool = False
    on_disk: Mapping[str, Any] = field(default_factory=dict)
    passed_through: tuple[str, ...] = ()
    replaced: HFModel | None = None
    rope: RopeSection | None = None

    def with_tied(self, tied: bool) -> HFModel:
        """Return the same model with the head tied to the embedding, or not."""
        return self if tied == self.core.tied else replace(self, core=replace(self.core, tied=tied))

    @property
    def architecture(self) -> str:
        """Name of transformers' class of the model."""
        return self.family.architecture_of(self.core)

    @property
    def placeholder_ids(self) -> Mapping[str, int]:
        """Field of config.json -> id of a token that no text may hold, as it stands for a part of an image."""
        return self.family.placeholder_ids(self.config)

    @cached_property
    def table(self) -> dict[str, Row]:
        """Native name -> row, for each parameter of the model; a tied head has none."""
        table = self.family.table(self.core)
        if self.core.tied:
            table.pop(HEAD, None)
        return table

    @property
    def in_memory(self) -> HFModel:
        """The model with the names of transformers' modules in memory instead of those on disk."""
        *_, last = self.family.forms()
        return replace(self, family=last)

    def named_in(self, names: Collection[str]) -> HFModel:
        """Return the model with the form of its table whose tensors are all among these names; itself if none is."""
        forms = (replace(self, family=family) for family in self.family.forms())
        return next((form for form in forms if form.tensors <= set(names)), self)

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Names of the tensors of `table`."""
        return frozenset(name for row in self.table.values() for name in row.names)

    @cached_property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the named axes of `table`."""
        return self.core.axis_sizes()


def read_model(source: str | Path | Mapping[str, Any], key: str = "") -> HFModel:
    """Read a directory's config.json, or a mapping of its fields, which is not changed.

    Args:
        source: the directory, or the mapping.
        key: the key of the run file that names the directory, for messages.

    Raises:
        ConversionError: no config, an unknown family, or a field that changes the math and is not supported.
    """
    directory = None if isinstance(source, Mapping) else Path(source)
    if isinstance(source, Mapping):
        place, on_disk = "model.config", dict(source)
    else:
        place, on_disk = str(Path(source) / "config.json"), read_json(Path(source) / "config.json", key)

    def tensors() -> Sequence[str]:
        return open_directory(directory).names if directory is not None and has_weights(directory) else ()

    try:
        model = _translate(on_disk, tensors, directory)
        if directory is None or not (directory / "generation_config.json").is_file():
            generation_config(model.config, model.core, on_disk)  # refuse it now, not when a run writes it at its end
    except ConversionError as problem:
        raise ConversionError(f"{place}: {problem}") from problem.__cause__
    _note(model)
    return model


def _translate(on_disk: Mapping[str, Any], tensors: Callable[[], Sequence[str]], directory: Path | None) -> HFModel:
    """Translate the content of config.json.

    Args:
        on_disk: the content.
        tensors: reads the names of the tensors next to it, which decide if the config does not name its family.
        directory: with config.json; None = it is in no directory.
    """
    raw = in_present_words(on_disk)
    check_sizes(raw)
    family = find_family(raw, tensors)
    _check_class_names(family, raw.get("architectures"))  # first: another class may read other fields
    raw = family.complete_fields(raw)
    unread = family.check_fields(raw)
    known = {name: value for name, value in raw.items() if name not in (*unread, *QUANTISED)}
    quantisation = find_quantisation(raw)
    config = family.transformers_config({**known, **_without_odd_dtypes(known)})
    for part, its_config in family.parts_of_config(known, config):
        _refuse_contradictions(part, its_config)
    family, core = with_heads(family, family.translate(config), raw.get("architectures"), config)
    check_parameters(family, core)
    _note_num_labels(known, core)
    family, core = _without_missing_head(family, core, raw.get("architectures") or [], tensors)
    family, core = _without_unused_head(family, core, raw.get("architectures") or [], directory)
    _check_base_class(family, core, raw.get("architectures") or [])
    reworded = raw != on_disk or _without_odd_dtypes(known) != {} or quantisation is not None
    return HFModel(family, config, core, {name: raw[name] for name in unread}, quantisation, reworded, on_disk)


def _without_odd_dtypes(raw: Mapping[str, Any]) -> dict[str, None]:
    """Return the dtype fields whose value torch does not know, such as "fp16", as null; the weights have the dtype."""
    given = {name: raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None}
    known = [str(one).removeprefix("torch.") for one in vars(torch).values() if isinstance(one, torch.dtype)]
    return {name: None for name, value in given.items() if value not in known and not isinstance(value, torch.dtype)}


def _note(model: HFModel) -> None:
    if model.unread:
        log_once(f"config.json: {unread_fields(model)}")


def unread_fields(model: HFModel) -> str:
    """Return a line on the fields without effect."""
    return f"{model.architecture} does not read {', '.join(sorted(model.unread))}; exports keep the values"


def _check_class_names(family: Family, named: Any) -> None:
    """Refuse a class with other heads than ours: its config alone would become a model of another task."""
    known = class_names(family)
    if named is not None and not (isinstance(named, list) and set(present_classes(named)) <= set(known)):
        raise ConversionError(
            f"architectures={named!r} is not supported; supported of {family.model_type}: {', '.join(known)}"
        )


def _check_base_class(family: Family, core: ModelConfig, named: Sequence[str]) -> None:
    """Refuse a base model without a head if its untied head is missing; another base model passes.

    The config has to show it, because the weights cannot: they could belong to a tied model.
    """
    base = [name for name in named if name not in (family.classes or [family.architecture])]
    if base and family.tied_by_bytes and not core.tied:
        tied = " with tie_word_embeddings=False" if "tie_word_embeddings" in family.fields.mapped else ""
        raise ConversionError(
            f"architectures={named!r}{tied} leaves out a head that is not the embedding; "
            f"try {family.architecture}, with the head among its weights"
        )


def _note_num_labels(raw: Mapping[str, Any], core: ModelConfig) -> None:
    """Log that names of labels do not count, as in transformers, where a config has another number of them."""
    names = raw.get("id2label") or {}
    if core.labels is not None and names and len(names) != core.labels.num_labels:
        log_once(
            f"num_labels={core.labels.num_labels} contradicts the {len(names)} names of id2label, which do not count: "
            f"labels are LABEL_0 to LABEL_{core.labels.num_labels - 1}"
        )


def _without_missing_head(
    family: Family, core: ModelConfig, named: Sequence[str], tensors: Callable[[], Sequence[str]]
) -> tuple[Family, ModelConfig]:
    """Return the base model of a decoder if its head is not the embedding, and is not on disk.

    That is so if `architectures` names the base class, or the tensors lack its prefix, as that class writes them.
    """
    base = base_class(family)
    if base is None or core.tied or not core.generates or core.has_cross_attention:
        return family, core
    names, head = tensors(), family.table(core)[HEAD].names[0]
    if not names or any(name.endswith(head) for name in names):
        return family, core
    if base not in present_classes(named) and any(name.startswith(family.prefix) for name in names):
        return family, core
    log_once(f"no {head} on disk, and tie_word_embeddings=False: the model is a {base}, without a head")
    return headless(family, base, core)


def _without_unused_head(
    family: Family, core: ModelConfig, named: Sequence[str], directory: Path | None
) -> tuple[Family, ModelConfig]:
    """Return the base model of a decoder whose head is the embedding, if its directory is one of text vectors.

    That is so if `architectures` names the base class, and modules.json has a pooling. A class with a head stays one.
    """
    base = base_class(family)
    if base is None or base not in present_classes(named) or not core.tied or not core.generates:
        return family, core
    if core.has_cross_attention or directory is None or not gives_vectors(directory):
        return family, core
    log_once(f"architectures={list(named)!r}, and modules.json has a pooling: the model has no head")
    return headless(family, base, core)


def with_new_head(model: HFModel, head: HeadSection) -> HFModel:
    """Return the model with a new head for labels, in place of its own.

    Args:
        model: the model as it is on disk.
        head: the labels.

    Raises:
        ConfigError: transformers has no such class for the family, or the padding id is not in the vocabulary.
    """
    family = FAMILIES[model.family.model_type]
    kind = "ForTokenClassification" if head.kind == "token" else "ForSequenceClassification"
    found = [name for name in label_classes(family) if name.endswith(kind)]
    if not found:
        others = ", ".join(label_classes(family))
        fix = f"nearest: {others}" if others else "remove model.head, or choose another model"
        raise ConfigError(f"model.head.kind={head.kind}: there is no class {kind} of {family.model_type}; {fix}")
    config = deepcopy(model.config)
    config.id2label = dict(enumerate(head.names))
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = head.problem
    if head.pad_token_id is not None:
        if head.pad_token_id >= model.core.vocab_size:
            raise ConfigError(
                f"model.head.pad_token_id={head.pad_token_id} must be below vocab_size={model.core.vocab_size}; "
                f"nearest: {model.core.vocab_size - 1}"
            )
        own = config.pad_token_id
        if own is not None and own != head.pad_token_id and 0 <= own < model.core.vocab_size:
            raise ConfigError(
                f"model.head.pad_token_id={head.pad_token_id} contradicts pad_token_id={own} in config.json; remove "
                "it, or change config.json"
            )
        config.pad_token_id = head.pad_token_id
    family, core = labelled(family, found[0], family.translate(config), config)
    return replace(model, family=family, core=replace(core, tied=model.core.tied), config=config, replaced=model)


# Field of transformers 4 -> (kind of layer, rope parameter) of transformers 5. The kind matters only in models with a
# rope for each kind of layer.
OLD_ROPE_FIELDS = {
    "rope_theta": ("full_attention", "rope_theta"),
    "rope_local_base_freq": ("sliding_attention", "rope_theta"),
    "global_rope_theta": ("full_attention", "rope_theta"),
    "local_rope_theta": ("sliding_attention", "rope_theta"),
    "rotary_emb_base": ("full_attention", "rope_theta"),
    "rotary_pct": ("full_attention", "partial_rotary_factor"),
    "partial_rotary_factor": ("full_attention", "partial_rotary_factor"),
}


def _refuse_contradictions(raw: Mapping[str, Any], config: Any) -> None:
    """Refuse contradicting values under two names: versions of transformers differ in the one that they read."""
    for alias, name in (*config.attribute_map.items(), ("n_embed", "hidden_size")):
        if alias in raw and name in raw and raw[alias] != raw[name]:
            raise ConversionError(f"{alias}={raw[alias]!r} contradicts {name}={raw[name]!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    for name, (kind, key) in OLD_ROPE_FIELDS.items():
        value, effective = raw.get(name), rope.get(kind, rope).get(key)
        if value is not None and effective is not None and value != effective:
            raise ConversionError(f"{name}={value!r} contradicts the {key}={effective!r} that transformers takes")
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    new = new.get("full_attention", new)
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            raise ConversionError(f"rope_scaling.{key}={old[key]!r} contradicts rope_parameters.{key}={new[key]!r}")


def generation_config(config: Any, core: ModelConfig, raw: Mapping[str, Any]) -> Any:
    """Return transformers' generation settings for a directory without generation_config.json.

    Args:
        config: transformers' config object, which drops them.
        core: the translation of the config.
        raw: config.json, where old models have these settings and transformers reads them.

    Returns:
        a `GenerationConfig`; None for models that do not generate text.

    Raises:
        ConversionError: transformers refuses the settings, and with them the model.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    if not core.generates:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warnings: settings without effect are kept unchanged
    try:
        return GenerationConfig.from_model_config({**raw, **config.to_dict()})
    except ValueError as problem:
        reason = " ".join(str(problem).split())
        raise ConversionError(f"transformers refuses its settings for generating: {reason}") from problem
    finally:
        logging.set_verbosity(verbosity)


def read_json(path: Path, key: str = "", limits: Limits = MODEL_SETTINGS) -> dict[str, Any]:
    """Read a JSON object from a file of a Hugging Face directory.

    Args:
        path: the file.
        key: the key of the run file that names the directory, for messages.
        limits: of the kind of file.

    Raises:
        ConversionError: no such file, one that cannot be read, or not a JSON object.
    """
    try:
        content = untrusted.read_json(path, limits, ConversionError)
    except ConversionError as problem:
        if is_missing(problem):
            raise ConversionError(why_missing(path, key)) from None
        raise
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content
