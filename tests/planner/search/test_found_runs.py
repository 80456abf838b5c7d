"""The best layout that the search finds is written as a run file, and `train` starts it as it is on real ranks."""

from pathlib import Path

import pytest

from megatron_ds import engine
from megatron_ds.config import load_run
from megatron_ds.planner.search.branch_and_bound import Limits
from megatron_ds.planner.search.find_layouts import find_layouts
from megatron_ds.planner.search.layout_files import write_layouts
from megatron_ds.planner.search.space import LAYOUT
from megatron_ds.training.launch import train
from tests.examples.test_examples import losses
from tests.planner.search.test_published_searches import searched

VARIES = LAYOUT | {"micro_batch_size", "zero_stage"}
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.sweep)])
def test_the_best_layout_trains(num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine.preload()
    short = ["train.steps=2", "schedule.warmup_steps=1", "data.valid=[]", f"output={tmp_path}/out", "export=null"]
    run = load_run("examples/parallel_3d/run.yaml", short)
    result = find_layouts(searched(run, 1, num_ranks, "cpu", None), Limits(), VARIES, 3)
    assert len({one.candidate.layout for one in result.found}) == 3
    paths = write_layouts(result.found, tmp_path / "layouts", num_ranks, 16 * 128)
    train(load_run(paths[0]), num_ranks)
    assert len(losses(tmp_path / "out")) == 2
    for path in paths[1:]:
        assert load_run(path).train.global_batch_size == 16
