"""Contestants that train a whole model: `python -m bench.gpu.fast.train CASE CONTESTANT`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contestant import start_peer
from bench.gpu.fast import models, targets
from bench.gpu.fast.measure import flops_per_token, measure_steps
from bench.gpu.fast.profile import profile
from bench.gpu.fast.targets import COMPILED, DEEPSPEED, OURS, PACKED, THEIRS_COMPILED
from bench.gpu.fast.weights import drawn_model, fill
from bench.gpu.record import (
    DEVICE,
    guarded,
    peak_gb,
    record,
    release_memory,
    reset_peak,
    torch_device,
    wait_for_turn,
)
from bench.ours import columns, engine_fields
from bench.peers import deepspeed_steps, plain_steps
from bench.work import Spec, Work, model_class
from megatron_ds.data.prefetch import pinned
from megatron_ds.engine import preload
from megatron_ds.hf.config import read_model
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo
from megatron_ds.runtime import ModelEngine, session

NUM_DOCUMENTS = 8


@dataclass(frozen=True)
class Case:
    """Work that contestants share.

    Attributes:
        title: the section of its results.
        work: model and batch.
        peft: the config of adapters to train instead of the model.
        times: number of timed steps.
        warm_ups: number of steps before them.
        packed: also measure our steps with several documents in each sequence.
        profiled: record the profile of our steps.
    """

    title: str
    work: Work
    peft: Mapping[str, Any] | None = None
    times: int = 8
    warm_ups: int = 3
    packed: bool = False
    profiled: bool = False


CASES = {
    "llama": Case(targets.LLAMA, models.LLAMA, packed=True, profiled=True),
    "long": Case(targets.LONG, models.LONG, times=2, warm_ups=2, packed=True),
    "lora": Case(targets.LORA, models.ADAPTERS, models.LORA),
    "bert": Case(targets.BERT, models.BERT),
}


# ---- ours ------------------------------------------------------------------------------------------------------------


def run_ours(case: Case, name: str) -> None:
    """Measure our engine, as a Python program builds it; then its packed steps and its profile."""
    work = case.work
    with session() as here:
        loaded = drawn_model(work.model, here.device, peft=case.peft)
        spec = Spec("ours", 1, {"compile": name == COMPILED}, work, "", DEVICE)
        engine = here.build_engine(loaded, **engine_fields(spec))
        batch = columns(work)
        step = steps_on(engine, batch, work.lr)
        frozen = frozen_params(engine) if case.peft else 0
        flops = work.tokens * flops_per_token(loaded.hf, work.seq_length, frozen)
        kernels = ", ".join(engine.engine.kernels) or "PyTorch's"
        measure_steps(
            case.title, name, step, work.tokens, flops, kernels=kernels, times=case.times, warm_ups=case.warm_ups
        )
        if case.profiled:
            guarded("profile", f"{case.title}, {name}", lambda: profile(f"{case.title}, {name}", step))
        if case.packed and name == OURS:
            guarded(case.title, PACKED, lambda: run_packed(case, engine, batch, flops))


def steps_on(engine: ModelEngine, batch: Mapping[str, Tensor], lr: float) -> Callable[[], float]:
    """Return a training step on a batch that stays in page-locked memory, as the training loop's does."""
    micro_batches = pinned(engine.split(batch), engine.device)
    return lambda: engine.train_step(micro_batches, lr).loss


def frozen_params(engine: ModelEngine) -> int:
    """Return the number of the engine's parameters that are not trained."""
    return sum(one.numel() for _, one in engine.engine.local_parameters() if not one.requires_grad)


def run_packed(case: Case, engine: ModelEngine, batch: Mapping[str, Tensor], flops: float) -> None:
    """Measure steps on sequences of several documents of one length; the FLOPs count attention in full."""
    work = case.work
    length = work.seq_length // NUM_DOCUMENTS
    positions = (torch.arange(work.seq_length) % length).expand(work.batch, -1).contiguous()
    step = steps_on(engine, {**batch, "position_ids": positions}, work.lr)
    release_memory()
    reset_peak()
    measure_steps(
        case.title, PACKED, step, work.tokens, flops, same_work=False, times=case.times, warm_ups=case.warm_ups
    )


# ---- theirs ----------------------------------------------------------------------------------------------------------


def run_transformers(case: Case, name: str) -> None:
    """Measure transformers' model in bf16 with torch's fused AdamW, or with DeepSpeed's ZeRO-1 around it."""
    work = case.work
    with alone_under_deepspeed() if name == DEEPSPEED else nullcontext():
        model = peer_model(case)
        spec = Spec("transformers", 1, {}, work, "", DEVICE)
        if name == DEEPSPEED:
            step = deepspeed_steps(model, spec, zero=1, data=1)
        else:
            step = plain_steps(model, spec, torch.compile(model) if name == THEIRS_COMPILED else None)
        frozen = sum(one.numel() for one in model.parameters() if not one.requires_grad)
        flops = work.tokens * flops_per_token(read_model(work.model), work.seq_length, frozen)
        with memory_at_failure(case.title, name):
            measure_steps(case.title, name, step, work.tokens, flops, times=case.times, warm_ups=case.warm_ups)


@contextmanager
def alone_under_deepspeed() -> Iterator[None]:
    """Start DeepSpeed as the only rank, as a script without this package does."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        os.environ[RENDEZVOUS_FILE] = str(Path(folder) / "rendezvous")
        start_peer(RankInfo())
        yield
        torch.distributed.destroy_process_group()


def peer_model(case: Case) -> Any:
    """Return transformers' model in bf16 on the device, with the weights that all contestants begin with."""
    from transformers import AutoConfig

    work, device = case.work, torch_device()
    fields = {name: value for name, value in work.model.items() if name != "model_type"}
    config = AutoConfig.for_model(work.model["model_type"], **fields)
    with device:
        model = model_class(work).from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    fill(model)
    if work.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.peft is not None:
        from peft import get_peft_model
        from peft.mapping import get_peft_config

        model = get_peft_model(model, get_peft_config(dict(case.peft)), autocast_adapter_dtype=False)
    return model.train()


@contextmanager
def memory_at_failure(section: str, name: str) -> Iterator[None]:
    """Record the memory that was in use when a contestant ran out of it: a lower bound of what it needs."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        record(section, name, None, peak_gb=peak_gb(), note=f"out of memory: {str(problem).splitlines()[0][:120]}")
        release_memory()


def main(case_name: str, name: str) -> None:
    """Measure one contestant of a case."""
    case = CASES[case_name]
    preload(name in (COMPILED, THEIRS_COMPILED))
    wait_for_turn()
    reset_peak()
    run = run_ours if name in (OURS, COMPILED) else run_transformers
    guarded(case.title, name, lambda: run(case, name))


if __name__ == "__main__":
    main(*sys.argv[1:])
