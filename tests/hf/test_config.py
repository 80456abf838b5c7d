"""Hub configs are accepted, old words are understood, and transformers 4 and 5 read what we write."""

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.relative_bias import RelativePositions
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.bert import EncoderConfig
from megatron_ds.models.t5 import EncoderDecoderConfig
from tests.hf.hub_configs import HUB
from tests.hf.models import LLAMA3, SMALL
from tests.parity.cases import CONFIGS
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.sampling import sampled

ALL_CASES = {**CONFIGS, **FAMILY_CASES, **ENCODER_CASES}


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    """What a wrong reading would get wrong."""
    core = read_model(config).core
    stack = list(core.stacks.values())[-1]
    rotary = stack.rotary[-1] if stack.rotary else None
    found = {
        "head_dim": stack.head_dim,
        "kv": stack.num_kv_heads,
        "ffn": stack.ffn_size,
        "tied": core.tied,
        "rope": None if rotary is None else (rotary.theta, rotary.scaling, rotary.factor),
        "window": stack.windows[0] if stack.windows else None,
        "activation": stack.activation,
        "eps": stack.norm.eps,
    }
    if isinstance(core, EncoderConfig):
        heads = (core.masked_lm, core.pooler, core.next_sentence)
        found.update(heads=heads, positions=core.positions, types=core.num_token_types)
    if isinstance(core, EncoderDecoderConfig):
        found.update(gated=stack.gated, scale=core.logit_multiplier, relative=stack.relative, layers=stack.num_layers)
    return found


