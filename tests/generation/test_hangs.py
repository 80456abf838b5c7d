"""A rank that stops ends the generation of all."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.errors import LaunchError
from megatron_ds.generation import run
from megatron_ds.parallel import launch
from megatron_ds.parallel import watchdog as watchdog_module
from tests.data.tiny_tokenizers import save_chat
from tests.generation.models import KINDS, save_model
from tests.ranks import preload


@pytest.mark.sweep
def test_a_rank_that_stops_ends_the_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preload()
    save_model(tmp_path, KINDS["rope, grouped heads"])
    save_chat(tmp_path)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return opened(*args, **kwargs)

    opened = run.open_generator
    monkeypatch.setattr(run, "open_generator", stopped)
    monkeypatch.setattr(run, "watch_peers", partial(watchdog_module.watch_peers, timeout_s=0.5))
    monkeypatch.setattr(watchdog_module, "SHORTEST_SILENCE_S", 2.0)
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    with pytest.raises(LaunchError, match=r"^no sign of rank 1 for 2 s; rank 1 does not respond: "):
        mds.generate(tmp_path, ["In"], tp=2, max_new_tokens=4)
