"""StarCoder2: Llama's names with LayerNorms, biases, a plain MLP and GPT-2's dropouts."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.families.llama import SHARED_FIELDS, decoder, family, one_window
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    mapped=SHARED_FIELDS
    | {"hidden_act", "norm_epsilon", "sliding_window", "use_bias", "residual_dropout", "embedding_dropout"},
    equal={
        "scale_attn_weights": (True,),
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
    },
    # second names of hidden_act and norm_epsilon in configs on the hub; transformers reads only the latter
    cosmetic=frozenset({"activation_function", "layer_norm_epsilon"}),
)


def translate(config: Any) -> DecoderConfig:
    """Translate a Starcoder2Config."""
    return decoder(
        config,
        NormStyle("layer", config.norm_epsilon),
        gated=False,
        qkv_bias=config.use_bias,
        attention_out_bias=config.use_bias,
        mlp_bias=config.use_bias,
        windows=one_window(config),
        embedding_dropout=config.embedding_dropout,
        residual_dropout=config.residual_dropout,
    )


STARCODER2 = family("starcoder2", "Starcoder2ForCausalLM", translate, FIELDS)

FAMILIES = (STARCODER2,)
