"""Unknown keys of the run file, and the keys that were meant: only such as take the value that was given."""

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from megatron_ds.config.schema_base import VARIANT
from megatron_ds.errors import ConfigError, nearest_names

# Names that other trainers have for our keys.
FOREIGN_NAMES: Mapping[str, str] = {
    "adam_betas": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "base_model": "model.path",
    "batch_size": "train.global_batch_size",
    "bf16": "deepspeed.bf16.enabled",
    "block_size": "data.seq_length",
    "clip_grad": "optimizer.grad_clip",
    "context_parallel": "parallel.context",
    "context_parallel_size": "parallel.context",
    "cp": "parallel.context",
    "cp_size": "parallel.context",
    "cutoff_len": "data.seq_length",
    "dataset": "data.train",
    "datasets": "data.train",
    "ep": "parallel.expert",
    "ep_size": "parallel.expert",
    "eval_dataset": "data.valid",
    "eval_steps": "train.eval_every",
    "expert_model_parallel_size": "parallel.expert",
    "expert_parallel": "parallel.expert",
    "expert_parallel_size": "parallel.expert",
    "fp16": "deepspeed.fp16.enabled",
    "gradient_clipping": "optimizer.grad_clip",
    "learning_rate": "optimizer.lr",
    "logging_steps": "train.log_every",
    "lora": "peft",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_kwargs": "schedule.options",
    "lr_scheduler_type": "schedule.name",
    "lr_warmup_steps": "schedule.warmup_steps",
    "max_grad_norm": "optimizer.grad_clip",
    "max_length": "data.seq_length",
    "max_seq_length": "data.seq_length",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "micro_batch": "train.micro_batch_size",
    "min_learning_rate": "schedule.min_lr",
    "model_name_or_path": "model.path",
    "moe_aux_loss_coeff": "train.moe_aux_loss",
    "moe_router_bias_update_rate": "train.moe_bias_rate",
    "moe_z_loss_coeff": "train.moe_z_loss",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "num_train_steps": "train.steps",
    "num_warmup_steps": "schedule.warmup_steps",
    "output_dir": "output",
    "per_device_train_batch_size": "train.micro_batch_size",
    "pipeline_parallel": "parallel.pipeline",
    "pipeline_parallel_size": "parallel.pipeline",
    "pp": "parallel.pipeline",
    "resume_from_checkpoint": "checkpoint.resume",
    "rope_scaling": "model.rope",
    "router_aux_loss_coef": "train.moe_aux_loss",
    "sample_packing": "data.packing",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "sequence_len": "data.seq_length",
    "sequence_parallel_size": "parallel.context",
    "tensor_parallel": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "tokenizer_name_or_path": "model.tokenizer",
    "tp": "parallel.tensor",
    "train_batch_size": "train.global_batch_size",
    "train_dataset": "data.train",
    "train_iters": "train.steps",
    "ulysses_degree": "parallel.context",
    "ulysses_size": "parallel.context",
    "val_set_size": "data.valid_share",
    "valid_dataset": "data.valid",
    "zero_stage": "deepspeed.zero_optimization.stage",
}
# Names that other trainers have for what is set in another way here.
_PRECISION = "write deepspeed: {bf16: {enabled: true}}, or fp16; the default is float32"
_DATA_PARALLEL = "it follows: ranks / (parallel.tensor * parallel.pipeline * parallel.context)"
_EXPERTS = "it is the model's: write it under model.config, by its name in the model's config.json"
_CAPACITY = "an expert takes all tokens that choose it; remove it"
_BETAS = "write optimizer.betas: [0.9, 0.95]"
OTHER_WAYS: Mapping[str, str] = {
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "beta1": _BETAS,
    "beta2": _BETAS,
    "capacity_factor": _CAPACITY,
    "data_parallel": _DATA_PARALLEL,
    "data_parallel_size": _DATA_PARALLEL,
    "dp": _DATA_PARALLEL,
    "dtype": _PRECISION,
    "moe_expert_capacity_factor": _CAPACITY,
    "moe_router_topk": _EXPERTS,
    "moe_top_k": _EXPERTS,
    "num_experts": _EXPERTS,
    "num_experts_per_tok": _EXPERTS,
    "parallel.data": _DATA_PARALLEL,
    "precision": _PRECISION,
    "torch_dtype": _PRECISION,
    "gradient_accumulation_steps": (
        "set train.global_batch_size: it counts the samples of all ranks and micro batches of a step"
    ),
    "curriculum_learning": "write train.length_ramp: {start: 64, steps: 10000}",
    "rampup_batch_size": "write train.batch_ramp: {start: 32, increment: 32, samples: 100000}",
    "activation_offloading": "write train.offload_activations: true",
    "gradient_checkpointing": "write train.recompute: full",
    "tiled_mlp": "write train.mlp_tile_tokens, such as 4096",
    "assistant_only_loss": "write data.loss_on: assistant, the default, or all",
    "train_on_inputs": "write data.loss_on: all, or assistant, the default",
    "val_split": "write data.valid: {share: 0.01}",
    "validation_split": "write data.valid: {share: 0.01}",
    "warmup_ratio": "write schedule.warmup_steps, a number of steps",
}
# Keys that say too little for another section's key of this name to be meant.
_GENERIC_NAMES = frozenset({"check", "columns", "config", "format", "init", "name", "options", "path", "split"})
_OPTIONS = {"nproc": "--nproc", "max_restarts": "--max-restarts", "min_nproc": "--min-nproc"}


