"""Loading of a run file with `key.sub=value` overrides into a `RunConfig`, and dumping it.

Any problem raises a `ConfigError` of one line. Paths in the file are relative to the current directory.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_ds.config.automatic import AUTO
from megatron_ds.config.deepspeed_json import DEFAULT_STAGE, load_deepspeed, read_deepspeed_file
from megatron_ds.config.error_messages import explain
from megatron_ds.config.run_config import RunConfig
from megatron_ds.config.schema_base import Section
from megatron_ds.config.unknown_keys import explain_unknown_key
from megatron_ds.config.yaml_text import format_yaml, parse_yaml
from megatron_ds.errors import ConfigError, show
from megatron_ds.paths import expanded, expanded_text
from megatron_ds.plugins import import_modules, load_entry_points
from megatron_ds.untrusted import is_missing, read_text
from megatron_ds.untrusted.limits import RUN_FILE

S = TypeVar("S", bound=Section)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the run that a YAML file and overrides describe.

    Args:
        path: the run file.
        overrides: `key.sub=value` with the value in YAML; the last one of a key wins. Keys inside `deepspeed` and
            `model.config` are allowed; if `deepspeed` is the path of a JSON file, that file is read first.

    Raises:
        ConfigError: a problem of the file, an override or a value, in one line.
    """
    path = expanded(path)
    mapping = parse_yaml(_read_text(path), str(path))
    if mapping is None:
        raise ConfigError(f"{path} is empty; a run file needs at least model, data.train, train.steps and output")
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} is not a mapping of sections; it holds {show(mapping)}")
    return build_run(mapping, overrides)


def build_run(mapping: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Build the run that a plain mapping with the run file's keys describes.

    Args:
        mapping: by sections; it is not changed.
        overrides: see `load_run`.

    Raises:
        ConfigError: an unknown key, a missing or a wrong value, or a module that cannot be imported, in one line.
    """
    mapping = copy.deepcopy(mapping) if overrides else mapping
    for override in overrides:
        _apply_override(mapping, override)
    _import_outside(mapping.get("imports"))
    given = {key: copy.deepcopy(v) for key, v in mapping.items() if v is not None or key not in RunConfig.model_fields}
    for section in ("model", "data", "train"):  # so that errors name the missing key instead of its section
        given.setdefault(section, {})
    invalid = [key for key in given if not isinstance(key, str)]
    if invalid:
        raise ConfigError(f"{show(invalid[0])}: unknown key; legal here: {', '.join(RunConfig.model_fields)}")
    for key, value in given.items():  # before any value is checked
        if key not in RunConfig.model_fields:
            raise ConfigError(explain_unknown_key((key,), value, RunConfig))
    try:
        return RunConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None


def build_section(kind: type[S], fields: Mapping[str, Any], prefix: str = "", keep: Collection[str] = ()) -> S:
    """Build one section from keywords, for programs without a run file.

    Args:
        kind: the section's class.
        fields: its fields; None stands for the default.
        prefix: what errors put before a field's name.
        keep: the fields whose None is a value.

    Raises:
        ConfigError: an unknown field, a missing or a wrong value, in one line.
    """
    given = {name: copy.deepcopy(value) for name, value in fields.items() if value is not None or name in keep}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{prefix}{'.' if prefix else ''}{explain(error, kind)}") from None


def _import_outside(imports: Any) -> None:
    """Import the modules that register names; anything but a list of module names is refused later."""
    load_entry_points()
    if isinstance(imports, list) and all(isinstance(name, str) and name for name in imports):
        import_modules(imports)


def dump_run(run: RunConfig) -> str:
    """Return YAML text of the resolved run, which `load_run` reads back to an equal run.

    A DeepSpeed JSON named by its path is inlined as it stands, its "auto" values kept: the text needs no other file,
    and later overrides of the batch sizes still reach DeepSpeed.
    """
    mapping = run.model_dump()
    for name, value in mapping.items():
        if isinstance(value, dict) and name != "deepspeed":
            mapping[name] = {key: inner for key, inner in value.items() if inner is not None}
    mapping["deepspeed"] = load_deepspeed(run.deepspeed)
    return format_yaml({name: value for name, value in mapping.items() if value is not None})


def _read_text(path: Path) -> str:
    if path.is_dir():
        found = sorted(path.glob("*.yaml"))
        hint = f", such as {found[0]}" if found else ""
        raise ConfigError(f"run file {path} is a directory; name a YAML file{hint}")
    try:
        return read_text(path, RUN_FILE, ConfigError)
    except ConfigError as problem:
        if isinstance(problem.__cause__, UnicodeDecodeError):
            raise ConfigError(f"run file {path} is not UTF-8 text") from None
        if is_missing(problem):
            raise ConfigError(f"run file {path} does not exist (looked from {Path.cwd()})") from None
        raise ConfigError(f"run file {problem}") from None


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in place, and create the mappings that it needs."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {show(override)} is not key.sub=value, for example train.steps=100")
    value = parse_yaml(text, f"override {key}")
    _refuse_index(key)
    node = mapping
    for depth, part in enumerate(parts[:-1], start=1):
        place = ".".join(parts[:depth])
        inner = node.get(part)
        if place in _SHORT_FORMS:
            inner = _SHORT_FORMS[place](inner)
        if inner is None:
            inner = {}
        if isinstance(inner, list):
            raise ConfigError(f"override {key}: {place} is a list; give the complete list, {place}=[...]")
        if not isinstance(inner, dict):
            raise ConfigError(f"override {key}: {place}={show(inner)} is not a mapping, so nothing can be set in it")
        node[part] = inner
        node = inner
    node[parts[-1]] = value


def _refuse_index(key: str) -> None:
    """Refuse `data.train[0]`, which names an element of a list."""
    name, bracket, _ = key.partition("[")
    if bracket:
        raise ConfigError(f"override {key}: {name} is a list; give the complete list, {name}=[...]")


def _deepspeed_mapping(given: Any) -> Any:
    """Return the DeepSpeed mapping that an override changes: of a file, or the default one, whose stage stays."""
    if not given:
        return {"zero_optimization": {"stage": DEFAULT_STAGE}}
    return read_deepspeed_file(expanded_text(given, f"deepspeed={given}")) if isinstance(given, str) else given


def _context_mapping(given: Any) -> Any:
    """Return the mapping that an override changes where a run file has a number of context ranks alone."""
    return {"size": given} if isinstance(given, int) and not isinstance(given, bool) else given


def _parallel_mapping(given: Any) -> Any:
    """Return the mapping that an override of a size changes: it replaces the planner's choice."""
    return {} if given == AUTO else given


_SHORT_FORMS: Mapping[str, Callable[[Any], Any]] = {
    "deepspeed": _deepspeed_mapping,
    "parallel": _parallel_mapping,
    "parallel.context": _context_mapping,
}
"""Section -> the mapping that another value in the section's place stands for."""
