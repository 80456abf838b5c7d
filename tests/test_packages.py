"""The wheel and the sdist: what they hold, and a wheel installed and used away from the clone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

from megatron_ds.version import __version__

ROOT = Path(__file__).parent.parent
Run = Callable[..., str]


def files_under(*folders: str) -> set[str]:
    """Return the files of the clone under folders, without what Python makes of them."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist of the clone, and the wheel that was built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program of a fresh environment with the wheel, in a directory; its packages are those of the tests."""
    place = tmp_path_factory.mktemp("installed")
    environment = place / "environment"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["XDG_CACHE_HOME"] = str(place / "cache")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, env=clean)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))  # not its .pth files: not the clone

    def run(cwd: Path, program: str, *arguments: str) -> str:
        command = [str(environment / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_wheel_holds_the_package_and_what_is_shipped_with_it(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(about))
    shipped = files_under("ds_configs", "examples")
    assert names == files_under("megatron_ds") | {f"megatron_ds/share/{name}" for name in shipped}
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "Apache-2.0"


def test_sdist_holds_what_a_clone_does(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("megatron_ds", "ds_configs", "examples", "docs", "tests", "bench")
    expected = {name for name in files_under(*folders) if not name.startswith("bench/gpu/wheels/")}
    assert not (expected | {"Makefile", "LICENSE", "requirements.txt", "pyproject.toml"}) - names


def test_installed_command_has_the_examples(installed: Run, tmp_path: Path) -> None:
    assert installed(tmp_path, "megatron-ds", "--version") == f"megatron-ds {__version__}\n"
    assert "pretrain_moby_dick" in installed(tmp_path, "megatron-ds", "examples")
    installed(tmp_path, "megatron-ds", "examples", "parallel_3d")
    code = (
        "import megatron_ds as mds; from megatron_ds.config import load_deepspeed\n"
        "run = mds.load_run('examples/parallel_3d/run.yaml')\n"
        "print(mds.__file__, load_deepspeed(run.deepspeed)['zero_optimization'])"
    )
    file, _, mapping = installed(tmp_path, "python", "-c", code).partition(" ")
    assert "environment/lib" in file and mapping.startswith("{'stage': 1")


@pytest.mark.sweep
def test_installed_command_trains_and_exports(installed: Run, tmp_path: Path) -> None:
    installed(tmp_path, "megatron-ds", "examples", "pretrain_moby_dick")
    run = ["train", "examples/pretrain_moby_dick/run.yaml", "--nproc", "2"]
    installed(tmp_path, "megatron-ds", *run, "train.steps=2", "schedule.warmup_steps=1", "data.valid=[]")
    assert (tmp_path / "out" / "moby_dick" / "hf" / "model.safetensors").is_file()
    assert "LlamaForCausalLM" in installed(tmp_path, "megatron-ds", "inspect", "out/moby_dick/hf")
