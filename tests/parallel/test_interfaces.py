"""Over several machines ranks take the interface by which the master is reached, and refuse others."""

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from megatron_ds import processes
from megatron_ds.errors import TopologyError
from megatron_ds.parallel import interfaces
from megatron_ds.parallel.interfaces import GLOO, NCCL, _Place, choose_interfaces
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rendezvous import meet
from tests.parallel.test_rendezvous import alone, environment, free_port, try_to_meet

OWN = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1"], "eth1": ["10.9.0.1"], "virbr0": ["192.168.122.1"]}
PLACES = (_Place("first", "127.0.1.1", "127.0.1.1"), _Place("second", "10.0.0.1", "10.0.0.7"))


def choose(
    given: Mapping[int, dict[str, str]], monkeypatch: pytest.MonkeyPatch, places: tuple[_Place, ...] = PLACES
) -> list[tuple[str | None, str | None] | str]:
    """The variables of two ranks afterwards, or their errors. Rank 0 reaches itself by its name, as on Debian."""
    port = free_port()
    monkeypatch.setattr(interfaces, "addresses_of_interfaces", lambda: OWN)
    monkeypatch.setattr(interfaces, "_address_towards", lambda reached: "10.0.0.1")

    def rank(info: RankInfo) -> tuple[str | None, str | None] | str:
        interfaces._find_place = lambda host, port: places[info.rank]  # type: ignore[assignment]
        environ = environment(info.rank, 2, port, **given.get(info.rank, {}))
        group = meet(info, 20, environ)
        try:
            choose_interfaces(info, group, (GLOO, NCCL), environ)
        except TopologyError as problem:
            return str(problem)
        group.store.add("done", 1)
        while info.rank == 0 and group.store.add("done", 0) < 2:
            time.sleep(0.01)  # it hosts the store
        return environ.get(GLOO), environ.get(NCCL)

    return run_local(rank, 2, 30.0)


@pytest.fixture
def bridges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Say which interfaces are bridges."""

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name / "bridge").mkdir(parents=True)
        monkeypatch.setattr(interfaces, "_INTERFACES", tmp_path)

    return make


def test_ranks_of_two_machines_take_what_reaches_the_master(
    bridges: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bridges()
    assert choose({}, monkeypatch) == [("eth0", None), ("eth0", None)]


def test_ranks_of_one_machine_take_what_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    same = (_Place("first", "127.0.0.1", "127.0.0.1"),) * 2
    assert choose({1: {GLOO: "eth1"}}, monkeypatch, same) == [(None, None), ("eth1", None)]


def test_nccl_is_kept_from_bridges_alone(bridges: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    bridges("virbr0", "eth0")
    assert choose({0: {NCCL: "eth"}}, monkeypatch) == [("eth0", "eth"), ("eth0", "^=lo,virbr0")]


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({GLOO: "lo"}, "GLOO_SOCKET_IFNAME=lo in the environment does not reach 127.0.0.1:"),
        ({GLOO: "eth"}, "GLOO_SOCKET_IFNAME=eth in the environment; set it to one of lo, eth0, eth1, virbr0"),
        ({NCCL: "=eth"}, "NCCL_SOCKET_IFNAME==eth in the environment; set it to one of lo, eth0, eth1, virbr0"),
    ],
)
def test_an_interface_that_does_not_do_is_refused_on_every_rank(
    variables: dict[str, str], problem: str, bridges: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bridges()
    first, second = choose({1: variables}, monkeypatch)
    assert first == second
    assert str(first).startswith(f"rank 1 on {socket.gethostname()} cannot connect to the others: {problem}")


@pytest.mark.parametrize("given", ["eth0,lo", "lo,eth0"])
def test_one_of_several_interfaces_is_enough(
    given: str, bridges: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bridges()
    assert choose({1: {GLOO: given, NCCL: "ib,eth"}}, monkeypatch)[1] == (given, "ib,eth")


def test_the_own_place_is_found() -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        place = interfaces._find_place("127.0.0.1", port)
    assert (place.address, place.master) == ("127.0.0.1", "127.0.0.1") and place.network
    assert interfaces._find_place("127.0.0.1", port).address == ""
    assert interfaces._address_towards(_Place("", "127.0.0.2", "")) == "127.0.0.1"


def test_machines_without_an_id_of_their_start_differ_by_their_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first network of every machine has the same number."""
    monkeypatch.setattr(processes, "_BOOT_ID", tmp_path / "none")
    places = []
    for name in ("node1", "node2"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        places.append(interfaces._find_place("127.0.0.1", free_port()).network)
    assert processes.boot_id() == "" and places[0] != places[1]


@pytest.mark.parametrize(
    ("rank", "host", "hint"),
    [
        (0, "192.0.2.200", "(MASTER_ADDR=192.0.2.200 is no address of this machine, rank 0's; try its own)"),
        (0, "no-such-host.invalid", "(MASTER_ADDR=no-such-host.invalid is not known here: "),
        (0, "2001:db8::1", "(MASTER_ADDR=2001:db8::1 is no address of this machine, rank 0's; try its own)"),
        (1, "::1", "; MASTER_ADDR=::1 is ::1 here, which is this machine itself; if rank 0 is on"),
        (1, "localhost", "; MASTER_ADDR=localhost is 127.0.0.1 here, which is this machine itself; if rank 0 is on"),
    ],
)
def test_a_waiting_rank_shows_what_speaks_against_the_address(rank: int, host: str, hint: str) -> None:
    def waits() -> tuple[str, list[str]]:
        return try_to_meet(rank, environment(rank, 2, free_port(), host), 0.5, local_rank=0)

    error, lines = alone(waits)
    assert hint in error and hint in lines[0]