_BERT = {"head_dim": 64, "kv": 12, "ffn": 3072, "tied": True, "rope": None, "window": None, "activation": "gelu"}
_T5 = {"head_dim": 64, "rope": None, "window": None, "eps": 1e-6, "relative": RelativePositions(32, 128, 512**-0.5)}
HUB_MEANING: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": {
        **_BERT,
        "eps": 1e-12,
        "heads": (True, False, False),
        "positions": PositionTable(512),
        "types": 2,
    },
    "FacebookAI/roberta-base": {
        **_BERT,
        "eps": 1e-5,
        "heads": (True, False, False),
        "positions": PositionTable(512, offset=2, skipped_id=1),
        "types": 1,
    },
    "google-t5/t5-small": {
        **_T5,
        "kv": 8,
        "ffn": 2048,
        "tied": True,
        "activation": "relu",
        "gated": False,
        "scale": 512**-0.5,
        "layers": 6,
    },
    "google/t5-v1_1-small": {
        **_T5,
        "kv": 6,
        "ffn": 1024,
        "tied": False,
        "activation": "gelu_tanh",
        "gated": True,
        "scale": 1.0,
        "layers": 8,
    },
    "salesforce/lavis-unifiedqav2_3b": {
        **_T5,
        "head_dim": 128,
        "kv": 32,
        "ffn": 16384,
        "tied": True,
        "activation": "relu",
        "gated": False,
        "scale": 1024**-0.5,
        "relative": RelativePositions(32, 128, 1024**-0.5),
        "layers": 24,
    },
    "modelscope/diffsynth-hunyuan_dit-tokenizer_t5": {  # mT5-XL
        **_T5,
        "kv": 32,
        "ffn": 5120,
        "tied": False,
        "activation": "gelu_tanh",
        "gated": True,
        "scale": 1.0,
        "relative": RelativePositions(32, 128, 2048**-0.5),
        "layers": 24,
    },
    "meta-llama/Llama-2-70b-hf": {
        "head_dim": 128,
        "kv": 8,
        "ffn": 28672,
        "tied": False,
        "rope": (1e4, "default", 1.0),
        "window": None,
        "activation": "silu",
        "eps": 1e-5,
    },
    "Qwen/Qwen2.5-72B": {
        "head_dim": 128,
        "kv": 8,
        "ffn": 29568,
        "tied": False,
        "rope": (1e6, "default", 1.0),
        "window": None,  # sliding_window is a number, use_sliding_window is false
        "activation": "silu",
        "eps": 1e-5,
    },
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
    "EleutherAI/gpt-neox-20b": {
        "head_dim": 96,
        "kv": 64,
        "ffn": 24576,
        "tied": False,
        "rope": (1e4, "default", 1.0),
        "window": None,
        "activation": "gelu_tanh",
        "eps": 1e-5,
    },
    "tiiuae/falcon-7b": {
        "head_dim": 64,
        "kv": 1,
        "ffn": 18176,
        "tied": True,
        "rope": (1e4, "default", 1.0),
        "window": None,
        "activation": "gelu",
        "eps": 1e-5,
    },
    "facebook/opt-350m": {
        "head_dim": 64,
        "kv": 16,
        "ffn": 4096,
        "tied": True,
        "rope": None,
        "window": None,
        "activation": "relu",
        "eps": 1e-5,
    },
    "google/gemma-3-1b-it": {
        "head_dim": 256,
        "kv": 1,
        "ffn": 6912,
        "tied": True,
        "rope": (1e4, "default", 1.0),  # the last of 26 layers is a sliding one
        "window": 512,
        "activation": "gelu_tanh",
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
    assert read_model(tmp_path).core == model.core


# ---- old and new words -----------------------------------------------------------------------------------------------


def rope_of(words: dict[str, Any]) -> RotaryConfig:
    """Of the first layer of a small Llama."""
    rotary = read_model({**SMALL, **words}).core.rotary[0]
    assert rotary is not None
    return rotary


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
    assert read_model({**SMALL, **old}).core == read_model(new).core


def test_linear_rope_in_the_words_of_transformers_4() -> None:
    rotary = rope_of({"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (rotary.theta, rotary.scaling, rotary.factor) == (2e4, "linear", 2.0)


def test_plain_rope_in_the_words_of_transformers_4() -> None:
    rotary = rope_of({"rope_theta": 2e4, "rope_scaling": None})
    assert (rotary.theta, rotary.scaling) == (2e4, "default")


def test_ropes_that_fill_in_what_is_not_said() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    rotary = rope_of({"rope_scaling": yarn})
    assert (rotary.beta_fast, rotary.beta_slow, rotary.truncate) == (32.0, 1.0, True)
    assert rotary.magnitude == pytest.approx(0.1 * math.log(4) + 1)
    assert rope_of({"rope_scaling": {**yarn, "factor": None}}).factor == 64 / 16
    assert rope_of({"rope_scaling": {**yarn, "attention_factor": 1.5}}).magnitude == 1.5
    assert rope_of({"rope_scaling": {"type": "dynamic", "factor": 2.0}}).original_max_positions == 64
    long = {"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    rotary = rope_of({"rope_scaling": {**long, "original_max_position_embeddings": 16}})
    assert rotary.magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    assert (rotary.short_factors, rotary.long_factors) == ((1.0, 1.0), (2.0, 3.0))
    assert rope_of({"rope_scaling": {**long, "original_max_position_embeddings": 64}}).magnitude == 1.0


def test_rope_in_the_words_of_gpt_neox() -> None:
    base = {key: value for key, value in FAMILY_CASES["gpt_neox-parallel"].items() if key != "rope_parameters"}
    for words, dim, theta in (
        ({}, 2, 1e4),
        ({"rotary_pct": 0.5, "rotary_emb_base": 500}, 4, 500.0),
        ({"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 1.0}}, 8, 7.0),
    ):
        assert read_model({**base, **words}).core.rotary == (RotaryConfig(dim, theta),) * 4


def test_ropes_of_gemma_3_in_the_words_of_transformers_4() -> None:
    decoder = read_model(FAMILY_CASES["gemma3_text-linear-one-kv-head"]).core
    sliding, full = decoder.rotary[:2]
    assert (sliding, decoder.windows[0]) == (RotaryConfig(8, 5e3), 7)
    assert (full and (full.theta, full.scaling, full.factor), decoder.windows[1]) == ((1e6, "linear", 8.0), None)


def test_layers_without_rope() -> None:
    for case, rotating in (("every-fourth", (1, 1, 1, 0)), ("windows-untied", (0, 1, 1, 0))):
        found = read_model(FAMILY_CASES[f"smollm3-{case}"]).core.rotary
        assert tuple(int(rope is not None) for rope in found) == rotating


def test_falcons_key_heads() -> None:
    for case, kv_heads in (("7b", 1), ("40b", 2), ("rw", 8)):
        assert read_model(FAMILY_CASES[f"falcon-{case}"]).core.num_kv_heads == kv_heads


def test_padding_id_counts_from_the_end_where_negative() -> None:
    assert read_model({**SMALL, "pad_token_id": -1}).core.padding_id == 130


def test_sliding_window_of_qwen() -> None:
    base = {**CONFIGS["qwen2"], "sliding_window": 9, "max_window_layers": 1}
    assert read_model({**base, "use_sliding_window": True}).core.windows == (None, 9, 9, 9)
    assert read_model({**base, "use_sliding_window": False}).core.windows == (None,) * 4
    explicit = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}
    assert read_model({**base, **explicit}).core.windows == (9, None, 9, None)


def test_sliding_window_of_mistral() -> None:
    without = {key: value for key, value in CONFIGS["mistral"].items() if key != "sliding_window"}
    assert read_model(without).core.windows == (4096,) * 4
    assert read_model({**without, "sliding_window": None}).core.windows == (None,) * 4


# ---- what we write ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sampled(ALL_CASES))
def test_written_config_is_read_by_transformers_5(case: str, tmp_path: Path) -> None:
    model = read_model(ALL_CASES[case])
    (tmp_path / "config.json").write_text(json.dumps(config_json(model, "bfloat16")))
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    expected = model.config.to_dict()
    expected.update(
        dtype="bfloat16",
        architectures=[model.architecture],
        _name_or_path=read["_name_or_path"],
        # transformers 5 ties every T5 in words; its bytes say whether it does
        tie_word_embeddings=model.core.tied or model.family.tied_by_bytes,
    )
    if expected.get("num_nextn_predict_layers"):
        expected["num_nextn_predict_layers"] = 0  # such layers are not read
    for content in (read, expected):  # transformers copies the dtype of old configs with the text's fields at the top
        content.get("text_config", {}).pop("dtype", None)
    only_for_4 = {name for name in read.keys() - expected.keys() if name == "partial_rotary_factor"}
    ropes = [content.pop("rope_parameters", None) for content in (read, expected)]
    assert {name: value for name, value in read.items() if name not in only_for_4} == expected
    assert _without_old_word(ropes[0]) == _without_old_word(ropes[1])
    assert read_model(tmp_path).core == model.core


def _without_old_word(rope: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (rope or {}).items() if name != "type"}


KEPT_BUT = ("architectures", "dtype", "torch_dtype", "transformers_version")


@pytest.mark.parametrize("case", sampled(ALL_CASES))
def test_written_config_has_the_words_of_transformers_4(case: str) -> None:
    model = read_model(ALL_CASES[case])
    content = config_json(model, "float16")
    assert content["torch_dtype"] == content["dtype"] == "float16"
    if model.family.passes_through:  # its words stay what they are
        kept = {name: value for name, value in content.items() if name not in KEPT_BUT}
        assert kept == ALL_CASES[case]
        return
    assert content["tie_word_embeddings"] is model.core.tied
    if "rope_parameters" not in content:
        assert "rope_theta" not in content
        return
    whole = content["rope_parameters"]
    rope = whole.get("full_attention", whole)
    if model.family.model_type == "gpt_neox":
        assert content["rotary_emb_base"] == rope["rope_theta"]
        assert content["rotary_pct"] == rope["partial_rotary_factor"]
    elif model.family.model_type == "modernbert":
        assert content["global_rope_theta"] == rope["rope_theta"]
        assert content["local_rope_theta"] == whole["sliding_attention"]["rope_theta"]
        assert content.keys().isdisjoint({"rope_theta", "rope_scaling", "rope_local_base_freq"})
        return
    else:
        assert content["rope_theta"] == rope["rope_theta"]
    if "sliding_attention" in whole and model.family.model_type != "olmo3":  # it never had a field for the second one
        assert content["rope_local_base_freq"] == whole["sliding_attention"]["rope_theta"]
    scaling = content["rope_scaling"]
    if rope["rope_type"] == "default":
        assert scaling is None
    else:
        assert scaling.get("rope_type", scaling.get("type")) == rope["rope_type"]
        assert scaling.keys().isdisjoint({"rope_theta", "partial_rotary_factor"})
        assert {name: rope[name] for name in scaling if name != "type"}.items() <= scaling.items()


def test_written_longrope_of_phi_3_has_the_three_fields_that_transformers_4_takes() -> None:
    content = config_json(read_model(FAMILY_CASES["phi3-longrope-beyond"]), "float32")
    assert content["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert content["original_max_position_embeddings"] == 16
    assert content["partial_rotary_factor"] == 1.0
    with_more = config_json(read_model(FAMILY_CASES["phi3-longrope-partial"]), "float32")
    assert with_more["rope_scaling"]["attention_factor"] == 1.7  # it refuses this one, rather than misreading it


def test_written_config_says_null_where_absence_means_something_else() -> None:
    content = config_json(read_model({**CONFIGS["mistral"], "sliding_window": None}), "float32")
    assert content["sliding_window"] is None  # absent: 4096


def test_written_config_points_to_no_code() -> None:
    model = read_model({**CONFIGS["llama"], "auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}})
    assert "auto_map" not in config_json(model, "float32")
