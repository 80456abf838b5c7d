"""The losses of the small Llama in fp32 on the CPU, with PyTorch's code: what the other precisions are held against."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bench.gpu.record import OUT, pick, record, wait_for_turn
from bench.gpu.right.small_runs import Setting, train

STEPS = pick(20, 4)
_FILE = OUT / "reference.json"


def main() -> None:
    """Train plain and packed sequences, and keep the losses."""
    found = {}
    for packed in (False, True):
        outcome = train(Setting(zero=0, packed=packed, engine={"kernels": "torch"}), STEPS)
        assert outcome.device == "cpu", outcome.device
        found["packed" if packed else "plain"] = outcome.losses
    _FILE.write_text(json.dumps(found))
    plain = found["plain"]
    record("matrix", "fp32 on the CPU", None, last=round(plain[-1], 4), fell=round(plain[0] - plain[-1], 4))


def reference_losses(packed: bool, steps: int) -> Sequence[float]:
    """Return the losses of the first steps.

    Raises:
        FileNotFoundError: the part `reference` has not run.
    """
    if not _FILE.is_file():
        raise FileNotFoundError(f"{_FILE} is missing; run the part `reference` too")
    losses: list[float] = json.loads(_FILE.read_text())["packed" if packed else "plain"]
    return losses[:steps]


if __name__ == "__main__":
    wait_for_turn()
    main()
