"""Ranks of a launcher meet, name those that are missing, and end with one line if these do not come."""

import logging
import resource
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ds.errors import ConfigError
from megatron_ds.parallel import rendezvous
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rendezvous import meet, name_ranks
from tests.listening import listening_addresses

ALONE = "given by RANK={}, WORLD_SIZE={}, MASTER_ADDR and MASTER_PORT in the environment; to start alone, unset RANK"


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, world_size: int, port: int, host: str = "127.0.0.1", **more: str) -> dict[str, str]:
    place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    return {**place, "MASTER_ADDR": host, "MASTER_PORT": str(port), **more}


def record_lines() -> list[str]:
    """The lines that this process, a fork, logs from now on; the first one early."""
    rendezvous.FIRST_MESSAGE_S = 0.1
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_ds")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    return lines


def try_to_meet(
    rank: int, environ: dict[str, str], timeout_s: float, local_rank: int | None = None
) -> tuple[str, list[str]]:
    """The error of a rank whose job is incomplete, and what it logged; in a process of its own."""
    lines, local_rank = record_lines(), rank if local_rank is None else local_rank
    try:
        meet(RankInfo(rank, int(environ["WORLD_SIZE"]), local_rank), timeout_s, environ)
    except ConfigError as problem:
        return str(problem), lines
    return "", lines


def alone(act: Callable[[], Any]) -> Any:
    return run_local(lambda info: act(), 1, 30.0)[0]


def test_all_ranks_meet_whoever_comes_first() -> None:
    port = free_port()

    def rank(info: RankInfo) -> tuple[str, bytes]:
        time.sleep(0.3 * (2 - info.rank))  # rank 0 last
        group = meet(info, 20, environment(info.rank, 3, port))
        group.store.set(f"from {info.rank}", group.name)
        group.store.wait(["from 0", "from 1", "from 2"])
        result = group.name, group.store.get("from 2")
        group.store.add("read", 1)
        while info.rank == 0 and group.store.add("read", 0) < 3:
            time.sleep(0.01)  # it hosts the store
        return result

    found = run_local(rank, 3, 30.0)
    assert len(set(found)) == 1 and found[0][0] == found[0][1].decode()


def test_groups_of_one_store_do_not_see_each_other() -> None:
    """As torchrun restarts its ranks over the store of its agent, in any order, or with fewer of them."""
    port = free_port()

    def rank(info: RankInfo) -> list[tuple[str, bool]]:
        if info.rank == 3:
            store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            while store.add("done", 0) < 3:
                time.sleep(0.02)
            return []
        found = []
        for attempt, world_size in enumerate((3, 3, 2)):
            if info.rank >= world_size:
                continue
            time.sleep(0.2 * ((info.rank + attempt) % 3))
            environ = environment(info.rank, world_size, port, TORCHELASTIC_USE_AGENT_STORE="True")
            group = meet(RankInfo(info.rank, world_size, info.rank), 20, environ)
            found.append((group.name, group.store.check(["mark"])))
            group.store.add("met", 1)
            while group.store.add("met", 0) < world_size:
                time.sleep(0.01)
            group.store.set("mark", "left over")
        dist.TCPStore("127.0.0.1", port, is_master=False).add("done", 1)
        return found

    first, second, third, _ = run_local(rank, 4, 40.0)
    assert first == second and third == first[:2]
    assert len({name for name, _ in first}) == 3 and not any(found for _, found in first)


def test_rank_0_names_the_missing_ranks_and_the_way_out() -> None:
    port = free_port()
    error, lines = alone(lambda: try_to_meet(0, environment(0, 4, port), 0.6))
    assert error.startswith(
        f"no sign of ranks 1, 2, 3 of 4 at 127.0.0.1:{port} within train.start_timeout=0.6 s; {ALONE.format(0, 4)}"
    )
    assert lines[0].startswith(f"waiting for ranks 1, 2, 3 of 4 at 127.0.0.1:{port} since 0 s, {ALONE.format(0, 4)}")
    assert 1 <= len(lines) <= 4, "at growing intervals"


def test_where_all_ranks_are_on_this_machine_no_other_reaches_the_store() -> None:
    port = free_port()

    def addresses() -> set[str]:
        group = meet(RankInfo(0, 1, 0), 20, environment(0, 1, port))
        again = meet(RankInfo(0, 1, 0), 20, environment(0, 1, port))  # of the same process, which shares the store
        assert group.name != again.name
        return listening_addresses()

    assert alone(addresses) == {"127.0.0.1"}


def test_only_those_that_have_not_come_are_named() -> None:
    port = free_port()
    (zero, said), (one, other), _ = run_local(
        lambda info: (
            try_to_meet(info.rank, environment(info.rank, 3, port), 2.5 - 1.5 * info.rank) if info.rank < 2 else None
        ),
        3,
        30.0,
    )
    assert one.startswith("no sign of other ranks of 3 at ") and other[-1].startswith("waiting for other ranks of 3")
    assert any(line.startswith("waiting for rank 2 of 3") for line in said), said
    assert zero.startswith("no sign of ranks 1, 2 of 3"), "rank 1 has given up"


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("127.0.0.1", "connection refused"),
        ("no-such-host.invalid", "MASTER_ADDR=no-such-host.invalid is not known here: "),
    ],
)
def test_another_rank_names_what_keeps_it_from_rank_0(host: str, reason: str) -> None:
    port = free_port()
    error, lines = alone(lambda: try_to_meet(1, environment(1, 2, port, host), 0.5))
    assert error.startswith(f"no sign of rank 0 of 2 at {host}:{port} within train.start_timeout=0.5 s ({reason}")
    assert lines[0].startswith(f"waiting for rank 0 of 2 at {host}:{port} since 0 s ({reason}")
    assert ALONE.format(1, 2) in lines[0]


