"""The family of a config: other names of a family, former names, and configs that name none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.model_type import MISSING_PARTS
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.verify import verify_hf
from tests.hf.models import SMALL, changed, hashes
from tests.parity.cases import CONFIGS
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.reference import make_model

REFINED = {
    "model_type": "RefinedWebModel",
    "architectures": ["RWForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
    "vocab_size": 131,
    "hidden_size": 32,
    "n_layer": 4,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "parallel_attn": True,
}


def refusal(config: dict[str, Any] | Path) -> str:
    with pytest.raises(ConversionError) as caught:
        read_model(config)
    return str(caught.value)


@pytest.mark.parametrize("alias", [family.model_type for family in FAMILIES.values() if family.same_as])
def test_another_name_has_the_same_table(alias: str) -> None:
    other = FAMILIES[alias]
    family = FAMILIES[str(other.same_as)]
    assert (other.rows, other.ignored, other.aliases) == (family.rows, family.ignored, family.aliases)
    assert other.fields.mapped <= family.fields.mapped and other.fields.equal == family.fields.equal
    assert list(other.classes.values()) == [options for name, options in family.classes.items()]


def present(former: str) -> dict[str, Any]:
    """What transformers calls the models of a former type."""
    shared = {name: value for name, value in REFINED.items() if name not in ("n_layer", "n_head", "auto_map")}
    renamed = {"model_type": "falcon", "num_hidden_layers": 4, "num_attention_heads": 4}
    grouped = {"num_kv_heads": 2, "new_decoder_architecture": True} if former == "RefinedWeb" else {}
    return {**shared, **renamed, **grouped, "architectures": ["FalconForCausalLM"]}


@pytest.mark.parametrize("former", ["RefinedWebModel", "RefinedWeb"])
def test_refined_web_is_falcon(former: str, tmp_path: Path) -> None:
    """Verified against transformers' Falcon, and exported as one."""
    make_model(present(former)).save_pretrained(tmp_path / "in")
    grouped = {"n_head_kv": 2, "multi_query": None} if former == "RefinedWeb" else {}
    old = {name: value for name, value in {**REFINED, "model_type": former, **grouped}.items() if value is not None}
    (tmp_path / "in" / "config.json").write_text(json.dumps(old))
    assert verify_hf(tmp_path / "in").ok
    rewrite(tmp_path / "in", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures == ["FalconForCausalLM"]
    assert read_model(tmp_path / "out").core == read_model(tmp_path / "in").core == read_model(present(former)).core
    assert hashes(tmp_path / "out") == hashes(tmp_path / "in")


def test_refined_web_without_a_field_whose_default_changed() -> None:
    without = {name: value for name, value in REFINED.items() if name != "parallel_attn"}
    assert "parallel_attn is missing, whose default is another one in model_type='RefinedWebModel'" in refusal(without)
    assert "n_head=4 contradicts num_attention_heads=8" in refusal({**REFINED, "num_attention_heads": 8})


def test_gpt_sw3_is_gpt2() -> None:
    model = read_model({**CONFIGS["gpt2"], "model_type": "gpt-sw3"})
    assert model.core == read_model(CONFIGS["gpt2"]).core
    assert config_json(model, "float32")["model_type"] == AutoConfig.for_model("gpt-sw3").model_type == "gpt2"


# ---- without model_type ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("gpt2-plain", "GPT2LMHeadModel"),
        ("gpt2-plain", "GPT2Model"),
        ("llama-plain", "LLaMAForCausalLM"),
        ("opt-before", "OPTForCausalLM"),
        ("gpt_neox-parallel", "GPTNeoXForCausalLM"),
        ("falcon-7b", "RWForCausalLM"),
    ],
)
def test_a_class_names_the_family(case: str, named: str) -> None:
    config = {name: value for name, value in FAMILY_CASES[case].items() if name != "model_type"}
    assert read_model({**config, "architectures": [named]}).family.model_type == case.partition("-")[0]


def test_a_class_of_another_name_keeps_it() -> None:
    for named, family in {
        "XLMRobertaForMaskedLM": "xlm-roberta",
        "MT5ForConditionalGeneration": "mt5",
        "CamembertModel": "camembert",
    }.items():
        assert (
            read_model({"architectures": [named], "pad_token_id": 1, "tie_word_embeddings": True}).family.model_type
            == family
        )


def test_a_class_that_we_do_not_have() -> None:
    assert refusal({**SMALL, "model_type": None, "architectures": ["MPTForCausalLM"]}).startswith(
        "model.config: model_type is missing, and architectures=['MPTForCausalLM'] belongs to no supported "
        "family; supported"
    )


@pytest.mark.parametrize(
    ("case", "families"),
    [("gpt2", ["gpt2"]), ("qwen3", ["qwen3"]), ("llama", ["llama", "mistral"]), ("qwen2", ["qwen2"])],
)
def test_else_fields_and_tensors_name_it(case: str, families: list[str], saved: Path, tmp_path: Path) -> None:
    directory = changed(saved / case / "float32", tmp_path / "old", model_type=None, architectures=None)
    if len(families) == 1:
        assert read_model(directory).core == read_model(saved / case / "float32").core
    else:
        message = refusal(directory)
        assert "model_type is missing, and fields and tensors are those of llama and mistral" in message


# ---- hints -----------------------------------------------------------------------------------------------------------


def without_a_norm(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if "layernorm" not in name}


@pytest.mark.parametrize(
    ("change", "fields", "hint"),
    [
        (dict, {}, "nearest: llama"),
        (dict, {"logit_scale": 2.0}, "supported: "),  # a field that Llama has not
        (without_a_norm, {}, "supported: "),  # tensors that are not Llama's
    ],
)
def test_a_relative_is_named_where_its_table_fits(
    change: Callable[[Any], Any], fields: dict[str, Any], hint: str, saved: Path, tmp_path: Path
) -> None:
    directory = changed(saved / "llama" / "float32", tmp_path / "x", change, model_type="llama2", **fields)
    assert f"model_type='llama2' is not supported; {hint}" in refusal(directory)


@pytest.mark.parametrize("model_type", MISSING_PARTS)
def test_what_a_relative_needs_is_named(model_type: str) -> None:
    """No present family is one of them, and transformers has all of those."""
    assert model_type not in FAMILIES and model_type in {*CONFIG_MAPPING_NAMES, "deepseek_v32"}
    message = refusal({"model_type": model_type})
    assert f"{model_type!r} is not supported; it needs {MISSING_PARTS[model_type]}; supported: gpt2, " in message


def test_more_than_text() -> None:
    message = refusal({"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}})
    assert "'gemma3n' is not supported; it is more than a text model, and of those only these are: gemma3, " in message
    assert message == refusal({"model_type": "gemma3n", "text_config": {}})
