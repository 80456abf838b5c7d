"""What transformers or a near relative would get wrong in silence, of families that are Llama with other options."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Exaone4Config

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.reference import load_reference
from megatron_ds.hf.special_floats import decode_floats, encode_floats
from tests.hf.hub_configs import HUB
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.reference import make_model
from tests.parity.sampling import first_cases
from tests.ranks import run_alone

FIRST = {model_type: FAMILY_CASES[case] for model_type, case in first_cases(FAMILY_CASES).items()}


def read(model_type: str, **fields: Any) -> HFModel:
    """Read the first case of a family with other fields."""
    return read_model({**FIRST[model_type], **fields})


def without(model_type: str, *names: str) -> dict[str, Any]:
    return {name: value for name, value in FIRST[model_type].items() if name not in names}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConversionError) as caught:
        read_model(config)
    return str(caught.value)


# ---- OLMo 3: `rope_theta` at the top ---------------------------------------------------------------------------------


def test_olmo3_rope_theta_that_reaches_the_full_layers_alone_is_refused() -> None:
    """transformers 5 takes it out of the config once, for the full layers, and then no second time."""
    legacy = {**without("olmo3", "rope_theta", "rope_scaling"), "rope_theta": 1e4}
    fields = {name: value for name, value in legacy.items() if name != "model_type"}
    theirs = AutoConfig.for_model("olmo3", **fields).rope_parameters
    assert theirs["full_attention"]["rope_theta"] == 1e4 and theirs["sliding_attention"]["rope_theta"] == 5e5
    assert "rope_theta=10000.0 reaches the full layers alone in transformers 5" in refusal(legacy)
    half = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_type": "default"}}
    assert "rope_theta=10000.0 reaches the full layers alone" in refusal({**legacy, "rope_parameters": half})


def test_olmo3_of_the_hub_and_our_exports_are_read() -> None:
    published = read_model(HUB["allenai/Olmo-3-1025-7B"]).core
    full, sliding = published.rotary[3], published.rotary[0]
    assert published.windows[:4] == (4096, 4096, 4096, None)
    assert (full.scaling, full.theta, full.factor) == ("yarn", 5e5, 8.0)
    assert (sliding.scaling, sliding.theta) == ("default", 5e5)
    two_thetas = read_model(FAMILY_CASES["olmo3-two-thetas-tied"])
    assert {rope.theta for rope in two_thetas.core.rotary} == {5e5, 1e3}
    assert read_model(config_json(two_thetas, "float32")).core == two_thetas.core


# ---- EXAONE 4: fields that are left out, and a null window -----------------------------------------------------------


def test_exaone4_without_its_fields_is_a_hybrid() -> None:
    core = read_model(without("exaone4", "sliding_window")).core
    assert core.windows == (4096, 4096, 4096, None)
    assert [rope is None for rope in core.rotary] == [False, False, False, True]


def test_exaone4_with_a_null_window_is_full_and_rotated_everywhere(tmp_path: Path) -> None:
    """transformers' own class divides by zero; the reference gets the `layer_types` that it lacks."""
    null = {**without("exaone4", "layer_types"), "sliding_window": None, "sliding_window_pattern": None}
    with pytest.raises(ZeroDivisionError):
        Exaone4Config(**{name: value for name, value in null.items() if name != "model_type"})
    core = read_model(null).core
    assert set(core.windows) == {None} and None not in core.rotary
    assert len(read_model(HUB["LGAI-EXAONE/EXAONE-4.0-1.2B"]).core.rotary) == 30
    run_alone(_save_with_null_window, null, tmp_path)
    assert run_alone(_layer_types_of_reference, tmp_path) == ["full_attention"] * 4


def _save_with_null_window(null: dict[str, Any], directory: Path) -> None:
    make_model({**null, "layer_types": ["full_attention"] * 4}).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(null))


def _layer_types_of_reference(directory: Path) -> list[str]:
    return load_reference(directory, read_model(directory), torch.float32).config.layer_types


def test_exaone4_pattern_of_letters() -> None:
    letters, number = (read("exaone4", sliding_window_pattern=pattern) for pattern in ("LG", 2))
    assert letters.core == number.core and letters.core.windows == (7, None, 7, None)
    assert read_model(HUB["LGAI-EXAONE/EXAONE-4.0-32B"]).core.windows[:5] == (4096, 4096, 4096, None, 4096)
    assert "sliding_window_pattern='LGL' is not supported without layer_types" in refusal(
        {**FIRST["exaone4"], "sliding_window_pattern": "LGL"}
    )
    assert "layer_types[1]='sliding_attention' needs sliding_window" in refusal(
        {**FIRST["exaone4"], "sliding_window": None, "layer_types": ["full_attention", "sliding_attention"] * 2}
    )


