"""The head for labels among peft's modules: all of it and nothing else, for every class that has one."""

import json
from pathlib import Path

import pytest

from megatron_ds.config.run_config import HeadSection
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import read_model, with_new_head
from megatron_ds.hf.peft.new_head import HEAD_FILE, head_file, head_modules, read_base
from megatron_ds.hf.peft.projections import in_memory
from megatron_ds.hf.peft.saved_modules import saved_parameters
from megatron_ds.hf.registry import FAMILIES
from tests.training.tiny import MODEL

KNOWN = {
    ("llama", "sequence"): ["score"],
    ("llama", "token"): ["score"],
    ("gpt2", "token"): ["classifier"],
    ("bert", "sequence"): ["bert.pooler.dense", "classifier"],
    ("bert", "token"): ["classifier"],
    ("roberta", "sequence"): ["classifier"],
    ("distilbert", "sequence"): ["pre_classifier", "classifier"],
    ("modernbert", "sequence"): ["head", "classifier"],
    ("t5", "sequence"): ["classification_head"],
}


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_all_of_the_head_and_nothing_else_is_trained_in_full(kind: str) -> None:
    """By peft's matching of the ends of names, in every family with such a class."""
    seen = set()
    for model_type in FAMILIES:
        try:
            model = with_new_head(read_model({"model_type": model_type}), HeadSection(labels=3, kind=kind))
        except (ConfigError, ConversionError):  # no such class, or no model by defaults alone
            continue
        named, ends = in_memory(model), head_modules(model)
        head = {native for native in named.table if native.startswith("head.")}
        assert saved_parameters(ends, named, "peft") == head, model_type
        assert ends == KNOWN.get((model_type, kind), ends), model_type
        seen.add(model_type)
    assert len(seen) > (25 if kind == "sequence" else 15)
    assert {model_type for model_type, known in KNOWN if known == kind} <= seen


def test_the_file_about_the_head_gives_it_back(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({**MODEL, "architectures": ["LlamaForCausalLM"]}))
    head = HeadSection(labels=["sea", "land"], problem="multi_label_classification", pad_token_id=7)
    model = with_new_head(read_model(base), head)
    (content,) = head_file(model).values()
    (tmp_path / HEAD_FILE).write_bytes(content)
    again = read_base(tmp_path, base)
    assert again.core == model.core and again.config.to_dict() == model.config.to_dict()
    assert head_file(read_model(base)) == {} and read_base(base, base).core.labels is None
    (tmp_path / HEAD_FILE).write_text('{"labels": 0}')
    with pytest.raises(ConversionError, match=r"label_head\.json: is damaged: .*labels.*; try to export it again"):
        read_base(tmp_path, base)
