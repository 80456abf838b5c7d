"""The device's table for plans: products, attention and streams as `megatron-ds plan --calibrate` measures them.

With several GPUs all of them work at the same time, and their collectives and messages are measured too. The profile is
written to `$OUT`, where `megatron-ds plan --device FILE` reads it; docs/planning.md says how it comes with the package.
"""

from __future__ import annotations

import time

from bench.gpu.record import DEVICE, OUT, guarded, pick, record, wait_for_turn
from megatron_ds.engine import preload
from megatron_ds.planner.calibration.calibrate import Sizes, calibrate, usual_sizes, write_profile
from megatron_ds.planner.calibration.measure_operations import STREAMS
from megatron_ds.planner.operations import Attention, Product, Stream
from megatron_ds.planner.profiles import Device, Link, find_by_gpu, measured_file_name
from megatron_ds.planner.profiles.device import MeasuredProduct

SECTION = "profile of this device, for `megatron-ds plan --device`"
BUDGET_S = 25.0  # of the operations; rounds after the first one are left out if they would take longer
LONG = "its fastest product, at the clock of long runs"
SMALL = Sizes(
    products=[Product(m, 64, 64, dtype=dtype) for m in (16, 64) for dtype in ("float32", "bfloat16")],
    attention=[Attention(1, 2, 2, 16, 32, 32, 32 * 33 // 2, backward, "float32") for backward in (False, True)],
    streams=[Stream(4096, name=name) for name in STREAMS],
    buffers=[1024, 65536],
    steady_s=0.1,
)


def main() -> None:
    """Measure and write the profile, and record its figures."""
    began_s = time.monotonic()
    device = calibrate("here", None if DEVICE == "cuda" else 1, pick(usual_sizes(DEVICE), SMALL), BUDGET_S)
    path = OUT / measured_file_name(device)
    write_profile(device, path)
    num_operations = sum(map(len, (device.measured_products, device.measured_attention, device.measured_streams)))
    tflops = _product(_fastest(device)).flops / _fastest(device).us / 1e6
    record(
        SECTION,
        path.name,
        None,
        **_figures(device),
        **_of_products(tflops, device),
        operations=num_operations,
        s=round(time.monotonic() - began_s, 1),
    )
    record(SECTION, LONG, None, **_of_products(tflops * device.steady, device), of_burst=device.steady)


def _figures(device: Device) -> dict[str, float]:
    """Return the memory's bandwidth, the time of a kernel with nothing to do, and of several GPUs their best sum."""
    known = find_by_gpu(device.gpu) if device.gpu is not None else None
    found = {"memory_gb_s": device.memory_gb_s, "launch_us": device.streams.launch_us}
    if known is not None:
        found["of_bandwidth"] = round(device.memory_gb_s / known.memory_gb_s, 3)
    if isinstance(device.link, Link):
        sums = [row for row in device.link.measured if row.kind == "all_reduce" and row.axis is None]
        found["all_reduce_gb_s"] = round(
            max(2 * (row.ranks - 1) / row.ranks * row.num_bytes / row.us for row in sums) / 1e3, 1
        )
    return found


def _of_products(tflops: float, device: Device) -> dict[str, float]:
    """Return a rate of products in bf16, and its share of the data sheet's peak, which a CPU has not."""
    share = {} if device.gpu is None else {"of_peak": round(tflops * 1e12 / device.peak_flops("bfloat16"), 3)}
    return {"tflops": float(f"{tflops:.4g}"), **share}


def _product(row: MeasuredProduct) -> Product:
    return Product(row.m, row.n, row.k, row.batch, row.dtype)


def _fastest(device: Device) -> MeasuredProduct:
    rows = [one for one in device.measured_products if one.dtype == "bfloat16"]
    return max(rows, key=lambda one: _product(one).flops / one.us)


if __name__ == "__main__":
    preload()
    wait_for_turn()
    guarded(SECTION, "measurement", main)
