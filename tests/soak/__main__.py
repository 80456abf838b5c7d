"""Kill runs at random moments and count what went wrong: `python -m tests.soak --kills 1000`, part of `make soak`.

Several lanes run at the same time, since a run that has lost a rank mostly waits. Every 50 kills, and at the end, the
counts are printed: wrong losses, lost checkpoints, hangs, left processes. The exit status is 1 if any is above 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from tests.ranks import preload
from tests.soak.attempts import Lane, attempt_line, end_processes
from tests.training.tiny import write_corpus

COUNTS = ("wrong losses", "lost checkpoints", "hangs", "left processes", "other faults")
EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Kill runs at random moments.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=3, help="runs at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for all files, kept at the end; default: a temporary one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="megatron_ds-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    preload()
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    lanes = [_start_lane(folder, number, options.seed) for number in range(options.lanes)]
    try:
        counts = _count(dict(lanes), options.kills)
    finally:
        for _, pid in lanes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        end_processes(folder.resolve())
    sys.exit(1 if any(counts[name] for name in COUNTS) else 0)


def _start_lane(folder: Path, number: int, seed: int) -> tuple[int, int]:
    """Fork a lane; return the descriptor from which its attempts are read, a line each, and its pid."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(read)
        lane = Lane(folder / "corpus", folder.resolve() / f"lane{number}", random.Random(f"{seed}/{number}"))
        while True:
            os.write(write, (attempt_line(lane.attempt()) + "\n").encode())
    os.close(write)
    return read, pid


def _count(lanes: dict[int, int], kills: int) -> Counter[str]:
    """Read attempts until so many were hit; print the counts."""
    counts: Counter[str] = Counter()
    begun_s, done, last = time.monotonic(), 0, 0
    rest = dict.fromkeys(lanes, b"")
    while done < kills:
        ready, _, _ = select.select(list(lanes), [], [])
        for descriptor in ready:
            content = os.read(descriptor, 65536)
            assert content, "a lane has ended"
            *lines, rest[descriptor] = (rest[descriptor] + content).split(b"\n")
            for attempt in map(json.loads, lines):
                done += attempt["is_hit"]
                _add(counts, attempt)
        if done // EVERY > last or done >= kills:
            last = done // EVERY
            shown = ", ".join(f"{counts[name]} {name}" for name in COUNTS)
            print(f"{done} kills in {time.monotonic() - begun_s:.0f} s: {shown}", flush=True)
    for name in ("moment", "blow", "launch", "layout"):
        shown = ", ".join(
            f"{key.partition('=')[2]} {counts[key]}" for key in sorted(counts) if key.startswith(f"{name}=")
        )
        print(f"by {name}: {shown}")
    return counts


def _add(counts: Counter[str], attempt: dict[str, object]) -> None:
    if attempt["is_hit"]:
        counts.update(f"{name}={attempt[name]}" for name in ("moment", "blow", "launch", "layout"))
    faults = attempt["faults"]
    assert isinstance(faults, list)
    counts.update(name for name, _ in faults if name)
    if faults:
        print(json.dumps(attempt), flush=True)


if __name__ == "__main__":
    main()
