"""The example of the README by `megatron-ds train` on one rank: export, its check by transformers, and a profile."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu.record import OUT, guarded, pick, record, wait_for_turn

STEPS = pick(40, 4)
NAME = "pretrain_moby_dick, bf16 zero1"
NUM_SHOWN = 300  # characters of a failed command's end


def main() -> None:
    """Run the command; its whole output goes to `command.log`."""
    with tempfile.TemporaryDirectory(prefix="command-") as folder:
        guarded("command", NAME, lambda: _run(Path(folder) / "run"))


def _run(output: Path) -> None:
    words = [sys.executable, "-m", "megatron_ds", "train", "examples/pretrain_moby_dick/run.yaml", "--nproc", "1"]
    words += ["parallel.tensor=1", "parallel.sequence=false", "deepspeed=ds_configs/zero1_bf16.json"]
    words += [f"train.steps={STEPS}", f"train.eval_every={STEPS}", "schedule.warmup_steps=2"]
    words += [f"train.profile.steps=[{STEPS - 1}, {STEPS}]", f"output={output}", f"export.path={output}/hf"]
    began_s = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True)
    seconds = round(time.monotonic() - began_s, 1)
    text = done.stdout + done.stderr
    (OUT / "command.log").write_text(text)
    if done.returncode != 0:
        end = " ".join(text.split())[-NUM_SHOWN:]
        record("command", NAME, False, s=seconds, error=f"status {done.returncode}: {end}")
        return
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    exported = (output / "hf" / "config.json").is_file()  # its check by transformers has passed, or the status is not 0
    profiled = any((output / "profile").iterdir())
    fell = losses[-1] < losses[0]
    record(
        "command",
        NAME,
        fell and exported and profiled,
        s=seconds,
        first_loss=round(losses[0], 4),
        last_loss=round(losses[-1], 4),
        exported=exported,
        profiled=profiled,
    )


if __name__ == "__main__":
    wait_for_turn()
    main()
