"""Hunyuan, dense: Llama with norms of queries and keys after the rotation, whose base a fixed `alpha` stretches."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import rotary
from megatron_ds.hf.families.llama import RMS_FIELDS, biases, decoder, family, rms, rows
from megatron_ds.hf.family import renamed
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.gpt import DecoderConfig

NAMES = {"self_attn.q_norm": "self_attn.query_layernorm", "self_attn.k_norm": "self_attn.key_layernorm"}
FIELDS = FieldRules(
    RMS_FIELDS | {"attention_bias"},
    # fields of its authors' own code, which transformers' code takes for granted
    equal={"use_qk_norm": (True,), "use_cla": (False,), "mlp_bias": (False,)},
    cosmetic=frozenset({"eod_token_id"}),
)
_UNREAD = ("factor", "mscale", "mscale_all_dim")  # with an alpha transformers takes them to be 1
_ALPHA_FIELDS = {"rope_type", "type", "rope_theta", "alpha", "beta_fast", "beta_slow", *_UNREAD}


def _rope(config: Any, head_dim: int) -> RotaryConfig:
    """Translate the rotation. With an alpha it is the plain one, of another base, whatever its type says."""
    parameters = {name: value for name, value in config.rope_parameters.items() if name != "alpha" or value}
    if parameters.get("rope_type") != "dynamic" or "alpha" not in parameters:
        return rotary(parameters, head_dim, config.max_position_embeddings)
    for name, value in parameters.items():
        if name not in _ALPHA_FIELDS:
            raise ConversionError(f"rope_parameters.{name}={value!r} is not supported with alpha")
        if name in _UNREAD and value not in (None, 1.0):
            raise ConversionError(f"rope_parameters.{name}={value} is not supported with alpha; supported: 1.0")
    if head_dim < 4:
        raise ConversionError(f"rope_parameters.alpha needs more than head_dim={head_dim}; nearest: 4")
    return RotaryConfig(head_dim, parameters["rope_theta"] * parameters["alpha"] ** (head_dim / (head_dim - 2)))


def translate(config: Any) -> DecoderConfig:
    """Translate a HunYuanDenseV1Config."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    rope = (_rope(config, head_dim),) * config.num_hidden_layers
    return decoder(config, rms(config), rotary=rope, qk_norm=rms(config), qk_norm_after_rotary=True, **biases(config))


HUNYUAN_V1_DENSE = family("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", translate, FIELDS, renamed(rows, NAMES))

FAMILIES = (HUNYUAN_V1_DENSE,)
