"""Losses over 20 steps against transformers in fp32 on the CPU: the same weights, batch and optimizer."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.gpu.fast.models import LOSSES
from bench.gpu.fast.targets import LOSSES as TITLE
from bench.gpu.fast.train import steps_on
from bench.gpu.fast.weights import drawn_model, fill
from bench.gpu.record import DEVICE, guarded, pick, record, wait_for_turn
from bench.ours import columns, engine_fields
from bench.peers import plain_steps
from bench.work import Spec, Work
from megatron_ds.engine import preload
from megatron_ds.runtime import session

STEPS = pick(20, 3)
CPU = torch.device("cpu")


def reference(work: Work) -> list[float]:
    """Return the losses of transformers' model, whose weights are those of bf16."""
    fields = {name: value for name, value in work.model.items() if name != "model_type"}
    config = AutoConfig.for_model(work.model["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    fill(model)
    step = plain_steps(model.float().train(), Spec("transformers", 1, {}, replace(work, dtype="fp32"), "", "cpu"))
    return [step() for _ in range(STEPS)]


def main() -> None:
    """Record the largest relative difference in each precision."""
    expected = reference(LOSSES)
    record(TITLE, "transformers, fp32 on the CPU", None, first_loss=expected[0], last_loss=expected[-1])
    with session() as here:
        for precision in ("fp32", "bf16"):
            work = replace(LOSSES, dtype=precision)
            engine = here.build_engine(
                drawn_model(work.model, CPU), **engine_fields(Spec("ours", 1, {}, work, "", DEVICE))
            )
            step = steps_on(engine, columns(work), work.lr)
            losses = [step() for _ in range(STEPS)]
            off = max(abs(one - other) / abs(other) for one, other in zip(losses, expected))
            record(
                TITLE, f"ours, {precision}", None, off=float(f"{off:.3g}"), first_loss=losses[0], last_loss=losses[-1]
            )


if __name__ == "__main__":
    preload()
    wait_for_turn()
    guarded(TITLE, "losses", main)
