"""A group that died is started again: how often, with how many ranks, and when not."""

import signal
from collections.abc import Callable

import pytest

from megatron_ds.errors import DataError, LaunchError
from megatron_ds.parallel.failure import GroupError
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.restart import run_with_restarts


def dying(times: int, problem: BaseException) -> tuple[list[tuple[int, bool]], Callable[[int, bool], None]]:
    """What the groups were started with, and a start whose first groups die."""
    seen: list[tuple[int, bool]] = []

    def start(ranks: int, is_restart: bool) -> None:
        seen.append((ranks, is_restart))
        if len(seen) <= times:
            raise problem

    return seen, start


def test_a_group_is_started_until_it_ends_well() -> None:
    seen, start = dying(2, LaunchError("rank 1 died"))
    run_with_restarts(start, 4, 3)
    assert seen == [(4, False), (4, True), (4, True)]


def test_after_the_last_restart_its_error_is_told() -> None:
    seen, start = dying(9, LaunchError("rank 1 died"))
    with pytest.raises(LaunchError, match=r"^rank 1 died$"):
        run_with_restarts(start, 2, 2)
    assert len(seen) == 3


@pytest.mark.parametrize("problem", [DataError("row 1"), KeyboardInterrupt(), SystemExit(143)])
def test_what_would_be_the_same_again_ends_it(problem: BaseException) -> None:
    seen, start = dying(9, problem)
    with pytest.raises(type(problem)):
        run_with_restarts(start, 2, 5)
    assert len(seen) == 1


def test_a_group_that_was_told_to_stop_is_not_started_again() -> None:
    problem = GroupError("rank 1 was killed", {1: signal.SIGKILL})
    problem.is_stopping = True
    seen, start = dying(9, problem)
    with pytest.raises(GroupError):
        run_with_restarts(start, 2, 5)
    assert len(seen) == 1


def test_too_few_that_are_left_end_it() -> None:
    seen, start = dying(9, GroupError("rank 1 was killed", {1: signal.SIGKILL}))
    with pytest.raises(LaunchError, match=r"^rank 1 was killed; too few ranks are left to continue$"):
        run_with_restarts(start, 2, 5, fewer=lambda left: None)
    assert len(seen) == 1


def test_it_goes_on_with_those_that_are_left() -> None:
    seen, start = dying(2, GroupError("rank 1 was killed", {1: signal.SIGKILL}))
    run_with_restarts(start, 4, 3, fewer=lambda left: {3: 2, 1: 1}[left])
    assert [ranks for ranks, _ in seen] == [4, 2, 1]


def test_a_group_tells_which_ranks_were_killed() -> None:
    import os

    def fn(info: object) -> None:
        if getattr(info, "rank") in (0, 2):  # noqa: B009
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(GroupError) as caught:
        run_local(fn, 3)
    assert caught.value.lost == {0: signal.SIGKILL, 2: signal.SIGKILL}
