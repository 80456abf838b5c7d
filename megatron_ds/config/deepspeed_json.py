"""The DeepSpeed JSON: reading, checks against the keys of DeepSpeed 0.19.8, and completion from the run file.

It sets precision, ZeRO, offload and communication. The run file sets batch sizes, clipping, optimizer and schedule;
in the JSON they are absent or "auto". Two different values of one setting are refused.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megatron_ds.config.deepspeed_blocks import check_optimizer_block, check_scheduler_block
from megatron_ds.config.deepspeed_keys import (
    COUNT_KEYS,
    NATIVE_AUTO,
    ONLY_VALUES,
    OTHER_KEYS,
    PATH_KEYS,
    REMOVED_KEYS,
    SECTION_KEYS,
    TOP_LEVEL_KEYS,
    UNSUPPORTED_KEYS,
)
from megatron_ds.config.deepspeed_source import AUTO, Place, equal, is_unset
from megatron_ds.config.engine_config import EngineConfig
from megatron_ds.errors import ConfigError, nearest_names, show, suggest
from megatron_ds.paths import expanded_text
from megatron_ds.shipped import existing_or_shipped, shipped
from megatron_ds.untrusted import is_missing, parse_json, read_text
from megatron_ds.untrusted.limits import DEEPSPEED_SETTINGS

DEFAULT_STAGE = 1  # of ZeRO, where there is no DeepSpeed JSON
BUCKET_ELEMENTS = 50_000_000  # gradients that data ranks reduce at a time: larger messages are no faster
CPU_BUCKET_ELEMENTS = 5_000_000  # a bucket whose memory the process keeps from step to step
_COUNT, _SWITCH = TypeAdapter(Annotated[int, Field(ge=0)]), TypeAdapter(bool)
_NEVER_PRINT_STEPS = 10**9  # DeepSpeed's own step reports are replaced by metrics.jsonl


@dataclass(frozen=True)
class DeepSpeedSummary:
    """The facts of a DeepSpeed JSON that the rest of megatron_ds uses.

    `offload_optimizer` and `offload_param` are true for cpu and for nvme. `hpz_partition_size` is the number of
    consecutive ranks over which ZeRO-3 shards parameters a second time (ZeRO++; Wang et al. 2023); 1 = it does not.
    """

    zero_stage: int
    precision: Literal["fp32", "bf16", "fp16"]
    offload_optimizer: bool
    offload_param: bool
    hpz_partition_size: int = 1


def load_deepspeed(source: str | dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed mapping of a run, with its "auto" values.

    Args:
        source: the run's `deepspeed`: the path of a JSON file, or the mapping itself.

    Raises:
        ConfigError: no such file, not JSON, an unknown or removed key, or a value that cannot run.
    """
    mapping = read_deepspeed_file(source) if isinstance(source, str) else copy.deepcopy(source)
    check_deepspeed_keys(mapping, Place.of(source))
    _expand_paths(mapping, Place.of(source))
    return mapping


def _expand_paths(mapping: dict[str, Any], place: Place) -> None:
    """Replace `~` and variables in the paths of a mapping, in place."""
    for dotted in PATH_KEYS:
        section, _, key = dotted.rpartition(".")
        block = _get(mapping, section)
        if isinstance(block, dict) and isinstance(block.get(key), str):
            block[key] = expanded_text(block[key], place.state(dotted, block[key]))


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """Return the mapping in a JSON file, its keys unchecked.

    A file of the user's has precedence over the shipped one of the same name, `ds_configs/NAME`.

    Raises:
        ConfigError: the file is missing or is not a JSON mapping; with the line.
    """
    try:
        text = read_text(existing_or_shipped(path), DEEPSPEED_SETTINGS, ConfigError)
    except ConfigError as problem:
        if is_missing(problem):
            near = nearest_names(path, [f"ds_configs/{file.name}" for file in shipped("ds_configs").glob("*.json")])
            hint = f"; nearest: {near[0]}" if near else ""
            raise ConfigError(f"deepspeed={path}: no such file (looked from {Path.cwd()}){hint}") from None
        raise ConfigError(f"deepspeed={problem}") from None
    try:
        mapping = parse_json(text, path, DEEPSPEED_SETTINGS, ConfigError)
    except ConfigError as problem:
        if isinstance(error := problem.__cause__, json.JSONDecodeError):
            place = f"{path} line {error.lineno} column {error.colno}"
            raise ConfigError(f"{place}: not valid JSON: {error.msg}") from None
        raise
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} is not a mapping; it holds {show(mapping)}")
    return mapping


