"""NCCL with one rank, which training uses on one GPU, and what it answers to two ranks on one GPU."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

from bench.gpu.record import DEVICE, guarded, record, wait_for_turn

LIMIT_S = 40.0
CODE = """
import datetime, sys, torch, torch.distributed as dist
rank, ranks, port = map(int, sys.argv[1:])
torch.cuda.set_device(0)
dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks,
                        timeout=datetime.timedelta(seconds=20))
x = torch.ones(4, device="cuda")
dist.all_reduce(x)
torch.cuda.synchronize()
print("sum", x[0].item(), flush=True)
dist.destroy_process_group()
"""
ANSWER = re.compile(r"^sum |ncclInvalidUsage|Duplicate GPU|Error: ")
"""What a line has that tells what came of it; the last such line counts."""


def main() -> None:
    """Start one rank, then two."""
    if DEVICE != "cuda":
        record("layouts", "nccl", None, answer="no GPU")
        return
    guarded("layouts", "nccl, 1 rank", _one)
    guarded("layouts", "nccl, 2 ranks on one GPU", _two)


def _one() -> None:
    answer = _ask(1)
    record("layouts", "nccl, 1 rank", answer == "sum 1.0", answer=answer)


def _two() -> None:
    record("layouts", "nccl, 2 ranks on one GPU", None, answer=_ask(2))


def _ask(ranks: int) -> str:
    """Return what rank 0 says: its sum, or its error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(rank), str(ranks), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "NCCL_MULTI_RANK_GPU_ENABLE": "1"},  # from NCCL 2.30 on
        )
        for rank in range(ranks)
    ]
    answers = []
    for process in started:
        try:
            lines = process.communicate(timeout=LIMIT_S)[0].strip().splitlines()
            telling = [line for line in lines if ANSWER.search(line)] or lines or ["nothing"]
            answers.append(telling[-1][:200])
        except subprocess.TimeoutExpired:
            process.kill()
            answers.append(f"no end in {LIMIT_S:.0f} s")
    return answers[0]


if __name__ == "__main__":
    wait_for_turn()
    main()
