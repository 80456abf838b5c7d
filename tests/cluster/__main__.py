"""Run the tests of this folder in a sandbox: `python -m tests.cluster [ARGUMENTS OF PYTEST]`, which is `make cluster`.

The sandbox is made of Linux namespaces: networks, mounts, host names and processes of its own. Nothing that the tests
set up is seen outside of it, and when its first process ends, by whatever, the kernel ends the others and takes down
networks and mounts. Without root it is made in a user namespace, where the system allows one; Slurm and sshd, which
need users of their own, are then skipped.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SANDBOX = "MEGATRON_DS_TEST_SANDBOX"
"""Set inside the sandbox."""

_NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
_AS_USER = ("--user", "--map-root-user")


def sandbox_command() -> list[str] | None:
    """Return the start of a command line that runs a command in a sandbox; None if this system allows none."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return None
    command = ["unshare", *(() if os.geteuid() == 0 else _AS_USER), *_NAMESPACES]
    trial = subprocess.run([*command, "ip", "link", "add", "trial", "type", "bridge"], capture_output=True)
    return command if trial.returncode == 0 else None


def main() -> None:
    command = sandbox_command()
    if command is None:
        print("cluster: skipped, because this system lets this user make no network namespaces (try as root)")
        print("0 passed, 0 failed, 1 skipped")
        return
    names_tests = any(Path(argument.partition("::")[0]).exists() for argument in sys.argv[1:])
    all_tests = [] if names_tests else [str(Path(__file__).parent)]
    pytest = [sys.executable, "-m", "pytest", "-m", "cluster", *all_tests, *sys.argv[1:]]
    os.environ[SANDBOX] = "1"
    os.execvp(command[0], [*command, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *pytest])


if __name__ == "__main__":
    main()
