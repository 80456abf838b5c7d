"""An objective that the package does not know, named in the run file: trained, logged, and refused where wrong."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import DataSection, RunConfig
from megatron_ds.data import Causal
from megatron_ds.errors import ConfigError
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.sequential import with_head
from megatron_ds.monitor import read_metrics
from megatron_ds.runtime import LoadedModel
from megatron_ds.runtime.objective import OBJECTIVES, Objective
from megatron_ds.training.datasets import open_split
from megatron_ds.training.resolve import resolve_run
from tests.parity.own_head import HEAD, ZLossHead
from tests.ranks import preload

LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "alone": (1, {}, 1),
    "dp2": (2, {}, 3),
    "tp2": (2, {"tensor": 2, "sequence": True}, 2),
    "pp2": (2, {"pipeline": 2}, 1),
}


def z_loss(model: LoadedModel, data: DataSection, seed: int) -> Objective:
    if not isinstance(model.hf.core, DecoderConfig):
        raise ConfigError("train.objective=z_loss needs a decoder")
    return Objective(Causal(), lambda layers, ctx: with_head(layers, ZLossHead, HEAD))


def unlabelled(model: LoadedModel, data: DataSection, seed: int) -> Objective:
    spec = replace(HEAD, label_columns=("targets", "advantages"))
    return Objective(Causal(), lambda layers, ctx: with_head(layers, ZLossHead, spec))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (z_loss, unlabelled):
        monkeypatch.setitem(OBJECTIVES._entries, make.__name__, make)


def test_terms_and_metrics_are_logged_the_same_at_every_layout(make_run: Callable[..., RunConfig]) -> None:
    preload()
    seen = {}
    for name, (ranks, parallel, stage) in LAYOUTS.items():
        zero = {"zero_optimization": {"stage": stage}}
        run = make_run(name, train={"objective": "z_loss"}, parallel=parallel, deepspeed=zero)
        mds.train(run, nproc=ranks)
        steps, valid = read_metrics(Path(run.output) / "metrics.jsonl")
        assert len(steps) == 5 and len(valid) == 2
        for step in steps:
            assert list(step.terms) == ["targets", "z"] and sum(step.terms.values()) == pytest.approx(step.loss)
        for line in (*steps, *valid):
            assert list(line.metrics) == ["top_quarter", "log_partition"] and 0.0 < line.metrics["top_quarter"] < 1.0
        losses = [step.loss for step in steps] + [line.valid_loss for line in valid]
        seen[name] = losses + [value for line in (*steps, *valid) for value in line.metrics.values()]
        assert mds.load_run(Path(run.output) / "config.yaml").train.objective == "z_loss"
    for name in LAYOUTS:
        assert seen[name] == pytest.approx(seen["alone"], rel=2e-5), name


def test_a_run_of_its_own_objective_logs_no_metrics(make_run: Callable[..., RunConfig]) -> None:
    preload()
    run = make_run()
    mds.train(run)
    lines = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    assert not any("metrics" in line or "terms" in line for line in lines)


def refusal(run: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        open_split(resolve_run(run, 1, "cpu"), "train")
    return str(caught.value)


def test_an_unknown_objective_is_refused(make_run: Callable[..., RunConfig]) -> None:
    text = refusal(make_run(train={"objective": "z_lose"}))
    assert re.fullmatch(r"train\.objective=z_lose is not one of auto, .*; did you mean z_loss\?", text)


def test_labels_that_the_data_do_not_have_are_refused(make_run: Callable[..., RunConfig]) -> None:
    assert refusal(make_run(train={"objective": "unlabelled"})) == (
        "train.objective=unlabelled reads the label column advantages, which samples of data.format=text do not have "
        "for a llama model; they have input_ids, targets"
    )


@pytest.mark.parametrize("sections", [{"checkpoint": {"every": 2}}, {"export": {"path": "hf"}}], ids=["save", "export"])
def test_parameters_that_no_directory_can_hold_are_refused(
    make_run: Callable[..., RunConfig], sections: dict[str, Any]
) -> None:
    fix = "checkpoint.every=0" if "checkpoint" in sections else "no export"
    assert refusal(make_run(train={"objective": "z_loss"}, **sections)) == (
        "train.objective=z_loss trains head.gain, which a LlamaForCausalLM does not have, so that no Hugging Face "
        f"directory can hold it; try {fix}"
    )
