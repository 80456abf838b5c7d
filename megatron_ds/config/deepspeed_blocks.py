"""The `optimizer` and `scheduler` blocks that DeepSpeed JSONs written for other trainers carry.

The run file decides optimizer and schedule, and DeepSpeed gets a torch optimizer. A block is accepted, and ignored,
only if all of its values equal the run file's, so that no setting is lost silently.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ds.config.deepspeed_source import Place, equal, is_unset
from megatron_ds.config.engine_config import EngineConfig
from megatron_ds.errors import ConfigError, show

_SCHEDULE_OF_TYPE: Mapping[str, str] = {
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}

_Expected = Mapping[str, tuple[str | None, tuple[Any, ...]]]


def check_optimizer_block(mapping: Mapping[str, Any], config: EngineConfig, place: Place) -> None:
    """Refuse an `optimizer` block whose values differ from the run file's."""
    block, optimizer = _block(mapping, "optimizer", place), config.optimizer
    if optimizer is None:
        _refuse_block(block, "optimizer", place)
        return
    expected: _Expected = {
        "lr": (f"optimizer.lr={optimizer.lr}", (optimizer.lr,)),
        "betas": (f"optimizer.betas={show(optimizer.betas)}", (optimizer.betas,)),
        "eps": (f"optimizer.eps={optimizer.eps}", (optimizer.eps,)),
        "weight_decay": (f"optimizer.weight_decay={optimizer.weight_decay}", (optimizer.weight_decay,)),
        "max_grad_norm": (f"optimizer.grad_clip={optimizer.grad_clip}", (optimizer.grad_clip,)),
        "torch_adam": (None, (True, False)),  # another implementation of the same update
        "adam_w_mode": (f"optimizer.name={optimizer.name}", (True,)),
        "bias_correction": (f"optimizer.name={optimizer.name}", (True,)),
        "amsgrad": (f"optimizer.name={optimizer.name}", (False,)),
    }
    kind = block.get("type")
    same = ("adamw", "adam") if optimizer.name == "adamw" else (optimizer.name.lower(),)  # its Adam is AdamW by default
    if not is_unset(kind) and str(kind).lower() not in same:
        place.refuse_disagreement("optimizer.type", kind, f"optimizer.name={optimizer.name}")
    _check_params(block, "optimizer", expected, place)


def check_scheduler_block(mapping: Mapping[str, Any], config: EngineConfig, place: Place) -> None:
    """Refuse a `scheduler` block whose values differ from the run file's."""
    block, schedule = _block(mapping, "scheduler", place), config.schedule
    if schedule is None or config.optimizer is None:
        _refuse_block(block, "scheduler", place)
        return
    lr = config.optimizer.lr
    counted = "train.epochs, from which the steps follow," if config.steps is None else f"train.steps={config.steps}"
    warmup = "schedule warm-up is linear and starts at 0"
    expected: _Expected = {
        "warmup_num_steps": (f"schedule.warmup_steps={schedule.warmup_steps}", (schedule.warmup_steps,)),
        "total_num_steps": (counted, () if config.steps is None else (config.steps,)),
        "warmup_max_lr": (f"optimizer.lr={lr}", (lr,)),
        "warmup_min_lr": (warmup, (0,)),
        "warmup_min_ratio": (warmup, (0,)),
        "warmup_type": (warmup, ("linear",)),
        "cos_min_ratio": (
            f"schedule.min_lr / optimizer.lr = {schedule.min_lr} / {lr}",
            (schedule.min_lr / lr if lr else 0,),
        ),
        "last_batch_iteration": (None, (-1,)),
    }
    kind = block.get("type")
    if not is_unset(kind) and _SCHEDULE_OF_TYPE.get(str(kind)) != schedule.name:
        place.refuse_disagreement("scheduler.type", kind, f"schedule.name={schedule.name}")
    _check_params(block, "scheduler", expected, place)


def _block(mapping: Mapping[str, Any], name: str, place: Place) -> Mapping[str, Any]:
    """Return the block as a mapping; empty if it is absent, null or "auto"."""
    block = mapping.get(name)
    if is_unset(block):
        return {}
    if not isinstance(block, dict):
        raise ConfigError(f"{place.state(name, block)} is not a mapping; remove it, since the run file sets it")
    for key in block:
        if key not in ("type", "params"):
            _refuse_stranger(place, f"{name}.{key}", block[key])
    return block


def _refuse_block(block: Mapping[str, Any], name: str, place: Place) -> None:
    """Refuse a block if the Python program that builds the engine decides its values."""
    if block:
        raise ConfigError(f"{place.name(name)}: the program that builds the engine decides the {name}; remove it")


def _check_params(block: Mapping[str, Any], name: str, expected: _Expected, place: Place) -> None:
    params = block.get("params")
    if is_unset(params):
        return
    if not isinstance(params, dict):
        raise ConfigError(f"{place.state(f'{name}.params', params)} is not a mapping; remove it")
    for key, value in params.items():
        if is_unset(value):
            continue
        statement, legal = expected.get(key, (None, ()))
        if any(equal(value, one) for one in legal):
            continue
        if statement is None:
            _refuse_stranger(place, f"{name}.params.{key}", value)
        else:
            place.refuse_disagreement(f"{name}.params.{key}", value, statement)


def _refuse_stranger(place: Place, key: str, value: Any) -> None:
    section = "optimizer" if key.startswith("optimizer") else "schedule"
    raise ConfigError(f"{place.state(key, value)} has no counterpart in the run file's {section} section; remove it")