def explain_unknown_key(loc: tuple[int | str, ...], value: Any, model: type[BaseModel]) -> str:
    """Return the line for a key that a section does not have.

    Another section's key is offered only for a key at the top, or if it is the only one of its name.
    """
    prefix, name = dotted(loc[:-1]), str(loc[-1])
    section = next((one for one in _sections(model) if one.name == _without_index(loc[:-1])), None)
    fields = section.fields if section is not None else {}
    start = f"{dotted(loc)}: unknown key"
    for sign, named in ((":", "a space after the colon"), ("=", "a colon instead of =")):
        if sign in name:
            key, _, text = name.partition(sign)
            return f"{start}; write {key}: {text or 'value'}, with {named}"
    if not prefix and name in _OPTIONS:
        return f"{start}; did you mean {_OPTIONS[name]}?"
    other_way = OTHER_WAYS.get(dotted(loc)) or OTHER_WAYS.get(name)
    if other_way and not any(isinstance(part, int) for part in loc):
        return f"{start}; {other_way}"
    homes = _homes(name, value, model) if not any(isinstance(part, int) for part in loc) else []
    near = [key for key in nearest_names(name, fields) if fits(fields[key], value)]
    if homes and (not prefix or (len(homes) == 1 and name not in _GENERIC_NAMES)):
        return f"{start}; did you mean {' or '.join(homes)}?"
    if near:
        return f"{start}; did you mean {' or '.join(f'{prefix}.{key}' if prefix else key for key in near)}?"
    return f"{start}; legal here: {', '.join(sorted(fields))}"


def dotted(loc: tuple[int | str, ...]) -> str:
    """Return `data.train[0].path` for a location."""
    text = ""
    for part in loc:
        if str(part).startswith(VARIANT):
            continue
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def fits(field: FieldInfo, value: Any) -> bool:
    """Return whether a field takes a value; a section takes every mapping, and what stands for one."""
    if models := _models_in(field.annotation):
        is_entry = _is_list(field.annotation) and isinstance(value, str | list)
        return isinstance(value, dict) or is_entry or _stands_for(value, models[0])
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except (ValidationError, ConfigError):
        return False
    return True


def _stands_for(value: Any, section: type[BaseModel]) -> bool:
    try:
        section.model_validate(value)
    except (ValidationError, ConfigError):
        return False
    return True


class _Section(NamedTuple):
    name: str
    fields: dict[str, FieldInfo]
    in_list: bool


def _sections(model: type[BaseModel], name: str = "", in_list: bool = False) -> Iterator[_Section]:
    yield _Section(name, model.model_fields, in_list)
    for key, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            yield from _sections(inner, f"{name}.{key}" if name else key, in_list or _is_list(field.annotation))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def _homes(name: str, value: Any, model: type[BaseModel]) -> list[str]:
    """Return the keys of this name in other sections, or under our name, that take the value.

    A key of a section in a section is meant only if no section has it.
    """
    found = [
        f"{section.name}.{name}"
        for section in _sections(model)
        if section.name and not section.in_list and name in section.fields and fits(section.fields[name], value)
    ]
    found = [one for one in found if one.count(".") == min(other.count(".") for other in found)]
    section_name, _, key = FOREIGN_NAMES.get(name, "").partition(".")
    field = model.model_fields.get(section_name)
    if field is None:
        return found
    if not key:
        return [*found, section_name] if fits(field, value) else found
    inner = next(iter(_models_in(field.annotation)), None)  # None: a mapping with keys of its own
    is_known = inner is None or (key in inner.model_fields and fits(inner.model_fields[key], value))
    return [*found, f"{section_name}.{key}"] if is_known and f"{section_name}.{key}" not in found else found


def _without_index(loc: tuple[int | str, ...]) -> str:
    return ".".join(part for part in loc if isinstance(part, str))
