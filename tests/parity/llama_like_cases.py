"""Small configs of families that are Llama, Gemma or Granite with other options; see `family_cases`."""

from typing import Any

from tests.parity.case_fields import ALTERNATING, LLAMA, PLAIN_ROPE, SIX_HEADS, YARN_ROPE, cases_of
from tests.parity.cases import LLAMA3_ROPE

_HEADS = {**LLAMA, "head_dim": 8}
_ONE_KV_HEAD = {"num_key_value_heads": 1}
_TWO_KV_HEADS = {"num_key_value_heads": 2}  # which 4 tensor ranks do not divide
_BIASES = {"attention_bias": True, "mlp_bias": True}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
_HALF = {"rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5}}
_FULL_LAST = ["sliding_attention"] * 3 + ["full_attention"]
_SEED_OSS = {**_HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.22}
_HYBRID = {
    **LLAMA,
    **_MULTIPLIERS,
    "shared_intermediate_size": 48,
    "layer_types": ["attention"] * 4,
    "num_local_experts": 0,
    "mamba_n_heads": 8,
}

LLAMA_LIKE_CASES: dict[str, dict[str, Any]] = {
    **cases_of(
        "internlm3",
        {**_HEADS, **_UNTIED},
        {
            "bias-dynamic-beyond": {
                "qkv_bias": True,
                "bias": True,
                "max_position_embeddings": 16,
                "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
            },
            "plain-tied": _TIED,
            "two-kv-heads": {**_TWO_KV_HEADS, "head_dim": 16, **_BIASES},
        },
    ),
    **cases_of(
        "iquestcoder",
        _HEADS,
        {
            "two-kv-heads-bias": {**_TWO_KV_HEADS, **_BIASES},
            "plain-tied": {**_TIED, "head_dim": None},
            "yarn": {"rope_parameters": YARN_ROPE, "head_dim": 16},
        },
    ),
    **cases_of(
        "seed_oss",
        _SEED_OSS,
        {
            "out-bias-two-kv-heads": {**_TWO_KV_HEADS, "attention_bias": False, "attention_out_bias": True},
            "qkv-bias-tied": _TIED,
            "all-biases-wide-heads": {
                "attention_out_bias": True,
                "mlp_bias": True,
                "head_dim": 16,
                "pad_token_id": 1,
                "hidden_act": "gelu",
            },
        },
    ),
    **cases_of(
        "ministral",
        _HEADS,
        {
            "alternating-two-kv-heads": {"sliding_window": 7, "layer_types": ALTERNATING, **_TWO_KV_HEADS},
            "windows-tied": {"sliding_window": 9, **_TIED},
            "full-yarn": {"layer_types": ["full_attention"] * 4, "rope_parameters": YARN_ROPE, "pad_token_id": 3},
        },
    ),
    **cases_of(
        "cwm",
        _HEADS,
        {
            "first-full-bias": {"sliding_window": 7, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
            "alternating-two-kv-heads": {"sliding_window": 9, "layer_types": ALTERNATING, **_TWO_KV_HEADS},
            "all-sliding-tied": {"sliding_window": 5, "layer_types": ["sliding_attention"] * 4, **_TIED},
        },
    ),
    **cases_of(
        "arcee",
        _HEADS,
        {
            "bias-two-kv-heads": {**_TWO_KV_HEADS, **_BIASES, "rope_parameters": YARN_ROPE},
            "plain-tied": _TIED,
            "six-heads-gelu": {**SIX_HEADS, "hidden_act": "gelu_new", "pad_token_id": 2},
        },
    ),
    **cases_of(
        "jais2",
        _HEADS,
        {
            "bias-two-kv-heads": {**_TWO_KV_HEADS, "layer_norm_eps": 1e-3},
            "no-bias-tied": {"attention_bias": False, "mlp_bias": False, **_TIED},
            "all-heads-silu": {"num_key_value_heads": 8, "hidden_act": "silu", "rope_parameters": _LINEAR_ROPE},
        },
    ),
    **cases_of(
        "ernie4_5",
        _HEADS,
        {
            "bias-two-kv-heads": {**_TWO_KV_HEADS, "use_bias": True, "pad_token_id": 0},
            "untied-wide-heads": {**_UNTIED, "head_dim": 16},
            "linear": {"rope_parameters": _LINEAR_ROPE, "hidden_act": "gelu"},
        },
    ),
    **cases_of(
        "helium",
        {**LLAMA, "head_dim": 4},
        {
            "bias-two-kv-heads": {**_TWO_KV_HEADS, **_BIASES},
            "plain-tied": {**_TIED, "pad_token_id": 3},
            "all-heads-linear": {"num_key_value_heads": 8, "rope_parameters": _LINEAR_ROPE},
        },
    ),
    **cases_of(
        "olmo3",
        {**LLAMA, "sliding_window": 7},
        {
            "yarn-two-kv-heads-bias": {
                **_TWO_KV_HEADS,
                "attention_bias": True,
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            },
            "two-thetas-tied": {
                **_TIED,
                "layer_types": ALTERNATING,
                "rope_parameters": {
                    "full_attention": LLAMA3_ROPE,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                },
                "pad_token_id": 1,
            },
            "all-heads-default": {"num_key_value_heads": 8, "head_dim": 8},
        },
    ),
    **cases_of(
        "exaone4",
        {**LLAMA, "sliding_window": 7},
        {
            "every-fourth-full-two-kv-heads": _TWO_KV_HEADS,
            "no-windows-tied": {
                **_TIED,
                "sliding_window": None,
                "layer_types": ["full_attention"] * 4,
                "head_dim": 8,
                "rope_scaling": LLAMA3_ROPE,
            },
            "pattern-untied": {"sliding_window_pattern": 2, "pad_token_id": 0, "num_key_value_heads": 8},
            "layer-types": {"sliding_window_pattern": 3, "layer_types": _FULL_LAST},
        },
    ),
    **cases_of(
        "glm",
        {**_HEADS, "pad_token_id": 3},
        {
            "half-two-kv-heads": _TWO_KV_HEADS,
            "no-bias-full-tied": {
                "attention_bias": False,
                "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 1.0},
                **_TIED,
            },
            "all-heads-linear": {
                "num_key_value_heads": 8,
                "rope_parameters": {**_LINEAR_ROPE, "partial_rotary_factor": 0.75},
                "hidden_act": "gelu",
            },
        },
    ),
    **cases_of(
        "glm4",
        _HEADS,
        {
            "half-two-kv-heads": {**_TWO_KV_HEADS, **_HALF},
            "no-bias-tied": {"attention_bias": False, **_TIED, "pad_token_id": 5},
            "one-kv-head-yarn": {
                **_ONE_KV_HEAD,
                "head_dim": 16,
                "rope_parameters": {**YARN_ROPE, "partial_rotary_factor": 0.5},
            },
        },
    ),
    **cases_of(
        "gemma",
        {**_HEADS, "pad_token_id": 0},
        {
            "one-kv-head": {**_ONE_KV_HEAD, "hidden_act": "gelu", "hidden_activation": None},
            "bias-untied": {"attention_bias": True, **_UNTIED, "head_dim": 16, "hidden_act": "relu"},
            "six-heads-linear": {**SIX_HEADS, "rope_parameters": _LINEAR_ROPE, "pad_token_id": None},
        },
    ),
    **cases_of(
        "vaultgemma",
        {**_HEADS, "sliding_window": 7, "query_pre_attn_scalar": 11},
        {
            "caps-two-kv-heads": {
                **_TWO_KV_HEADS,
                "attn_logit_softcapping": 0.5,
                "final_logit_softcapping": 4.0,
                "pad_token_id": 0,
            },
            "no-caps-bias": {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "attention_bias": True,
                "layer_types": _FULL_LAST,
            },
            "untied-linear": {**_UNTIED, "attn_logit_softcapping": 2.0, "rope_parameters": _LINEAR_ROPE},
        },
    ),
    **cases_of(
        "hyperclovax",
        {**_HEADS, **_MULTIPLIERS},
        {
            "norms-around-bias-two-kv-heads": {**_TWO_KV_HEADS, **_BIASES, "logits_scaling": 0.25},
            "norms-before-tied": {"use_post_norm": False, "logits_scaling": 3.0, **_TIED},
            "wide-heads-llama3": {"head_dim": 16, "rope_parameters": LLAMA3_ROPE},
        },
    ),
    **cases_of(
        "granitemoehybrid",
        _HYBRID,
        {
            "rope-two-kv-heads": {**_TWO_KV_HEADS, "position_embedding_type": "rope", "logits_scaling": 4.0},
            "no-positions-tied": {"position_embedding_type": "nope", **_TIED, "time_step_limit": [0.0, 100.0]},
            "bias-linear": {
                "attention_bias": True,
                "position_embedding_type": "rope",
                "rope_parameters": _LINEAR_ROPE,
            },
        },
    ),
}