# ---- fields with two names or two meanings ---------------------------------------------------------------------------


def test_gemma_hidden_act() -> None:
    """Its configs say "gelu" and mean the approximation by tanh; `hidden_activation` is not read any more."""
    assert read_model(HUB["google/gemma-2b"]).core.activation == "gelu_tanh"
    assert read("gemma", hidden_act="gelu").core.activation == "gelu_tanh"
    assert read("gemma", hidden_act="relu", hidden_activation=None).core.activation == "relu"
    assert "hidden_activation='relu' is not supported" in refusal({**FIRST["gemma"], "hidden_activation": "relu"})
    assert "use_bidirectional_attention=True" in refusal({**FIRST["gemma"], "use_bidirectional_attention": True})


def test_internlm3_biases_by_their_old_names() -> None:
    plain = without("internlm3", "qkv_bias", "bias")
    for fields in ({"qkv_bias": True, "bias": True}, {"attention_bias": True, "mlp_bias": True}):
        core = read_model({**plain, **fields}).core
        assert core.qkv_bias and core.attention_out_bias and core.mlp_bias
    assert not read_model(plain).core.qkv_bias
    assert "`qkv_bias` different from `bias` is not supported" in refusal({**plain, "qkv_bias": True})
    assert "qkv_bias=True contradicts attention_bias=False" in refusal(
        {**plain, "qkv_bias": True, "bias": True, "attention_bias": False}
    )
    assert read_model({**plain, "architectures": ["InternLM3ForCausalLM"]}).architecture == "LlamaForCausalLM"


def test_iquestcoder_options_that_no_checkpoint_has_are_refused() -> None:
    assert "clip_qkv=8.0 is not supported; supported: None" in refusal({**FIRST["iquestcoder"], "clip_qkv": 8.0})
    assert "use_sliding_window=True is not supported" in refusal({**FIRST["iquestcoder"], "use_sliding_window": True})


def test_hyperclovax_multiplies_the_logits_and_granite_divides_them() -> None:
    assert read("hyperclovax", logits_scaling=0.125).core.logit_multiplier == 0.125
    assert read("granite", logits_scaling=8.0).core.logit_multiplier == 0.125
    assert read("granitemoehybrid", logits_scaling=8.0).core.logit_multiplier == 0.125
    assert read("hyperclovax", attention_multiplier=None, head_dim=16).core.attention_scale == 0.25


def test_dropouts_of_seed_oss_are_on_by_default_and_ernie_has_none() -> None:
    core = read_model(without("seed_oss", "attention_dropout", "residual_dropout")).core
    assert core.attention_dropout == core.residual_dropout == 0.1
    assert read("ernie4_5").core.attention_dropout == 0.0
    assert "attention_dropout=0.1 is not a known field" in refusal({**FIRST["ernie4_5"], "attention_dropout": 0.1})


def test_cos_and_sin_that_stay_fp32_and_pairs_of_adjacent_dims() -> None:
    """In fp32 the first makes no difference; in bf16 transformers rotates OLMo 3 and ERNIE 4.5 in fp32."""
    found = {name: read(name).core.rotary[0] for name in ("llama", "olmo3", "ernie4_5", "helium", "glm", "glm4")}
    assert [name for name, rope in found.items() if rope is not None and rope.fp32] == ["olmo3", "ernie4_5"]
    assert [name for name, rope in found.items() if rope is not None and rope.adjacent] == [
        *("ernie4_5", "helium", "glm", "glm4")
    ]


def test_an_export_of_granite_4_names_its_layers_as_on_the_hub() -> None:
    """transformers 5 renames them in memory, to a name that earlier versions and other programs do not know."""
    exported = config_json(read("granitemoehybrid"), "float32")
    assert exported["layer_types"] == ["attention"] * 4
    assert read_model(exported).core == read("granitemoehybrid").core


def test_helium_output_projection_is_square() -> None:
    assert "head_dim=16 times num_attention_heads=8 is not hidden_size=32" in refusal(
        {**FIRST["helium"], "head_dim": 16}
    )


