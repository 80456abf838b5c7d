"""Run files of found layouts: they hold the keys that were given, and read back as the runs that were found."""

import os
from pathlib import Path

import pytest

from megatron_ds.config import RunConfig, load_run
from megatron_ds.errors import ConfigError
from megatron_ds.planner.search.branch_and_bound import GB, Estimate, FoundLayout
from megatron_ds.planner.search.layout_files import run_text, write_layouts
from megatron_ds.planner.search.space import Candidate, with_candidate
from tests.ranks import run_alone

ROOT = Path(__file__).parents[3]
RUN_FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*/*.yaml"))
FOUND = (
    (Candidate(8, 4, sequence=True, micro_batch_size=2, recompute="selective"), Estimate(12.5, 61 * GB)),
    (Candidate(zero_stage=3, offload_optimizer=True), Estimate(25.0, 30 * GB, 8 * GB)),
)


def test_files_read_back_as_the_runs_that_were_found(tmp_path: Path) -> None:
    run = load_run(ROOT / "examples/plan/llama3_70b.yaml")
    found = [FoundLayout(one, estimate, with_candidate(run, one)) for one, estimate in FOUND]
    paths = write_layouts(found, tmp_path / "layouts", 64, 1000)
    assert [path.name for path in paths] == ["1_tensor_8_pipeline_4_zero_1.yaml", "2_zero_3.yaml"]
    assert [load_run(path) for path in paths] == [one.run for one in found]
    text = paths[0].read_text().splitlines()
    assert text[0] == ("# tensor 8, pipeline 4, ZeRO 1, micro-batch 2, recompute selective; 2 data ranks: 64 ranks.")
    assert text[1] == "# Planned: 12.5 s a step, 80 tokens/s, 61.0 GB on the fullest device."
    assert "30.0 GB on the fullest device and 8.0 GB of its host's" in paths[1].read_text()
    assert len(text) < 50, "keys that were not given are not written"
    with pytest.raises(ConfigError, match=r"holds 1_tensor_8_pipeline_4_zero_1\.yaml already"):
        write_layouts(found, tmp_path / "layouts", 64, 1000)
    with pytest.raises(ConfigError, match=r"--write=.* cannot be made: Not a directory"):
        write_layouts(found, paths[0] / "there", 64, 1000)


def test_shared_memory_stays_as_it_was_given() -> None:
    """It has no effect on one tensor rank, and `train` refuses the layouts that it cannot be used in."""
    run = load_run(ROOT / "examples/plan/llama3_8b.yaml", ["parallel.tensor=2", "parallel.shared_memory=true"])
    for tensor in (1, 2):
        assert with_candidate(run, Candidate(tensor)).parallel.shared_memory
    assert "shared_memory: true" in run_text(with_candidate(run, Candidate()))


def _written_again(path: str, folder: Path) -> tuple[RunConfig, RunConfig]:
    """The run of a file with another layout, and what is read of the file that is written for it."""
    os.chdir(ROOT)
    written = with_candidate(load_run(path), Candidate(2, sequence=True))
    (folder / "run.yaml").write_text(run_text(written))
    return written, load_run(folder / "run.yaml")


@pytest.mark.parametrize("path", [path for path in RUN_FILES if "kubernetes" not in path])
def test_every_shipped_run_reads_back(path: str, tmp_path: Path) -> None:
    """In a process of its own, because what the package of an example registers stays in it."""
    written, read = run_alone(_written_again, path, tmp_path)
    assert read == written
