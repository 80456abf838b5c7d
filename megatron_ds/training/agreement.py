"""Agreement of the ranks of a run on everything that decides its result, before anything is built.

A launcher's ranks read run files, arguments, packages, models and data of their own machines. Ranks that `run_local`
forks have one of each.
"""

from __future__ import annotations

from megatron_ds.checkpoint.directory import checkpoints_in
from megatron_ds.config import RunConfig
from megatron_ds.parallel.agreement import Council, agree
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rendezvous import RankGroup
from megatron_ds.parallel.shared_directory import check_shared
from megatron_ds.runtime.rank_facts import FIXES, run_facts
from megatron_ds.training.resume import checkpoint_folder


def check_same_run(run: RunConfig, info: RankInfo, group: RankGroup | None) -> None:
    """Check that all ranks of a launcher run the same. Collective over the world.

    Args:
        run: this rank's run file, with overrides and defaults.
        info: this rank.
        group: the ranks, which have met; None = ranks that this program forked, which are the same.

    Raises:
        ConfigError: they do not; see `agree`.
    """
    if group is None or info.world_size == 1:
        return
    council = Council(info, group)
    agree(council, "what they run", lambda: run_facts(run, run.data), FIXES)
    check_shared(council, shared_directories(run) if info.rank == 0 else {})


def shared_directories(run: RunConfig) -> dict[str, str]:
    """Return the directories that several ranks write to or read from, by their keys in the run file.

    Without checkpoints rank 0 alone uses the output. An export is written by rank 0, and checked by a rank of the last
    pipeline stage.
    """
    found = {}
    resumes = run.checkpoint.resume == "auto" and bool(checkpoints_in(checkpoint_folder(run.output)))
    if run.checkpoint.every or resumes:
        found["output"] = run.output
        if checkpoint_folder(run.output).is_dir():  # it may be a link, or a mount of its own
            found["output (its checkpoints)"] = str(checkpoint_folder(run.output))
    if run.export is not None and run.export.check and (run.parallel.pipeline > 1 or run.parallel.auto):
        found["export.path"] = run.export.path
    return found
