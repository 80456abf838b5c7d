"""Effect of each Hugging Face config field on the math. A field that may have one and is not known is refused."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.quantised import FIELDS as QUANTISED
from megatron_ds.hf.quantised import find_quantisation

SIZES = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "sliding_window",
        "sliding_window_pattern",
        "no_rope_layer_interval",
        "query_pre_attn_scalar",
        "n_embd",
        "n_embed",
        "n_inner",
        "n_layer",
        "n_head",
        "n_positions",
        "rotary_dim",
        "ffn_dim",
        "ffn_hidden_size",
        "word_embed_proj_dim",
        "num_kv_heads",
        "type_vocab_size",
        "embedding_size",
        "num_hidden_groups",
        "inner_group_num",
        "local_attention",
        "global_attn_every_n_layers",
        "dim",
        "hidden_dim",
        "n_heads",
        "n_layers",
        "d_model",
        "d_kv",
        "d_ff",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_experts_per_tok",
        "moe_k",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "n_shared_experts",
        "moe_num_shared_experts",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
        "decoder_sparse_step",
        "moe_layer_start_index",
        "moe_layer_interval",
        "window_size",
    ]
)
POSITIVE = frozenset(
    [
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_epsilon",
        "norm_eps",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "logits_scaling",
        "rope_theta",
        "rope_local_base_freq",
        "global_rope_theta",
        "local_rope_theta",
        "rotary_emb_base",
        "rotary_pct",
        "partial_rotary_factor",
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "low_freq_factor",
        "high_freq_factor",
        "mscale",
        "mscale_all_dim",
        "routed_scaling_factor",
        "swiglu_limit",
        "norm_eps",
        "logit_scale",
        "alpha",
    ]
)
PROBABILITIES = frozenset(
    [
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "dropout",
        "attention_dropout",
        "hidden_dropout",
        "residual_dropout",
        "embedding_dropout",
        "mlp_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout_rate",
        "classifier_dropout",
        "classifier_dropout_prob",
        "seq_classif_dropout",
        "resid_dropout",
        "embed_dropout",
    ]
)
FLAGS = frozenset(
    [
        "tie_word_embeddings",
        "truncate",
        "scale_decoder_outputs",
        "norm_topk_prob",
        "output_router_logits",
        "token_classification_bias",
        "multi_query",
        "qk_layernorm",
        "use_qk_norm",
        "use_qkv_bias",
        "scale_embedding",
        "norm_bias",
        "decoder_bias",
        "classifier_bias",
    ]
)
NOT_NEGATIVE = frozenset(["router_aux_loss_coef", "moe_norm_min", "llama_4_scaling_beta"])
LISTS = frozenset(["short_factor", "long_factor"])
ROPE = frozenset(["rope_parameters", "rope_scaling"])
PER_LAYER = ("layer_types", "no_rope_layers")

# Fields of any family that change the math or the weights, with the values that have no effect.
COMMON_EQUAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}

# Fields of any family that control training in transformers; here the run file does.
COMMON_TRAINING = frozenset(["gradient_checkpointing", "pretraining_tp"])

# Fields of any family that a class with a head for labels reads; see `hf.label_classes`.
OF_LABELS = frozenset(
    [
        "id2label",
        "label2id",
        "num_labels",
        "_num_labels",
        "problem_type",
        "classifier_dropout",
        "token_classification_bias",
    ]
)

# Fields of configs on the hub that affect neither the math nor the weights.
COMMON_COSMETIC = frozenset(
    [
        # identity and provenance
        "architectures",
        "model_type",
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "auto_map",
        "finetuning_task",
        "tokenizer_class",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        "is_llama_config",
        # dtype of the weights, which is read from the weights themselves
        "dtype",
        "torch_dtype",
        "use_bfloat16",
        # implementation choices of transformers without effect on the result
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "chunk_size_feed_forward",
        "use_cache",
        "cache_implementation",
        "torchscript",
        "tf_legacy_loss",
        # token ids
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        # outputs of a forward pass
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "keys_to_ignore_at_inference",
        "tie_last_hidden_states",
        # other tasks; `OF_LABELS` are mapped where a class has a head for labels
        *OF_LABELS,
        "prefix",
        "task_specific_params",
        # encoder-decoders
        "is_decoder",
        "cross_attention_hidden_size",
        # generation
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "diversity_penalty",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    ]
)


@dataclass(frozen=True)
class FieldRules:
    """Config fields that a family may have, by their effect on the math. They take precedence over the common fields.

    Attributes:
        mapped: fields that the family's `translate` reads, directly or through transformers' config class.
        equal: fields that change the math, each with its supported values.
        training: fields without effect on a forward pass; the run file decides what they control.
        cosmetic: fields without effect on training: token ids, outputs, caching, names.
        may_be_zero: sizes that are 0 where there is no such thing.
    """

    mapped: frozenset[str]
    equal: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    training: frozenset[str] = frozenset()
    cosmetic: frozenset[str] = frozenset()
    may_be_zero: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return any(name in names for names in (self.mapped, self.equal, self.training, self.cosmetic, _COMMON))

    def check(self, raw: Mapping[str, Any], may_read: Callable[[str], bool] = lambda name: True) -> list[str]:
        """Refuse unknown fields that may have an effect, misspelled ones, and known fields with unsupported values.

        Args:
            raw: the config.
            may_read: tests whether the code of the model may read a field.

        Returns:
            the unknown fields that the code does not read.

        Raises:
            ConversionError: names field, value and supported values.
        """
        find_quantisation(raw)
        _check_lengths(raw)
        equal, unread = {**COMMON_EQUAL, **self.equal}, []
        for name, value in raw.items():
            if name in QUANTISED:
                continue
            if name not in self:
                if self._near(name, _MISSPELLED) or may_read(name):
                    raise ConversionError(f"{name}={reprlib.repr(value)} is not a known field; {self._advice(name)}")
                unread.append(name)
                continue
            if name in equal and not any(_same(value, allowed) for allowed in equal[name]):
                raise ConversionError(f"{name}={reprlib.repr(value)} is not supported; supported: {equal[name][0]!r}")
            if name in ROPE:
                _check_rope(name, value)
            else:
                _check_value(name, name, value, least_size=0 if name in self.may_be_zero else 1)
        return unread

    def _near(self, name: str, likeness: float) -> list[str]:
        return difflib.get_close_matches(name, sorted(self.mapped | self.equal.keys()), n=1, cutoff=likeness)

    def _advice(self, name: str) -> str:
        nearest = self._near(name, _SIMILAR)
        if nearest:
            return f"nearest: {nearest[0]}"
        return "it could change the math, so it is not ignored; remove it if it does nothing"


_SIMILAR, _MISSPELLED = 0.8, 0.9  # likeness of names, as difflib measures it; no real field of 0.9 is another one

_COMMON = COMMON_COSMETIC | COMMON_TRAINING | COMMON_EQUAL.keys()


def _same(value: Any, allowed: Any) -> bool:
    """Compare two values; a bool equals only a bool, although 1 == True in Python."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _check_lengths(raw: Mapping[str, Any]) -> None:
    for name in PER_LAYER:
        entries, layers = raw.get(name), raw.get("num_hidden_layers")
        if isinstance(entries, list) and isinstance(layers, int) and len(entries) != layers:
            raise ConversionError(f"{name} has {len(entries)} entries; it must have num_hidden_layers={layers}")


