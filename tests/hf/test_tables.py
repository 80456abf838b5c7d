"""The tables name exactly the parameters of our models and the tensors of transformers', with their shapes."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ds.hf.config import read_model
from megatron_ds.models.gpt import decoder_stages
from megatron_ds.models.stages import StageModel
from tests.parity.cases import CONFIGS

OPTIONS: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "llama-attention-bias": {**CONFIGS["llama"], "attention_bias": True},
    "llama-mlp-bias": {**CONFIGS["llama"], "mlp_bias": True},
    "llama-head-dim": {**CONFIGS["llama"], "head_dim": 6},
    "llama-one-kv-head": {**CONFIGS["llama"], "num_key_value_heads": 1},
    "mistral-tied": {**CONFIGS["mistral"], "tie_word_embeddings": True, "sliding_window": None},
    "qwen3-tied-bias": {**CONFIGS["qwen3"], "attention_bias": True},
    "qwen3-untied": {**CONFIGS["qwen3"], "tie_word_embeddings": False},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_table_is_the_model(case: str) -> None:
    model = read_model(OPTIONS[case])
    with torch.device("meta"):
        ours = dict(StageModel(decoder_stages(model.decoder)).named_parameters())
    assert set(model.table) == set(ours)
    for name, row in model.table.items():
        assert row.native == name
        assert row.op.native_shape(model.axis_sizes) == ours[name].spec.shape, name
        assert row.op.split_dim(row.split) == ours[name].spec.split_dim, name


@pytest.mark.parametrize("case", OPTIONS)
def test_table_is_transformers_model(case: str) -> None:
    model = read_model(OPTIONS[case])
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**OPTIONS[case]))
    expected = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}  # a tied head is one
    rows = model.table.values()
    named = [(name, row.op.source_shape(at, model.axis_sizes)) for row in rows for at, name in enumerate(row.names)]
    assert len(dict(named)) == len(named), "a tensor stands in two rows"
    assert dict(named) == expected


def test_tied_model_has_no_head_and_knows_it_again() -> None:
    model = read_model(CONFIGS["gpt2"])
    assert model.decoder.tied and "head.weight" not in model.table
    untied = model.with_tied(False)
    assert "head.weight" in untied.table and "head.weight" not in model.table
