"""A few training steps of a small Llama or mixture of experts in forked ranks, with settings as a user writes them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gpu.record import DEVICE, peak_gb, pick, reset_peak, synchronize
from bench.gpu.right.chosen_kernels import read_choice
from megatron_ds.engine import DEFAULT_SETTINGS, DeviceSettings, preload, start_distributed, stop_distributed
from megatron_ds.log import quiet_libraries
from megatron_ds.parallel.launch import RankInfo, run_local
from megatron_ds.runtime import ModelEngine, Session, load_model
from tests.staged import stage_collectives

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": pick(2048, 512),
    "hidden_size": pick(256, 64),
    "intermediate_size": pick(704, 128),
    "num_hidden_layers": pick(4, 2),
    "num_attention_heads": pick(8, 4),
    "num_key_value_heads": pick(4, 2),
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    **MODEL,
    "model_type": "qwen3_moe",
    "head_dim": pick(32, 16),
    "moe_intermediate_size": pick(192, 32),
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
SEQ = pick(128, 32)
BATCH, MICRO_BATCH = 8, 2
BATCHES = 2  # global batches, in turn: few, so that the loss falls
LR = 5e-4
FIRST_SCALE = 12  # fp16's dynamic scale begins at 2 to this power, so that no step of a small model is skipped


@dataclass(frozen=True)
class Setting:
    """Precision, ZeRO stage and options of a run.

    Attributes:
        precision: "fp32", "bf16" or "fp16".
        zero: ZeRO stage.
        deepspeed: further keys of `zero_optimization`.
        engine: further fields of an `EngineConfig`.
        packed: several documents per sequence.
        ranks: number of ranks, all on one device.
        devices: settings of the device.
        experts: train the mixture of experts instead of the Llama.
    """

    precision: str = "fp32"
    zero: int = 1
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False
    ranks: int = 1
    devices: DeviceSettings = DEFAULT_SETTINGS
    experts: bool = False

    def fields(self) -> dict[str, Any]:
        """Return the fields of its `EngineConfig`."""
        table: dict[str, Any] = {"zero_optimization": {"stage": self.zero, **self.deepspeed}}
        if self.precision == "bf16":
            table["bf16"] = {"enabled": True}
        if self.precision == "fp16":
            table["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": FIRST_SCALE}
        return {
            "deepspeed": table,
            "optimizer": {"lr": LR},
            "global_batch_size": BATCH,
            "micro_batch_size": MICRO_BATCH,
            "kernels": read_choice(),
            **self.engine,
        }


@dataclass(frozen=True)
class Outcome:
    """Results of rank 0.

    Attributes:
        losses, norms: loss and gradient norm of each step.
        applied: number of steps that were not skipped.
        ms: median time of a step, in milliseconds.
        peak_gb: peak of the device's memory; None on a CPU.
        device: the device of the parameters.
        staged_calls: number of collectives that went through host memory.
    """

    losses: list[float]
    norms: list[float]
    applied: int
    ms: float
    peak_gb: float | None
    device: str
    staged_calls: int


def train(setting: Setting, steps: int, timeout_s: float = 150.0) -> Outcome:
    """Train in forked ranks, which share the device if there are several. This process must not have used CUDA."""
    quiet_libraries()
    preload(compiles=bool(setting.engine.get("compile")))
    return run_local(lambda info: _rank(info, setting, steps), setting.ranks, timeout_s)[0]


def build(info: RankInfo, setting: Setting, timeout_s: float = 120.0) -> ModelEngine:
    """Join the process group and build this rank's engine."""
    device = start_distributed(info, timeout_s=timeout_s, settings=setting.devices)
    return Session(info, device).build_engine(load_model(EXPERTS if setting.experts else MODEL), **setting.fields())


def global_batch(step: int, packed: bool = False) -> dict[str, Tensor]:
    """Return the columns of a global batch, (BATCH, SEQ) each; the first sequence has fewer labels than the others."""
    generator = torch.Generator().manual_seed(3 + step % BATCHES)
    ids = torch.randint(3, MODEL["vocab_size"], (BATCH, SEQ), generator=generator)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    targets[0, : SEQ // 3] = -100
    columns = {"input_ids": ids, "targets": targets}
    if packed:
        columns["position_ids"] = (torch.arange(SEQ) % (SEQ // 4 + 1)).expand(BATCH, -1).contiguous()
    return columns


def _rank(info: RankInfo, setting: Setting, steps: int) -> Outcome:
    shares_device = info.world_size > 1 and DEVICE == "cuda"
    staging = stage_collectives(everything=not shares_device) if info.world_size > 1 else None
    engine = build(info, setting)
    batches = [engine.split(global_batch(step, setting.packed)) for step in range(BATCHES)]
    results, times_s = [], []
    reset_peak()
    for step in range(steps):
        synchronize()
        began_s = time.perf_counter()
        results.append(engine.train_step(batches[step % BATCHES], LR))
        synchronize()
        times_s.append(time.perf_counter() - began_s)
    _, parameter = next(iter(engine.engine.local_parameters()))
    outcome = Outcome(
        losses=[result.loss for result in results],
        norms=[result.grad_norm for result in results],
        applied=sum(result.applied for result in results),
        ms=round(sorted(times_s)[len(times_s) // 2] * 1e3, 1),
        peak_gb=peak_gb(),
        device=str(parameter.device),
        staged_calls=sum(staging.calls.values()) if staging is not None else 0,
    )
    stop_distributed()
    return outcome


def largest_difference(found: list[float], reference: list[float]) -> float:
    """Return the largest relative difference of two curves; infinity if a value is NaN."""
    differences = [abs(one / other - 1) for one, other in zip(found, reference, strict=True)]
    return max(one if one == one else float("inf") for one in differences)
