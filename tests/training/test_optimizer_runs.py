"""Runs with other optimizers than AdamW, and with an average of the weights, as a user starts them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.config import RunConfig, build_run
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.training.resolve import resolve_run
from tests.ranks import preload
from tests.training.test_registered_names import lines_of

MakeRun = Callable[..., RunConfig]


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def test_an_average_is_exported_at_the_end_and_from_the_last_checkpoint(make_run: MakeRun, tmp_path: Path) -> None:
    preload()
    run = make_run(
        deepspeed={"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
        train={"ema": {"decay": 0.8}},
        checkpoint={"every": 2},
        export={"path": str(tmp_path / "live"), "ema": True, "check": True},
    )
    mds.train(run, nproc=2)
    mds.export_hf(run.output, tmp_path / "averaged", ema=True)
    mds.export_hf(run.output, tmp_path / "trained")
    live, averaged = weights_in(tmp_path / "live"), weights_in(tmp_path / "averaged")
    assert all(torch.equal(live[name], one) and one.dtype == torch.bfloat16 for name, one in averaged.items())
    assert not torch.equal(live["lm_head.weight"], weights_in(tmp_path / "trained")["lm_head.weight"])


def test_adapters_are_averaged_too(make_run: MakeRun, tmp_path: Path) -> None:
    preload()
    base = make_run("base", export={"path": str(tmp_path / "hf")}, train={"steps": 1}, schedule={"warmup_steps": 0})
    mds.train(base)
    content = base.model_dump(exclude_none=True) | {
        "model": {"path": str(tmp_path / "hf")},
        "peft": {"r": 4, "target_modules": "all-linear"},
        "train": {**base.train.model_dump(exclude_none=True), "steps": 4, "ema": {"decay": 0.8}},
        "checkpoint": {"every": 4},
        "export": {"path": str(tmp_path / "live"), "ema": True},
        "output": str(tmp_path / "lora"),
    }
    mds.train(build_run(json.loads(json.dumps(content))), nproc=2)
    mds.export_hf(tmp_path / "lora", tmp_path / "averaged", ema=True)
    live, averaged = weights_in(tmp_path / "live"), weights_in(tmp_path / "averaged")
    trained = weights_in(tmp_path / "lora" / "checkpoints" / name_of(4))
    assert all(torch.equal(live[name], one) for name, one in averaged.items())
    assert live.keys() == trained.keys() and not torch.equal(*(one[next(iter(live))] for one in (live, trained)))
    mds.export_hf(tmp_path / "lora", tmp_path / "merged", ema=True, merge=True)
    assert weights_in(tmp_path / "merged").keys() == weights_in(tmp_path / "hf").keys()


def test_another_optimizer_is_refused_and_then_begins_empty(make_run: MakeRun) -> None:
    preload()
    mds.train(make_run(checkpoint={"every": 5}))
    lion = {"optimizer": {"name": "lion", "lr": 1e-4}, "schedule": {"min_lr": 0.0}, "train": {"steps": 7}}
    with pytest.raises(CheckpointError, match=r"^optimizer\.name=lion keeps exp_avg, .* try optimizer\.name=adamw"):
        mds.train(make_run(**lion, checkpoint={"every": 5}))
    for steps in (7, 8):  # the second time it is its own state that is resumed
        run = make_run(**{**lion, "train": {"steps": steps}}, checkpoint={"every": 5, "optimizer": "reset"})
        mds.train(run)
        assert StateReader(Path(run.output) / "checkpoints" / name_of(steps)).optimizer_kinds == {"exp_avg"}
    assert [line["step"] for line in lines_of(run) if "lr" in line] == list(range(1, 9))


ON_NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {
            "optimizer": {"name": "muon"},
            "checkpoint": {"every": 0},
            "deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}},
        },
        "deepspeed.zero_optimization.offload_optimizer.device=nvme has not been tried with optimizer.name=muon, whose "
        "ranks exchange state; try cpu, or optimizer.name=adamw",
    ),
    (
        {"optimizer": {"name": "sgd", "options": {"momentum": 1.5}}},
        "optimizer.options.momentum=1.5 must be less than 1.0",
    ),
    (
        {"optimizer": {"name": "sgd", "options": {"momentum": 0.0, "nesterov": True}}},
        "optimizer.options.nesterov=true needs a momentum; try optimizer.options.momentum=0.9",
    ),
    (
        {"optimizer": {"name": "sgd", "options": {"nesterov": 1}}},
        "optimizer.options.nesterov=1 is not true or false; nearest: true",
    ),
    (
        {"optimizer": {"name": "adafactor", "options": {"decay_rate": 0.8}}},
        "optimizer.options.decay_rate=0.8 must be less",
    ),
    ({"optimizer": {"name": "adafactor", "options": {"beta": 0.8}}}, "optimizer.options.beta: unknown option"),
    (
        {"optimizer": {"name": "adafactor"}, "deepspeed": ON_NVME},
        "deepspeed.zero_optimization.offload_optimizer.device=nvme has not been tried with optimizer.name=adafactor",
    ),
    (
        {"train": {"ema": {}}, "deepspeed": ON_NVME},
        "deepspeed.zero_optimization.offload_optimizer.device=nvme cannot be averaged by train.ema yet; try cpu",
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSALS, ids=[message.split(" ")[0] for _, message in REFUSALS])
def test_refused_in_one_line(make_run: MakeRun, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_run(make_run(**sections), 1, "cpu")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_export_of_no_average_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.ema=true needs an average of the weights, .*try train\.ema\.decay"):
        make_run(export={"path": str(tmp_path / "hf"), "ema": True})