# ---- names that stand for another norm in a relative -----------------------------------------------------------------

INPUT, ATTENTION_OUTPUT, BEFORE_MLP, MLP_OUTPUT = (
    "attention_norm",
    "attention_output_norm",
    "mlp_norm",
    "mlp_output_norm",
)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (
            "glm4-half-two-kv-heads",
            {
                INPUT: "input_layernorm",
                ATTENTION_OUTPUT: "post_self_attn_layernorm",
                BEFORE_MLP: "post_attention_layernorm",
                MLP_OUTPUT: "post_mlp_layernorm",
            },
        ),
        ("glm-half-two-kv-heads", {INPUT: "input_layernorm", BEFORE_MLP: "post_attention_layernorm"}),
        (
            "hyperclovax-norms-around-bias-two-kv-heads",
            {
                INPUT: "input_layernorm",
                ATTENTION_OUTPUT: "post_norm1",
                BEFORE_MLP: "post_attention_layernorm",
                MLP_OUTPUT: "post_norm2",
            },
        ),
        ("hyperclovax-norms-before-tied", {INPUT: "input_layernorm", BEFORE_MLP: "post_attention_layernorm"}),
        ("vaultgemma-caps-two-kv-heads", {INPUT: "input_layernorm", BEFORE_MLP: "pre_feedforward_layernorm"}),
        (
            "olmo3-all-heads-default",
            {ATTENTION_OUTPUT: "post_attention_layernorm", MLP_OUTPUT: "post_feedforward_layernorm"},
        ),
    ],
)
def test_names_of_norms_by_their_places(case: str, names: dict[str, str]) -> None:
    table = read_model(FAMILY_CASES[case]).table
    found = {
        native.split(".")[2]: row.names[0].split(".")[3]
        for native, row in table.items()
        if native.startswith("blocks.2.") and native.split(".")[2].endswith("_norm")
    }
    assert found == names


# ---- Granite 4 without Mamba layers, and infinities in JSON ----------------------------------------------------------


def test_granitemoehybrid_mamba_layers_and_experts_are_refused_by_name() -> None:
    base = FIRST["granitemoehybrid"]
    mixed = {**base, "layer_types": ["attention", "mamba"] * 2}
    assert "layer_types[1]='mamba' is not supported; supported: 'attention'" in refusal(mixed)
    assert "layer_types[0]='mamba' is not supported" in refusal(without("granitemoehybrid", "layer_types"))
    assert "num_local_experts=8 is not supported; supported: 0" in refusal({**base, "num_local_experts": 8})
    assert "num_local_experts=8 is not supported" in refusal(without("granitemoehybrid", "num_local_experts"))
    assert "position_embedding_type='alibi' is not supported" in refusal({**base, "position_embedding_type": "alibi"})
    assert read("granitemoehybrid", position_embedding_type=None).core.rotary == ()


def test_granitemoehybrid_multipliers_that_are_null_are_refused() -> None:
    null = {**FIRST["granitemoehybrid"], "residual_multiplier": None}
    assert "residual_multiplier=None must be a number" in refusal(null)


def test_infinities_in_json() -> None:
    words = {"limits": [0.0, {"__float__": "Infinity"}, {"__float__": "-Infinity"}], "rest": {"__float__": 3}}
    assert decode_floats(words) == {"limits": [0.0, math.inf, -math.inf], "rest": {"__float__": 3}}
    assert encode_floats(decode_floats(words)) == words
    assert math.isnan(decode_floats({"__float__": "NaN"})) and encode_floats((math.nan,)) == [{"__float__": "NaN"}]
    assert decode_floats({"__float__": "Infinity", "more": 1}) == {"__float__": "Infinity", "more": 1}


def test_written_infinities_are_json_that_transformers_reads(tmp_path: Path) -> None:
    """AutoConfig refuses its own words for them where they are given as fields."""
    fields = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    model = read("granitemoehybrid", **fields)
    assert model.config.time_step_limit == (0.0, math.inf)
    text = json.dumps(config_json(model, "float32"), allow_nan=False)
    assert json.loads(text)["time_step_limit"] == fields["time_step_limit"]
    (tmp_path / "config.json").write_text(text)
    assert AutoConfig.from_pretrained(tmp_path).time_step_limit == (0.0, math.inf)
    assert read_model(tmp_path).core == model.core
