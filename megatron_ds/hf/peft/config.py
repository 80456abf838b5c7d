"""Configs of Hugging Face's peft: each field is supported, or has no effect, or must have a given value, or is refused.

A file may be older or newer than the installed peft. Fields that this does not know are ignored if their value is null,
false or empty, as peft ignores them, and refused by name otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel, read_json
from megatron_ds.hf.missing_config import ADAPTER_CONFIG, why_missing
from megatron_ds.hf.peft.field_kinds import check_kinds, meant_field
from megatron_ds.hf.peft.model_names import ModelNames
from megatron_ds.hub import hub_id, snapshot_of
from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec
from megatron_ds.log import get_logger

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_BIN = "adapter_model.bin"


@dataclass(frozen=True)
class PeftFields:
    """Rules for the fields of one type of peft config. These and `COSMETIC` name every field.

    Attributes:
        supported: fields with the same meaning as in peft.
        required: fields that must have the given value.
    """

    supported: frozenset[str]
    required: Mapping[str, Any]


_OF_REFUSED_INITIALIZATIONS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")
_NULL_IS_THE_DEFAULT = frozenset(
    {"peft_type", "r", "lora_alpha", "lora_dropout", "init_lora_weights", "rank_pattern", "alpha_pattern", "bias"}
)
_BY_BOUNDS = (True, False, "gaussian")
_BY_PEFT = ("pissa", "olora", "orthogonal")
_OF_WEIGHTS_THAT_ARE_READ = ("eva",)  # an initialization of A and B alone, whose trained values are read
_OF_BARE_PARAMETERS: Mapping[str, tuple[Any, ...]] = {
    "lora_dropout": (0.0,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": _BY_BOUNDS,
}
"""Field -> the values with which peft adapts parameters that are not weights of linear layers."""
COSMETIC = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *(
            "inference_mode",
            "fan_in_fan_out",
            "megatron_config",
            "megatron_core",
            "runtime_config",
            "qalora_group_size",
        ),
        *_OF_REFUSED_INITIALIZATIONS,
    }
)
"""Fields of any type of config without effect on the math, or decided by the model."""
OLD_COSMETIC = frozenset({"merge_weights"})
"""Fields of old versions of peft without effect on the math, whatever their value."""
PEFT_FIELDS = {
    "LORA": PeftFields(
        frozenset(
            {
                *("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules"),
                *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
                *("modules_to_save", "ensure_weight_tying", "trainable_token_indices", "use_dora"),
                "target_parameters",
            }
        ),
        {
            "bias": "none",
            "lora_bias": False,
            "layer_replication": None,
            "velora_config": None,
            "alora_invocation_tokens": None,
            "use_qalora": False,
            "monteclora_config": None,
            "use_bdlora": None,
            "arrow_config": None,
            "kasa_config": None,
        },
    ),
    "IA3": PeftFields(
        frozenset({"target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights", "modules_to_save"}),
        {},
    ),
}


class AdapterConfig:
    """A peft config: the modules that it matches, and the adapter of each.

    Args:
        source: a directory with adapter_config.json, that file, or its content.

    Attributes:
        where: prefix of error messages: `peft`, or `peft=PATH`.
        kind: peft's type of adapter, a key of `PEFT_FIELDS`.
        starts: the adapters start from their initialization; otherwise a file has their weights.
        is_file: it is read from a file, which may hold names of other models.

    Raises:
        ConversionError: peft refuses the config, or a value is not supported.
    """

    def __init__(self, source: str | Path | Mapping[str, Any]) -> None:
        self.is_file = not isinstance(source, Mapping)
        self.where, raw = _read(source)
        raw = {name: value for name, value in raw.items() if value is not None or name not in _NULL_IS_THE_DEFAULT}
        self.kind = str(raw.get("peft_type", "LORA")).upper()
        self.starts = isinstance(source, Mapping) or find_weights(source) is None
        _check_initialization(self.where, raw.get("init_lora_weights", True), self.starts)
        self._config = _checked(self.where, self.kind, raw, is_file=self.is_file)
        if self.kind == "LORA":
            _check_lora(self.where, self._config)

    def settle_targets(self, model: HFModel, modules: Collection[str], names: Sequence[str]) -> str:
        """Replace missing `target_modules` by peft's default for the model, and "all-linear" by all modules.

        Old names of experts and routers among them become names of parameters, as in peft: `w2` stands for the
        parameter `down_proj` of Mixtral's experts.

        Args:
            model: the base model.
            modules: names of the linear layers that can be adapted.
            names: of all tensors in memory.

        Returns:
            the resulting `target_modules`, for error messages.

        Raises:
            ConversionError: the config has no `target_modules`, and peft has no default.
        """
        import peft.utils as defaults

        if self._config.target_modules is None:
            name = f"TRANSFORMERS_MODELS_TO_{self.kind}_TARGET_MODULES_MAPPING"
            usual = getattr(defaults, name).get(model.family.model_type, () if self.parameters else None)
            if usual is None:
                raise ConversionError(f"{self.where}.target_modules is missing; nearest: all-linear")
            self._config.target_modules = set(usual)
            if self.kind == "IA3" and not self._config.feedforward_modules:
                usual = defaults.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[model.family.model_type]
                self._config.feedforward_modules = set(usual)
        self._rename_targets(model, modules, names)
        if self._config.target_modules == "all-linear":
            self._config.target_modules = set(modules)
        return _format(self._config.target_modules)

    def name_targets(self, modules: Collection[str]) -> None:
        """Name the adapted modules one by one, so that the written config matches no module of a tower.

        Args:
            modules: names of the modules that the config matches in the text model.
        """
        if self.kind == "IA3":
            adapters = {name: self.adapter(name, 1) for name in modules}
            of_input = (name for name, one in adapters.items() if isinstance(one, IA3Spec) and one.of_input)
            self._config.feedforward_modules = set(of_input)
        self._config.target_modules = set(modules)

    def _rename_targets(self, model: HFModel, modules: Collection[str], names: Sequence[str]) -> None:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        stand_in: Any = ModelNames(model.config, modules, names)
        try:
            convert_peft_config_for_transformers(self._config, stand_in, None)
        except ValueError as problem:
            raise ConversionError(f"{self.where}: peft refuses it: {' '.join(str(problem).split())}") from problem

    @property
    def parameters(self) -> tuple[str, ...]:
        """Ends of the names of parameters that get adapters by themselves."""
        return tuple(sorted(getattr(self._config, "target_parameters", None) or ()))

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Ends of the names of modules that are trained in full."""
        return tuple(self._config.modules_to_save or ())

    def save_too(self, modules: Sequence[str]) -> None:
        """Train further modules in full, unless the config names them already."""
        known = self.modules_to_save
        self._config.modules_to_save = [*known, *(one for one in modules if not known or not one.endswith(known))]

    @property
    def token_rows(self) -> dict[str, tuple[int, ...]]:
        """End of a table's name -> rows of it that are replaced; "" = the word embedding."""
        given = getattr(self._config, "trainable_token_indices", None) or {}
        return {name: tuple(rows) for name, rows in (given if isinstance(given, dict) else {"": given}).items()}

    @property
    def keeps_tied(self) -> bool:
        """A tied embedding and head stay one parameter when either is trained in full."""
        return bool(getattr(self._config, "ensure_weight_tying", False))

    def matches(self, module: str) -> bool:
        """Ask peft whether the config matches a module of transformers."""
        from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

        match = check_target_module_exists(self._config, module)
        return bool(match) and not isinstance(match, _ExcludedModule)

    def matches_parameter(self, name: str) -> bool:
        """Test whether the config matches a parameter of transformers, as peft does."""
        return any(name == target or name.endswith(f".{target}") for target in self.parameters)

    def check_bare(self, name: str) -> None:
        """Check that peft can adapt parameters that are not weights of linear layers.

        Args:
            name: of such a parameter.

        Raises:
            ConversionError: a field has a value with which it cannot.
        """
        for field, wanted in _OF_BARE_PARAMETERS.items():
            value = getattr(self._config, field)
            if value not in wanted:
                raise ConversionError(
                    f"{self.where}.{field}={value} does not work on {name}, a parameter of experts or a router; "
                    f"nearest: {str(wanted[0]).lower()}"
                )

    def adapter(self, module: str, width: int) -> LoRASpec | IA3Spec:
        """Return the adapter of one module, by peft's rules.

        Args:
            module: name of the module.
            width: number of its input features.
        """
        if self.kind == "IA3":
            from peft import IA3Model

            of_input = IA3Model._check_target_module_feedforward(self._config, module)
            return IA3Spec(of_input, None if self._config.init_ia3_weights else 1.0)
        return self._lora(module, width)

    def _lora(self, module: str, width: int) -> LoRASpec:
        from peft.utils.other import get_pattern_key

        config = self._config
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha)
        gaussian, plain = config.init_lora_weights == "gaussian", config.init_lora_weights is False
        return LoRASpec(
            rank=rank,
            scale=alpha / math.sqrt(rank) if config.use_rslora else alpha / rank,
            dropout=config.lora_dropout,
            a_bound=None if gaussian else 1 / math.sqrt(width),
            a_std=1 / rank if gaussian else None,
            b_bound=1 / math.sqrt(rank) if plain else None,
            dora=bool(config.use_dora),
            init=config.init_lora_weights if config.init_lora_weights in _BY_PEFT else None,
        )

    def content(self, model: HFModel, base: str) -> dict[str, Any]:
        """Return the content of adapter_config.json for adapters of the model at the path `base`."""
        content = self._config.to_dict()
        if content.get("task_type") is None:
            content["task_type"] = model.core.task_type
        content.update(peft_type=self.kind, base_model_name_or_path=base, inference_mode=True)
        snapshot = snapshot_of(Path(base))
        if snapshot is not None:  # another machine has another cache
            content.update(base_model_name_or_path=snapshot.id.repo, revision=snapshot.commit)
        return {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}


