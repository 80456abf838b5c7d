"""Alternatives to this package, with the settings of their own trainers: fused AdamW, clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.contestant import Step
from bench.work import Spec, Work, model_class

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformers_alone(spec: Spec) -> Step:
    """Train transformers' model in one process: autocast if requested, torch's AdamW."""
    model = _load(spec)
    return _plain_steps(model, spec)


def transformers_tp(spec: Spec) -> Step:
    """Train with transformers' tensor parallelism and the model's own plan."""
    from transformers.distributed import DistributedConfig

    model = _load(spec, distributed_config=DistributedConfig(tp_plan="auto", tp_size=spec.world))
    return _plain_steps(model, spec)


def autotp(spec: Spec) -> Step:
    """Train transformers' model with DeepSpeed's tensor parallelism."""
    settings = {"autotp_size": spec.world, **spec.options.get("tensor_parallel", {})}
    return _deepspeed_steps(spec, zero=0, data=1, more={"tensor_parallel": settings})


def deepspeed_zero(spec: Spec) -> Step:
    """Train transformers' model with DeepSpeed's ZeRO."""
    return _deepspeed_steps(spec, zero=spec.options["zero"], data=spec.world, more={})


def _load(spec: Spec, **options: Any) -> Any:
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
    """Group plain and distributed tensors separately, because torch's foreach functions do not accept a mixture."""
    from torch.distributed.tensor import DTensor

    plain = [one for one in model.parameters() if not isinstance(one, DTensor)]
    divided = [one for one in model.parameters() if isinstance(one, DTensor)]
    return [kind for kind in (plain, divided) if kind]


def _plain_steps(model: Any, spec: Spec) -> Step:
    work, batch, optimizer = spec.work, _batch(spec.work, spec.device), _adamw(model, spec.work)
    half = torch.autocast(spec.device, torch.bfloat16, enabled=work.dtype == "bf16" and spec.world == 1)

    def step() -> float:
        with half:
            loss = model(**batch, use_cache=False).loss if _caches(model) else model(**batch).loss
        loss.backward()
        for parameters in _kinds(model):
            nn.utils.clip_grad_norm_(parameters, work.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _caches(model: Any) -> bool:
    return bool(getattr(model.config, "use_cache", False))


def _deepspeed_steps(spec: Spec, zero: int, data: int, more: dict[str, Any]) -> Step:
    import deepspeed
    import torch.distributed as dist

    work = spec.work
    model = _load(spec)
    config = {
        "train_micro_batch_size_per_gpu": work.batch // data,
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
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    share = slice(dist.get_rank() * work.batch // data, (dist.get_rank() + 1) * work.batch // data)
    batch = {name: column[share if data > 1 else slice(None)] for name, column in _batch(work, spec.device).items()}

    def step() -> float:
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step
