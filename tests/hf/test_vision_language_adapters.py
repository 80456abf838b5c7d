"""Adapters of the text in a model of text and images: named as peft names its modules, and none of a tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.peft.adapters import read_adapters
from megatron_ds.hf.peft.export import export_adapters
from megatron_ds.hf.peft.reader import AdapterReader
from tests.hf.images import config_of, inputs_with_image
from tests.hf.models import hashes
from tests.parity.reference import make_model
from tests.ranks import run_alone

# Types whose names differ on disk and in memory; in the tower of the first there is a q_proj too.
TYPES = ("gemma3", "qwen2_5_vl", "smolvlm")
TEXT_MODULES = r"model\.(language_model|text_model)\..*\.(q_proj|v_proj|down_proj)"


def _with_image(model: Any, model_type: str) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_with_image(model_type)).logits


def _load(base: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)


def _through_our_tables(folder: Path, model_type: str) -> tuple[list[str], Tensor, Tensor]:
    """Save a base and adapters of peft, read them, write them; returns peft's problems, and logits of both."""
    make_model(config_of(model_type)).save_pretrained(folder / "base")
    config = LoraConfig(r=3, target_modules=TEXT_MODULES, init_lora_weights=False, modules_to_save=["embed_tokens"])
    theirs = get_peft_model(_load(folder / "base"), config)
    theirs.save_pretrained(folder / "adapter")
    before = _with_image(theirs, model_type)
    model = read_model(folder / "base")
    reader = AdapterReader(folder / "adapter", read_adapters(folder / "adapter", model, str(folder / "base")))
    adapters = reader.adapters
    ours = ((name, reader.full(name)) for name in adapters.table)
    export_adapters(folder / "again", adapters, ours, None, None)
    loaded: Any = PeftModel.from_pretrained(_load(folder / "base"), folder / "again", autocast_adapter_dtype=False)
    problems = [name for name, _ in loaded.named_parameters() if "lora_" in name and "vision" in name]
    return problems, before, _with_image(loaded, model_type)


@pytest.mark.parametrize("model_type", TYPES)
def test_adapters_of_peft_come_back(model_type: str, tmp_path: Path) -> None:
    """Tensor by tensor; and peft puts them on no module of a tower."""
    problems, before, after = run_alone(_through_our_tables, tmp_path, model_type)
    assert problems == [] and torch.equal(before, after)
    assert hashes_of_adapters(tmp_path / "again") == hashes_of_adapters(tmp_path / "adapter")


def hashes_of_adapters(directory: Path) -> dict[str, str]:
    (directory / "adapter_model.safetensors").rename(directory / "model.safetensors")
    return hashes(directory)


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
def test_modules_are_named_one_by_one(kind: str) -> None:
    """By "q_proj" alone peft would match those of the tower too, whose adapters no file holds."""
    config: dict[str, Any] = {"peft_type": kind, "target_modules": ["q_proj", "down_proj"]}
    config |= {"feedforward_modules": ["down_proj"]} if kind == "IA3" else {"exclude_modules": r".*\.3\.mlp\..*"}
    found = read_adapters(config, read_model(config_of("gemma3")), "base")
    text = "model.language_model.layers"
    q = [f"{text}.{layer}.self_attn.q_proj" for layer in range(4)]
    down = [f"{text}.{layer}.mlp.down_proj" for layer in range(4 if kind == "IA3" else 3)]
    assert found.config["target_modules"] == sorted(found.modules) == sorted(q + down)
    assert found.config.get("feedforward_modules") == (down if kind == "IA3" else None)


def test_modules_of_a_tower_match_nothing() -> None:
    model = read_model(config_of("qwen3_vl"))
    with pytest.raises(ConversionError, match=r"target_modules=\['qkv'\] matches nothing in a qwen3_vl; supported: "):
        read_adapters({"target_modules": ["qkv"]}, model, "base")
