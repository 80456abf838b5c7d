"""Modules of sentence-transformers: the vector of a text that a directory with modules.json gives.

A transformer, then a pooling over its last hidden states, and perhaps a normalisation, are translated. Whatever else
such a directory may have, such as dense layers with weights of their own, is refused by its name. The files themselves
are carried unchanged (`carried_files.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.carried_files import MODULES
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.hidden_output import PoolingConfig
from megatron_ds.untrusted import file_inside, read_json
from megatron_ds.untrusted.limits import MODEL_SETTINGS

PACKAGE = "sentence_transformers"
KINDS = ("Transformer", "Pooling", "Normalize")  # in this order; the last one may be absent

# Mode of a pooling -> the pick that it is.
PICKS = {"cls": "first", "mean": "mean", "lasttoken": "last"}

# Field of a pooling's config until version 5, a flag -> the mode that it stands for.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
OTHER_FIELDS = ("pooling_mode", "include_prompt", "word_embedding_dimension", "embedding_dimension")

# Fields that name what a module computes with -> the one value that is supported, which is the default.
TRANSFORMER_FIELDS = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
NORMALIZE_FIELDS = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
TRANSFORMER_FILE = "sentence_bert_config.json"


@dataclass(frozen=True)
class Module:
    """An entry of modules.json: the folder of the module, empty for the directory itself, and its dotted class."""

    path: str
    type: str

    @property
    def kind(self) -> str:
        """Name of its class, without the module that holds it."""
        return self.type.rpartition(".")[2]


def gives_vectors(directory: Path) -> bool:
    """Test whether a directory has modules of sentence-transformers with a pooling among them."""
    return any(module.kind == "Pooling" for module in _modules(directory))


def read_pooling(directory: Path) -> PoolingConfig | None:
    """Read how the vector of a text follows from the hidden states.

    None without a modules.json.

    Raises:
        ConversionError: a module, or a field of one, that is not supported.
    """
    modules = _modules(directory)
    if not modules:
        return None
    for module, kind in zip(modules, KINDS, strict=False):
        if module.kind != kind or module.type.partition(".")[0] != PACKAGE:
            raise ConversionError(_unsupported(directory, module))
    if len(modules) > len(KINDS):
        raise ConversionError(_unsupported(directory, modules[len(KINDS)]))
    if len(modules) == 1 or modules[0].path:
        raise ConversionError(
            f"{directory / MODULES}: the path of the Transformer must be empty, and a Pooling must follow; "
            f"try a copy of the directory without {MODULES}"
        )
    _check_defaults(directory / TRANSFORMER_FILE, TRANSFORMER_FIELDS)
    if len(modules) == len(KINDS):
        _check_defaults(directory / modules[2].path / "config.json", NORMALIZE_FIELDS)
    place = directory / modules[1].path / "config.json"
    if not place.is_file():
        raise ConversionError(f"{place} is missing; the Pooling of {MODULES} needs it")
    return PoolingConfig(pick=_pick(place, _object(place)), normalize=len(modules) == len(KINDS))


def pooled(core: ModelConfig, directory: Path) -> ModelConfig:
    """Return a model with the pooling of its directory; the same model if it has a head, or the directory has none.

    Raises:
        ConversionError: see `read_pooling`.
    """
    if core.data_objective is not None:
        return core
    return replace(core, pooling=read_pooling(directory))


def describe(pooling: PoolingConfig) -> str:
    """Return a line on a pooling."""
    what = {"first": "first token", "last": "last token", "mean": "mean of the tokens"}[pooling.pick]
    return f"{what}{', normalised' if pooling.normalize else ''}"


def _modules(directory: Path) -> Sequence[Module]:
    """Read modules.json; an empty list if there is no such file."""
    path = directory / MODULES
    if not path.is_file():
        return ()
    content = _json(path)
    if not isinstance(content, list) or not all(isinstance(one, Mapping) and "type" in one for one in content):
        raise ConversionError(f"{path}: expected a list of modules, each with a type; try a copy without {MODULES}")
    modules = [Module(str(one.get("path", "")), str(one["type"])) for one in content]
    for one in modules:
        if one.path:
            file_inside(directory, one.path, f"{path}: a module", ConversionError)
    return modules


def _unsupported(directory: Path, module: Module) -> str:
    return (
        f"{directory / MODULES}: {module.path or 'a module'} is a {module.type}, which is not supported here; "
        f"supported: {', '.join(KINDS)} of {PACKAGE}, in this order; "
        f"try a copy of the directory without {MODULES}, which gives hidden states alone"
    )


def _pick(place: Path, fields: Mapping[str, Any]) -> str:
    """Translate the mode of a pooling. As in sentence-transformers, `pooling_mode` beats the flags."""
    supported = f"supported: {', '.join(PICKS)}"
    unknown = sorted(fields.keys() - {*FLAGS, *OTHER_FIELDS})
    if unknown:
        raise ConversionError(f"{place}: {unknown[0]}={fields[unknown[0]]!r} is not a known field; remove it")
    if fields.get("include_prompt", True) is not True:
        raise ConversionError(
            f"{place}: include_prompt={fields['include_prompt']!r} is not supported: ids do not show where a prompt "
            "ends; nearest: true"
        )
    given = [(f"{name}=True", mode) for name, mode in FLAGS.items() if fields.get(name)] or [("", "mean")]
    if "pooling_mode" in fields:
        value = fields["pooling_mode"]
        given = [(f"pooling_mode={value!r}", one) for one in (value if isinstance(value, list) else [value])]
    if len(given) != 1:
        named = " and ".join(dict.fromkeys(name for name, _ in given)) or "pooling_mode=[]"
        raise ConversionError(f"{place}: {named} must be one mode, not {len(given)}; {supported}")
    ((name, mode),) = given
    if mode not in PICKS:
        raise ConversionError(f"{place}: {name} is not supported; {supported}")
    return PICKS[mode]


def _check_defaults(place: Path, supported: Mapping[str, str]) -> None:
    """Refuse other values of a module's fields than the supported ones, if it has a config."""
    fields = _object(place) if place.is_file() else {}
    for name, value in supported.items():
        if fields.get(name, value) != value:
            raise ConversionError(f"{place}: {name}={fields[name]!r:.100} is not supported; nearest: {value}")


def _object(path: Path) -> Mapping[str, Any]:
    content = _json(path)
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content


def _json(path: Path) -> Any:
    return read_json(path, MODEL_SETTINGS, ConversionError)
