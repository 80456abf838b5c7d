"""The ledger of config fields: what each does to the math. A field that is not in it is refused, never ignored."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ds.errors import ConversionError

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
        "n_embd",
        "n_inner",
        "n_layer",
        "n_head",
        "n_positions",
    ]
)

# Fields of any family that change the math or the weights, with the values at which they do nothing.
COMMON_EQUAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
}

# Hub configs carry these; training sees none of them.
COMMON_HARMLESS = frozenset(
    [
        # identity and provenance
        "architectures",
        "model_type",
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "auto_map",
        "finetuning_task",
        "tokenizer_class",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
        "is_llama_config",
        # the type of the weights, which the weights themselves say
        "dtype",
        "torch_dtype",
        "use_bfloat16",
        # how transformers computes the same
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
        "use_cache",
        "cache_implementation",
        "torchscript",
        "tf_legacy_loss",
        # token ids
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        # what a forward pass hands out
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "keys_to_ignore_at_inference",
        # other tasks
        "id2label",
        "label2id",
        "num_labels",
        "_num_labels",
        "problem_type",
        "prefix",
        "task_specific_params",
        # encoder-decoders
        "is_decoder",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
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
    """Every config field that a family may carry, by what it does to the math.

    Attributes:
        mapped: read by the family's `translate`.
        equal: fields that change the math, each with the values that are supported.
        harmless: no effect on training: token ids, outputs, caching, names.
    """

    mapped: frozenset[str]
    equal: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.mapped or name in self.harmless or name in self.equal or name in _COMMON

    def check(self, raw: Mapping[str, Any]) -> None:
        """Refuse fields that are unknown, or known and not supported at their value.

        Raises:
            ConversionError: naming field, value and what is supported.
        """
        _refuse_quantised(raw)
        equal = {**COMMON_EQUAL, **self.equal}
        for name, value in raw.items():
            if name in _QUANTISED:
                continue
            if name not in self:
                raise ConversionError(f"{name}={reprlib.repr(value)} is not a known field; {self._advice(name)}")
            if name in equal and not any(_same(value, allowed) for allowed in equal[name]):
                raise ConversionError(f"{name}={reprlib.repr(value)} is not supported; supported: {equal[name][0]!r}")
            if name in SIZES and value is not None and not _is_count(value):
                raise ConversionError(f"{name}={reprlib.repr(value)} must be a whole number of at least 1")

    def _advice(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, sorted(self.mapped | self.equal.keys()), n=1, cutoff=0.8)
        if nearest:
            return f"nearest: {nearest[0]}"
        return "it could change the math, so it is not ignored; remove it if it does nothing"


_QUANTISED = ("quantization_config", "compression_config")
_COMMON = COMMON_HARMLESS | COMMON_EQUAL.keys()


def _refuse_quantised(raw: Mapping[str, Any]) -> None:
    for name in _QUANTISED:
        if raw.get(name):
            method = raw[name].get("quant_method", "unknown") if isinstance(raw[name], Mapping) else raw[name]
            raise ConversionError(
                f"{name}.quant_method={method!r}: quantised weights are not supported; use the checkpoint that they "
                "were made from"
            )


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and a bool only where a bool is meant: 1 == True in Python, but not in a config."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
