"""A run twice, and a run from its middle: losses and files are the same bit for bit with `train.deterministic`."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import megatron_ds as mds
from bench.gpu.record import guarded, pick, record, wait_for_turn
from bench.gpu.right.chosen_kernels import read_choice
from bench.gpu.right.small_runs import MODEL
from megatron_ds.engine import preload
from megatron_ds.log import quiet_libraries

STEPS = pick(8, 4)
SEQ = pick(128, 32)
SAMPLES = 64
GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
"""It has dropout."""

RUNS: dict[str, tuple[dict[str, Any], str, int]] = {
    "llama bf16 zero1": (MODEL, "bf16", 1),
    "gpt2 with dropout, bf16 zero2": (GPT2, "bf16", 2),
    "llama fp32 zero3": (MODEL, "fp32", 3),
}
"""Name -> model, precision, ZeRO stage."""


@dataclass(frozen=True)
class Curve:
    """A finished run: its losses by step and the bytes of its last checkpoint's weights."""

    losses: dict[int, float]
    weights: list[bytes]


def main() -> None:
    """Check each run in a temporary directory."""
    quiet_libraries()
    preload()
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        data = Path(folder) / "data.jsonl"
        write_samples(data, SAMPLES, SEQ, vocab_size=500)
        for name, (model, precision, zero) in RUNS.items():
            guarded("resume", name, partial(_check, name, model, precision, zero, data))


def write_samples(path: Path, count: int, length: int, vocab_size: int) -> None:
    """Write random token ids as tokenized data."""
    chance = random.Random(0)
    rows = [{"input_ids": [chance.randrange(3, vocab_size) for _ in range(length)]} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _check(name: str, model: dict[str, Any], precision: str, zero: int, data: Path) -> None:
    def run(title: str, **checkpoint: Any) -> tuple[Path, Curve]:
        output = data.parent / f"{name}-{title}".replace(" ", "_").replace(",", "")
        content = {
            "model": {"config": model},
            "deepspeed": {"zero_optimization": {"stage": zero}, "bf16": {"enabled": precision == "bf16"}},
            "data": {"format": "tokenized", "train": [str(data)], "seq_length": SEQ},
            "train": {
                "steps": STEPS,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "kernels": read_choice(),
                "deterministic": True,
            },
            "checkpoint": {"every": STEPS // 2, **checkpoint},
            "output": str(output),
        }
        mds.train(mds.build_run(content), 1)
        return output, _read(output)

    first_output, first = run("first")
    _, second = run("second")
    _, later = run("later", resume=str(first_output / "checkpoints" / f"step_{STEPS // 2:08d}"))
    resumed = bool(later.losses) and all(first.losses[step] == loss for step, loss in later.losses.items())
    record(
        "resume",
        name,
        first == second and resumed and later.weights == first.weights,
        twice_the_same=first == second,
        resumed_the_same=resumed and later.weights == first.weights,
        resumed_steps=len(later.losses),
    )


def _read(output: Path) -> Curve:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    files = sorted((output / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors"))
    assert files, "the checkpoint has no weights"
    return Curve({row["step"]: row["loss"] for row in rows if "loss" in row}, [file.read_bytes() for file in files])


if __name__ == "__main__":
    wait_for_turn()
    main()
