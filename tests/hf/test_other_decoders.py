"""Fields of single decoder families that are easily read wrong, and what is refused of these families."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.layers.attention_shape import QueryTemperature
from megatron_ds.models.gpt import DecoderConfig
from tests.hf.hub_configs import HUB
from tests.parity.case_fields import PLAIN_ROPE, YARN_ROPE
from tests.parity.other_decoder_cases import OTHER_DECODER_CASES

ALPHA = OTHER_DECODER_CASES["hunyuan_v1_dense-alpha"]["rope_parameters"]
GROWTH = OTHER_DECODER_CASES["ministral3-plain-tied"]["rope_parameters"]


def core_of(case: str, **changes: Any) -> DecoderConfig:
    core = read_model({**OTHER_DECODER_CASES[case], **changes}).core
    assert isinstance(core, DecoderConfig)
    return core


def test_biogpt_has_torchs_epsilon_whatever_layer_norm_eps_says() -> None:
    assert core_of("biogpt-scaled", layer_norm_eps=1e-12) == core_of("biogpt-scaled", layer_norm_eps=1e-3)
    assert core_of("biogpt-scaled").norm.eps == torch.nn.LayerNorm(1).eps


def test_biogpt_counts_padding_as_positions() -> None:
    """transformers 5 does, and 4 did not; the numbers differ only behind padding on the left."""
    positions = core_of("biogpt-scaled").positions
    assert positions is not None and positions.offset == 2 and not positions.skips_padding


def test_alpha_of_hunyuan_is_another_base_at_any_length() -> None:
    rope = core_of("hunyuan_v1_dense-alpha").rotary[0]
    assert rope is not None and rope.scaling == "default"
    assert rope.theta == 1e4 * 50.0 ** (8 / 6)
    assert torch.equal(rope.inverse_frequencies(8), rope.inverse_frequencies(100_000))
    dynamic = core_of("hunyuan_v1_dense-alpha", rope_parameters={**ALPHA, "alpha": None, "factor": 2.0}).rotary[0]
    assert dynamic is not None and dynamic.scaling == "dynamic"


def test_growth_of_ministral3_is_kept_and_written() -> None:
    model = read_model(OTHER_DECODER_CASES["ministral3-yarn"])
    assert isinstance(model.core, DecoderConfig) and model.core.query_temperature == QueryTemperature(0.4, 8)
    written = config_json(model, "float32")
    assert written["rope_parameters"]["llama_4_scaling_beta"] == 0.4
    assert read_model(written).core == model.core


def test_verify_reaches_the_length_from_which_queries_grow() -> None:
    core = core_of("ministral3-plain-tied")
    assert 8 in core.edges
    far = replace(core, query_temperature=QueryTemperature(0.1, 100))
    inputs, missed = far.probes(1)
    assert missed is None and max(probe.input_ids.shape[1] for probe in inputs) > 100
    inputs, missed = read_model(HUB["mistralai/Ministral-3-3B-Base-2512-text"]).core.probes(1)
    assert missed is not None and "16,384" in missed and len(inputs) == 1


def test_a_dropout_of_stablelm_is_of_the_mlp_alone() -> None:
    core = core_of("stablelm-sequential", hidden_dropout=0.25)
    assert (core.residual_dropout, core.attention_out_dropout) == (0.25, 0.0)


def test_layers_of_cohere2_without_a_window_do_not_rotate() -> None:
    core = core_of("cohere2-every-second")
    assert [rope is not None for rope in core.rotary] == [window is not None for window in core.windows]
    assert [window is not None for window in core.windows] == [True, False, True, False]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("codegen-partial", {"n_head": 2}, "n_head=2 must be a multiple of 4; nearest: 4"),
    (
        "gpt_bigcode-one-kv-head",
        {"num_key_value_heads": 2},
        "num_key_value_heads=2 contradicts multi_query=True; nearest: 1",
    ),
    (
        "gpt_neo-every-second",
        {"attention_types": [[["global", "far"], 2]]},
        "attention_layers[1]='far' is not supported; supported: global, local",
    ),
    (
        "cohere-plain",
        {"logit_scale": None},
        "logit_scale=None is not supported: transformers needs a number; nearest: 1.0",
    ),
    ("cohere-plain", {"logit_scale": -1}, "logit_scale=-1 must be a number above 0"),
    (
        "cohere2-every-second",
        {"position_embedding_type": "rope"},
        "position_embedding_type='rope' is not supported; supported: 'rope_gptj'",
    ),
    (
        "nemotron-bias",
        {"num_key_value_heads": None},
        "num_key_value_heads is missing, which num_attention_heads=8 is divided by; nearest: 8",
    ),
    ("stablelm-sequential", {"head_dim": 4}, "head_dim=4 is not supported; supported: 8, hidden_size / heads"),
    (
        "hunyuan_v1_dense-alpha",
        {"rope_parameters": {**ALPHA, "factor": 2.0}},
        "rope_parameters.factor=2.0 is not supported with alpha; supported: 1.0",
    ),
    (
        "hunyuan_v1_dense-alpha",
        {"rope_parameters": {**ALPHA, "attention_factor": 2.0}},
        "rope_parameters.attention_factor=2.0 is not supported with alpha",
    ),
    (
        "hunyuan_v1_dense-alpha",
        {"head_dim": 2},
        "rope_parameters.alpha needs more than head_dim=2; nearest: 4",
    ),
    ("hunyuan_v1_dense-alpha", {"use_cla": True}, "use_cla=True is not supported; supported: False"),
    (
        "ministral3-yarn",
        {"rope_parameters": YARN_ROPE},
        "rope_parameters.llama_4_scaling_beta is missing, without which transformers' code fails",
    ),
    (
        "ministral3-plain-tied",
        {"rope_parameters": {**PLAIN_ROPE, "llama_4_scaling_beta": 0.1}},
        "rope_parameters.original_max_position_embeddings is missing, without which transformers' code fails",
    ),
    (
        "ministral3-plain-tied",
        {"rope_parameters": {**GROWTH, "llama_4_scaling_beta": -0.1}},
        "rope_parameters.llama_4_scaling_beta=-0.1 must be a number of at least 0",
    ),
    ("apertus-bias", {"post_norm": True}, "post_norm=True is not supported; supported: False"),
    ("biogpt-scaled", {"layerdrop": 0.1}, "layerdrop=0.1 is not supported; supported: 0.0"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_refused(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError) as caught:
        read_model({**OTHER_DECODER_CASES[case], **changes})
    assert str(caught.value) == f"model.config: {message}"
