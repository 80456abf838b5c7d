"""Small configs of every family: each option of a family, each rope, each layout of its weights is in one of them.

A name begins with its `model_type`. Sequences of 32 go past the windows, and past the original length where a name says
"beyond". Sizes divide by 4 ranks but where the point of a case is that they do not.
"""

from typing import Any

from tests.parity.case_fields import ALTERNATING, LAYERS, LLAMA, PLAIN_ROPE, SIX_HEADS, TOKENS, YARN_ROPE, cases_of
from tests.parity.cases import LLAMA3_ROPE
from tests.parity.llama_like_cases import LLAMA_LIKE_CASES
from tests.parity.other_decoder_cases import OTHER_DECODER_CASES
from tests.parity.vision_language_cases import VISION_LANGUAGE_CASES

_GPT = {**TOKENS, "n_embd": 32, "n_layer": 4, "n_head": 8, "n_positions": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Factors that differ from dim to dim, and short ones from long ones."""
    short, long = [1.0 + 0.1 * pair for pair in range(pairs)], [2.0 + 0.7 * pair for pair in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long, **more}


GPT_CASES = {
    **cases_of(
        "gpt2",
        {**_GPT, **_NO_DROPOUT},
        {
            "plain": {},
            "scales": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40, "activation_function": "relu"},
            "unscaled-untied": {"scale_attn_weights": False, "tie_word_embeddings": False},
        },
    ),
    **cases_of(
        "gptj",
        {**_GPT, **_NO_DROPOUT, "n_embd": 64, "rotary_dim": 4},
        {
            "partial": {},
            "full-tied": {"rotary_dim": 8, "tie_word_embeddings": True, "n_inner": 48},
            "four-heads": {"n_embd": 32, "n_head": 4, "rotary_dim": 6, "activation_function": "gelu"},
        },
    ),
    **cases_of(
        "gpt_neox",
        {**LAYERS, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64},
        {
            "parallel": {"rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.25}},
            "sequential": {"use_parallel_residual": False, "rotary_pct": 0.5, "rotary_emb_base": 5000},
            "no-bias-tied": {"attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 1.0},
            "linear-fast-gelu": {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
                "rotary_pct": 0.5,
                "hidden_act": "gelu_fast",
            },
            "dynamic-beyond": {
                "max_position_embeddings": 16,
                "rope_scaling": {"type": "dynamic", "factor": 3.0},
                "rotary_pct": 0.5,
            },
        },
    ),
    **cases_of(
        "opt",
        {**LAYERS, "ffn_dim": 64, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 1},
        {
            "before": {},
            "after-narrow": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
            "narrow-untied": {"word_embed_proj_dim": 24, "tie_word_embeddings": False},
            "no-bias": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
            "no-final-norm": {"_remove_final_layer_norm": True, "pad_token_id": None},
        },
    ),
    **cases_of(
        "bloom",
        {**TOKENS, "hidden_size": 32, "n_layer": 4, "n_head": 8},
        {
            "tied": {},
            "untied": {"tie_word_embeddings": False},
            "six-heads": {"hidden_size": 48, "n_head": 6},  # not a power of two: ALiBi's second series of slopes
        },
    ),
    **cases_of(
        "falcon",
        {**LAYERS, "max_position_embeddings": 64},
        {
            "7b": {"num_kv_heads": 8},
            "7b-untied-bias": {"tie_word_embeddings": False, "bias": True, "ffn_hidden_size": 80},
            "7b-alibi": {"alibi": True},
            "7b-sequential": {"parallel_attn": False},
            "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
            "40b-one-norm": {"new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1},
            "40b-alibi-one-group": {"new_decoder_architecture": True, "num_kv_heads": 1, "alibi": True},
            "rw": {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
            "rw-rotary": {"multi_query": False, "parallel_attn": True, "activation": "relu"},
            "rw-six-heads": {"multi_query": False, "alibi": True, "hidden_size": 48, "num_attention_heads": 6},
            "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        },
    ),
}

LLAMA_CASES = {
    **cases_of(
        "llama",
        LLAMA,
        {
            "plain": {},
            "bias-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "pad_token_id": 5},
            "one-kv-head": {"num_key_value_heads": 1, "head_dim": 8},
            "all-heads": {"num_key_value_heads": 8, "hidden_act": "gelu"},
            "six-heads": {**SIX_HEADS, "rope_parameters": LLAMA3_ROPE},
            "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 2e4},
            "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic-beyond": {
                "max_position_embeddings": 16,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "head_dim": 8,
            },
            "yarn": {"rope_parameters": YARN_ROPE, "head_dim": 16},
            "yarn-mscale": {
                "rope_parameters": {
                    **YARN_ROPE,
                    "mscale": 0.7,
                    "mscale_all_dim": 1.1,
                    "beta_fast": 4,
                    "beta_slow": 0.5,
                },
                "head_dim": 16,
            },
            "yarn-magnitude": {
                "rope_parameters": {**YARN_ROPE, "attention_factor": 1.3, "truncate": False, "beta_fast": 2.0},
                "head_dim": 16,
            },
            "longrope": {"rope_parameters": _longrope(4, original_max_position_embeddings=32), "head_dim": 8},
            "longrope-beyond": {
                "rope_parameters": _longrope(4, original_max_position_embeddings=16, factor=3.0),
                "head_dim": 8,
            },
        },
    ),
    **cases_of(
        "mistral",
        {**LLAMA, "head_dim": 8},
        {
            "window": {"sliding_window": 7},
            "no-window-tied": {"sliding_window": None, "tie_word_embeddings": True, "num_key_value_heads": 2},
            "yarn": {"sliding_window": 31, "rope_parameters": YARN_ROPE},
        },
    ),
    **cases_of(
        "qwen2",
        LLAMA,
        {
            "full": {"pad_token_id": 3},
            "windows-tied": {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 2,
                "tie_word_embeddings": True,
            },
            "two-kv-heads": {
                "num_key_value_heads": 2,
                "layer_types": ALTERNATING,
                "use_sliding_window": True,
                "sliding_window": 11,
            },
            "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        },
    ),
    **cases_of(
        "qwen3",
        {**LLAMA, "head_dim": 8},
        {
            "tied": {"tie_word_embeddings": True},
            "bias-windows": {
                "attention_bias": True,
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 1,
            },
            "one-kv-head": {"num_key_value_heads": 1, "head_dim": 16},
            "six-heads": {**SIX_HEADS, "head_dim": 12},
        },
    ),
    **cases_of(
        "phi3",
        {**LLAMA, "hidden_size": 64, "original_max_position_embeddings": 64},
        {
            "plain": {"num_key_value_heads": 8, "pad_token_id": 7},
            "window-tied": {"sliding_window": 5, "tie_word_embeddings": True},
            "partial": {"partial_rotary_factor": 0.75, "hidden_size": 128, "num_key_value_heads": 2},
            "longrope": {"rope_parameters": _longrope(4), "original_max_position_embeddings": 32},
            "longrope-beyond": {"rope_scaling": _longrope(4), "original_max_position_embeddings": 16},
            "longrope-partial": {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {**_longrope(2), "attention_factor": 1.7},
                "original_max_position_embeddings": 16,
            },
        },
    ),
}

LATER_CASES = {
    **cases_of(
        "gemma2",
        {**LLAMA, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 11},
        {
            "caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 4.0, "pad_token_id": 0},
            "no-caps-bias": {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "attention_bias": True,
                "num_key_value_heads": 2,
            },
            "untied-full": {
                "tie_word_embeddings": False,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
                "attn_logit_softcapping": 2.0,
                "hidden_activation": "gelu",
            },
        },
    ),
    **cases_of(
        "gemma3_text",
        {**LLAMA, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 11},
        {
            "two-ropes": {"sliding_window_pattern": 2, "pad_token_id": 0},
            "linear-one-kv-head": {
                "sliding_window_pattern": 2,
                "num_key_value_heads": 1,
                "rope_theta": 1e6,
                "rope_local_base_freq": 5e3,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "cap-bias-untied": {
                "layer_types": ALTERNATING,
                "final_logit_softcapping": 4.0,
                "attention_bias": True,
                "tie_word_embeddings": False,
            },
            "nested-ropes": {
                "layer_types": ALTERNATING,
                "rope_parameters": {
                    "full_attention": LLAMA3_ROPE,
                    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                },
            },
        },
    ),
    **cases_of(
        "olmo2",
        {**LLAMA, "head_dim": 8},
        {
            "all-heads": {"num_key_value_heads": 8, "pad_token_id": 1},
            "groups-bias-tied": {"attention_bias": True, "tie_word_embeddings": True},
            "one-kv-head": {"num_key_value_heads": 1},
            "six-heads": {**SIX_HEADS, "rope_parameters": YARN_ROPE},
        },
    ),
    **cases_of(
        "granite",
        LLAMA,
        {
            "multipliers-tied": {
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.3,
                "residual_multiplier": 0.22,
                "logits_scaling": 0.5,
                "tie_word_embeddings": True,
            },
            "plain-bias": {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.2},
            "two-kv-heads": {"num_key_value_heads": 2, "attention_multiplier": 0.1, "logits_scaling": 8},
        },
    ),
    **cases_of(
        "smollm3",
        LLAMA,
        {
            "every-fourth": {},
            "every-second-bias": {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True},
            "windows-untied": {
                "no_rope_layers": [0, 1, 1, 0],
                "use_sliding_window": True,
                "sliding_window": 9,
                "tie_word_embeddings": False,
                "num_key_value_heads": 2,
            },
            "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}},
        },
    ),
    **cases_of(
        "starcoder2",
        {**LLAMA, "num_key_value_heads": 2},
        {
            "window": {"sliding_window": 7},
            "no-bias-untied": {"use_bias": False, "tie_word_embeddings": False},
            "one-kv-head": {"num_key_value_heads": 1, "hidden_act": "gelu", "norm_epsilon": 1e-3},
        },
    ),
}

_SPARSE = {**LLAMA, "head_dim": 8, "num_experts_per_tok": 2}
_EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 3}
_QWEN_MOE = {**_SPARSE, "num_experts": 4, "moe_intermediate_size": 24}
_GROUPED = {**_SPARSE, "n_routed_experts": 8, "moe_intermediate_size": 16, "n_shared_experts": 1}
_MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.22}

MOE_CASES = {
    **cases_of(
        "mixtral",
        {**_SPARSE, "num_local_experts": 4, "intermediate_size": 48},
        {
            "four-experts": {},
            "eight-window-tied": {**_EIGHT, "sliding_window": 7, "tie_word_embeddings": True},
            "four-of-eight": {
                **_EIGHT,
                "num_experts_per_tok": 4,
                "num_key_value_heads": 2,
                "rope_parameters": YARN_ROPE,
            },
        },
    ),
    **cases_of(
        "qwen2_moe",
        {**_QWEN_MOE, "shared_expert_intermediate_size": 40},
        {
            "all": {"mlp_only_layers": []},
            "every-second": {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False},
            "windows-dense-first": {
                "mlp_only_layers": [0, 2],
                "num_experts": 8,
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 3,
            },
        },
    ),
    **cases_of(
        "qwen3_moe",
        _QWEN_MOE,
        {
            "renormalised": {"norm_topk_prob": True},
            "dense-layer-bias": {"mlp_only_layers": [1], "attention_bias": True, "num_experts": 8},
            "window-one-kv-head": {"use_sliding_window": True, "sliding_window": 9, "num_key_value_heads": 1},
        },
    ),
    **cases_of(
        "olmoe",
        {**_SPARSE, "num_experts": 4, "head_dim": 4, "intermediate_size": 40},
        {
            "groups": {"pad_token_id": 1},
            "eight-renormalised-bias": {"num_experts": 8, "norm_topk_prob": True, "attention_bias": True},
            "one-of-four-tied": {"num_experts_per_tok": 1, "tie_word_embeddings": True, "num_key_value_heads": 8},
        },
    ),
    **cases_of(
        "granitemoe",
        {**_SPARSE, **_MULTIPLIERS, "num_local_experts": 4, "intermediate_size": 48},
        {
            "multipliers-tied": {"logits_scaling": 0.5, "tie_word_embeddings": True},
            "eight-bias": {**_EIGHT, "attention_bias": True},
            "one-kv-head": {"num_key_value_heads": 1, "hidden_act": "gelu"},
        },
    ),
    **cases_of(
        "granitemoeshared",
        {**_SPARSE, **_MULTIPLIERS, "num_local_experts": 4, "intermediate_size": 48},
        {
            "shared": {"shared_intermediate_size": 40},
            "none-shared": {"logits_scaling": 4, "num_local_experts": 8},
            "eight-bias-tied": {
                **_EIGHT,
                "shared_intermediate_size": 16,
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
        },
    ),
    **cases_of(
        "ernie4_5_moe",
        {**LLAMA, "head_dim": 8, "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 16},
        {
            "dense-first-tied": {},
            "every-second-untied": {
                "moe_layer_interval": 2,
                "moe_layer_start_index": 0,
                "moe_layer_end_index": 2,
                "moe_num_shared_experts": 0,
                "tie_word_embeddings": False,
            },
            "least-sum": {"moe_num_experts": 4, "moe_k": 1, "moe_norm_min": 0.4},
        },
    ),
    **cases_of(
        "glm4_moe",
        _GROUPED,
        {
            "dense-first": {"first_k_dense_replace": 1, "use_qk_norm": True},
            "groups-bias": {
                "n_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 2.5,
                "first_k_dense_replace": 2,
                "attention_bias": True,
                "n_shared_experts": 2,
            },
            "all-not-renormalised": {"first_k_dense_replace": 0, "norm_topk_prob": False, "n_routed_experts": 4},
        },
    ),
    **cases_of(
        "dots1",
        _GROUPED,
        {
            "not-renormalised": {"sliding_window": None},
            "windows-groups-bias": {
                "sliding_window": 7,
                "max_window_layers": 2,
                "first_k_dense_replace": 1,
                "attention_bias": True,
                "norm_topk_prob": True,
                "n_group": 2,
                "routed_scaling_factor": 1.5,
                "n_shared_experts": 2,
            },
            "dense-first-tied": {
                "sliding_window": None,
                "first_k_dense_replace": 2,
                "tie_word_embeddings": True,
                "norm_topk_prob": True,
                "num_key_value_heads": 2,
            },
        },
    ),
    **cases_of(
        "minimax_m2",
        {**_SPARSE, "num_local_experts": 4, "intermediate_size": 24},
        {
            "partial": {"rotary_dim": 4},
            "eight-full": {**_EIGHT, "num_key_value_heads": 2, "rope_theta": 1e4},
            "yarn-tied": {
                "rope_parameters": {**YARN_ROPE, "partial_rotary_factor": 0.5},
                "tie_word_embeddings": True,
                "num_experts_per_tok": 1,
            },
        },
    ),
    **cases_of(
        "gpt_oss",
        {**_SPARSE, "num_local_experts": 4, "intermediate_size": 24, "sliding_window": 7},
        {
            "yarn": {"rope_parameters": {**YARN_ROPE, "truncate": False}},
            "low-limit-no-bias": {
                **_EIGHT,
                "swiglu_limit": 0.3,
                "attention_bias": False,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
                "rope_parameters": PLAIN_ROPE,
            },
            "windows-tied": {
                "layer_types": ["sliding_attention"] * 4,
                "tie_word_embeddings": True,
                "num_experts_per_tok": 3,
                "num_key_value_heads": 2,
                "rope_parameters": PLAIN_ROPE,
            },
        },
    ),
}

FAMILY_CASES: dict[str, dict[str, Any]] = {
    **GPT_CASES,
    **LLAMA_CASES,
    **LATER_CASES,
    **LLAMA_LIKE_CASES,
    **OTHER_DECODER_CASES,
    **MOE_CASES,
    **VISION_LANGUAGE_CASES,
}
