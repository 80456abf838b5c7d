"""Several ranks on the one device, with collectives through host memory: losses and norms are those of one rank.

`python -m bench.gpu.right.layouts [NAME ...]` runs all layouts, or some of them.
"""

from __future__ import annotations

import sys
from functools import cache, partial

from bench.gpu.record import DEVICE, guarded, pick, record, wait_for_turn
from bench.gpu.right.matrix import FULL_OFFLOAD, OPTIMIZER_OFFLOAD
from bench.gpu.right.small_runs import LR, Outcome, Setting, largest_difference, train
from megatron_ds.engine import DeviceSettings

STEPS = pick(5, 3)
LOSS_BOUND, NORM_BOUND = 1e-5, 1e-4  # fp32 sums in another order
BF16_BOUND = 1e-2  # each rank rounds its partial sums

TWO = DeviceSettings(tensor=2)  # the order of kernels that the overlap of reductions needs
TENSOR = {"parallel": {"tensor": 2}}
SEQUENCE = {"parallel": {"tensor": 2, "sequence": True}}
PIPELINE = {"parallel": {"pipeline": 2}}
ULYSSES, GATHER, RING = ({"parallel": {"context": {"size": 2, "method": one}}} for one in ("ulysses", "gather", "ring"))

# In fp32, because in bf16 the iterations of Muon enlarge what sums in another order differ by
MUON = {"optimizer": {"name": "muon", "lr": LR, "options": {"ns_dtype": "fp32"}}}

LAYOUTS = {
    "tp2": Setting(engine=TENSOR, ranks=2, devices=TWO),
    "tp2 sequence": Setting(engine=SEQUENCE, ranks=2, devices=TWO),
    "tp2 sequence bf16": Setting("bf16", engine=SEQUENCE, ranks=2),
    "tp2 sequence packed": Setting(engine=SEQUENCE, packed=True, ranks=2),
    "tp2 recompute full": Setting(engine={**TENSOR, "recompute": "full"}, ranks=2),
    "pp2": Setting(engine=PIPELINE, ranks=2),
    "pp2 bf16": Setting("bf16", engine=PIPELINE, ranks=2),
    "dp2 zero0": Setting(zero=0, ranks=2),
    "dp2 zero1": Setting(zero=1, ranks=2),
    "dp2 zero2": Setting(zero=2, ranks=2),
    "dp2 zero3": Setting(zero=3, ranks=2),
    "dp2 zero3 bf16 offload": Setting("bf16", 3, FULL_OFFLOAD, ranks=2),
    "dp2 zero2 fp16": Setting("fp16", 2, ranks=2),
    "cp2 ulysses bf16 packed": Setting("bf16", engine=ULYSSES, packed=True, ranks=2),
    "cp2 gather bf16": Setting("bf16", engine=GATHER, ranks=2),
    "cp2 ring bf16 keep attention": Setting(
        "bf16", engine={**RING, "recompute": "full", "keep_attention": True}, ranks=2
    ),
    "tp2 pp2 sequence": Setting(engine={"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}}, ranks=4),
    "tp4 sequence": Setting(engine={"parallel": {"tensor": 4, "sequence": True}}, ranks=4),
    "tp2 dp2 zero3": Setting(engine=TENSOR, zero=3, ranks=4),
    "tp2 sequence muon": Setting(engine={**SEQUENCE, **MUON}, ranks=2),
    "dp2 zero3 muon": Setting(engine=MUON, zero=3, ranks=2),
    "dp2 zero2 offload muon": Setting(zero=2, deepspeed=OPTIMIZER_OFFLOAD, engine=MUON, ranks=2),
    "tp2 sequence compiled": Setting(engine={**SEQUENCE, "compile": True}, ranks=2),
}
"""The last one compiles, which takes longest."""


def main(*names: str) -> None:
    """Train at the named layouts, each in ranks of its own; none = all."""
    plain = _alone(False, False)
    record("layouts", "one rank", None, loss=round(plain.losses[-1], 5), ms=plain.ms)
    for name in names or LAYOUTS:
        setting = LAYOUTS[name]
        alone = _alone(setting.packed, MUON.keys() <= setting.engine.keys())
        guarded("layouts", name, partial(compare, name, setting, alone))


@cache
def _alone(packed: bool, muon: bool) -> Outcome:
    """Train with one rank."""
    return train(Setting(packed=packed, engine=MUON if muon else {}), STEPS)


def compare(name: str, setting: Setting, alone: Outcome) -> None:
    """Train with several ranks, and record how far losses and norms are from those of one rank."""
    if setting.precision == "fp16" and DEVICE == "cpu":
        record("layouts", name, None, skipped="DeepSpeed has no fp16 on CPUs")
        return
    found = train(setting, STEPS)
    loss, norm = largest_difference(found.losses, alone.losses), largest_difference(found.norms, alone.norms)
    exact = setting.precision == "fp32"
    right = loss < (LOSS_BOUND if exact else BF16_BOUND) and norm < (NORM_BOUND if exact else 10 * BF16_BOUND)
    record(
        "layouts",
        name,
        right and found.staged_calls > 0,
        ranks=setting.ranks,
        loss_difference=float(f"{loss:.1e}"),
        norm_difference=float(f"{norm:.1e}"),
        ms=found.ms,
        staged_calls=found.staged_calls,
    )


if __name__ == "__main__":
    wait_for_turn()
    main(*sys.argv[1:])
