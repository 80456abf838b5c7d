"""Alternatives to this package, with the settings of their own trainers: fused AdamW, clipping."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bench.contestant import Step
from bench.work import Spec, Work, model_class

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformers_alone(spec: Spec) -> Step:
    """Train transformers' model in one process: autocast if requested, torch's AdamW."""
    return plain_steps(load(spec), spec)


def transformers_tp(spec: Spec) -> Step:
    """Train with transformers' tensor parallelism and the model's own plan."""
    from transformers.distributed import DistributedConfig

    model = load(spec, distributed_config=DistributedConfig(tp_plan="auto", tp_size=spec.world))
    return plain_steps(model, spec)


def autotp(spec: Spec) -> Step:
    """Train transformers' model with DeepSpeed's tensor parallelism."""
    settings = {"autotp_size": spec.world, **spec.options.get("tensor_parallel", {})}
    return deepspeed_steps(load(spec), spec, zero=0, data=1, more={"tensor_parallel": settings})


def deepspeed_zero(spec: Spec) -> Step:
    """Train transformers' model with DeepSpeed's ZeRO."""
    return deepspeed_steps(load(spec), spec, zero=spec.options["zero"], data=spec.world)


def autoep(spec: Spec) -> Step:
    """Train transformers' model with DeepSpeed's expert parallelism, ZeRO-1 over the same ranks."""
    _let_autoep_read_the_registry()
    settings = {"enabled": True, "autoep_size": spec.world, **spec.options.get("expert_parallel", {})}
    return deepspeed_steps(load(spec), spec, zero=1, data=spec.world, more={"expert_parallel": settings})


def _let_autoep_read_the_registry() -> None:
    """Let a registry of transformers 5.23 be read by names too, as DeepSpeed 0.19.8 does; it fails otherwise."""
    from transformers.utils import output_capturing

    class Registry(output_capturing._CanRecordRegistry):
        def get(self, key: Any, default: Any = None) -> Any:
            return dict.get(self, key, default) if isinstance(key, str) else super().get(key)

        def __setitem__(self, key: Any, value: Any) -> None:
            dict.__setitem__(self, key if isinstance(key, str) else str(key.__class__), value)

    output_capturing._CAN_RECORD_REGISTRY = Registry(output_capturing._CAN_RECORD_REGISTRY)


def load(spec: Spec, **options: Any) -> Any:
    """Load the model; the option `experts` is transformers' implementation of a mixture's experts."""
    if "experts" in spec.options:
        options["experts_implementation"] = spec.options["experts"]
    dtype = torch.float32 if spec.runner == "transformers" else DTYPES[spec.work.dtype]
    model = model_class(spec.work).from_pretrained(spec.folder, dtype=dtype, **options)
    if spec.work.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train().to(spec.device)


def _batch(work: Work, device: str) -> dict[str, Tensor]:
    return {name: column.to(device) for name, column in work.batches().items()}


def _adamw(model: nn.Module, work: Work) -> torch.optim.AdamW:
    groups = [{"params": parameters} for parameters in _kinds(model)]
    return torch.optim.AdamW(groups, lr=work.lr, weight_decay=0.1, fused=True)


def _kinds(model: nn.Module) -> list[list[nn.Parameter]]:
    """Separate the trained plain and distributed tensors, because torch's foreach functions do not accept a mixture."""
    from torch.distributed.tensor import DTensor

    trained = [one for one in model.parameters() if one.requires_grad]
    plain = [one for one in trained if not isinstance(one, DTensor)]
    divided = [one for one in trained if isinstance(one, DTensor)]
    return [kind for kind in (plain, divided) if kind]


def plain_steps(model: Any, spec: Spec, forward: Any = None) -> Step:
    """Train a transformers model with torch's AdamW: in its own dtype, or under autocast if its weights are in fp32.

    Args:
        model: the model, on the device.
        spec: the work, and options of the optimizer.
        forward: what computes the loss, such as the compiled model; None = `model`.
    """
    work, batch, optimizer = spec.work, _batch(spec.work, spec.device), _adamw(model, spec.work)
    full = next(model.parameters()).dtype == torch.float32
    half = torch.autocast(spec.device, torch.bfloat16, enabled=work.dtype == "bf16" and full)
    forward = model if forward is None else forward  # a compiled model has no truth value

    def step() -> float:
        with half:
            loss = forward(**batch, use_cache=False).loss if _caches(model) else forward(**batch).loss
        loss.backward()
        for parameters in _kinds(model):
            nn.utils.clip_grad_norm_(parameters, work.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _caches(model: Any) -> bool:
    return bool(getattr(model.config, "use_cache", False))


def deepspeed_steps(
    model: Any, spec: Spec, zero: int, data: int, more: Mapping[str, Any] = MappingProxyType({})
) -> Step:
    """Train a transformers model with DeepSpeed.

    Args:
        model: the model.
        spec: the work, and options of the optimizer.
        zero: the ZeRO stage.
        data: number of data ranks.
        more: other keys of DeepSpeed's config; with any, DeepSpeed makes the optimizer.
    """
    import torch.distributed as dist

    work = spec.work
    engine = deepspeed_engine(model, spec, zero, work.batch // data, more)
    share = slice(dist.get_rank() * work.batch // data, (dist.get_rank() + 1) * work.batch // data)
    batch = {name: column[share if data > 1 else slice(None)] for name, column in _batch(work, spec.device).items()}

    def step() -> float:
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def deepspeed_engine(
    model: Any,
    spec: Spec,
    zero: int,
    micro_batch: int,
    more: Mapping[str, Any] = MappingProxyType({}),
    mpu: Any = None,
) -> Any:
    """Return DeepSpeed's engine of a model, with the optimizer; `mpu` says which ranks share a sequence, if any do."""
    import deepspeed

    work = spec.work
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": work.grad_clip,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": work.dtype == "bf16"},
        "steps_per_print": 10**9,
        **more,
    }
    optimizer = _adamw(model, work) if not more else None
    if optimizer is None:  # made from the parameters that DeepSpeed has divided
        config["optimizer"] = {
            "type": "AdamW",
            "params": {"lr": work.lr, "weight_decay": 0.1, "torch_adam": True, "fused": True},
        }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
    )
    return engine