def _check_rope(path: str, rope: Any) -> None:
    """Check `rope_scaling` or `rope_parameters`, which may hold one mapping for each kind of layer."""
    if rope is not None and not isinstance(rope, Mapping):
        raise ConversionError(f"{path}={reprlib.repr(rope)} must be a mapping of rope fields, or null")
    for name, value in (rope or {}).items():
        if isinstance(value, Mapping):
            _check_rope(f"{path}.{name}", value)
        else:
            _check_value(f"{path}.{name}", name, value)


def _check_value(path: str, name: str, value: Any, least_size: int = 1) -> None:
    """Refuse a value of the wrong type or range; transformers only warns, or fails with an obscure error.

    Args:
        path: full name of the field, such as rope_scaling.factor.
        name: its last part, which decides the rule.
        value: None = left to transformers, which knows whether null is allowed.
        least_size: the smallest size.
    """
    rule = ""
    if value is None:
        return
    if name in SIZES and not (_is_number(value, least_size) and isinstance(value, int)):
        rule = f"must be a whole number of at least {least_size}"
    elif name in POSITIVE and not (_is_number(value, 0) and value > 0):
        rule = "must be a number above 0"
    elif name in NOT_NEGATIVE and not _is_number(value, 0):
        rule = "must be a number of at least 0"
    elif name in PROBABILITIES and not (_is_number(value, 0) and value < 1):
        rule = "must be a probability below 1"
    elif name in FLAGS and not isinstance(value, bool):
        rule = "must be true or false"
    elif name in LISTS and not (isinstance(value, list) and all(_is_number(one, 0) and one > 0 for one in value)):
        rule = "must be a list of numbers above 0"
    if rule:
        raise ConversionError(f"{path}={reprlib.repr(value)} {rule}")


def _is_number(value: Any, least: float) -> bool:
    """Test for a finite number of at least `least`; true and false are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < math.inf
