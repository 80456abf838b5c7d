"""A run whose documents begin with the tokenizer's special tokens, and one that was begun without them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint.progress import Progress
from megatron_ds.config import RunConfig
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.training.datasets import open_split
from megatron_ds.training.resolve import resolve_run
from megatron_ds.training.resume import initial_progress
from tests.data.tiny_tokenizers import save_framed


def test_a_run_without_a_beginning_is_told_how_to_go_on(tmp_path: Path, make_run: Callable[..., RunConfig]) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", "b", "a a a b")))

    def begun(bos: Any, saved: Progress | None = None) -> Progress:
        data = {"train": [str(tmp_path / "text.jsonl")], "valid": [], "seq_length": 2, "bos": bos}
        run = make_run(data=data, model={"tokenizer": save_framed(tmp_path / "tok", "<bos> $A")})
        return initial_progress(run, saved, open_split(resolve_run(run, 1, "cpu"), "train"), Path("out/step_2"))

    old = begun(False)
    settings = {name: value for name, value in old.data.settings.items() if name != "data.bos"}
    saved = Progress(step=2, applied=2, data=replace(old.data, samples=16, settings=settings))
    assert begun(False, saved).data.samples == 16
    with pytest.raises(CheckpointError) as caught:
        begun("auto", saved)
    assert str(caught.value) == (
        "data.bos=auto (13 tokens, 6 samples of 2, <bos> before each document) is not what out/step_2 was trained on: "
        "10 tokens, 4 samples of 2, without a special token before each document; set data.bos=false to resume as "
        "before, or set data.restart=true to resume with the new data from their first sample"
    )
    new = replace(begun("auto"), step=2, applied=2).with_data(samples=16)
    assert begun("auto", new).data.samples == 16
    with pytest.raises(CheckpointError, match=r"^data.bos=false is not what .* trained on: auto; change it back"):
        begun(False, new)


def test_bos_is_for_text_of_causal_models(make_run: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^data.bos=true does nothing with data.format=tokenized; remove it, or use"):
        resolve_run(make_run(format="tokenized", data={"bos": True}), 1, "cpu")
    with pytest.raises(ConfigError, match=r"^data.bos=yes please is not one of auto, true, false$"):
        make_run(data={"bos": "yes please"})
    bert = {"model_type": "bert", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1}
    bert |= {"num_attention_heads": 4, "intermediate_size": 32}
    with pytest.raises(ConfigError, match=r"^data.bos=true has no effect for a bert model; remove it$"):
        resolve_run(make_run(model={"config": bert}, data={"bos": True}), 1, "cpu")
