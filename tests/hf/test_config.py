"""Hub configs are accepted; what changes the math and is not supported is refused; transformers 4 and 5 read ours."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import config_json, read_model
from megatron_ds.hf.registry import FAMILIES
from tests.hf.hub_configs import HUB
from tests.parity.cases import CONFIGS


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConversionError) as caught:
        read_model(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    """What a wrong reading would get wrong."""
    decoder = read_model(config).decoder
    rotary = decoder.rotary
    return {
        "head_dim": decoder.head_dim,
        "kv": decoder.num_kv_heads,
        "ffn": decoder.ffn_size,
        "tied": decoder.tied,
        "rope": None if rotary is None else (rotary.theta, rotary.scaling, rotary.factor),
        "window": decoder.windows[-1],
        "activation": decoder.activation,
        "eps": decoder.norm_eps,
    }


HUB_MEANING: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {
        "head_dim": 64,
        "kv": 12,
        "ffn": 3072,
        "tied": True,
        "rope": None,
        "window": None,
        "activation": "gelu_tanh",
        "eps": 1e-5,
    },
    "meta-llama/Llama-3.2-1B": {
        "head_dim": 64,
        "kv": 8,
        "ffn": 8192,
        "tied": True,
        "rope": (5e5, "llama3", 32.0),
        "window": None,
        "activation": "silu",
        "eps": 1e-5,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "head_dim": 64,
        "kv": 4,
        "ffn": 5632,
        "tied": False,
        "rope": (1e4, "default", 1.0),
        "window": None,
        "activation": "silu",
        "eps": 1e-5,
    },
    "mistralai/Mistral-7B-v0.1": {
        "head_dim": 128,
        "kv": 8,
        "ffn": 14336,
        "tied": False,
        "rope": (1e4, "default", 1.0),
        "window": 4096,
        "activation": "silu",
        "eps": 1e-5,
    },
    "Qwen/Qwen2.5-0.5B": {
        "head_dim": 64,
        "kv": 2,
        "ffn": 4864,
        "tied": True,
        "rope": (1e6, "default", 1.0),
        "window": None,
        "activation": "silu",
        "eps": 1e-6,
    },
    "Qwen/Qwen3-0.6B": {
        "head_dim": 128,
        "kv": 8,
        "ffn": 3072,
        "tied": True,
        "rope": (1e6, "default", 1.0),
        "window": None,
        "activation": "silu",
        "eps": 1e-6,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_hub_configs_are_accepted(name: str) -> None:
    before = deepcopy(HUB[name])
    found = meaning(HUB[name])
    assert HUB[name] == before, "the caller's mapping was changed"
    if name in HUB_MEANING:
        assert found == HUB_MEANING[name]


@pytest.mark.parametrize("name", HUB)
def test_hub_configs_survive_an_export(name: str, tmp_path: Path) -> None:
    model = read_model(HUB[name])
    (tmp_path / "config.json").write_text(json.dumps(config_json(model, "bfloat16")))
    assert read_model(tmp_path).decoder == model.decoder


# ---- the ledger ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_transformers_is_in_the_ledger(model_type: str) -> None:
    """A field that a new transformers brings fails here, before it is refused at a user's."""
    rules = FAMILIES[model_type].fields
    upstream = set(AutoConfig.for_model(model_type).to_dict())
    assert len(upstream) > 20
    assert sorted(name for name in upstream if name not in rules) == []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_default_config_of_transformers_is_accepted(model_type: str) -> None:
    content = AutoConfig.for_model(model_type).to_dict()
    assert read_model(content).family is FAMILIES[model_type]


def test_no_field_is_classified_twice() -> None:
    from megatron_ds.hf.fields import COMMON_EQUAL, COMMON_HARMLESS

    for family in FAMILIES.values():
        rules = family.fields
        classes = [rules.mapped, rules.harmless, set(rules.equal), COMMON_HARMLESS, set(COMMON_EQUAL)]
        assert sum(map(len, classes)) == len(set().union(*classes)), family.model_type


