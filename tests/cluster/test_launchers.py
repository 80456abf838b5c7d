"""The scripts of examples/multi_node under real launchers over two machines, each started cold.

torchrun is started on each machine, and `deepspeed` connects by ssh. Slurm is in test_slurm.py.
"""

from collections.abc import Callable

import pytest

from tests.cluster.commands import Job, difference, losses, start_cold
from tests.cluster.conftest import ROOT, Alone, Cluster
from tests.cluster.services import why_no_sshd
from tests.cluster.test_layouts import BOUND

Seen = Callable[[object], None]
SCRIPTS = ROOT / "examples/multi_node"
START_S = 150.0  # two cold ranks and their launchers on two busy cores


def _check(job: Job, cluster: Cluster, alone: Alone, seen: Seen) -> None:
    statuses = job.wait(START_S)
    assert set(statuses) == {0}, job.text
    found = difference(losses(cluster.folder / "run"), alone({}))
    seen(f"status {statuses}, {found:.0e} from one process's")
    assert found <= BOUND


def test_torchrun(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    run_file = cluster.write_run({"parallel": {"tensor": 2, "sequence": True}})
    environ = {"HEAD": "node1", "NODES": "2", "RANKS_PER_NODE": "1", "PORT": str(cluster.port())}
    command = (SCRIPTS / "torchrun.sh", run_file)
    commands = [
        start_cold(machine, "torchrun", command, ROOT, cluster.folder, **environ) for machine in cluster.machines[:2]
    ]
    _check(cluster.job(commands), cluster, alone, seen)


@pytest.mark.skipif(why_no_sshd() is not None, reason=str(why_no_sshd()))
@pytest.mark.usefixtures("sshd")
def test_deepspeed_over_ssh(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    run_file = cluster.write_run({})
    hostfile = cluster.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    command = (SCRIPTS / "deepspeed.sh", run_file)
    environ = {"HOSTFILE": str(hostfile), "MASTER_PORT": str(cluster.port())}
    started = start_cold(cluster.machines[0], "deepspeed", command, ROOT, cluster.folder, **environ)
    _check(cluster.job([started]), cluster, alone, seen)
