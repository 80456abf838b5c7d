"""Runs on context ranks: the losses, checkpoints and exports of one process, for lengths that divide and others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.cli.main import _run
from megatron_ds.config import RunConfig
from megatron_ds.monitor import read_metrics
from tests.ranks import preload
from tests.training.test_adapter_runs import base, make_lora  # noqa: F401
from tests.training.test_expert_facts import MIXTRAL
from tests.training.test_runs import losses

Make = Callable[..., RunConfig]
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "ulysses": (2, {"context": 2}, 1),
    "gather": (2, {"context": {"size": 2, "method": "gather"}}, 3),
    "tp2-sp-ring": (4, {"tensor": 2, "sequence": True, "context": {"size": 2, "method": "ring"}}, 1),
    "pp2-cp2": (4, {"pipeline": 2, "context": 2}, 1),
}


@pytest.mark.parametrize(
    ("format", "length", "names"),
    [
        ("text", 32, ("gather", "pp2-cp2")),
        pytest.param("text", 32, ("ulysses",), marks=pytest.mark.sweep),
        pytest.param("tokenized", 33, ("gather", "tp2-sp-ring"), marks=pytest.mark.sweep),
    ],
)
def test_losses_are_those_of_one_process(make_run: Make, format: str, length: int, names: tuple[str, ...]) -> None:
    """Five steps in fp32, sums in another order: 2e-5 relative. 33 positions are padded, and examples are ragged."""
    preload()
    alone = make_run("alone", format, data={"seq_length": length})
    mds.train(alone)
    for name in names:
        ranks, parallel, stage = LAYOUTS[name]
        zero = {"zero_optimization": {"stage": stage}}
        run = make_run(name, format, parallel=parallel, data={"seq_length": length}, deepspeed=zero)
        mds.train(run, nproc=ranks)
        for field in ("loss", "valid_loss", "grad_norm", "tokens"):
            assert losses(run.output, field) == pytest.approx(losses(alone.output, field), rel=2e-5), (name, field)


def test_padding_is_no_token_for_the_balance_of_experts(make_run: Make) -> None:
    """The losses of routers have a share of the gradient norm, and of the metrics that are logged."""
    preload()
    seen = {}
    for name, ranks, parallel in (
        ("alone", 1, {}),
        ("cp2", 2, {"context": {"size": 2, "method": "ring"}, "expert": 2}),
    ):
        train = {"steps": 3, "moe_aux_loss": 0.1, "moe_z_loss": 0.01}
        run = make_run(name, model={"config": MIXTRAL}, parallel=parallel, data={"seq_length": 29}, train=train)
        mds.train(run, nproc=ranks)
        steps, _ = read_metrics(Path(run.output) / "metrics.jsonl")
        seen[name] = [{"loss": one.loss, "norm": one.grad_norm, **one.metrics} for one in steps]
    assert len(seen["alone"][0]) > 3, seen["alone"][0].keys()
    for alone, divided in zip(seen["alone"], seen["cp2"], strict=True):
        assert divided == pytest.approx(alone, rel=2e-5)


def test_a_checkpoint_is_resumed_at_any_number_of_context_ranks(make_run: Make, tmp_path: Path) -> None:
    """Two context ranks, then one process, then two: the losses of a run that was not cut; one export from each."""
    preload()
    sections = {"checkpoint": {"every": 2, "keep": 9}, "schedule": {"name": "constant"}}
    whole = make_run("whole", train={"steps": 6}, **sections)
    mds.train(whole)
    for ranks, steps in ((2, 2), (1, 4), (2, 6)):
        parallel = {"context": {"size": ranks, "method": "gather" if steps == 6 else "auto"}}
        cut = make_run("cut", parallel=parallel, train={"steps": steps}, **sections)
        mds.train(cut, nproc=ranks)
    assert losses(cut.output, "loss") == pytest.approx(losses(whole.output, "loss"), rel=2e-5)
    assert losses(cut.output, "grad_norm") == pytest.approx(losses(whole.output, "grad_norm"), rel=2e-5)
    directories = []
    for run in (whole, cut):
        directories.append(tmp_path / f"{Path(run.output).name}_hf")
        assert _run(["export", run.output, str(directories[-1])]) == 0
    first, second = (load_file(directory / "model.safetensors") for directory in directories)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


def test_adapters_on_context_ranks(make_lora: Any) -> None:  # noqa: F811
    preload()
    alone = make_lora("alone")
    mds.train(alone)
    run = make_lora("cp2", "deepspeed.zero_optimization.stage=2", parallel={"context": {"size": 2, "method": "gather"}})
    mds.train(run, nproc=2)
    assert losses(run.output, "loss") == pytest.approx(losses(alone.output, "loss"), rel=2e-5)
    assert losses(run.output, "valid_loss") == pytest.approx(losses(alone.output, "valid_loss"), rel=2e-5)
