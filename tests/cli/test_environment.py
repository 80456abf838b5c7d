"""Commands in surroundings that nobody planned: variables of a launcher that is gone, ports of other programs."""

import socket
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.conftest import Fork

MASTER = {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> str:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("left_over", "unset"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK WORLD_SIZE LOCAL_RANK"),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_JOB_ID": "7",
            },
            "SLURM_STEP_ID",
        ),
    ],
    ids=["torchrun", "srun"],
)
def test_a_launcher_that_is_gone(left_over: dict[str, str], unset: str, fork: Fork, run_file: Path) -> None:
    environ = {**left_over, **MASTER, "MASTER_PORT": free_port()}
    process = fork("-m", "megatron_ds", "train", run_file, "train.start_timeout=0.5", **environ)
    out, err = process.communicate(30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"error: no sign of rank 1 of 2 at 127.0.0.1:{environ['MASTER_PORT']} within ")
    assert err.endswith(f"MASTER_ADDR and MASTER_PORT in the environment; to start alone, unset {unset}\n")
    assert err.count("\n") == 1 and not (run_file.parent / "out").exists()


def test_slurm_without_a_step_and_mpi_are_alone(fork: Fork, run_file: Path) -> None:
    """A shell of salloc, and variables of mpirun, which no version of this command reads."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "2"}
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    process = fork("-m", "megatron_ds", "train", run_file, "train.steps=2", "train.eval_every=0", **slurm, **mpi)
    out, err = process.communicate(60)
    assert process.returncode == 0, err
    assert "world       1 = tp 1 x pp 1 x dp 1" in out


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_port_in_use(world_size: str, fork: Fork, run_file: Path) -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environ = {"RANK": "0", "WORLD_SIZE": world_size, "LOCAL_RANK": "0", **MASTER, "MASTER_PORT": port}
        process = fork("-m", "megatron_ds", "train", run_file, **environ)
        out, err = process.communicate(30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"error: MASTER_PORT={port} in the environment: rank 0 cannot listen there (address already")
    assert err.count("\n") == 1 and "nearest: " in err


@pytest.mark.parametrize("launched", [True, False])
def test_an_interface_that_does_not_exist(launched: bool, fork: Fork, run_file: Path) -> None:
    place = (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MASTER, "MASTER_PORT": free_port()} if launched else {}
    )
    process = fork("-m", "megatron_ds", "train", run_file, GLOO_SOCKET_IFNAME="nope", **place)
    out, err = process.communicate(30)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: rank 0 cannot connect to the others (") and "Unable to find address for: nope" in err
    assert "GLOO_SOCKET_IFNAME=nope in the environment; set it to one of lo" in err and err.count("\n") == 1


def test_a_user_without_a_home_trains(fork: Fork, run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    places = {"HOME": "/dev/null/nobody", "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path / "tmp")}
    script = tmp_path / "fresh.py"  # the temporary directory that the forking process has found
    script.write_text("import tempfile\ntempfile.tempdir = None\nfrom megatron_ds.cli.main import main\nmain()\n")
    process = fork(script, "train", run_file, "data.cache_dir=null", **places)
    _, err = process.communicate(60)
    assert process.returncode == 0, err
    assert err.startswith(f"caches are in {tmp_path}/tmp/megatron_ds-") and "Traceback" not in err
    assert list((tmp_path / "tmp").glob("megatron_ds-*/xdg_cache_home/megatron_ds/tokens/*"))


def test_a_current_directory_that_is_gone_is_one_line(fork: Fork, run_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "gone.py"
    (tmp_path / "gone").mkdir()
    script.write_text(
        f"import os\nos.chdir({str(tmp_path / 'gone')!r})\nos.rmdir({str(tmp_path / 'gone')!r})\n"
        "from megatron_ds.cli.main import main\nmain()\n"
    )
    process = fork(script, "train", run_file)
    expected = "error: the current directory does not exist any more; try cd to one that does\n"
    assert (process.communicate(30), process.returncode) == (("", expected), 2)
