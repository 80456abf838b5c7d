"""Runs with `model.rope`: a short model is trained on longer texts, resumed without its directory, and exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ds as mds
from megatron_ds.cli.main import _run
from megatron_ds.config import RunConfig, build_run
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.hf.config import read_model
from megatron_ds.training.resolve import resolve_run
from tests.ranks import preload, run_alone
from tests.training.test_runs import losses
from tests.training.tiny import MODEL, write_tokenizer

ROPE = {"type": "yarn", "factor": 4}
WANTED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}


def _save_base(directory: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(AutoConfig.for_model(**{**MODEL, "max_position_embeddings": 8})).save_pretrained(directory)


@pytest.fixture
def make(make_run: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """A run on a model of 8 positions and texts of 32."""
    preload()
    base = tmp_path / "base"
    run_alone(_save_base, base)
    write_tokenizer(base)

    def build(name: str, **sections: Any) -> RunConfig:
        content = make_run(name).model_dump(exclude_none=True)
        content |= {"model": {"path": str(base), "rope": ROPE}, "checkpoint": {"every": 2}}
        content |= {"schedule": {"name": "constant"}, **sections}
        content["train"] = {**content["train"], "steps": sections.get("steps", 4)}
        return build_run({key: value for key, value in content.items() if key != "steps"})

    return build


def written(directory: Path) -> tuple[Any, Any]:
    config = json.loads((directory / "config.json").read_text())
    return config["rope_parameters"], config["max_position_embeddings"]


def test_stretched_resumed_and_exported(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    export = {"path": str(tmp_path / "hf"), "check": True}  # transformers computes the same from it, beyond 8 positions
    mds.train(make("whole", export=export))
    assert written(tmp_path / "hf") == (WANTED, 32)
    mds.train(make("run", steps=2))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert written(checkpoint) == (WANTED, 32)
    plain = {"path": str(tmp_path / "base")}
    with pytest.raises(CheckpointError, match=r"has a different model: rotary=.*; change model\.rope back, choose"):
        mds.train(make("run", model=plain))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    mds.train(make("run"))  # its model is read from the checkpoint, which is stretched already
    assert losses(str(tmp_path / "run"), "loss") == losses(str(tmp_path / "whole"), "loss")


def test_sequences_beyond_the_stretched_positions_are_refused(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    model = {"path": str(tmp_path / "base")}

    def resolved(rope: dict[str, Any]) -> int:
        run = resolve_run(make("run", model={**model, "rope": rope}), 1, "cpu")
        length: int = run.hf.config.max_position_embeddings
        return length

    with pytest.raises(ConfigError) as caught:
        resolved({"type": "linear", "factor": 2})
    assert str(caught.value) == (
        "data.seq_length=32 is more than the 16 positions that model.rope gives; nearest: 16, or a larger "
        "model.rope.factor, or model.rope.max_position_embeddings=32"
    )
    with pytest.raises(ConfigError, match=r"more than the 8 positions that model\.rope gives"):
        resolved({"type": "default", "rope_theta": 5e5})
    assert resolved({"type": "default", "rope_theta": 5e5, "max_position_embeddings": 32}) == 32
    assert resolved({"type": "dynamic", "factor": 2}) == 8


def test_sequences_beyond_the_positions_of_a_model_without_stretching_are_noted(
    make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr("megatron_ds.training.resolve.log_once", notes.append)
    resolve_run(make("run"), 1, "cpu")
    assert notes == []
    resolve_run(make("run", model={"path": str(tmp_path / "base")}), 1, "cpu")
    assert notes == [
        "data.seq_length=32 is more than max_position_embeddings=8 of config.json, which exports keep; model.rope "
        "stretches the model to longer texts"
    ]


def test_adapters_of_a_stretched_model(
    make: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = {"r": 4, "target_modules": "all-linear"}
    export = {"path": str(tmp_path / "adapter"), "check": True}
    mds.train(make("run", peft=peft, export=export))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    for directory in (tmp_path / "adapter", checkpoint):
        assert json.loads((directory / "rope.json").read_text()) == {"type": "yarn", "factor": 4.0}
    assert _run(["export", str(checkpoint), str(tmp_path / "merged"), "--merge"]) == 0, capsys.readouterr().err
    assert written(tmp_path / "merged") == (WANTED, 32)
    assert read_model(tmp_path / "merged").core.rotary[0].scaling == "yarn"  # type: ignore[attr-defined]
    plain = {"path": str(tmp_path / "base")}
    with pytest.raises(CheckpointError, match=r"rope\.json is another rotation than the run's; set model\.rope to"):
        mds.train(make("run", peft=peft, model=plain, steps=6))
    mds.train(make("plain", peft=peft, model=plain))
    with pytest.raises(CheckpointError, match=r"was trained without model\.rope; remove it, or"):
        mds.train(make("plain", peft=peft, steps=6))
