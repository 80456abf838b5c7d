"""Ranks of a launcher compare what they run, and end together where it differs."""

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_ds.errors import ConfigError, TopologyError
from megatron_ds.parallel import agreement
from megatron_ds.parallel.agreement import Council, Facts, agree, describe_differences, name_places
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rendezvous import meet
from tests.parallel.test_rendezvous import environment, free_port, record_lines

FIXES = {"versions": "install the same", "run file": "start the same"}


def together(act: Callable[[Council], Any], world_size: int, timeout_s: float = 20, local_ranks: int = 8) -> list[Any]:
    """Results of `act` on ranks that have met, with the number of errors that each raised."""
    port = free_port()

    def rank(info: RankInfo) -> Any:
        own = RankInfo(info.rank, world_size, info.rank % local_ranks)
        group = meet(own, timeout_s, environment(info.rank, world_size, port))
        try:
            result = act(Council(own, group))
        except (ConfigError, SystemExit, ZeroDivisionError) as problem:
            result = f"{type(problem).__name__}: {problem}"
        group.store.add("left", 1)
        until = time.monotonic() + 5
        while info.rank == 0 and group.store.add("left", 0) < world_size and time.monotonic() < until:
            time.sleep(0.01)  # it hosts the store
        return result

    return run_local(rank, world_size, 60.0)


def facts_of(rank: int) -> Facts:
    lr = "0.5" if rank == 1 else "0.001"
    return {"versions": {"torch": "2.13"}, "run file": {"train.seed": "1", "optimizer.lr": lr}}


def test_equal_facts_pass() -> None:
    assert together(lambda council: agree(council, "it", lambda: facts_of(0), FIXES), 3) == [None] * 3


def test_facts_are_equal_in_any_order() -> None:
    """Packages are found in the order of a directory, and settings stand in a file as its author wrote them."""

    def gather(rank: int) -> Facts:
        return {"plugins": dict([("plugin a", "1"), ("plugin b", "2")][:: 1 - 2 * rank])}

    assert together(lambda council: agree(council, "it", lambda: gather(council.info.rank), FIXES), 2) == [None] * 2


def test_a_difference_is_one_line_on_each_machine_and_status_2_on_every_rank() -> None:
    line = "ConfigError: optimizer.lr is 0.5 on rank 1 and 0.001 on ranks 0, 2-3; start the same"
    found = together(lambda council: agree(council, "it", lambda: facts_of(council.info.rank), FIXES), 4, local_ranks=2)
    assert found == [line, "SystemExit: 2", line, "SystemExit: 2"]


def test_a_rank_that_cannot_find_its_facts_ends_all() -> None:
    def gather(rank: int) -> Facts:
        if rank == 1:
            raise ConfigError("deepspeed=ds.json does not exist")
        return facts_of(0)

    found = together(lambda council: agree(council, "it", lambda: gather(council.info.rank), FIXES), 3)
    assert found[0] == f"ConfigError: rank 1 on {socket.gethostname()}: deepspeed=ds.json does not exist"
    assert found[1:] == ["SystemExit: 2"] * 2


def test_a_defect_of_one_rank_ends_the_others_too() -> None:
    def gather(rank: int) -> Facts:
        return facts_of(0) if rank != 1 else facts_of(1 // (rank - 1))

    zero, one = together(lambda council: agree(council, "it", lambda: gather(council.info.rank), FIXES), 2)
    assert zero.startswith(f"ConfigError: rank 1 on {socket.gethostname()}: ZeroDivisionError: ")
    assert one.startswith("ZeroDivisionError: ")


def test_a_rank_that_says_nothing_is_named() -> None:
    def act(council: Council) -> str:
        if council.info.rank == 1:
            time.sleep(1.0)
            return "late"
        with pytest.raises(TopologyError) as caught:
            council.decide("the data", "", lambda texts: "")
        return str(caught.value)

    said, _ = together(act, 2, timeout_s=0.6)
    assert said.startswith("no word of rank 1 about the data within train.start_timeout=0.6 s; ")


def test_rank_0_which_knows_who_is_silent_ends_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "TELL_S", 0.6)

    def act(council: Council) -> float:
        began_s = time.monotonic()
        if council.info.rank < 2:
            with pytest.raises(TopologyError, match="no word of rank 2" if council.info.rank == 0 else "of rank 0"):
                council.decide("the data", "", lambda texts: "")
        return time.monotonic() - began_s

    first, second, _ = together(act, 3, timeout_s=0.3)
    assert first + 0.3 < second


def test_who_is_waited_for_is_said_on_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "FIRST_MESSAGE_S", 0.1)

    def act(council: Council) -> list[str]:
        lines = record_lines()
        time.sleep(0.5 if council.info.rank == 3 else 0.0)
        council.decide("the data", "", lambda texts: "")
        return [line.partition(" since ")[0] for line in lines]

    first, second, third, _ = together(act, 4, local_ranks=2)
    assert first[0] == "waiting for word of rank 3 about the data"
    assert second == [] and third[0] == "waiting for word of rank 0 about the data"


def test_values_of_the_first_rank_reach_all() -> None:
    assert together(lambda council: council.from_first("token", str(council.info.rank)), 3) == ["0"] * 3


def test_only_the_first_kind_that_differs_is_named_and_few_of_its_names() -> None:
    many = {f"key{number}": "a" for number in range(9)}
    other = dict.fromkeys(many, "b")
    one = describe_differences([((0,), {"versions": {}, "run file": many}), ((1,), {"run file": other})], "hh", FIXES)
    assert one.startswith("key0 is a on rank 0 and b on rank 1; key1 is ") and one.endswith(
        "; 5 more differ; start the same"
    )
    first = describe_differences([((0,), {"versions": {"torch": "2.13"}}), ((1,), {"run file": other})], "hh", FIXES)
    assert first == "torch is 2.13 on rank 0 and not set on rank 1; install the same"


def test_ranks_are_named_in_ranges_with_their_machines() -> None:
    hosts = ["a"] * 4 + ["b"] * 4
    assert name_places([1], ["a"] * 8) == "rank 1"
    assert name_places([0, 2, 3, 4, 7], hosts) == "ranks 0, 2-4, 7 (a, b)"
    assert name_places(range(99), [f"n{rank}" for rank in range(99)]) == "ranks 0-98 (n0, n1, n2, n3, 95 more)"