def check_deepspeed_keys(mapping: Mapping[str, Any], place: Place) -> None:
    """Refuse removed, unsupported and unknown keys, and values that would make the training wrong."""
    for key, fix in REMOVED_KEYS.items():
        if _get(mapping, key) is not None:
            raise ConfigError(f"{place.name(key)}: DeepSpeed 0.19 has removed this; {fix}")
    for key, reason in UNSUPPORTED_KEYS.items():
        block = mapping.get(key)
        if block is not None and not (isinstance(block, dict) and block.get("enabled") is False):
            raise ConfigError(f"{place.name(key)}: megatron_ds does not run with it: {reason}")
    known_elsewhere = (*REMOVED_KEYS, *UNSUPPORTED_KEYS)
    for key in mapping:
        if key not in TOP_LEVEL_KEYS and key not in known_elsewhere:
            raise ConfigError(f"{place.name(str(key))}: unknown DeepSpeed key; {_nearest(str(key), TOP_LEVEL_KEYS)}")
    for section, legal in SECTION_KEYS.items():
        _check_section(mapping, section, legal, place)
    for key, only, reason in ONLY_VALUES:
        value = _get(mapping, key)
        if not is_unset(value) and not equal(value, only):
            raise ConfigError(f"{place.state(key, value)} cannot be used: {reason}; remove it, or set {show(only)}")
    precision = _facts(mapping, place).precision
    dtype = _get(mapping, "data_types.param_dtype")
    if not is_unset(dtype) and dtype != precision:
        raise ConfigError(
            f"{place.state('data_types.param_dtype', dtype)} disagrees with the precision {precision}, which "
            "bf16.enabled and fp16.enabled set; remove it"
        )


def _nearest(key: str, legal: tuple[str, ...]) -> str:
    homes = [f"{section}.{key}" for section, keys in SECTION_KEYS.items() if key in keys]
    if len(homes) == 1:
        return f"did you mean {homes[0]}?"
    text = suggest(key, legal)
    return text if text.startswith("did you mean") else "remove it, or see DeepSpeed's configuration reference"


def _check_section(mapping: Mapping[str, Any], section: str, legal: tuple[str, ...], place: Place) -> None:
    block = _get(mapping, section)
    if block is None:
        return
    if not isinstance(block, dict):
        raise ConfigError(f"{place.state(section, block)} is not a mapping; {_as_mapping(section, block)}")
    for key in block:
        if key not in legal and f"{section}.{key}" not in REMOVED_KEYS:
            raise ConfigError(
                f"{place.name(f'{section}.{key}')}: unknown DeepSpeed key; {suggest(str(key), legal, f'{section}.')}"
            )
        _check_value(f"{section}.{key}", block[key], place)


def _check_value(key: str, value: Any, place: Place) -> None:
    """Refuse a value of another type than DeepSpeed takes, which its own check would answer with a traceback."""
    if is_unset(value) or key in OTHER_KEYS:
        return
    try:
        (_COUNT if key in COUNT_KEYS else _SWITCH).validate_python(value)
    except ValidationError:
        rule = "is not a whole number of at least 0" if key in COUNT_KEYS else "is not true or false"
        raise ConfigError(f"{place.state(key, value)} {rule}") from None


def _as_mapping(section: str, value: Any) -> str:
    """Return the way out for a value in the place of a section: its main key, if it has one that takes the value."""
    key = {bool: "enabled", int: "stage", str: "device"}.get(type(value))
    if key in SECTION_KEYS[section]:
        return f"write {{{json.dumps(key)}: {json.dumps(value)}}}"
    return "write {...} or remove it"