def find_weights(directory: str | Path) -> Path | None:
    """Return the file of the adapters in a directory, safetensors before .bin, as in peft; None = it has none."""
    files = (Path(directory) / name for name in (ADAPTER_WEIGHTS, ADAPTER_BIN))
    return next((file for file in files if file.is_file()), None)


def named_base(directory: Path) -> Any:
    """Return the base model that the config of a directory of adapters names; None if it names none.

    An id has the revision that the config names.

    Raises:
        ConversionError: see `read_json`.
    """
    content = read_json(directory / ADAPTER_CONFIG)
    base, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(base, str) or not isinstance(revision, str) or (place := hub_id(base)) is None:
        return base
    return str(replace(place, revision=revision))


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "peft", dict(source)
    path = Path(source)
    file = path / ADAPTER_CONFIG if path.is_dir() else path
    if not file.is_file():
        raise ConversionError(why_missing(path / ADAPTER_CONFIG, "peft"))
    return f"peft={source}", read_json(file)


def _checked(where: str, kind: str, raw: Mapping[str, Any], is_file: bool) -> Any:
    """Build peft's config object, after refusing every field with an effect that would be ignored here."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    if kind not in PEFT_FIELDS:
        raise ConversionError(f"{where}.peft_type={kind} is not supported; supported: {', '.join(PEFT_FIELDS)}")
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    known = {field.name for field in fields(made)}
    unknown = {name: value for name, value in raw.items() if name not in known}
    for name, value in sorted(unknown.items()):
        if not is_file or (value and name not in OLD_COSMETIC):
            shown = f"{name}={_format(value)}" if is_file else name
            meant = meant_field(name, value, PEFT_FIELDS[kind].supported)
            fix = f"did you mean {meant}?" if meant is not None else "remove it"
            raise ConversionError(f"{where}.{shown} is not a field of peft's {made.__name__}; {fix}")
    check_kinds(where, raw)
    if unknown:
        get_logger().info("%s: peft's %s has no %s; ignored", where, made.__name__, ", ".join(sorted(unknown)))
    for name, wanted in PEFT_FIELDS[kind].required.items():
        if name in raw and raw[name] != wanted and (raw[name] or wanted):
            raise ConversionError(f"{where}.{name}={_format(raw[name])} is not supported; nearest: {_format(wanted)}")
    init = raw.get("init_lora_weights")
    left_out = ("peft_type", *(name for name in _OF_REFUSED_INITIALIZATIONS if name != f"{init}_config"))
    given = {name: value for name, value in raw.items() if name in known and name not in left_out}
    try:
        config: Any = made(**given)
    except (TypeError, ValueError, ImportError) as problem:
        raise ConversionError(f"{where}: peft refuses it: {' '.join(str(problem).split())}") from problem
    if kind == "IA3" and config.feedforward_modules is None:
        config.feedforward_modules = set()
    return config


def _check_initialization(where: str, init: Any, starts: bool) -> None:
    """Check `init_lora_weights`; `starts`: the adapters are initialized by it, not read."""
    allowed = (*_BY_BOUNDS, *_BY_PEFT, *(() if starts else _OF_WEIGHTS_THAT_ARE_READ))
    if init not in allowed:
        names = ", ".join(str(one).lower() for one in (*_BY_BOUNDS, *_BY_PEFT))
        near = "pissa" if str(init).startswith("pissa") else "true"
        raise ConversionError(f"{where}.init_lora_weights={init} is not supported; supported: {names}; nearest: {near}")


def _check_lora(where: str, config: Any) -> None:
    others = {f"rank_pattern.{name}": rank for name, rank in (config.rank_pattern or {}).items()}
    for field, rank in {"r": config.r, **others}.items():
        if not isinstance(rank, int) or rank < 1:
            raise ConversionError(f"{where}.{field}={rank} must be at least 1; nearest: 1")
        if config.init_lora_weights == "orthogonal" and rank % 2:
            raise ConversionError(f"{where}.{field}={rank} must be even for an orthogonal start; nearest: {rank + 1}")
    if not 0 <= config.lora_dropout < 1:
        raise ConversionError(f"{where}.lora_dropout={config.lora_dropout} is not in [0, 1); nearest: 0.0")


def _format(value: Any) -> str:
    return str(sorted(value) if isinstance(value, set) else value)
