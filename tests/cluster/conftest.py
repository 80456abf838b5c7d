"""Machines, jobs on them, and the table of what was seen."""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config.yaml_text import format_yaml
from tests.cluster.__main__ import SANDBOX
from tests.cluster.commands import Command, Job, losses, start_cold, start_fork
from tests.cluster.machines import Machine, make_machines
from tests.cluster.pauses import Pause
from tests.cluster.services import Slurm, start_sshd
from tests.forked_python import run_python
from tests.training.tiny import run_mapping, write_corpus

ROOT = Path(__file__).parents[2]
NAMES = ("node1", "node2", "node3")
Sections = Mapping[str, Mapping[str, Any]]


LONGEST = ("test_restarts.py", "test_network.py", "test_launchers.py")  # begun first, as in tests/conftest.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(__file__).parent in item.path.parents]  # the others are of other folders
    for item in own:
        item.add_marker(pytest.mark.cluster)
        if SANDBOX not in os.environ:
            item.add_marker(pytest.mark.skip(reason="run by `make cluster`, in a sandbox"))
    if SANDBOX in os.environ:
        place = {file: index for index, file in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a line for each test with what it saw, and the counts of each file."""
    if SANDBOX not in os.environ:
        return
    counts: dict[str, Counter[str]] = {}
    write = terminalreporter.write_line
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            file, _, name = report.nodeid.rpartition("/")[2].partition("::")
            counts.setdefault(file, Counter())[outcome] += 1
            seen = "; ".join(str(value) for key, value in report.user_properties if key == "seen")
            write(f"{outcome:8}{name.removeprefix('test_'):52}{report.duration:6.1f} s  {seen}")
    for file, count in sorted(counts.items()):
        write(f"{file:24}" + ", ".join(f"{number} {outcome}" for outcome, number in count.items()))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all machines share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def machines(shared: Path) -> list[Machine]:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    return make_machines(NAMES, shared / "machines", 1 + int(worker.removeprefix("gw")), (shared.parent, ROOT))


@pytest.fixture(scope="session")
def tiny_corpus(shared: Path) -> Path:
    folder = shared / "corpus"
    folder.mkdir()
    write_corpus(folder)
    return folder


class Cluster:
    """The machines, and a folder on the shared file system in which each test writes its run files."""

    def __init__(self, machines: Sequence[Machine], corpus: Path, folder: Path) -> None:
        self.machines, self.folder = list(machines), folder
        self._corpus = corpus
        self._jobs: list[Job] = []
        self._next_port = random.Random(str(folder)).randrange(20000, 29000)

    def write_run(self, *changes: Sections, name: str = "run") -> Path:
        """Write NAME.yaml, whose output is the folder NAME, with the sections of a tiny run changed."""
        mapping = run_mapping(self._corpus, self.folder / name)
        mapping["train"].update(steps=6, eval_every=3)
        for sections in changes:
            for section, entries in sections.items():
                mapping[section] = {**mapping.get(section, {}), **entries}
        file = self.folder / f"{name}.yaml"
        file.write_text(format_yaml(mapping))
        return file

    def port(self) -> int:
        """Return a port that no other job of this test uses."""
        self._next_port += 1
        return self._next_port

    def job(self, commands: Sequence[Command]) -> Job:
        """Return a job that ends with the test."""
        self._jobs.append(Job(commands))
        return self._jobs[-1]

    def start_ranks(
        self,
        run_file: Path,
        *arguments: object,
        num_machines: int = 2,
        per_machine: int = 1,
        master: str = "node1",
        on: Mapping[str, Sequence[object]] | None = None,
        environ: Mapping[str, str] | None = None,
        ranks: Sequence[int] | None = None,
        port: int | None = None,
        pause: Pause | None = None,
    ) -> Job:
        """Start `megatron-ds train` on every rank, with the variables that launchers set.

        Args:
            run_file: for all.
            arguments: for all.
            num_machines: of them, from the first.
            per_machine: ranks of each.
            master: MASTER_ADDR.
            on: more arguments of one machine's ranks, by its name.
            environ: more variables.
            ranks: those that are started; None = all.
            port: MASTER_PORT; None = a new one.
            pause: at which the ranks pause.
        """
        world, port = num_machines * per_machine, port or self.port()
        commands = []
        for rank in range(world) if ranks is None else ranks:
            machine, local = self.machines[rank // per_machine], rank % per_machine
            place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": per_machine}
            given = {**place, "MASTER_ADDR": master, "MASTER_PORT": port, **(environ or {})}
            words = ("-m", "megatron_ds", "train", run_file, *arguments, *(on or {}).get(machine.name, ()))
            variables = {name: str(value) for name, value in given.items()}
            prepare = partial(pause.install, rank) if pause is not None else None
            commands.append(start_fork(machine, f"rank{rank}", words, self.folder, prepare, **variables))
        return self.job(commands)

    def start_torchrun(self, run_file: Path, port: int, options: Sequence[str] = ()) -> Job:
        """Start torchrun, each with one rank, on the first two machines."""
        return self.job([self.torchrun_on(machine, run_file, port, options) for machine in self.machines[:2]])

    def torchrun_on(self, machine: Machine, run_file: Path, port: int, options: Sequence[str]) -> Command:
        """Start torchrun on one of two machines, with the rendezvous on the first.

        Where agents share their store with the ranks (torch 2.13), one that joins a later round waits for an address
        that nobody sets again, and a machine cannot be replaced.
        """
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"node1:{port}")
        command = ("torchrun", "--nnodes", 2, "--nproc-per-node", 1, *rendezvous, *options)
        words = (*command, "-m", "megatron_ds", "train", run_file)
        name, environ = f"torchrun-{machine.name}", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return start_cold(machine, name, words, self.folder, self.folder, **environ)

    def end(self) -> None:
        """Kill what still runs of its jobs."""
        for job in self._jobs:
            job.end()


@contextmanager
def _cluster(machines: list[Machine], corpus: Path, shared: Path) -> Iterator[Cluster]:
    folder = shared / f"test{len(list(shared.glob('test*')))}"
    folder.mkdir()
    made = Cluster(machines, corpus, folder)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def cluster(machines: list[Machine], tiny_corpus: Path, shared: Path) -> Iterator[Cluster]:
    with _cluster(machines, tiny_corpus, shared) as made:
        yield made


@pytest.fixture(scope="module")
def module_cluster(machines: list[Machine], tiny_corpus: Path, shared: Path) -> Iterator[Cluster]:
    """For jobs that several tests of a module look at."""
    with _cluster(machines, tiny_corpus, shared) as made:
        yield made


@pytest.fixture(scope="session")
def slurm(machines: list[Machine], shared: Path) -> Slurm:
    """Slurm on the machines, the third of which is its head."""
    *nodes, head = machines
    return Slurm(head, nodes, shared / "slurm")


@pytest.fixture(scope="session")
def sshd(machines: list[Machine], shared: Path) -> None:
    start_sshd(machines, shared / "ssh")


Alone = Callable[[Sections], dict[str, float]]


@pytest.fixture(scope="session")
def alone(tiny_corpus: Path, shared: Path) -> Alone:
    """Losses of a run by one process."""
    known: dict[str, dict[str, float]] = {}

    def run(changes: Sections) -> dict[str, float]:
        key = repr(changes)
        if key not in known:
            folder = shared / f"alone{len(known)}"
            folder.mkdir()
            file = Cluster([], tiny_corpus, folder).write_run(changes)
            run_python("-m", "megatron_ds", "train", file, check=True, cwd=folder)
            known[key] = losses(folder / "run")
        return known[key]

    return run


@pytest.fixture
def seen(record_property: Callable[[str, object], None]) -> Callable[[object], None]:
    """Show something in this test's line of the table."""
    return lambda what: record_property("seen", what)
