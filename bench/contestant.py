"""One contestant: a process with its forked ranks, which runs the requested numbers of steps.

Its standard input has numbers of steps, one per line. For each of them, and once at the start, rank 0 writes a line of
JSON to the original standard output. All other output goes to standard error.
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
"""Do the work once and return its loss, or 0."""

RUNNERS = {
    "transformers": "bench.peers:transformers_alone",
    "transformers-tp": "bench.peers:transformers_tp",
    "autotp": "bench.peers:autotp",
    "autoep": "bench.peers:autoep",
    "deepspeed": "bench.peers:deepspeed_zero",
    "ulysses": "bench.ulysses:train",
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


IN_CHILDREN = ("from-pretrained", "start", "cp", "map", "prepare")  # their work is done by child processes


def main() -> None:
    """Read the spec named on the command line, start its ranks, and serve steps until the input ends."""
    spec = Spec.read(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the output of libraries must not mix with the answers
    module, _, name = RUNNERS[spec.runner].partition(":")
    build = getattr(importlib.import_module(module), name)
    if spec.world == 1 and spec.runner != "ours":
        _serve(build(spec), spec, channel, 0, _alone)
        return
    from megatron_ds.engine import preload, start_distributed, stop_distributed
    from megatron_ds.parallel.launch import run_local

    preload(spec.options.get("compile", False))
    start = start_distributed if spec.runner == "ours" else start_peer

    def rank(info: Any) -> None:
        start(info)
        _serve(build(spec), spec, channel, info.rank, _meeting(info.world_size) if info.world_size > 1 else _alone)
        stop_distributed()

    run_local(rank, spec.world)


def start_peer(info: Any) -> None:
    """Join the process group as a script without this package does: gloo's collectives, the C library's defaults."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from megatron_ds.parallel.launch import RENDEZVOUS_FILE

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(info.local_rank)
    else:
        deepspeed.ops.__compatible_ops__ = {}  # does not compile its all-reduce through shared memory
    os.environ["LOCAL_RANK"] = str(info.local_rank)
    place = f"file://{os.environ[RENDEZVOUS_FILE]}"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=place, rank=info.rank, world_size=info.world_size)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


FromAll = Callable[[float], list[float]]
"""Gather a number from every rank; returns the list by rank."""


def _alone(value: float) -> list[float]:
    return [value]


def _meeting(ranks: int) -> FromAll:
    """Return a gather over gloo on any device, because a rank that waits for its turn must not keep a GPU busy."""
    import torch
    import torch.distributed as dist

    group = dist.new_group(list(range(ranks)), backend="gloo")

    def from_all(value: float) -> list[float]:
        parts = [torch.zeros(1, dtype=torch.float64) for _ in range(ranks)]
        dist.all_gather(parts, torch.tensor([value], dtype=torch.float64), group=group)
        return [float(part) for part in parts]

    return from_all


def _serve(step: Step, spec: Spec, channel: Any, rank: int, from_all: FromAll) -> None:
    """Report that the rank is ready, then run the requested numbers of steps until the input ends."""
    if rank == 0:
        channel.write(json.dumps({"ready": True}) + "\n")
    processes = _Processes() if spec.runner in IN_CHILDREN else None
    while count := int(from_all(_next_count() if rank == 0 else 0)[0]):  # waiting ranks sleep
        began_s = time.perf_counter()
        for _ in range(count):
            loss = step()
        _synchronize(spec)
        seconds = time.perf_counter() - began_s
        losses = from_all(loss)
        peaks = [float(processes.peak_bytes)] if processes is not None else from_all(_peak_bytes(spec))
        if rank == 0:
            answer = {"seconds": seconds, "steps": count, "loss": sum(losses) / len(losses), "peaks": peaks}
            channel.write(json.dumps(answer) + "\n")


def _next_count() -> int:
    return int(sys.stdin.readline().strip() or 0)


def _synchronize(spec: Spec) -> None:
    if spec.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _peak_bytes(spec: Spec) -> int:
    """Return the peak memory of this rank: resident memory on CPU, allocated tensors on a GPU."""
    if spec.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage may include the peak of the parent process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class _Processes:
    """Sample the memory of this process and its children five times a second, and keep the largest."""

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