# ---- old and new words -----------------------------------------------------------------------------------------------

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL = {key: value for key, value in CONFIGS["llama"].items() if key != "rope_parameters"}


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
)
def test_rope_in_the_words_of_transformers_4(old: dict[str, Any]) -> None:
    new = {**SMALL, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    assert read_model({**SMALL, **old}).decoder == read_model(new).decoder


def test_linear_rope_in_the_words_of_transformers_4() -> None:
    rotary = read_model({**SMALL, "rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}}).decoder.rotary
    assert rotary is not None and (rotary.theta, rotary.scaling, rotary.factor) == (2e4, "linear", 2.0)


def test_plain_rope_in_the_words_of_transformers_4() -> None:
    rotary = read_model({**SMALL, "rope_theta": 2e4, "rope_scaling": None}).decoder.rotary
    assert rotary is not None and (rotary.theta, rotary.scaling) == (2e4, "default")


def test_sliding_window_of_qwen() -> None:
    base = {**CONFIGS["qwen2"], "sliding_window": 9, "max_window_layers": 1}
    assert read_model({**base, "use_sliding_window": True}).decoder.windows == (None, 9, 9, 9)
    assert read_model({**base, "use_sliding_window": False}).decoder.windows == (None,) * 4
    explicit = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}
    assert read_model({**base, **explicit}).decoder.windows == (9, None, 9, None)


def test_sliding_window_of_mistral() -> None:
    without = {key: value for key, value in CONFIGS["mistral"].items() if key != "sliding_window"}
    assert read_model(without).decoder.windows == (4096,) * 4
    assert read_model({**without, "sliding_window": None}).decoder.windows == (None,) * 4


# ---- refused ---------------------------------------------------------------------------------------------------------

SUPPORTED_ACTIVATIONS = "gelu, gelu_new, gelu_pytorch_tanh, relu, silu, swish"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "model_type is missing; supported: gpt2, llama, mistral, qwen2, qwen3"),
    ({"model_type": "lama"}, "model_type='lama' is not supported; nearest: llama"),
    ({"model_type": "qwen2_moe"}, "model_type='qwen2_moe' is not supported; nearest: qwen2"),
    ({"model_type": "t5"}, "model_type='t5' is not supported; supported: gpt2, llama, mistral, qwen2, qwen3"),
    ({"model_type": ["gpt2"]}, "model_type=['gpt2'] is not supported; nearest: gpt2"),
    (
        {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx=True is not supported; supported: False",
    ),
    ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights=False is not supported; supported: True"),
    ({"model_type": "gpt2", "scale_attn_weights": 1}, "scale_attn_weights=1 is not supported; supported: True"),
    (
        {"model_type": "gpt2", "reorder_and_upcast_attn": True},
        "reorder_and_upcast_attn=True is not supported; supported: False",
    ),
    (
        {"model_type": "gpt2", "add_cross_attention": True},
        "add_cross_attention=True is not supported; supported: False",
    ),
    (
        {"model_type": "llama", "hidden_act": "mish"},
        f"hidden_act='mish' is not supported; supported: {SUPPORTED_ACTIVATIONS}",
    ),
    (
        {"model_type": "gpt2", "activation_function": "tanh"},
        f"activation_function='tanh' is not supported; supported: {SUPPORTED_ACTIVATIONS}",
    ),
    ({**SMALL, "num_hidden_layer": 2}, "num_hidden_layer=2 is not a known field; nearest: num_hidden_layers"),
    (
        {**SMALL, "logits_scaling": 8.0},
        "logits_scaling=8.0 is not a known field; it could change the math, so it is not ignored; remove it if it does "
        "nothing",
    ),
    (
        {**SMALL, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type='dynamic' is not supported; supported: default, linear, llama3",
    ),
    (
        {**SMALL, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        "rope_type='yarn' is not supported; supported: default, linear, llama3",
    ),
    (
        {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5 is not supported with rope_type='default'",
    ),
    (
        {**SMALL, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}},
        "rope_parameters.mscale=1.0 is not supported with rope_type='linear'",
    ),
    (
        {**SMALL, "rope_theta": 0},
        "rope_parameters.rope_theta=0 must be a number above 0 with rope_type='default'",
    ),
    ({**SMALL, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; supported: 1.0"),
    ({**SMALL, "pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]} is not supported; supported: {}"),
    (
        {**SMALL, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config.quant_method='gptq': quantised weights are not supported; use the checkpoint that they "
        "were made from",
    ),
    ({**SMALL, "hidden_size": 0}, "hidden_size=0 must be a whole number of at least 1"),
    ({**SMALL, "num_key_value_heads": "4"}, "num_key_value_heads='4' must be a whole number of at least 1"),
    ({**SMALL, "num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=8"),
    ({"model_type": "gpt2", "n_head": 7}, "n_head=7 does not divide n_embd=768"),
    (
        {**CONFIGS["qwen3"], "layer_types": ["chunked_attention"] * 4},
        "layer_types[0]='chunked_attention' is not supported; supported: full_attention, sliding_attention",
    ),
    (
        {**CONFIGS["qwen3"], "layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        "layer_types[3]='sliding_attention' needs sliding_window, and use_sliding_window=true where the family has "
        "that field",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(config: dict[str, Any], message: str) -> None:
    assert refusal(config) == f"model.config: {message}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"type": "linear"}}, ("rope_parameters", "'factor'")),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps", "small")),
        ({"hidden_size": 30}, ("30", "heads")),
        ({"head_dim": 5}, ("head_dim", "5", "even")),
    ],
)
def test_what_transformers_itself_refuses(change: dict[str, Any], words: tuple[str, ...]) -> None:
    message = refusal({**SMALL, **change})
    assert message.startswith("model.config: transformers refuses it: ")
    assert all(word in message for word in words), message


def test_refusal_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(ConversionError) as caught:
        read_model(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: model_type='lama' is not supported; nearest: llama"


@pytest.mark.parametrize("there", ["directory", "file", "nothing"])
def test_no_config(there: str, tmp_path: Path) -> None:
    place = tmp_path / "model"
    if there == "directory":
        place.mkdir()
    elif there == "file":
        place.touch()
    with pytest.raises(ConversionError) as caught:
        read_model(place)
    assert str(caught.value) == f"{place}: no config.json here; is it a Hugging Face directory?"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        (b"\xff", "not JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)"),
        (b"[1]", "expected a JSON object, not list"),
    ],
)
def test_config_that_is_none(content: bytes, rule: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConversionError) as caught:
        read_model(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {rule}"


# ---- what we write ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONFIGS)
def test_written_config_is_read_by_transformers_5(case: str, tmp_path: Path) -> None:
    model = read_model(CONFIGS[case])
    (tmp_path / "config.json").write_text(json.dumps(config_json(model, "bfloat16")))
    read = AutoConfig.from_pretrained(tmp_path)
    expected = model.config.to_dict()
    expected.update(
        dtype="bfloat16",
        architectures=[model.family.architecture],
        _name_or_path=str(tmp_path),
        tie_word_embeddings=model.decoder.tied,
    )
    assert {**read.to_dict(), "_name_or_path": str(tmp_path)} == expected


@pytest.mark.parametrize("case", CONFIGS)
def test_written_config_has_the_words_of_transformers_4(case: str) -> None:
    model = read_model(CONFIGS[case])
    content = config_json(model, "float16")
    assert content["torch_dtype"] == content["dtype"] == "float16"
    assert content["tie_word_embeddings"] is model.decoder.tied
    rotary = model.decoder.rotary
    if rotary is None:
        assert "rope_theta" not in content
        return
    assert content["rope_theta"] == rotary.theta
    assert content["head_dim" if "head_dim" in content else "hidden_size"] in (rotary.dim, model.decoder.hidden_size)
    if rotary.scaling == "default":
        assert content["rope_scaling"] is None
    else:
        assert content["rope_scaling"]["rope_type"] == rotary.scaling
        assert content["rope_scaling"]["factor"] == rotary.factor
        assert "rope_theta" not in content["rope_scaling"]


def test_written_config_says_null_where_absence_means_something_else() -> None:
    content = config_json(read_model({**CONFIGS["mistral"], "sliding_window": None}), "float32")
    assert content["sliding_window"] is None  # absent: 4096


def test_written_config_points_to_no_code() -> None:
    model = read_model({**CONFIGS["llama"], "auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}})
    assert "auto_map" not in config_json(model, "float32")
