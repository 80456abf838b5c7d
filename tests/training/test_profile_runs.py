"""`train.profile` in real runs: a trace a rank that a browser opens, and parts that add up to the step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import RunConfig
from megatron_ds.errors import ConfigError, TrainingError
from megatron_ds.monitor.profile import EXPOSED, time_by_part
from megatron_ds.parallel.regions import ATTENTION, DISPATCH, EMBEDDING, EXPERTS, HEAD, MLP, OPTIMIZER, ROUTER
from megatron_ds.training.step_profile import StepProfile
from tests.halves import swept
from tests.ranks import preload, run_alone
from tests.training.tiny import MODEL

MIXTRAL = {**MODEL, "model_type": "mixtral", "num_local_experts": 4}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2, "sequence": True}, {}),
    "pp2-full": (2, {"pipeline": 2}, {"recompute": "full"}),
    "experts": (2, {"expert": 2}, {}),
    "alone": (1, {}, {}),
}
OF_EXPERTS = (ROUTER, DISPATCH, EXPERTS)


@pytest.mark.parametrize("layout", ["pp2-full", "experts", *swept("tp2", "alone")])
def test_parts_of_a_run(make_run: Callable[..., RunConfig], layout: str) -> None:
    preload()
    ranks, parallel, train = LAYOUTS[layout]
    model = {"model": {"config": MIXTRAL}} if layout == "experts" else {}
    run = make_run(layout, parallel=parallel, train={**train, "profile": {"steps": [2, 4]}}, **model)
    mds.train(run, nproc=ranks)
    folder = Path(run.output) / "profile"
    parts = json.loads((folder / "parts.json").read_text())
    assert parts["steps"] == [2, 4] and len(parts["ranks"]) == ranks
    lines = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    told_s = sum(line["step_s"] for line in lines if line["step"] in (2, 3, 4) and "step_s" in line) / 3
    for rank, times in enumerate(parts["ranks"]):
        trace = json.loads((folder / f"rank_{rank:05d}.json").read_text())
        assert trace["traceEvents"] and times["steps"] == 3
        seconds = times["seconds"]
        assert sum(seconds.values()) == pytest.approx(told_s, rel=0.2)
        assert seconds[ATTENTION] > 0 and seconds[MLP] > 0 and seconds[OPTIMIZER] > 0
        assert seconds[EXPOSED] > 0.02 * told_s or ranks == 1
        last, first = rank == ranks - 1 or layout != "pp2-full", rank == 0 or layout != "pp2-full"
        assert (seconds[HEAD] > 0) == last and (seconds[EMBEDDING] > 0) == first
        forward = {"traceEvents": [event for event in trace["traceEvents"] if event.get("cat") != "fwdbwd"]}
        assert all((seconds[name] > 0) == (layout == "experts") for name in OF_EXPERTS)
        for name in (ATTENTION, *(OF_EXPERTS if layout == "experts" else (MLP,))):
            assert seconds[name] > 1.1 * time_by_part(forward).seconds[name], "with its backward pass"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([4, 2], r"train.profile.steps=\[4, 2\] ends before it begins; nearest: \[2, 4\]"),
        ([4, 9], r"train.profile.steps=\[4, 9\] goes beyond train.steps=5; nearest: \[4, 5\]"),
        ([7, 9], r"train.profile.steps=\[7, 9\] goes beyond train.steps=5; nearest: \[5, 5\]"),
        (3, r"train.profile.steps=3 is not a first and a last step; write train.profile.steps=\[10, 12\]"),
        ([0, 2], "train.profile.steps"),
    ],
)
def test_what_cannot_be_recorded(make_run: Callable[..., RunConfig], steps: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_run(train={"profile": {"steps": steps}})


def test_a_trace_that_cannot_be_written_ends_the_run(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"profile": {"steps": [1, 1]}})
    Path(run.output).mkdir(parents=True)
    (Path(run.output) / "profile").write_text("a file in the way")

    def record() -> None:
        with StepProfile(run, 0, lambda line: None, lambda what, may_take_long=False: None).around(1):
            pass

    with pytest.raises(TrainingError, match=r"train.profile: .*rank_00000.json could not be written"):
        run_alone(record)
