"""The pause of training while a checkpoint is saved, asynchronously and synchronously. Alone on the device."""

from __future__ import annotations

import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import megatron_ds as mds
from bench.gpu.record import guarded, pick, record, wait_for_turn
from bench.gpu.right.chosen_kernels import read_choice
from bench.gpu.right.resume import write_samples
from bench.gpu.right.small_runs import MODEL
from megatron_ds.engine import preload
from megatron_ds.log import quiet_libraries

LARGE = {
    **MODEL,
    "vocab_size": pick(32000, 512),
    "hidden_size": pick(1024, 64),
    "intermediate_size": pick(2816, 128),
    "num_hidden_layers": pick(8, 2),
    "num_attention_heads": pick(16, 4),
    "num_key_value_heads": pick(16, 2),
}
"""168 M parameters: 2.3 GB of weights, masters and moments."""
SAVES = 4
EVERY = pick(60, 1)  # steps, so that a save is written before the next one begins
SEQ = pick(128, 32)
TARGET = 0.1  # of a synchronous pause


def main() -> None:
    """Run both ways and compare the pauses after the first save, which reserves the host memory."""
    quiet_libraries()
    preload()
    with tempfile.TemporaryDirectory(prefix="saves-") as folder:
        data = Path(folder) / "data.jsonl"
        write_samples(data, 64, SEQ, vocab_size=LARGE["vocab_size"])
        pauses = {
            mode: guarded("saves", mode, partial(_pauses, data, mode == "asynchronous"))
            for mode in ("synchronous", "asynchronous")
        }
    if pauses["synchronous"] and pauses["asynchronous"]:
        ratio = pauses["asynchronous"] / pauses["synchronous"]
        record("saves", "asynchronous relative to synchronous", None, ratio=round(ratio, 3), target=TARGET)


def _pauses(data: Path, asynchronous: bool) -> float:
    """Train with saves, record their pauses, and return the median of those after the first."""
    name = "asynchronous" if asynchronous else "synchronous"
    output = data.parent / name
    content = {
        "model": {"config": LARGE},
        "deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
        "data": {"format": "tokenized", "train": [str(data)], "seq_length": SEQ},
        "train": {
            "steps": SAVES * EVERY,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "kernels": read_choice(),
        },
        "checkpoint": {"every": EVERY, "keep": 1, "asynchronous": asynchronous},
        "output": str(output),
    }
    mds.train(mds.build_run(content), 1)
    saves = [json.loads(line) for line in (output / "checkpoints" / "saves.jsonl").read_text().splitlines()]
    pauses = [save["paused_s"] for save in saves]
    median = statistics.median(pauses[1:])
    figures = {"first_s": round(pauses[0], 4), "median_s": round(median, 4), "bytes": saves[-1]["bytes"]}
    record("saves", name, len(saves) == SAVES, waited_s=round(saves[-1]["waited_s"], 4), **figures)
    return median


if __name__ == "__main__":
    wait_for_turn()
    main()
