"""Limits of the sizes in config.json, checked before anything is computed from them.

A config may come from anywhere. From a number of layers or labels, transformers' config classes and our tables make
lists, and from the other sizes tensors: without limits, one number takes minutes and all memory before it is refused.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from megatron_ds.errors import ConversionError

if TYPE_CHECKING:
    from megatron_ds.hf.family import Family
    from megatron_ds.models.config import ModelConfig

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_REPEATED = "attention_types"  # gpt_neo's [[kinds of layers, how often], ...], of which its config class makes a list

_MOST_LAYERS = 10_000  # published: 126 (Llama 3.1 405B)
_MOST_EXPERTS = 2**14  # published: 2,048 (Switch-C)
_MOST_IN_ALL = 2**18  # experts of all layers, as they may be stored one by one; published: 30,720 (Switch-C)
_WIDEST = 2**20  # features; published: 16,384 (Llama 3.1 405B), and 53,248 in its feed-forward layers
_MOST_HEADS = 2**16  # published: 128
_MOST_IDS = 2**25  # published: 262,208 (Gemma 3)
_MOST_LABELS = 2**20
_MOST_PARAMETERS = 2**44  # published: 1.6e12 (Switch-C)

LIMITS: Mapping[str, int] = {
    **dict.fromkeys((*LAYERS, "num_hidden_groups", "inner_group_num", "depth"), _MOST_LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "n_embed", "d_model", "dim", "embedding_size"), _WIDEST),
    **dict.fromkeys(("word_embed_proj_dim", "head_dim", "d_kv", "rotary_dim"), _WIDEST),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "d_ff"), 4 * _WIDEST),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 4 * _WIDEST),
    "shared_intermediate_size": 4 * _WIDEST,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _MOST_HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "relative_attention_num_buckets"), _MOST_HEADS),
    **dict.fromkeys((*EXPERTS, "num_experts_per_tok", "moe_k", "n_group", "topk_group"), _MOST_EXPERTS),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), _MOST_EXPERTS),
    **dict.fromkeys(("vocab_size", "type_vocab_size"), _MOST_IDS),
    **dict.fromkeys(("num_labels", "_num_labels"), _MOST_LABELS),
}
"""Field -> its largest value. Windows, intervals and positions have none: nothing is as large as they say."""


def check_sizes(raw: Mapping[str, Any], path: str = "") -> None:
    """Refuse a config with a size above its limit, in nested configs too.

    Args:
        raw: its fields.
        path: the field that holds them, with a dot.

    Raises:
        ConversionError: names field, value and limit.
    """
    for name, value in raw.items():
        if isinstance(value, Mapping):
            check_sizes(value, f"{path}{name}.")
        elif name in LIMITS and isinstance(value, int | float) and value > LIMITS[name]:
            raise ConversionError(
                f"{path}{name}={reprlib.repr(value)} must be at most {LIMITS[name]:,}; nearest: {LIMITS[name]}"
            )
        elif name == _REPEATED and sum(_repetitions(value)) > _MOST_LAYERS:
            raise ConversionError(
                f"{path}{name}={reprlib.repr(value)} stands for more than {_MOST_LAYERS:,} layers; try fewer"
            )
    _check_product(raw, path)


def _check_product(raw: Mapping[str, Any], path: str) -> None:
    """Refuse a model whose layers have too many experts in total."""
    found = [[(raw[name], name) for name in names if isinstance(raw.get(name), int)] for names in (LAYERS, EXPERTS)]
    if not all(found):
        return
    (layers, of_layers), (experts, of_experts) = map(max, found)
    if layers * experts > _MOST_IN_ALL:
        raise ConversionError(
            f"{path}{of_experts}={experts} in {of_layers}={layers} are {layers * experts:,} experts, and must be at "
            f"most {_MOST_IN_ALL:,}; nearest: {_MOST_IN_ALL // layers}"
        )


def _repetitions(entries: Any) -> Iterator[int]:
    """Yield the number of layers that each entry of `attention_types` stands for; other checks refuse other forms."""
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list) and isinstance(entry[1], int):
            yield len(entry[0]) * max(0, entry[1])


def check_parameters(family: Family, core: ModelConfig) -> None:
    """Refuse a model with more parameters than any computer holds.

    Args:
        family: the family, whose table has the shapes.
        core: the model.

    Raises:
        ConversionError: names the parameter with the most elements, and its shape.
    """
    sizes, counts = core.axis_sizes(), dict[str, int]()
    shapes = {row.native: row.op.native_shape(sizes) for row in family.rows(core)}
    for name, shape in shapes.items():
        stack, dot, _ = name.partition(".{n}")
        counts[name] = prod(shape) * (core.stacks[stack].num_stored_blocks if dot else 1)
    total = sum(counts.values())
    if total > _MOST_PARAMETERS:
        largest = max(counts, key=counts.__getitem__)
        raise ConversionError(
            f"{total:.1e} parameters, most of them in {largest} of shape {list(shapes[largest])}, and there may be "
            f"{_MOST_PARAMETERS:.1e}; try smaller sizes in config.json"
        )
