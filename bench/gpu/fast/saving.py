"""The pause of an asynchronous save against a synchronous one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.gpu.fast import models
from bench.gpu.fast.targets import LATER, SYNCHRONOUS
from bench.gpu.fast.targets import SAVING as TITLE
from bench.gpu.fast.train import steps_on
from bench.gpu.fast.weights import drawn_model
from bench.gpu.record import DEVICE, guarded, pick, record, synchronize, time_runs, wait_for_turn
from bench.ours import columns, engine_fields
from bench.work import Spec
from megatron_ds.checkpoint.saver import Saver
from megatron_ds.engine import preload
from megatron_ds.runtime import ModelEngine, session
from megatron_ds.runtime.saving import make_saver

FIRST = "asynchronous, the first"
WORK = models.work({**models.LLAMA_1B, "num_hidden_layers": 4}, 2, pick(1024, 32))


def main() -> None:
    """Save a state synchronously, then twice asynchronously; the first of these also allocates its memory."""
    with session() as here, tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        loaded = drawn_model(WORK.model, here.device)
        engine = here.build_engine(loaded, **engine_fields(Spec("ours", 1, {}, WORK, "", DEVICE)))
        step = steps_on(engine, columns(WORK), WORK.lr)
        step_s = time_runs(step, times=pick(5, 2)).median_s

        def saver(asynchronous: bool) -> Saver:
            place = Path(folder) / str(asynchronous)
            return make_saver(engine.engine, loaded, engine.plan, place, keep=1, asynchronous=asynchronous)

        asynchronous = saver(True)
        for name, by in ((SYNCHRONOUS, saver(False)), (FIRST, asynchronous), (LATER, asynchronous)):
            step()  # each save has a step of its own, which names it
            guarded(TITLE, name, lambda: save(name, by, engine, step, step_s))  # noqa: B023


def save(name: str, saver: Saver, engine: ModelEngine, step: Callable[[], float], step_s: float) -> None:
    """Save and do a step; the pause is what both take beyond a step, as copies may slow the next step down."""
    synchronize()
    began_s = time.perf_counter()
    saver.save(engine.progress)
    step()
    synchronize()
    paused_s = time.perf_counter() - began_s - step_s
    saved = saver.wait()
    assert saved is not None
    record(
        TITLE,
        name,
        None,
        pause_s=round(max(0.0, paused_s), 4),
        written_s=round(saved.written_s, 3),
        gb=round(saved.bytes / 1e9, 3),
        host_gb=round(saved.host_bytes / 1e9, 3),
    )


if __name__ == "__main__":
    preload()
    wait_for_turn()
    guarded(TITLE, "save", main)
