"""The Llama family: Llama, Mistral, Qwen2, Qwen3. One table; the config says which of its rows exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row
from megatron_ds.hf.fields import FieldRules
from megatron_ds.hf.mapping import Op, copy
from megatron_ds.hf.translate import activation, layer_windows, rotary
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.config import DecoderConfig

_SHARED_FIELDS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_dropout",
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
    ]
)


def _decoder(config: Any, family: str, windows: tuple[int | None, ...], **options: bool) -> DecoderConfig:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norm = NormStyle("rms", config.rms_norm_eps)
    return DecoderConfig(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        ffn_size=config.intermediate_size,
        norm=norm,
        embedding_size=config.hidden_size,
        rotary=(rotary(config.rope_parameters, head_dim),) * config.num_hidden_layers,
        activation=activation("hidden_act", config.hidden_act),
        gated=True,
        qkv_bias=options.get("qkv_bias", False),
        attention_out_bias=options.get("out_bias", False),
        mlp_bias=options.get("mlp_bias", False),
        qk_norm=norm if options.get("qk_norm", False) else None,
        tied=config.tie_word_embeddings,
        windows=windows,
        attention_dropout=config.attention_dropout,
        init_std=config.initializer_range,
    )


def _llama(config: Any) -> DecoderConfig:
    bias = config.attention_bias
    windows = (None,) * config.num_hidden_layers
    return _decoder(config, "llama", windows, qkv_bias=bias, out_bias=bias, mlp_bias=config.mlp_bias)


def _mistral(config: Any) -> DecoderConfig:
    return _decoder(config, "mistral", (config.sliding_window,) * config.num_hidden_layers)


def _qwen2(config: Any) -> DecoderConfig:
    return _decoder(config, "qwen2", layer_windows(config.layer_types, config.sliding_window), qkv_bias=True)


def _qwen3(config: Any) -> DecoderConfig:
    bias = config.attention_bias
    return _decoder(
        config,
        "qwen3",
        layer_windows(config.layer_types, config.sliding_window),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )


def rows(config: DecoderConfig) -> list[Row]:
    """The table. `model.` is the base model's prefix."""
    native, theirs = "blocks.{n}", "model.layers.{n}"
    q, k, v, o = (f"{theirs}.self_attn.{part}_proj" for part in "qkvo")
    gate, up, down = (f"{theirs}.mlp.{part}_proj" for part in ("gate", "up", "down"))
    table = [
        Row(EMBEDDING, ("model.embed_tokens.weight",), copy("v e"), "v"),
        Row(f"{native}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",), copy("h")),
        Row(f"{native}.attention.qkv.q_weight", (f"{q}.weight",), copy("(n d) h"), "n"),
        Row(f"{native}.attention.qkv.kv_weight", (f"{k}.weight", f"{v}.weight"), Op(("(k d) h",) * 2, "(k * d) h"), "k"),
        Row(f"{native}.attention.out.weight", (f"{o}.weight",), copy("h (n d)"), "n"),
        Row(f"{native}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",), copy("h")),
        Row(f"{native}.mlp.up.weight", (f"{gate}.weight", f"{up}.weight"), Op(("f h",) * 2, "* f h"), "f"),
        Row(f"{native}.mlp.down.weight", (f"{down}.weight",), copy("h f"), "f"),
        Row("exit.norm.weight", ("model.norm.weight",), copy("h")),
        Row(HEAD, ("lm_head.weight",), copy("v e"), "v"),
    ]
    if config.qkv_bias:
        table.append(Row(f"{native}.attention.qkv.q_bias", (f"{q}.bias",), copy("(n d)"), "n"))
        table.append(
            Row(f"{native}.attention.qkv.kv_bias", (f"{k}.bias", f"{v}.bias"), Op(("(k d)",) * 2, "(k * d)"), "k")
        )
    if config.attention_out_bias:
        table.append(Row(f"{native}.attention.out.bias", (f"{o}.bias",), copy("h")))
    if config.mlp_bias:
        table.append(Row(f"{native}.mlp.up.bias", (f"{gate}.bias", f"{up}.bias"), Op(("f",) * 2, "* f"), "f"))
        table.append(Row(f"{native}.mlp.down.bias", (f"{down}.bias",), copy("h")))
    if config.qk_norm is not None:
        for part in "qk":
            names = (f"{theirs}.self_attn.{part}_norm.weight",)
            table.append(Row(f"{native}.attention.{part}_norm.weight", names, copy("d")))
    return table


def _family(
    model_type: str, architecture: str, translate: Callable[[Any], DecoderConfig], fields: FieldRules
) -> Family:
    ignored = (r"rotary_emb\.inv_freq$",)
    return Family(model_type, architecture, "model.", fields, translate, rows, ignored)


_SLIDING = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})

LLAMA = _family(
    "llama",
    "LlamaForCausalLM",
    _llama,
    FieldRules(
        mapped=_SHARED_FIELDS | {"attention_bias", "mlp_bias"},
        harmless=frozenset({"pretraining_tp"}),
    ),
)
MISTRAL = _family("mistral", "MistralForCausalLM", _mistral, FieldRules(mapped=_SHARED_FIELDS | {"sliding_window"}))
QWEN2 = _family("qwen2", "Qwen2ForCausalLM", _qwen2, FieldRules(mapped=_SHARED_FIELDS | _SLIDING))
QWEN3 = _family("qwen3", "Qwen3ForCausalLM", _qwen3, FieldRules(mapped=_SHARED_FIELDS | _SLIDING | {"attention_bias"}))
