"""Slurm and sshd on the machines, from Debian's slurm-wlm, munge, openssh-server and pdsh, with files of their own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.machines import Machine

_SLURM_CONF = """\
ClusterName=cluster
SlurmctldHost={head}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A Slurm cluster; its commands run on the head.

    Attributes:
        head: the machine of slurmctld, which runs no jobs.
        environ: variables for its commands.
    """

    def __init__(self, head: Machine, nodes: Sequence[Machine], folder: Path) -> None:
        self.head, self.environ = head, {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "munge", *(f"spool-{node.name}" for node in nodes)):
            (folder / name).mkdir(parents=True)
        lines = [f"NodeName={node.name} NodeAddr={node.address} CPUs=8 State=UNKNOWN" for node in nodes]
        text = _SLURM_CONF.format(head=f"{head.name}({head.address})", folder=folder, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(text)
        munge = folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        munge.chmod(0o711)
        options = [f"--{name}={munge / file}" for name, file in _MUNGE_FILES.items()]
        subprocess.run(["munged", "--force", *options], check=True, capture_output=True)
        self._log = folder / "daemons.log"
        self._daemons = [self._start(head, "slurmctld", "-c", "-D")]
        self._daemons += [self._start(node, "slurmd", "-D", "-N", node.name) for node in nodes]
        until = time.monotonic() + 30
        while self.run("sinfo", "--noheader", "--format=%T %D").strip() != f"idle {len(nodes)}":
            assert time.monotonic() < until, self.run("sinfo") + self._log.read_text()
            time.sleep(0.2)

    def run(self, *command: object) -> str:
        """Run a command of Slurm on the head and return what it printed."""
        return self.head.run("env", *(f"{name}={value}" for name, value in self.environ.items()), *command, check=False)

    def state(self, job: str) -> str:
        """Return a job's state, such as RUNNING."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0] if "JobState=" in shown else ""

    def _start(self, machine: Machine, *command: str) -> subprocess.Popen[bytes]:
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                command,
                env={**os.environ, **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=machine.enter,
                start_new_session=True,
            )

    @property
    def pids(self) -> set[int]:
        return {daemon.pid for daemon in self._daemons}


_MUNGE_FILES = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}


def why_no_slurm() -> str | None:
    """Return why Slurm cannot be started here; None if it can."""
    return _missing(("slurmctld", "slurmd", "srun", "munged"), "slurm-wlm munge")


def why_no_sshd() -> str | None:
    """Return why sshd and pdsh cannot be used here; None if they can."""
    return _missing(("sshd", "ssh", "ssh-keygen", "pdsh"), "openssh-server pdsh")


def _missing(commands: Sequence[str], packages: str) -> str | None:
    if Path("/proc/self/uid_map").read_text().split()[1:] != ["0", "4294967295"]:
        return "needs root"
    if any(shutil.which(command) is None for command in commands):
        return f"needs Debian's packages {packages}"
    return None


def start_sshd(machines: Sequence[Machine], folder: Path) -> list[subprocess.Popen[bytes]]:
    """Have root of each machine connect to the others by ssh without a password."""
    folder.mkdir()
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized")
    config = "Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    (folder / "config").write_text(f"{config}  IdentityFile {folder / 'key'}\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    assert pwd.getpwnam("sshd")
    given = {"AuthorizedKeysFile": folder / "authorized", "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes"}
    options = [f"-o{name}={value}" for name, value in given.items()]
    started = []
    for machine in machines:
        machine.run("mount", "--bind", folder / "config", "/etc/ssh/ssh_config")
        command = [
            "/usr/sbin/sshd",
            "-D",
            "-f",
            "/dev/null",
            "-h",
            str(folder / "host"),
            "-o",
            "PidFile=none",
            *options,
        ]
        started.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=machine.enter,
                start_new_session=True,
            )
        )
    return started
