"""Networks that are slow or wrong, and ranks that come late: the run equals one process's, or says what is wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.commands import difference, losses, steps_done
from tests.cluster.conftest import ROOT, Alone, Cluster
from tests.cluster.machines import Machine
from tests.cluster.test_layouts import BOUND

Seen = Callable[[object], None]
WIDE = "wan0"


@pytest.fixture
def wide_link(machines: list[Machine]) -> Iterator[str]:
    """The first machine's address on a link with 200 ms for a round trip and 1 % of loss to the second."""
    if not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("needs /dev/net/tun, as root")
    network = machines[0].address.split(".")[2]
    ends = [f"{machine.pid}:10.78.{network}.{index}" for index, machine in enumerate(machines[:2], start=1)]
    command = [sys.executable, "-m", "tests.cluster.slow_link", WIDE, "0.1", "0.01", *ends]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield f"10.78.{network}.1"
        process.kill()


@pytest.mark.timeout(200)
def test_200_ms_and_1_percent_loss(wide_link: str, cluster: Cluster, alone: Alone, seen: Seen) -> None:
    job = cluster.start_ranks(cluster.write_run({}), master=wide_link)
    statuses = job.wait(120)
    assert set(statuses) == {0}, job.text
    found = difference(losses(cluster.folder / "run"), alone({}))
    seen(f"{time.monotonic() - job[0].begun_s:.0f} s, {found:.0e} from one process's")
    assert found <= BOUND


def test_link_that_is_down_for_3_s(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    changes = {"train": {"steps": 60, "eval_every": 0}, "data": {"valid": []}}
    job = cluster.start_ranks(cluster.write_run(changes))
    job.wait_until(lambda: steps_done(cluster.folder / "run") >= 3)
    with cluster.machines[1].cut_off():
        time.sleep(3)
    assert set(job.wait(60)) == {0}, job.text
    found = difference(losses(cluster.folder / "run"), alone(changes))
    seen(f"{found:.0e} from one process's")
    assert found <= BOUND


WRONG_MASTERS = {
    "10.77.0.99": r"at 10\.77\.0\.99:\d+ within train\.start_timeout=4 s \(",
    "node3": r"at node3:\d+ within train\.start_timeout=4 s \(connection refused\)",
    "nowhere.invalid": r"at nowhere\.invalid:\d+ .*MASTER_ADDR=nowhere\.invalid is not known here",
}


@pytest.mark.parametrize("master", WRONG_MASTERS)
def test_wrong_master(master: str, cluster: Cluster, seen: Seen) -> None:
    job = cluster.start_ranks(cluster.write_run({"train": {"start_timeout": 4}}), master=master)
    assert job.wait(30) == [2, 2], job.text
    said = job[1].text.splitlines()[-1]
    seen(said[:160])
    assert re.search("no sign of rank 0 of 2 " + WRONG_MASTERS[master], said)
    assert not (cluster.folder / "run").exists()


def test_late_machine(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    run_file, port = cluster.write_run({}), cluster.port()
    first = cluster.start_ranks(run_file, ranks=[0], port=port)
    first.wait_until(lambda: "waiting for rank 1 of 2 at node1" in first.text, 30)
    late = cluster.start_ranks(run_file, ranks=[1], port=port)
    assert (first.wait(60), late.wait(20)) == ([0], [0]), first.text + late.text
    found = difference(losses(cluster.folder / "run"), alone({}))
    seen(f"{found:.0e} from one process's; {first.text.splitlines()[0][:110]}")
    assert found <= BOUND


def test_machine_that_never_comes(cluster: Cluster, seen: Seen) -> None:
    job = cluster.start_ranks(cluster.write_run({"train": {"start_timeout": 8}}), ranks=[0])
    assert job.wait(30) == [2], job.text
    seen(job[0].text.splitlines()[-1][:140])
    assert re.search(r"no sign of rank 1 of 2 at node1:\d+ within train\.start_timeout=8 s", job.text)


def test_cable_that_is_plugged_in_late(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    with cluster.machines[1].cut_off():
        job = cluster.start_ranks(cluster.write_run({}))
        job.wait_until(lambda: "waiting for rank 0" in job[1].text and "waiting for rank 1" in job[0].text, 30)
        assert not (cluster.folder / "run").exists()
    assert set(job.wait(60)) == {0}, job.text
    assert difference(losses(cluster.folder / "run"), alone({})) <= BOUND
    seen(job[1].text.splitlines()[0][:140])


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_while_waiting(rank: int, cluster: Cluster, seen: Seen) -> None:
    job = cluster.start_ranks(cluster.write_run({}), ranks=[rank])
    job.wait_until(lambda: "waiting for rank" in job[0].text, 30)
    since = time.monotonic()
    job[0].kill(signal.SIGTERM)
    (status,) = job.wait(10)
    seen(f"status {status} after {time.monotonic() - since:.1f} s")
    assert status in (143, -signal.SIGTERM)
    assert not (cluster.folder / "run").exists()


@pytest.fixture
def own_name_is_loopback(machines: list[Machine]) -> Iterator[None]:
    """/etc/hosts as Debian's and Ubuntu's installers write it: the own name is 127.0.1.1."""
    lines = [f"{machine.address} {machine.name}" for machine in machines]
    for machine in machines:
        others = [line for line in lines if not line.endswith(machine.name)]
        machine.write_hosts([f"127.0.1.1 {machine.name}", *others])
    yield
    for machine in machines:
        machine.write_hosts(lines)


@pytest.mark.usefixtures("own_name_is_loopback")
@pytest.mark.parametrize("master", ["address", "name"])
def test_own_name_is_loopback(master: str, cluster: Cluster, alone: Alone, seen: Seen) -> None:
    """Gloo would listen at 127.0.1.1, where no other machine finds it; it takes the interface to the master."""
    job = cluster.start_ranks(cluster.write_run({}), master=getattr(cluster.machines[0], master))
    assert set(job.wait(60)) == {0}, job.text
    found = difference(losses(cluster.folder / "run"), alone({}))
    seen(f"{found:.0e} from one process's")
    assert found <= BOUND
