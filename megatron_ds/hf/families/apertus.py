"""Apertus: Llama with norms of queries and keys, and a plain MLP whose activation has two learned scalars."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation
from megatron_ds.hf.families.llama import NATIVE, RMS_FIELDS, THEIRS, biases, decoder, family, rms, rows
from megatron_ds.hf.family import Row, renamed
from megatron_ds.hf.tensor_mapping import Op
from megatron_ds.models.gpt import DecoderConfig

XIELU = "xielu"
NAMES = {
    "input_layernorm": "attention_layernorm",
    "post_attention_layernorm": "feedforward_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
SCALARS = {"alpha_p": "1", "alpha_n": "1", "beta": "", "eps": ""}  # shapes on disk: one number, in no or one dim
FIELDS = FieldRules(
    RMS_FIELDS | {"attention_bias"},
    # fields of configs on the hub, which transformers' code takes for granted
    equal={"qk_norm": (True,), "post_norm": (False,), "mlp_bias": (False,), "hidden_dropout": (0.0,)},
)


def translate(config: Any) -> DecoderConfig:
    """Translate an ApertusConfig."""
    act = XIELU if config.hidden_act == XIELU else activation("hidden_act", config.hidden_act)
    return decoder(config, rms(config), activation=act, gated=False, qk_norm=rms(config), **biases(config))


def _rows(config: DecoderConfig) -> list[Row]:
    table, native, theirs = renamed(rows, NAMES)(config), f"{NATIVE}.mlp.activation", f"{THEIRS}.mlp.act_fn"
    if config.activation == XIELU:
        table += [Row(f"{native}.{name}", (f"{theirs}.{name}",), Op((dim,), "1")) for name, dim in SCALARS.items()]
    return table


APERTUS = family("apertus", "ApertusForCausalLM", translate, FIELDS, _rows)

FAMILIES = (APERTUS,)
