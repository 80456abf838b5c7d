"""One contestant: a process, and the ranks that it forks, that does steps when it is told to.

Its standard input brings numbers of steps, one a line; for each, and once at the start, its rank 0 writes a line of
JSON to what was its standard output. Everything else that is said goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench.work import Spec

Step = Callable[[], float]
"""Does the work once; returns its loss, or 0."""

RUNNERS = {
    "transformers": "bench.peers:transformers_alone",
    "transformers-tp": "bench.peers:transformers_tp",
    "autotp": "bench.peers:autotp",
    "deepspeed": "bench.peers:deepspeed_zero",
    "ours": "bench.ours:train",
    "gemm": "bench.gemm:products",
    "cp": "bench.files:copy",
    "rewrite": "bench.files:rewrite_directory",
    "from-pretrained": "bench.files:from_pretrained",
    "start": "bench.files:start_training",
    "loop": "bench.files:plain_loop",
    "map": "bench.files:datasets_map",
    "prepare": "bench.files:prepare_corpus",
}


IN_CHILDREN = ("from-pretrained", "start", "cp", "map", "prepare")  # whose work is done by processes of their own


def main() -> None:
    spec = Spec.read(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    module, _, name = RUNNERS[spec.runner].partition(":")
    build = getattr(importlib.import_module(module), name)
    if spec.world == 1 and spec.runner != "ours":
        _serve(build(spec), spec, channel, 0, _alone)
        return
    from megatron_ds.engine import preload, start_distributed, stop_distributed
    from megatron_ds.parallel.launch import run_local

    preload(spec.options.get("compile", False))

    def rank(info: Any) -> None:
        start_distributed(info)
        _serve(build(spec), spec, channel, info.rank, _meeting(info.world_size) if info.world_size > 1 else _alone)
        stop_distributed()

    run_local(rank, spec.world)


FromAll = Callable[[float], list[float]]
"""Every rank's value, by rank."""


def _alone(value: float) -> list[float]:
    return [value]


def _meeting(ranks: int) -> FromAll:
    """By gloo on any device: a rank that waits for its turn must not keep a GPU busy."""
    import torch
    import torch.distributed as dist

    group = dist.new_group(list(range(ranks)), backend="gloo")

    def from_all(value: float) -> list[float]:
        parts = [torch.zeros(1, dtype=torch.float64) for _ in range(ranks)]
        dist.all_gather(parts, torch.tensor([value], dtype=torch.float64), group=group)
        return [float(part) for part in parts]

    return from_all


def _serve(step: Step, spec: Spec, channel: Any, rank: int, from_all: FromAll) -> None:
    """Ready, then steps as often as asked, until no number comes."""
    if rank == 0:
        channel.write(json.dumps({"ready": True}) + "\n")
    processes = _Processes() if spec.runner in IN_CHILDREN else None
    while count := int(from_all(_told() if rank == 0 else 0)[0]):  # who waits sleeps
        began_s = time.perf_counter()
        for _ in range(count):
            loss = step()
        _synchronize(spec)
        seconds = time.perf_counter() - began_s
        losses = from_all(loss)
        peaks = [float(processes.peak_bytes)] if processes is not None else from_all(_peak_bytes(spec))
        if rank == 0:
            told = {"seconds": seconds, "steps": count, "loss": sum(losses) / len(losses), "peaks": peaks}
            channel.write(json.dumps(told) + "\n")


def _told() -> int:
    return int(sys.stdin.readline().strip() or 0)


def _synchronize(spec: Spec) -> None:
    if spec.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _peak_bytes(spec: Spec) -> int:
    """The most that this rank held: resident memory on CPU, allocated tensors on a GPU."""
    if spec.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's would be that of the process that started this one, where it held more
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class _Processes:
    """The most that this process or one below it holds, seen five times a second."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            for one in (me, *me.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.peak_bytes = max(self.peak_bytes, one.memory_info().rss)
            time.sleep(0.2)


if __name__ == "__main__":
    main()
