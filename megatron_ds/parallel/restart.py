"""Start a group of ranks again when it has died: with as many ranks, or with those that are left."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ds.errors import LaunchError
from megatron_ds.log import get_logger
from megatron_ds.parallel.failure import GroupError


def run_with_restarts(
    start: Callable[[int, bool], None],
    ranks: int,
    max_restarts: int,
    fewer: Callable[[int], int | None] | None = None,
) -> None:
    """Run a group until it ends well, or has died `max_restarts` + 1 times.

    What the user can mend, a Ctrl-C and other signals end it at once: they would be the same again.

    Args:
        start: runs a group of so many ranks to its end; is told whether it is a restart.
        ranks: of the first group.
        max_restarts: at most.
        fewer: the number of ranks to go on with where so many are left, None if too few; None = always as many.

    Raises:
        LaunchError: of the last group that died, or of one that had been told to stop or leaves too few ranks.
    """
    for restart in range(max_restarts + 1):
        try:
            return start(ranks, restart > 0)
        except LaunchError as problem:
            dead = problem if isinstance(problem, GroupError) else GroupError(str(problem))
            if restart == max_restarts or dead.is_stopping:
                raise
            if fewer is not None:
                left = fewer(ranks - len(dead.lost))
                if left is None:
                    raise LaunchError(f"{problem}; too few ranks are left to go on") from problem
                ranks = left
            number = f"{ranks} rank{'s' if ranks > 1 else ''}"
            get_logger().warning("%s; restart %d of %d with %s", problem, restart + 1, max_restarts, number)
    raise AssertionError("unreachable: the last round returns or raises")
