"""A run with `model.head` over a language model: resumed at another layout, and exported."""

import json
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import build_run
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.config import read_model
from tests.ranks import preload
from tests.training.test_labelled_runs import LAYOUTS, NAMES, lines, mapping, place
from tests.training.tiny import MODEL

__all__ = ["place"]  # a fixture


def test_a_new_head_is_resumed_and_exported(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head in a checkpoint is the one that was trained, not another new one."""
    preload()
    content = mapping(place, tmp_path / "run", "classes", path=str(place / "base"))
    content |= {"checkpoint": {"every": 2}, "schedule": {"name": "constant"}}
    export = {"path": str(tmp_path / "out"), "check": True}
    whole = {**content, "output": str(tmp_path / "whole"), "checkpoint": {"every": 0}}
    mds.train(build_run(whole), LAYOUTS["classes"][0])
    mds.train(build_run({**content, "train": {**content["train"], "steps": 2}}), LAYOUTS["classes"][0])
    other: dict[str, Any] = {"parallel": {"pipeline": 2}, "deepspeed": {"zero_optimization": {"stage": 1}}}
    mds.train(build_run({**content, **other, "export": export}), 2)
    with pytest.raises(CheckpointError, match=r"has a different model: id2label=\[.sea., .land., .sky.\], the run has"):
        swapped = {**content["model"], "head": {**content["model"]["head"], "labels": [*NAMES[:1], *NAMES[:0:-1]]}}
        mds.train(build_run({**content, "model": swapped, "data": {**content["data"], "restart": True}}), 2)
    straight, resumed = ([line["loss"] for line in lines(tmp_path / one, "loss")] for one in ("whole", "run"))
    assert resumed == pytest.approx(straight, rel=2e-5) and straight[-1] < straight[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == NAMES and config["pad_token_id"] == 0
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "generation_config.json" not in {file.name for file in (tmp_path / "out").iterdir()}
    # the export is such a model itself, and so is a checkpoint: neither needs `model.head`
    for directory in (tmp_path / "out", max((tmp_path / "run" / "checkpoints").glob("step_*"))):
        assert read_model(directory).architecture == "LlamaForSequenceClassification"


def test_padding_far_from_the_text_is_no_error_of_the_export(place: Path, tmp_path: Path) -> None:
    """There a window of ModernBERT holds nothing but padding, for which transformers has other outputs than we."""
    preload()
    sizes = {"vocab_size": MODEL["vocab_size"], "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = {"model_type": "modernbert", **sizes, "num_attention_heads": 2, "local_attention": 4, "pad_token_id": 0}
    content = mapping(place, tmp_path / "run", "words", config=config, tokenizer=str(place / "tokenizer"))
    content["data"]["valid"], content["data"]["seq_length"] = [], 48
    content |= {"parallel": {}, "train": {"steps": 1, "global_batch_size": 2}}
    content["export"] = {"path": str(tmp_path / "hf"), "check": True}
    mds.train(build_run(content))
    assert read_model(tmp_path / "hf").architecture == "ModernBertForTokenClassification"