def test_those_that_were_waited_for_are_announced(tmp_path: Path) -> None:
    port = free_port()

    def rank(info: RankInfo) -> list[str]:
        time.sleep(0.6 * info.rank)
        lines, group = record_lines(), meet(info, 20, environment(info.rank, 2, port))
        (tmp_path / str(info.rank)).touch()
        while not (tmp_path / "1").exists():
            time.sleep(0.01)  # rank 0 hosts the store
        del group
        return lines

    first, second = run_local(rank, 2, 30.0)
    assert first[0].startswith("waiting for rank 1 of 2 at ") and first[-1].startswith("all 2 ranks have come after ")
    assert not any("lost" in line for line in second)


def test_an_unknown_name_is_given_up_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "NAME_TIMEOUT_S", 0.1)
    error, _ = alone(lambda: try_to_meet(1, environment(1, 2, 1, "no-such-host.invalid"), 20))
    assert error.startswith("MASTER_ADDR=no-such-host.invalid is not known here: ")
    assert error.endswith("; set it to the name or the IP address of rank 0's machine")


def test_under_torchrun_rank_0_waits_for_its_agent() -> None:
    environ = environment(0, 2, free_port(), TORCHELASTIC_USE_AGENT_STORE="True")
    error, _ = alone(lambda: try_to_meet(0, environ, 0.3))
    assert error.startswith("no sign of torchrun's agent at 127.0.0.1:")


def test_a_port_in_use_is_one_line_with_a_free_one() -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error, _ = alone(lambda: try_to_meet(0, environment(0, 1, port), 5))
        own = f"MASTER_PORT={port} in the environment: rank 0 cannot listen there (address already in use); nearest: "
        assert error.startswith(own) and error.endswith(", the same on every rank")
        nearest = int(error.removeprefix(own).partition(",")[0])
        assert nearest > port
        assert alone(lambda: try_to_meet(0, environment(0, 1, nearest), 5)) == ("", [])


def test_a_port_of_another_program_is_not_waited_for_in_silence() -> None:
    """It accepts and never answers: torch would wait for ever."""
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error, lines = alone(lambda: try_to_meet(1, environment(1, 2, port), 1))
    why = "(the port is open, but what listens there is not a store of torch's)"
    assert why in error and why in lines[0]


def test_ranks_that_disagree_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait, because the invitation may be of an earlier group, and then all end with both numbers."""
    monkeypatch.setattr(rendezvous, "OTHER_SIZE_S", 0.4)
    monkeypatch.setattr(rendezvous, "UNKNOWN_S", 0.2)
    port = free_port()
    (zero, said), (one, other) = run_local(
        lambda info: try_to_meet(info.rank, environment(info.rank, 3 - info.rank, port), 10.0), 2, 30.0
    )
    assert said[0].startswith("waiting for ranks 1, 2 of 3 at ") and "(its WORLD_SIZE is 3, not 2)" in other[0]
    here = f"rank 1 on {socket.gethostname()}"
    assert zero == one == f"WORLD_SIZE is 3 on rank 0 and 2 on {here}; start the same number of ranks on every machine"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_take_part_ends_the_others_at_once(failing: int) -> None:
    """Also those that come later; and a group of the same store that comes after them meets."""
    port = free_port()

    def rank(info: RankInfo) -> tuple[list[str], float]:
        if info.rank == 3:
            store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            while store.add("done", 0) < 3:
                time.sleep(0.02)
            return [], 0.0
        found, began_s = [], time.monotonic()
        for attempt in range(2):
            time.sleep(0.3 * info.rank)
            environ = environment(info.rank, 3, port, TORCHELASTIC_USE_AGENT_STORE="True")
            problem = "no run file" if info.rank == failing and attempt == 0 else ""
            try:
                found.append(f"met {len(meet(RankInfo(info.rank, 3, info.rank), 20, environ, problem).name)}")
            except ConfigError as error:
                found.append(str(error))
        dist.TCPStore("127.0.0.1", port, is_master=False).add("done", 1)
        return found, time.monotonic() - began_s

    *ranks, _ = run_local(rank, 4, 40.0)
    assert [found for found, _ in ranks] == [["no run file", "met 32"]] * 3
    assert max(seconds for _, seconds in ranks) < 10


def test_names_of_ranks() -> None:
    assert [name_ranks(range(1, 1 + count)) for count in (1, 3, 9)] == [
        "rank 1",
        "ranks 1, 2, 3",
        "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 1 more",
    ]


@pytest.mark.parametrize(
    ("world_size", "given", "wanted"),
    [
        (64, (1024, 4096), None),
        (1000, (1024, 2**20), (8256, 2**20)),
        (1000, (1024, -1), (8256, -1)),
        (1000, (-1, -1), None),
        (1000, (1024, 4096), (4096, 4096)),
    ],
)
def test_ranks_may_open_a_connection_to_each_other_one(
    world_size: int,
    given: tuple[int, int],
    wanted: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("megatron_ds").propagate = True
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: given)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.append(both))
    rendezvous._allow_connections(RankInfo(0, world_size, 0))
    assert limits == ([] if wanted is None else [wanted])
    assert ("at most 4096 files may be open here" in caplog.text) == (wanted == (4096, 4096))
