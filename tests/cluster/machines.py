"""Machines for tests: Linux namespaces with a network, host name, /etc/hosts, /tmp and /dev/shm of their own.

They are joined by a bridge and see the same processes and, outside /tmp, the same files, like nodes with a shared file
system. A directory in /tmp is therefore one that machines do not share. All of it needs the sandbox of `__main__.py`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWNET = 0x20000, 0x4000000, 0x8000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_KINDS = ("net", "uts", "ipc", "mnt")
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        name: its host name.
        address: its IPv4 address in the machines' network.
        pid: the process that holds its namespaces.
        link: the end of its cable at the bridge.
    """

    name: str
    address: str
    pid: int
    link: str

    def enter(self) -> None:
        """Move this process, which must have one thread, to the machine."""
        for kind in _KINDS:
            descriptor = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY)
            try:
                _call("setns", descriptor, 0)
            finally:
                os.close(descriptor)

    def run(self, *command: object, check: bool = True) -> str:
        """Run a command on the machine and return what it printed."""
        words = [str(word) for word in command]
        done = subprocess.run(words, preexec_fn=self.enter, cwd="/", capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(words)}: {done.stderr}")
        return done.stdout

    def local(self, path: str) -> Path:
        """Return where a file of the machine's own /tmp is found from outside."""
        return Path(f"/proc/{self.pid}/root{path}")

    def write_hosts(self, lines: Sequence[str]) -> None:
        """Replace the machine's /etc/hosts."""
        self.local("/etc/hosts").write_text("".join(f"{line}\n" for line in ("127.0.0.1 localhost", *lines)))

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Pull the machine's cable; plug it in at the end."""
        _ip("link", "set", self.link, "down")
        try:
            yield
        finally:
            _ip("link", "set", self.link, "up")

    def processes(self) -> list[int]:
        """Pids of the processes that run on the machine, without the one that holds it."""
        own = os.readlink(f"/proc/{self.pid}/ns/net")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns/net") == own and int(path.name) != self.pid:
                    found.append(int(path.name))
            except OSError:
                continue  # it has ended, or is a zombie
        return found


def make_machines(names: Sequence[str], folder: Path, network: int, visible: Sequence[Path]) -> list[Machine]:
    """Make machines that are joined by a bridge. They end with this process.

    Args:
        names: their host names.
        folder: for their files; a new one.
        network: 1 to 254, different for each set of machines: the third number of the addresses.
        visible: directories that all of them see, though they may lie in /tmp.
    """
    bridge = f"br{network}"
    _ip("link", "add", bridge, "type", "bridge")
    _ip("link", "set", bridge, "up")
    machines = []
    for index, name in enumerate(names, start=1):
        own = folder / name
        own.mkdir(parents=True)
        address, link = f"10.77.{network}.{index}", f"v{network}.{index}"
        machine = Machine(name, address, _hold(name, own, visible), link)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
        _ip("link", "set", link, "master", bridge, "up")
        machine.run("ip", "link", "set", "lo", "up")
        machine.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")
        machines.append(machine)
    for machine in machines:
        machine.write_hosts([f"{one.address} {one.name}" for one in machines])
    return machines


def _hold(name: str, own: Path, visible: Sequence[Path]) -> int:
    """Start a process in namespaces of its own; return its pid once it has set them up."""
    parent = os.getpid()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
            _call("unshare", _CLONE_NEWNET | _CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC)
            _call("sethostname", name.encode(), len(name))
            _own_files(own, visible)
            os.write(write, b"up")
            os.chdir("/")
            for descriptor in range(3, 256):
                try:
                    os.close(descriptor)
                except OSError:
                    continue
            while os.getppid() == parent:
                signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        if pipe.read(2) != b"up":
            raise RuntimeError(f"the namespaces of {name} could not be made")
    return pid


def _own_files(own: Path, visible: Sequence[Path]) -> None:
    """Give this process a mount namespace with its own /etc/hosts, /tmp and /dev/shm."""
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    (own / "hosts").write_text("")
    _bind(own / "hosts", Path("/etc/hosts"))
    _call("mount", b"shm", b"/dev/shm", b"tmpfs", 0, b"size=300m,mode=1777")
    temporary = own / "tmp"
    temporary.mkdir(mode=0o1777)
    temporary.chmod(0o1777)
    for path in (one.resolve() for one in visible):
        if path.is_relative_to("/tmp"):
            place = temporary / path.relative_to("/tmp")
            place.mkdir(parents=True, exist_ok=True)
            _bind(path, place)
    _bind(temporary, Path("/tmp"))


def _bind(source: Path, target: Path) -> None:
    _call("mount", os.fsencode(source), os.fsencode(target), None, _MS_BIND | _MS_REC, None)


def _call(name: str, *arguments: object) -> None:
    if getattr(_LIBC, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
