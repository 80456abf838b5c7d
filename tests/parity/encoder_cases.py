"""Small configs of encoders and encoder-decoders: each class, activation and option of a family is in one of them.

A name begins with its `model_type`. The class is `architectures[0]`, or the family's first. Four layers or more in all,
so that every pipeline fits; lengths of 32 go past the last distance where a name says "few".
"""

from typing import Any

from tests.parity.cases import VOCAB

_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 2}
_BERT = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_ROBERTA = {**_BERT, "max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1}
_MODERNBERT = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "local_attention": 8,
    "global_attn_every_n_layers": 3,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 4,
    "n_heads": 8,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
_EUROBERT = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
_ROPES = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 2e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "sliding_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 4,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 8,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_FEW = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}


def _of(model_type: str, common: dict[str, Any], cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Cases named by what they change in a family's common fields."""
    return {f"{model_type}-{name}": {"model_type": model_type, **common, **changes} for name, changes in cases.items()}


ENCODER_CASES: dict[str, dict[str, Any]] = {
    **_of(
        "bert",
        _BERT,
        {
            "masked": {},
            "pretraining": {"architectures": ["BertForPreTraining"], "hidden_act": "relu", "type_vocab_size": 3},
            "base": {"architectures": ["BertModel"], "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
            "base-one-type": {"architectures": ["BertModel"], "type_vocab_size": 1, "pad_token_id": None},
            "masked-one-type": {"type_vocab_size": 1, "hidden_act": "gelu_new", "pad_token_id": 5},
        },
    ),
    **_of(
        "roberta",
        _ROBERTA,
        {
            "masked": {},
            "masked-relu": {"hidden_act": "relu", "pad_token_id": 3, "max_position_embeddings": 68},
            "two-types": {"type_vocab_size": 2, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
            "base": {"architectures": ["RobertaModel"]},
        },
    ),
    **_of(
        "modernbert",
        _MODERNBERT,
        {
            "masked": {},
            "biases": {
                **dict.fromkeys(["norm_bias", "attention_bias", "mlp_bias", "classifier_bias"], True),
                "local_attention": 7,
                "hidden_activation": "gelu_new",
                "pad_token_id": 3,
            },
            "untied-ropes": {
                "tie_word_embeddings": False,
                "decoder_bias": False,
                "classifier_activation": "silu",
                "layer_types": _KINDS,
                "global_attn_every_n_layers": None,
                "rope_parameters": _ROPES,
                "local_attention": 31,
            },
            "base": {"architectures": ["ModernBertModel"], "norm_bias": True, "norm_eps": 1e-3},
        },
    ),
    **_of(
        "distilbert",
        _DISTILBERT,
        {
            "masked": {},
            "relu": {"activation": "relu", "pad_token_id": 5, "sinusoidal_pos_embds": True},
            "base": {"architectures": ["DistilBertModel"], "hidden_dim": 48, "pad_token_id": None},
        },
    ),
    **_of(
        "electra",
        {**_BERT, "embedding_size": 16},
        {
            "generator": {},
            "wide-relu": {"embedding_size": 48, "hidden_act": "relu", "type_vocab_size": 3, "pad_token_id": 4},
            "base-one-width": {"architectures": ["ElectraModel"], "embedding_size": 32, "layer_norm_eps": 1e-3},
        },
    ),
    **_of(
        "albert",
        {**_BERT, "embedding_size": 16},
        {
            "masked": {},
            "one-width-relu": {"embedding_size": 32, "hidden_act": "relu", "type_vocab_size": 3, "pad_token_id": 4},
            "base": {"architectures": ["AlbertModel"], "embedding_size": 12, "layer_norm_eps": 1e-3},
        },
    ),
    **_of(
        "eurobert",
        _EUROBERT,
        {
            "untied": {"rope_parameters": {"rope_type": "default", "rope_theta": 250.0}},
            "biases-tied-one-kv-head": {
                "attention_bias": True,
                "mlp_bias": True,
                "tie_word_embeddings": True,
                "num_key_value_heads": 1,
            },
            "base-two-kv-heads": {
                "architectures": ["EuroBertModel"],
                "num_key_value_heads": 2,
                "head_dim": 8,
                "hidden_act": "gelu",
            },
        },
    ),
    **_of(
        "nomic_bert",
        _BERT,
        {
            "masked": {},
            "head-dim": {"head_dim": 8, "hidden_act": "gelu", "type_vocab_size": 3, "pad_token_id": 5},
            "base-one-type": {"architectures": ["NomicBertModel"], "type_vocab_size": 1, "layer_norm_eps": 1e-3},
        },
    ),
    **_of(
        "t5",
        _T5,
        {
            "tied-relu": {},
            "gated": {**_GATED, "d_kv": 6},
            "uneven-few": {**_GATED, **_FEW, "num_layers": 3, "num_decoder_layers": 2, "d_kv": 8},
            "gated-silu-few": {**_FEW, "feed_forward_proj": "gated-silu", "num_decoder_layers": 3, "d_kv": 2},
            "untied-relu": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "decoder_start_token_id": 3},
        },
    ),
    # other names of RoBERTa's and T5 v1.1's code
    **_of("xlm-roberta", _ROBERTA, {"masked": {"type_vocab_size": 2}}),
    **_of("camembert", _ROBERTA, {"base": {"architectures": ["CamembertModel"], "hidden_act": "relu"}}),
    **_of("mt5", _T5, {"gated-few": {**_GATED, **_FEW, "num_decoder_layers": 3}}),
}
