"""`megatron-ds train` on small file systems in memory that are full."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ds.config.yaml_text import format_yaml
from tests.cli.conftest import Fork, Start, wait_for_steps
from tests.training.tiny import run_mapping

pytestmark = [pytest.mark.sweep, pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of some bytes, and return its directory."""
    mounted: list[Path] = []

    def make(size: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> Path:
    """Fill a file system to its last byte; return the file that does."""
    file = disk / "fill"
    with open(file, "ab", buffering=0) as opened:
        for size in (4096, 1):
            while True:
                try:
                    opened.write(b"x" * size)
                except OSError:
                    break
    return file


def write_run(corpus: Path, output: Path, steps: int) -> Path:
    mapping = run_mapping(corpus, output)
    mapping["train"].update(steps=steps)
    mapping["data"].update(valid=[])
    file = output.parent.parent / "run.yaml"
    file.write_text(format_yaml(mapping))
    return file


def test_a_disk_that_is_full_for_a_while_costs_a_run_nothing(
    mount: Callable[[int], Path], fork: Fork, corpus: Path
) -> None:
    disk = mount(2**22)
    process = fork("-m", "megatron_ds", "train", write_run(corpus, disk / "out", 1500), "--nproc", 1)
    wait_for_steps(disk / "out", 5, process)
    filled = fill(disk)
    before = (disk / "out" / "metrics.jsonl").stat().st_size
    time.sleep(2)
    assert process.poll() is None and (disk / "out" / "metrics.jsonl").stat().st_size - before < 4096
    filled.unlink()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "metrics.jsonl cannot be written (No space left on device)" in err
    lines = (disk / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 1501))
    assert (disk / "out" / "report.html").is_file()


def test_a_full_temporary_directory_costs_a_run_nothing(
    mount: Callable[[int], Path], start: Start, corpus: Path, tmp_path: Path
) -> None:
    disk, output = mount(2**27), tmp_path / "runs" / "out"
    output.parent.mkdir()
    run = write_run(corpus, output, 300)
    process = start("-m", "megatron_ds", "train", run, "--nproc", 2, TMPDIR=str(disk))
    wait_for_steps(output, 5, process)
    fill(disk)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 300
    process = start("-m", "megatron_ds", "train", run, "checkpoint.resume=never", "train.steps=5", TMPDIR=str(disk))
    assert process.communicate(timeout=240) and process.returncode == 0, "nor one that begins there"
