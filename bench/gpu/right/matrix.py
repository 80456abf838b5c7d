"""Twenty steps of a small Llama at every ZeRO stage and precision, with offload, recomputation, packing, compilation.

Losses are held against those of fp32 on the CPU. `python -m bench.gpu.right.matrix GROUP [NAME ...]` runs the settings
of a group, or some of them, each in a process of its own.
"""

from __future__ import annotations

import math
import sys
from functools import partial

from bench.gpu.record import DEVICE, guarded, pick, record, wait_for_turn
from bench.gpu.right.reference import STEPS, reference_losses
from bench.gpu.right.small_runs import Setting, largest_difference, train
from megatron_ds.engine import DeviceSettings

BOUNDS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3, "tf32": 2e-3}
"""Largest relative difference of a loss from fp32's on the CPU, over all steps.

bf16 rounds weights and activations by up to 2^-9 and fp16 by 2^-12; a loss, a mean over many tokens, differs by less
than a few such steps. TF32 rounds the factors of products by 2^-11. Seen on a CPU: 1e-7 for fp32 sums in another order,
2.4e-3 for bf16.
"""

DETERMINISTIC = DeviceSettings(deterministic=True)
OPTIMIZER_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
FULL_OFFLOAD = {**OPTIMIZER_OFFLOAD, "offload_param": {"device": "cpu"}}
LONG_SEQUENCES = {"recompute": "full", "offload_activations": True, "mlp_tile_tokens": pick(96, 24)}


def _settings(precision: str) -> dict[str, Setting]:
    """Return the settings of a precision: each ZeRO stage, then each option at a stage that it works with."""
    first = 0 if precision == "fp32" else 1  # DeepSpeed keeps fp32 masters of 16-bit weights from stage 1 on
    found = {f"zero{stage}": Setting(precision, stage) for stage in range(first, 4)}
    found["zero1 packed"] = Setting(precision, 1, packed=True)
    found["zero1 deterministic"] = Setting(precision, 1, devices=DETERMINISTIC)
    if precision == "fp32":
        found["zero1 tf32"] = Setting(precision, 1, devices=DeviceSettings(tf32=True))
        return found
    found["zero1 offload"] = Setting(precision, 1, OPTIMIZER_OFFLOAD)
    found["zero2 offload"] = Setting(precision, 2, OPTIMIZER_OFFLOAD)
    found["zero3 offload"] = Setting(precision, 3, FULL_OFFLOAD)
    found["zero1 overlap"] = Setting(precision, 1, {"overlap_comm": True})
    found["zero1 recompute full"] = Setting(precision, 1, engine={"recompute": "full"})
    kept = {"recompute": "full", "keep_attention": True}
    found["zero1 recompute full keep attention"] = Setting(precision, 1, engine=kept)
    found["zero1 recompute selective"] = Setting(precision, 1, engine={"recompute": "selective"})
    found["zero3 deterministic"] = Setting(precision, 3, devices=DETERMINISTIC)
    found["zero2 recompute full"] = Setting(precision, 2, engine={"recompute": "full"})
    found["zero3 recompute full"] = Setting(precision, 3, engine={"recompute": "full"})
    found["zero1 tiles, inputs in host memory"] = Setting(precision, 1, engine=LONG_SEQUENCES)
    found["zero3 tiles, inputs in host memory"] = Setting(precision, 3, engine=LONG_SEQUENCES)
    return found


SETTINGS: dict[str, dict[str, Setting]] = {
    **{precision: _settings(precision) for precision in ("fp32", "bf16", "fp16")},
    "compiled": {
        "bf16 zero1": Setting("bf16", 1, engine={"compile": True}),
        "bf16 zero1 packed": Setting("bf16", 1, engine={"compile": True}, packed=True),
        "bf16 zero2": Setting("bf16", 2, engine={"compile": True}),
        "bf16 zero3": Setting("bf16", 3, engine={"compile": True}),
        "bf16 zero1 deterministic": Setting("bf16", 1, engine={"compile": True}, devices=DETERMINISTIC),
    },
    "compiled-more": {
        "fp32 zero1": Setting("fp32", 1, engine={"compile": True}),
        "fp16 zero1": Setting("fp16", 1, engine={"compile": True}),
        "fp16 zero3": Setting("fp16", 3, engine={"compile": True}),
        "bf16 zero1 recompute full": Setting("bf16", 1, engine={"compile": True, "recompute": "full"}),
    },
}


def main(group: str, *names: str) -> None:
    """Run the named settings of a group; none = all."""
    for name in names or SETTINGS[group]:
        guarded("matrix", f"{group} {name}", partial(_run, f"{group} {name}", SETTINGS[group][name]))


def _run(title: str, setting: Setting) -> None:
    """Train with a setting and record how far its losses are from the reference's."""
    if setting.precision == "fp16" and DEVICE == "cpu":
        record("matrix", title, None, skipped="DeepSpeed has no fp16 on CPUs")
        return
    outcome = train(setting, STEPS)
    rounding = "tf32" if setting.devices.tf32 else setting.precision
    off = largest_difference(outcome.losses, list(reference_losses("packed" if setting.packed else "plain", STEPS)))
    finite = all(map(math.isfinite, [*outcome.losses, *outcome.norms]))
    right = finite and off < BOUNDS[rounding] and outcome.applied == STEPS and outcome.device.startswith(DEVICE)
    record(
        "matrix",
        title,
        right,
        difference=float(f"{off:.2e}"),
        bound=BOUNDS[rounding],
        last_loss=round(outcome.losses[-1], 4),
        last_norm=round(outcome.norms[-1], 3),
        applied=outcome.applied,
        ms=outcome.ms,
        peak_gb=outcome.peak_gb,
    )


if __name__ == "__main__":
    wait_for_turn()
    main(*sys.argv[1:])
