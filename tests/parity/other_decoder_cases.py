"""Small configs of decoders of other lineages than Llama's names and GPT-2: as in family_cases.py, every option is on
in one of a type's cases."""

from typing import Any

from tests.parity.case_fields import ALTERNATING, LAYERS, LLAMA, PLAIN_ROPE, SIX_HEADS, TOKENS, YARN_ROPE, cases_of
from tests.parity.cases import LLAMA3_ROPE

_GPT = {**TOKENS, "n_embd": 32, "n_layer": 4, "n_head": 8, "n_positions": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NEO = {**TOKENS, "hidden_size": 32, "num_layers": 4, "num_heads": 8, "max_position_embeddings": 64, "window_size": 7}
_BIO = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 64}
_WIDE = {"hidden_size": 64, "intermediate_size": 96}  # heads of 8, of which a part can be rotated
_GROWTH = {"llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 8}  # the fourth step is reached
_ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}


def _partial(part: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": part, **more}}


OTHER_DECODER_CASES: dict[str, dict[str, Any]] = {
    **cases_of(
        "phi",
        {**LLAMA, **_WIDE},
        {
            "normed-heads": {"qk_layernorm": True, "pad_token_id": 3},
            "plain": {"num_key_value_heads": 8, "hidden_act": "relu"},
            "tied-linear": {
                "tie_word_embeddings": True,
                "num_key_value_heads": 2,
                **_partial(0.25, rope_type="linear", factor=2.0),
            },
            "one-kv-head": {"num_key_value_heads": 1, "qk_layernorm": True, "layer_norm_eps": 1e-3},
        },
    ),
    **cases_of(
        "stablelm",
        {**LLAMA, **_WIDE},
        {
            "parallel-normed-heads": {
                "use_parallel_residual": True,
                "qk_layernorm": True,
                "use_qkv_bias": True,
                "pad_token_id": 2,
            },
            "sequential": {"use_qkv_bias": True, **_partial(0.5)},
            "tied-two-kv-heads": {"tie_word_embeddings": True, "num_key_value_heads": 2, "qk_layernorm": True},
            "parallel-gelu": {"use_parallel_residual": True, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        },
    ),
    **cases_of(
        "gpt_bigcode",
        {**_GPT, **_NO_DROPOUT},
        {
            "one-kv-head": {"n_inner": 48},
            "all-heads": {"multi_query": False, "activation_function": "relu"},
            "unscaled-untied": {"scale_attn_weights": False, "tie_word_embeddings": False},
            "six-heads": {"n_embd": 48, "n_head": 6},
        },
    ),
    **cases_of(
        "gpt_neo",
        _NEO,
        {
            "every-second": {"attention_types": [[["global", "local"], 2]]},
            "untied": {
                "attention_types": [[["local"], 3], [["global"], 1]],
                "tie_word_embeddings": False,
                "intermediate_size": 40,
            },
            "six-heads": {
                "attention_types": [[["local", "local"], 2]],
                "hidden_size": 48,
                "num_heads": 6,
                "activation_function": "relu",
                "layer_norm_epsilon": 1e-3,
            },
        },
    ),
    **cases_of(
        "codegen",
        {**_GPT, **_NO_DROPOUT, "n_embd": 64, "n_ctx": 64},
        {
            "partial": {"rotary_dim": 4},
            "one-head-a-block": {"n_embd": 32, "n_head": 4, "rotary_dim": 8, "n_inner": 48},
            "tied-twelve-heads": {
                "n_embd": 96,
                "n_head": 12,
                "rotary_dim": 6,
                "tie_word_embeddings": True,
                "activation_function": "gelu",
            },
        },
    ),
    **cases_of(
        "biogpt",
        {**LAYERS, **_BIO, "max_position_embeddings": 64},
        {
            "scaled": {"pad_token_id": 1},
            "plain-untied": {"scale_embedding": False, "tie_word_embeddings": False, "hidden_act": "relu"},
            "six-heads": {"hidden_size": 48, "num_attention_heads": 6, "pad_token_id": 4},
        },
    ),
    **cases_of(
        "cohere",
        {**LLAMA, "logit_scale": 0.25},
        {
            "normed-heads": {"use_qk_norm": True, "attention_bias": True, "pad_token_id": 0},
            "plain": {"num_key_value_heads": 8, "logit_scale": 4.0},
            "normed-two-kv-heads": {
                "use_qk_norm": True,
                "num_key_value_heads": 2,
                "layer_norm_eps": 1e-3,
                "hidden_act": "gelu",
            },
            "linear-untied": {
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                "tie_word_embeddings": False,
            },
        },
    ),
    **cases_of(
        "cohere2",
        {**LLAMA, "logit_scale": 0.25, "sliding_window": 7},
        {
            "every-second": {"sliding_window_pattern": 2, "pad_token_id": 0},
            "untied-bias": {"layer_types": ALTERNATING[::-1], "attention_bias": True, "tie_word_embeddings": False},
            "two-kv-heads": {
                "num_key_value_heads": 2,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
                "logit_scale": 2.0,
            },
        },
    ),
    **cases_of(
        "nemotron",
        {**LLAMA, **_WIDE, "head_dim": 8},
        {
            "bias": {"attention_bias": True, "mlp_bias": True, "pad_token_id": 6},
            "tied-two-kv-heads": {"tie_word_embeddings": True, "num_key_value_heads": 2, "norm_eps": 1e-3},
            "wide-heads": {"head_dim": 16, **_partial(0.25), "hidden_act": "gelu"},
        },
    ),
    **cases_of(
        "hunyuan_v1_dense",
        {**LLAMA, "head_dim": 8},
        {
            "alpha": {"rope_parameters": _ALPHA, "attention_bias": True, "pad_token_id": 0},
            "tied-two-kv-heads": {"tie_word_embeddings": True, "num_key_value_heads": 2, "pad_token_id": 1},
            "six-heads": {**SIX_HEADS, "head_dim": 12, "rope_parameters": YARN_ROPE},
        },
    ),
    **cases_of(
        "apertus",
        {**LLAMA, "rope_parameters": LLAMA3_ROPE},
        {
            "bias": {"attention_bias": True, "pad_token_id": 3},
            "tied-two-kv-heads": {"tie_word_embeddings": True, "num_key_value_heads": 2, "rope_parameters": PLAIN_ROPE},
            "relu": {"hidden_act": "relu", "num_key_value_heads": 8},
        },
    ),
    **cases_of(
        "ministral3",
        {**LLAMA, "head_dim": 8, "pad_token_id": 5},
        {
            "yarn": {"rope_parameters": {**YARN_ROPE, **_GROWTH, "mscale": 0.7, "mscale_all_dim": 1.1}},
            "plain-tied": {"rope_parameters": {**PLAIN_ROPE, **_GROWTH}, "tie_word_embeddings": True},
            "window-two-kv-heads": {
                "sliding_window": 9,
                "num_key_value_heads": 2,
                "rope_parameters": {**YARN_ROPE, **_GROWTH, "type": "yarn", "max_position_embeddings": 64},
            },
        },
    ),
}