def summarize_deepspeed(mapping: Mapping[str, Any]) -> DeepSpeedSummary:
    """Return the facts of a mapping, before or after `fill_deepspeed`; an empty one means ZeRO-1 in fp32.

    Raises:
        ConfigError: bf16 and fp16 both enabled, or a stage, device or switch with an impossible value.
    """
    return _facts(mapping, Place(None))


def _facts(mapping: Mapping[str, Any], place: Place) -> DeepSpeedSummary:
    bf16_name = "bf16" if mapping.get("bf16") is not None else "bfloat16"  # as DeepSpeed chooses
    bf16 = _switch(mapping, f"{bf16_name}.enabled", place)
    fp16 = _switch(mapping, "fp16.enabled", place)
    if bf16 and fp16:
        raise ConfigError(f"{place.name(f'{bf16_name}.enabled and fp16.enabled')} are both true; keep one")
    stage = _get(mapping, "zero_optimization.stage")
    if stage is None:
        stage = 0 if mapping else DEFAULT_STAGE
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        text = " as a number without quotes" if stage in ("0", "1", "2", "3") else ""
        raise ConfigError(f"{place.state('zero_optimization.stage', stage)} is not one of 0, 1, 2, 3{text}")
    hpz = _get(mapping, "zero_optimization.zero_hpz_partition_size")
    return DeepSpeedSummary(
        zero_stage=int(stage),
        precision="bf16" if bf16 else "fp16" if fp16 else "fp32",
        offload_optimizer=_offloads(mapping, "offload_optimizer", "cpu_offload", place),
        offload_param=_offloads(mapping, "offload_param", "cpu_offload_param", place),
        hpz_partition_size=hpz if isinstance(hpz, int) else 1,
    )


def _switch(mapping: Mapping[str, Any], key: str, place: Place) -> bool:
    value = _get(mapping, key)
    if value is None:
        return False
    if not isinstance(value, bool):
        why = ": no other setting decides the precision" if value == AUTO else ""
        raise ConfigError(f"{place.state(key, value)} is not true or false{why}")
    return value


def _offloads(mapping: Mapping[str, Any], name: str, old_name: str, place: Place) -> bool:
    key = f"zero_optimization.{name}.device"
    device = _get(mapping, key)
    if device not in (None, "none", "cpu", "nvme"):
        raise ConfigError(f"{place.state(key, device)} is not one of none, cpu, nvme")
    return device in ("cpu", "nvme") or _switch(mapping, f"zero_optimization.{old_name}", place)


def fill_deepspeed(
    mapping: Mapping[str, Any], config: EngineConfig, data_size: int, hidden_size: int
) -> dict[str, Any]:
    """Return a complete DeepSpeed config, for `deepspeed.initialize` with a torch optimizer.

    Args:
        mapping: from `load_deepspeed`; it is not changed.
        config: the engine's settings; `check_engine` has accepted its batch sizes for `data_size`.
        data_size: data-parallel ranks.
        hidden_size: H of the model, for the ZeRO bucket sizes left at "auto" (as transformers' Trainer fills them).

    Raises:
        ConfigError: a value contradicts the run file, or an "auto" that nothing can fill.
    """
    place = Place.of(config.deepspeed)
    check_deepspeed_keys(mapping, place)
    filled = copy.deepcopy(dict(mapping))
    if not filled:
        filled["zero_optimization"] = {"stage": DEFAULT_STAGE}
    _fill_from_config(filled, config, data_size, place)
    check_optimizer_block(filled, config, place)
    check_scheduler_block(filled, config, place)
    filled.pop("optimizer", None)
    filled.pop("scheduler", None)
    _fill_bucket_sizes(filled, hidden_size)
    _refuse_leftover_auto(filled, place)
    filled["zero_allow_untested_optimizer"] = True
    for key, default in (
        ("zero_force_ds_cpu_optimizer", False),
        ("steps_per_print", _NEVER_PRINT_STEPS),
        ("wall_clock_breakdown", False),
        ("timers", {"throughput": {"enabled": False}}),  # it would wait for the device twice a micro-batch
    ):
        filled.setdefault(key, copy.deepcopy(default))
    if config.parallel.pipeline > 1:  # DeepSpeed's default partitions what stages exchange over the tensor ranks
        pipeline = {"pipe_partitioned": False, "grad_partitioned": False}
        filled["pipeline"] = {**pipeline, **(filled.get("pipeline") or {})}
    if summarize_deepspeed(filled).precision == "bf16":
        data_types = filled["data_types"] = dict(filled.get("data_types") or {})
        if data_types.get("grad_accum_dtype") is None:
            data_types["grad_accum_dtype"] = "fp32"
    return filled


