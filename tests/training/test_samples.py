"""`train.samples`: what is written and shown, at layouts, after a resume, and that training does not change by it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import RunConfig
from megatron_ds.errors import ConfigError, DataError

MakeRun = Callable[..., RunConfig]
SAMPLES = {"prompts": ["w1 w2 w3", "w7"], "max_new_tokens": 6}
LAYOUTS = {
    "tp2sp": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "zero3": (2, {"deepspeed": {"zero_optimization": {"stage": 3}}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
}


def lines_of(run: RunConfig, name: str = "samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.output) / name).read_text().splitlines()]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "tp2sp" else pytest.mark.sweep) for name in LAYOUTS]
)
def test_the_last_samples_are_what_the_export_writes(layout: str, make_run: MakeRun, tmp_path: Path) -> None:
    ranks, sections = LAYOUTS[layout]
    hf = tmp_path / "hf"
    run = make_run(train={"samples": SAMPLES}, export={"path": str(hf)}, **sections)
    result = mds.train(run, nproc=ranks)
    found = lines_of(run)
    assert [line["step"] for line in found] == [3, 3, 5, 5]
    assert [line["prompt"] for line in found] == SAMPLES["prompts"] * 2
    expected = mds.generate(hf, SAMPLES["prompts"], max_new_tokens=6)
    assert [line["text"] for line in found[2:]] == [one.text for one in expected]
    assert [line["stopped_by"] for line in found[2:]] == [one.stopped_by for one in expected]
    plain = mds.train(make_run("plain", **sections), nproc=ranks)
    assert result.last_loss == plain.last_loss and result.last_valid_loss == plain.last_valid_loss


def test_a_resumed_run_has_the_samples_of_each_step_once(make_run: MakeRun) -> None:
    samples = {**SAMPLES, "every": 2, "temperature": 1.0}
    run = make_run(train={"samples": samples, "steps": 6}, checkpoint={"every": 3})
    mds.train(run)
    whole = lines_of(run)
    assert [line["step"] for line in whole] == [2, 2, 4, 4, 6, 6]
    resume = str(Path(run.output) / "checkpoints" / "step_00000003")
    mds.train(make_run(train={"samples": samples, "steps": 6}, checkpoint={"every": 3, "resume": resume}))
    assert lines_of(run) == whole


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"every": "epoch"}, "train.samples.every=epoch is neither eval nor a number of steps"),
        ({"every": 0}, "train.samples.every=0 is neither"),
        ({"max_new_tokens": 80}, "train.samples: max_new_tokens=80"),
        ({"chat": True}, "has no chat template"),
        ({"prompts": []}, "train.samples.prompts"),
    ],
)
def test_what_cannot_be_sampled_is_refused(samples: dict[str, Any], message: str, make_run: MakeRun) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        mds.train(make_run(train={"samples": {**SAMPLES, **samples}}, model={"config": LEARNED}))


def test_samples_of_validations_need_validations(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match=r"data.valid is empty; try train.samples.every=100"):
        make_run(train={"samples": SAMPLES}, data={"valid": []})


LEARNED = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
