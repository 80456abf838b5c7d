"""The losses of small models in fp32 on the CPU, with PyTorch's code: what other precisions are held against."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bench.gpu.record import OUT, pick, record, wait_for_turn
from bench.gpu.right.small_runs import Setting, train

STEPS = pick(20, 4)
RUNS: dict[str, dict[str, bool]] = {"plain": {}, "packed": {"packed": True}, "experts": {"experts": True}}
"""Options of their settings, by name."""
_FILE = OUT / "reference.json"


def main() -> None:
    """Train the Llama on plain and on packed sequences, and the mixture of experts; keep the losses."""
    found = {}
    for name, options in RUNS.items():
        outcome = train(Setting(zero=0, engine={"kernels": "torch"}, **options), STEPS)
        assert outcome.device == "cpu", outcome.device
        found[name] = outcome.losses
    _FILE.write_text(json.dumps(found))
    plain = found["plain"]
    record("matrix", "fp32 on the CPU", None, last=round(plain[-1], 4), fell=round(plain[0] - plain[-1], 4))


def reference_losses(name: str, steps: int) -> Sequence[float]:
    """Return the losses of the first steps of one of the `RUNS`.

    Raises:
        FileNotFoundError: the part `reference` has not run.
    """
    if not _FILE.is_file():
        raise FileNotFoundError(f"{_FILE} is missing; run the part `reference` too")
    losses: list[float] = json.loads(_FILE.read_text())[name]
    return losses[:steps]


if __name__ == "__main__":
    wait_for_turn()
    main()
