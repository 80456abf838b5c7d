"""What a config asks for and we would get wrong is refused in one line: field, value, rule, nearest fix."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.registry import FAMILIES
from tests.hf.models import LLAMA3, SMALL
from tests.parity.family_cases import FAMILY_CASES


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConversionError) as caught:
        read_model(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


SUPPORTED = ", ".join(FAMILIES)
SUPPORTED_ACTIVATIONS = (
    "gelu, gelu_accurate, gelu_fast, gelu_new, gelu_python, gelu_python_tanh, gelu_pytorch_tanh, quick_gelu, relu, "
    "relu2, silu, swish"
)
NEAREST = {"lama": "llama", "GPT-J": "gptj", "qwen_2": "qwen2", "Bloom": "bloom"}
# Models of transformers' own: a similar name, or the same names of tensors, do not make them one of ours.
OTHERS = (
    *("olmo", "flex_olmo", "jetmoe", "mpt", "xglm", "persimmon"),
    *("convbert", "bart", "umt5", "funnel", "deberta", "longt5", "xlm-roberta-xl", "roberta-prelayernorm"),
)
UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({}, f"model_type is missing; supported: {SUPPORTED}"),
    ({"model_type": "whisper"}, f"model_type='whisper' is not supported; supported: {SUPPORTED}"),
    ({"model_type": ["gpt2"]}, "model_type=['gpt2'] is not supported; nearest: gpt2"),
    *(
        ({"model_type": asked}, f"model_type={asked!r} is not supported; nearest: {near}")
        for asked, near in NEAREST.items()
    ),
    *(({"model_type": asked}, f"model_type={asked!r} is not supported; supported: {SUPPORTED}") for asked in OTHERS),
    ({**SMALL, "num_hidden_layer": 2}, "num_hidden_layer=2 is not a known field; nearest: num_hidden_layers"),
    (
        {**SMALL, "unpadded_vocab_size": 100},  # read by a base class that no model's own file shows
        "unpadded_vocab_size=100 is not a known field; it could change the math, so it is not ignored; remove it if it "
        "does nothing",
    ),
    (
        {**SMALL, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config.quant_method='gptq': quantised weights are not supported; use the checkpoint that they "
        "were made from",
    ),
]
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    (
        "gpt2-plain",
        {"reorder_and_upcast_attn": True},
        "reorder_and_upcast_attn=True is not supported; supported: False",
    ),
    (
        "gpt2-plain",
        {"activation_function": "mish"},
        f"activation_function='mish' is not supported; supported: {SUPPORTED_ACTIVATIONS}",
    ),
    (
        "gemma2-caps",
        {"hidden_activation": "tanh"},
        f"hidden_activation='tanh' is not supported; supported: {SUPPORTED_ACTIVATIONS}",
    ),
    ("gpt2-plain", {"n_head": 7}, "n_head=7 does not divide n_embd=32; nearest: 4 or 8"),
    ("opt-before", {"num_attention_heads": 33}, "num_attention_heads=33 does not divide hidden_size=32; nearest: 32"),
    (
        "llama-plain",
        {"num_key_value_heads": 3},
        "num_key_value_heads=3 does not divide num_attention_heads=8; nearest: 2 or 4",
    ),
    ("falcon-40b", {"num_kv_heads": 5}, "num_kv_heads=5 does not divide num_attention_heads=8; nearest: 4 or 8"),
    ("llama-plain", {"pruned_heads": {"0": [1]}}, "pruned_heads={'0': [1]} is not supported; supported: {}"),
    ("llama-plain", {"hidden_size": 0}, "hidden_size=0 must be a whole number of at least 1"),
    ("llama-plain", {"num_key_value_heads": "4"}, "num_key_value_heads='4' must be a whole number of at least 1"),
    ("llama-plain", {"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number above 0"),
    ("llama-plain", {"attention_dropout": 1.0}, "attention_dropout=1.0 must be a probability below 1"),
    ("llama-plain", {"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    ("llama-plain", {"pad_token_id": 131}, "pad_token_id=131 must be below vocab_size=131, or null"),
    ("mistral-window", {"sliding_window": -1}, "sliding_window=-1 must be a whole number of at least 1"),
    (
        "mistral-window",
        {"layer_types": ["full_attention"] * 4},
        "layer_types=['full_attention', 'full_attention', 'full_attention', 'full_attention'] is not a known field; it "
        "could change the math, so it is not ignored; remove it if it does nothing",
    ),
    (
        "qwen3-tied",
        {"layer_types": ["chunked_attention"] * 4},
        "layer_types[0]='chunked_attention' is not supported; supported: full_attention, sliding_attention",
    ),
    (
        "qwen3-tied",
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        "layer_types[3]='sliding_attention' needs sliding_window, and use_sliding_window=true where the family has "
        "that field",
    ),
    (
        "smollm3-every-fourth",
        {"no_rope_layers": [1, 0]},
        "no_rope_layers has 2 entries; it must have num_hidden_layers=4",
    ),
    (
        "smollm3-every-fourth",
        {"no_rope_layers": [1, 2, 1, 0]},
        "no_rope_layers=[1, 2, 1, 0] must hold a 0 or a 1 for each layer",
    ),
    ("gptj-partial", {"rotary_dim": 10}, "rotary_dim=10 must be even and at most n_embd / n_head = 8"),
    ("gptj-partial", {"rotary_dim": 3}, "rotary_dim=3 must be even and at most n_embd / n_head = 8"),
    (
        "bloom-tied",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm=True is not supported; supported: False",
    ),
    ("bloom-tied", {"slow_but_exact": True}, "slow_but_exact=True is not supported; supported: False"),
    ("opt-before", {"layerdrop": 0.1}, "layerdrop=0.1 is not supported; supported: 0.0"),
    ("falcon-7b", {"hidden_dropout": 0.1}, "hidden_dropout=0.1 is not supported; supported: 0.0"),
    ("falcon-7b", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported; supported: 0.0"),
    (
        "falcon-40b",
        {"parallel_attn": False},
        "parallel_attn=False is not supported with new_decoder_architecture; supported: True",
    ),
    (
        "falcon-7b",
        {"num_ln_in_parallel_attn": 2},
        "num_ln_in_parallel_attn=2 is not supported with new_decoder_architecture=False; supported: 1",
    ),
    (
        "falcon-rw",
        {"num_kv_heads": 2},
        "num_kv_heads=2 is not supported without new_decoder_architecture or multi_query; supported: 8, which is "
        "num_attention_heads",
    ),
    (
        "gemma3_text-two-ropes",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True is not supported; supported: False",
    ),
    (
        "gemma3_text-two-ropes",
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping=50.0 is not supported; supported: None",
    ),
    ("phi3-plain", {"embd_pdrop": 0.1}, "embd_pdrop=0.1 is not supported; supported: 0.0"),
]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 16,
}
WRONG_ROPES: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": 0}, "rope_theta=0 must be a number above 0"),
    ({"rope_scaling": 8}, "rope_scaling=8 must be a mapping of rope fields, or null"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor='2' must be a number above 0"),
    ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor=-2 must be a number above 0"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling.factor=nan must be a number above 0"),
    (
        {"rope_scaling": {"type": "linear", "factor": None}},
        "rope_parameters.factor is missing, which rope_type='linear' needs",
    ),
    (
        {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
        "rope_parameters.rope_type='mrope' is not supported; supported: default, linear, dynamic, llama3, yarn, "
        "longrope",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}},
        "rope_parameters.mscale=1.0 is not supported with rope_type='linear'",
    ),
    (
        {"partial_rotary_factor": 0.5},
        "rope_parameters.partial_rotary_factor=0.5 is not supported by this family; supported: 1.0",
    ),
    (
        {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        "rope_parameters.high_freq_factor=1.0 must be above low_freq_factor=1.0",
    ),
    (
        {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}},
        "rope_parameters.beta_fast=1.0 must not be below beta_slow=2.0",
    ),
    ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_parameters.rope_theta=1.0 must be above 1 with rope_type='yarn'"),
    ({"rope_scaling": {**YARN, "truncate": 1}}, "rope_scaling.truncate=1 must be true or false"),
    (
        {"rope_scaling": {**LONG, "short_factor": 1.0}},
        "rope_scaling.short_factor=1.0 must be a list of numbers above 0",
    ),
    ({"rope_scaling": {**LONG, "long_factor": [1.0]}}, "rope_parameters.long_factor has 1 numbers; it must have 2"),
    (
        {"rope_scaling": {**LONG, "original_max_position_embeddings": 1}},
        "rope_parameters.original_max_position_embeddings=1 must be at least 2 with longrope",
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
        "rope_parameters.rope_type='dynamic' needs more than 2 rotated dims a head; nearest: 4",
    ),
    (
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
        "rope_theta=5.0 contradicts the rope_theta=6.0 that transformers takes",
    ),
    (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 3.0},
        },
        "rope_scaling.factor=2.0 contradicts rope_parameters.factor=3.0",
    ),
]
WRONG_ROPES_ELSEWHERE: list[tuple[str, dict[str, Any], str]] = [
    (
        "gpt_neox-no-bias-tied",
        {"rotary_pct": 0.4},
        "rope_parameters.partial_rotary_factor=0.4 rotates 3 of head_dim=8; it must be an even number from 2 to 8",
    ),
    (
        "gpt_neox-no-bias-tied",
        {"rope_theta": 5.0},
        "rope_theta=5.0 contradicts the rope_theta=10000.0 that transformers takes",
    ),
    (
        "phi3-plain",
        {"partial_rotary_factor": 1.5},
        "rope_parameters.partial_rotary_factor=1.5 rotates 12 of head_dim=8; it must be an even number from 2 to 8",
    ),
    (
        "gemma3_text-two-ropes",
        {"rope_parameters": {"rope_theta": 5.0}},
        "rope_parameters.rope_theta is next to full_attention and sliding_attention; it must be in one of them",
    ),
    (
        "gemma3_text-nested-ropes",
        {"rope_local_base_freq": 5.0},
        "rope_local_base_freq=5.0 contradicts the rope_theta=10000.0 that transformers takes",
    ),
    (
        "gemma3_text-two-ropes",
        {"rope_scaling": {**YARN, "truncate": False}},
        "rope_parameters.full_attention.truncate=False is not read by transformers here; supported: True",
    ),
    ("bloom-tied", {"n_embed": 64}, "n_embed=64 contradicts hidden_size=32"),
    ("gptj-partial", {"hidden_size": 32}, "hidden_size=32 contradicts n_embd=64"),
]
REFUSED = [
    *UNKNOWN,
    *(({**FAMILY_CASES[case], **change}, message) for case, change, message in UNSUPPORTED + WRONG_ROPES_ELSEWHERE),
    *(({**SMALL, **change}, message) for change, message in WRONG_ROPES),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(config: dict[str, Any], message: str) -> None:
    assert refusal(config) == f"model.config: {message}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"type": "linear"}}, ("rope_parameters", "'factor'")),
        ({"use_cache": "small"}, ("use_cache", "small")),
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
