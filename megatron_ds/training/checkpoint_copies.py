"""Copies of a run's checkpoints at a URL, made while it trains: `checkpoint.copy_to`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_ds.checkpoint.directory import checkpoints_in, is_checkpoint, step_of
from megatron_ds.checkpoint.remote_copies import RemoteCopies, fetch_newest
from megatron_ds.config import RunConfig
from megatron_ds.log import log_once
from megatron_ds.parallel.consensus import run_long_on_all_ranks
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.watchdog import Heartbeat
from megatron_ds.training.callbacks import Callback, RunState


def fetch_newer_checkpoint(run: RunConfig, folder: Path, info: RankInfo) -> None:
    """Copy the newest checkpoint at `checkpoint.copy_to` here, if it is of a later step. Collective over the world.

    Args:
        run: the run file.
        folder: of its checkpoints.
        info: this rank; the first one copies.

    Raises:
        RemoteError: the URL cannot be read.
    """
    url = run.checkpoint.copy_to
    if url is None:
        return

    def fetch() -> None:
        if info.rank > 0:
            return
        here = next((step_of(path) for path in checkpoints_in(folder) if is_checkpoint(path)), -1)
        step = fetch_newest(url, folder, here)
        if step is not None:
            log_once(f"checkpoint of step {step} copied from {url} to {folder}")

    run_long_on_all_ranks(fetch)


class CheckpointCopier(Callback):
    """A callback that copies each complete checkpoint. Rank 0 alone does; at the run's end all ranks wait for it.

    Args:
        run: the run file.
        folder: of the checkpoints.
        note: shows a line of text.
        heartbeat: called before the wait at the end.
    """

    def __init__(self, run: RunConfig, folder: Path, note: Callable[[str], None], heartbeat: Heartbeat) -> None:
        url = run.checkpoint.copy_to
        assert url is not None
        self._copies = RemoteCopies(url, folder, run.checkpoint.keep, note)
        self._heartbeat = heartbeat

    def on_step_end(self, state: RunState) -> None:
        if state.rank == 0:
            self._copies.poll()

    def on_checkpoint_saved(self, state: RunState) -> None:
        if state.rank == 0 and state.saved is not None:
            self._copies.begin(Path(state.saved.path))

    def on_run_end(self, state: RunState) -> None:
        self._heartbeat("copying the last checkpoint", may_take_long=True)
        run_long_on_all_ranks(self._copies.finish if state.rank == 0 else lambda: None)
