"""Harbor's table: the tensors of its transformers class, row by row, and the native parameters that they become."""

from __future__ import annotations

from typing import Any

from examples.extend.my_extension import modeling
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.families.llama import NATIVE, RMS_FIELDS, THEIRS, decoder, outer_rows
from megatron_ds.hf.family import Family, Row, linear, separate_qkv
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.tensor_mapping import Op
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig


def translate(config: Any) -> DecoderConfig:
    """HarborConfig -> DecoderConfig."""
    return decoder(config, NormStyle("rms", config.rms_norm_eps))


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table: Llama's names outside of the MLP; h hidden, n heads, d head dim, f feed-forward."""
    attention, mlp = f"{THEIRS}.self_attn", f"{THEIRS}.mlp"
    q, k, v = (f"{attention}.{part}_proj" for part in "qkv")
    return [
        *outer_rows(config),
        *separate_qkv(f"{NATIVE}.attention.qkv", q, k, v, bias=False),
        *linear(f"{NATIVE}.attention.out", f"{attention}.o_proj", "h (n d)", "n"),
        # one native matrix of both: gate first, then up
        Row(f"{NATIVE}.mlp.up.weight", (f"{mlp}.gate.weight", f"{mlp}.up.weight"), Op(("f h", "f h"), "* f h"), "f"),
        *linear(f"{NATIVE}.mlp.down", f"{mlp}.down", "h f", "f"),
    ]


HARBOR = Family(
    model_type="harbor",
    architecture="HarborForCausalLM",
    module=modeling.__name__,
    prefix="model.",
    fields=FieldRules(RMS_FIELDS, equal={"attention_bias": (False,), "mlp_bias": (False,)}),
    translate=translate,
    rows=rows,
)
FAMILIES.register(HARBOR.model_type, HARBOR)