def adapt_to_device(filled: Mapping[str, Any], device_type: str, data_size: int) -> dict[str, Any]:
    """Fill the defaults of a filled DeepSpeed config that depend on the device and the number of data ranks.

    At ZeRO stage 0 the engine clips gradients itself, because DeepSpeed's norm counts neither tensor ranks nor
    replicated parameters. DeepSpeed's default bucket of 5e8 gradients is 1 GB in bf16, allocated even if it reduces
    less; on a CPU it is fresh memory in every step, whose pages cost more than the copy. With one data rank there is
    nothing to reduce, and ZeRO-1 needs no bucket.

    Args:
        filled: from `fill_deepspeed`; it is not changed.
        device_type: torch's name, such as `cpu` or `cuda`.
        data_size: data-parallel ranks.
    """
    stage = summarize_deepspeed(filled).zero_stage
    zero = dict(filled.get("zero_optimization", {}))
    zero.setdefault("reduce_bucket_size", CPU_BUCKET_ELEMENTS if device_type == "cpu" else BUCKET_ELEMENTS)
    if stage == 1 and data_size == 1:
        zero.setdefault("contiguous_gradients", False)
    adapted = {**filled, "zero_optimization": zero}
    return {**adapted, "gradient_clipping": 0.0} if stage == 0 else adapted


def _fill_from_config(filled: dict[str, Any], config: EngineConfig, data_size: int, place: Place) -> None:
    """Set batch sizes and clipping in place; refuse other values."""
    micro, batch = config.micro_batch_size, config.global_batch_size
    assert batch % (micro * data_size) == 0, f"check_engine comes first: {batch=} {micro=} {data_size=}"
    accumulation = batch // (micro * data_size)
    rule = f"train.global_batch_size / (train.micro_batch_size * data ranks) = {batch} / ({micro} * {data_size})"
    clip = config.grad_clip
    for key, value, statement in (
        ("train_batch_size", batch, f"train.global_batch_size={batch}"),
        ("train_micro_batch_size_per_gpu", micro, f"train.micro_batch_size={micro}"),
        ("gradient_accumulation_steps", accumulation, f"{rule} = {accumulation}"),
        ("gradient_clipping", clip, f"optimizer.grad_clip={clip}"),
    ):
        stated = filled.get(key)
        if not is_unset(stated) and not equal(stated, value):
            place.refuse_disagreement(key, stated, statement)
        filled[key] = value


def _fill_bucket_sizes(filled: dict[str, Any], hidden_size: int) -> None:
    zero = filled.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    for key, value in (
        ("reduce_bucket_size", hidden_size * hidden_size),
        ("stage3_prefetch_bucket_size", int(0.9 * hidden_size * hidden_size)),
        ("stage3_param_persistence_threshold", 10 * hidden_size),
    ):
        if zero.get(key) == AUTO:
            zero[key] = value


def _refuse_leftover_auto(filled: Mapping[str, Any], place: Place) -> None:
    for key in _auto_places(filled, ""):
        if key not in NATIVE_AUTO:
            raise ConfigError(f"{place.state(key, AUTO)} cannot be filled; write a value or remove it")


def _auto_places(node: Any, key: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _auto_places(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _auto_places(value, f"{key}[{index}]")
    elif node == AUTO:
        yield key


def _get(mapping: Mapping[str, Any], dotted: str) -> Any:
    """Return the value at a dotted key; None if anything on the way is absent or not a mapping."""
    node: Any = mapping
    for part in dotted.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(part)
    return node
