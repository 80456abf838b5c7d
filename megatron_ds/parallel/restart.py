"""Restart of a group of ranks that died, with the same number of ranks or with those that are left."""

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
    """Run a group until it succeeds, or has died `max_restarts` + 1 times.

    Errors that the user can fix are raised at once, since a restart would repeat them; so are Ctrl-C and other signals.

    Args:
        start: called as start(ranks, is_restart); runs a group of that many ranks to its end.
        ranks: the number of ranks of the first group.
        max_restarts: the largest number of restarts.
        fewer: maps the number of ranks that are left to the number to continue with, None if they are too few; None =
            always continue with the same number.

    Raises:
        LaunchError: the last group died, was asked to stop, or left too few ranks.
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
                    raise LaunchError(f"{problem}; too few ranks are left to continue") from problem
                ranks = left
            number = f"{ranks} rank{'s' if ranks > 1 else ''}"
            get_logger().warning("%s; restart %d of %d with %s", problem, restart + 1, max_restarts, number)
    raise AssertionError("unreachable: the last attempt returns or raises")
