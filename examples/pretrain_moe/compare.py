"""Show the losses of runs and the balance of their experts, from their metrics.jsonl.

python examples/pretrain_moe/compare.py RUN [RUN ...]
"""

import json
import sys
from pathlib import Path

MEAN_OF = 20  # steps whose training loss is averaged

Line = dict[str, float]


def read(run: str) -> list[Line]:
    """Return the lines of a run's metrics.jsonl, with an objective's or a model's own numbers among the others."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**line, **line.get("metrics", {})} for line in map(json.loads, lines)]


def row(valid: Line, steps: list[Line]) -> str:
    """Return the row of one validation, given the lines of the training steps."""
    before = [line for line in steps if line["step"] <= valid["step"]]
    losses, last = [line["loss"] for line in before[-MEAN_OF:]], before[-1]
    text = f"{valid['step']:6}{sum(losses) / len(losses):10.3f}{valid['valid_loss']:10.3f}"
    if "moe_entropy" in last:
        fewest, mean, most = (last[f"moe_tokens_{name}"] for name in ("min", "mean", "max"))
        text += f"{last['moe_entropy']:10.3f}{fewest / mean:8.2f} to {most / mean:.2f}{last['moe_aux_loss']:10.3f}"
    return text


def main() -> None:
    """Print a table for each run."""
    for run in sys.argv[1:]:
        lines = read(run)
        steps = [line for line in lines if "loss" in line]
        seconds = sum(line["step_s"] for line in steps)
        print(f"{run}: {len(steps)} steps in {seconds:.0f} s")
        print("  step      loss     valid" + "   entropy  tokens/mean  aux loss" * ("moe_entropy" in steps[-1]))
        for line in lines:
            if "valid_loss" in line:
                print(row(line, steps))


if __name__ == "__main__":
    main()
