"""Errors of a launcher's rank before it has met the others, which must not wait for a rank that is gone."""

from __future__ import annotations

import contextlib
import os
import sys

from megatron_ds.errors import ConfigError, MegatronDSError
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo, rank_from_environment


def tell_peers(problem: str) -> None:
    """Tell the other ranks of a launcher why this one ends. Returns at once where none waits for this process.

    Otherwise returns when they know it, or after `rendezvous.TELL_S`. This process may not have imported torch yet.
    """
    info = _own_rank()
    if info is None or info.world_size == 1:
        return
    rendezvous = sys.modules.get("megatron_ds.parallel.rendezvous")
    if rendezvous is not None and rendezvous.has_begun_to_meet():
        return
    from megatron_ds.parallel.rendezvous import TELL_S, meet, name_place

    with contextlib.suppress(MegatronDSError, RuntimeError):  # it is raised, or nobody has come: this rank ends anyway
        meet(info, TELL_S, problem=f"{name_place(info)}: {problem}")


def _own_rank() -> RankInfo | None:
    """Return the rank that a launcher gave this process; None if it is alone, or its variables are incomplete."""
    if RENDEZVOUS_FILE in os.environ:
        return None
    try:
        return rank_from_environment()
    except ConfigError:
        return None
