"""Mixtral and MiniMax-M2: every layer has experts, whose projections are named w1, w3 and w2."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import rotary
from megatron_ds.hf.families.experts import AUX_LOSS, ROUTING, ExpertNames, aux_loss, moe_family, router, with_experts
from megatron_ds.hf.families.llama import RMS_FIELDS, decoder, one_window, rms
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.stack import MoEConfig

NAMES = ExpertNames(
    router="block_sparse_moe.gate.weight",
    choice_bias=("block_sparse_moe.e_score_correction_bias", "x"),
    experts="block_sparse_moe.experts",
    gate="w1",
    up="w3",
    down="w2",
)
IN_MEMORY = ExpertNames(choice_bias=("mlp.e_score_correction_bias", "x"))
COUNTS = ("num_local_experts", "num_experts")
_FIELDS = RMS_FIELDS | ROUTING | AUX_LOSS | set(COUNTS)
_EQUAL: dict[str, tuple[Any, ...]] = {"router_jitter_noise": (0.0,)}  # random factors of the input in training


def _moe(config: Any, **options: Any) -> MoEConfig:
    return MoEConfig(
        router=router(config, "num_local_experts", renormalise=True, **options),
        ffn_size=config.intermediate_size,
        layers=tuple(range(config.num_hidden_layers)),
        aux_loss=aux_loss(config),
    )


def _mixtral(config: Any) -> DecoderConfig:
    return with_experts(decoder(config, rms(config), windows=one_window(config)), _moe(config))


def _minimax(config: Any) -> DecoderConfig:
    """Translate a MiniMaxM2Config. Its published configs have `rotary_dim` instead of a partial_rotary_factor."""
    rope = rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings, partial=True)
    given = getattr(config, "rotary_dim", None)
    if given not in (None, rope.dim):
        raise ConversionError(f"rotary_dim={given} contradicts the {rope.dim} dims that partial_rotary_factor rotates")
    dense = decoder(
        config,
        rms(config),
        rotary=(rope,) * config.num_hidden_layers,
        qk_norm=rms(config),
        qk_norm_across_heads=True,
    )
    return with_experts(dense, _moe(config, score="sigmoid", choice_bias=True))


MIXTRAL = moe_family(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral,
    FieldRules(_FIELDS | {"sliding_window"}, equal=_EQUAL),
    NAMES,
    IN_MEMORY,
    COUNTS,
)
MINIMAX_M2 = moe_family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    _minimax,
    FieldRules(
        _FIELDS | {"rotary_dim"},
        # fields of its authors' own code, which transformers' code takes for granted
        equal={
            **_EQUAL,
            "scoring_func": ("sigmoid",),
            "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
            "use_routing_bias": (True,),
            "shared_intermediate_size": (0,),
        },
        cosmetic=frozenset({"use_mtp", "num_mtp_modules", "mtp_transformer_layers"}),
        may_be_zero=frozenset({"shared_intermediate_size"}),
    ),
    NAMES,
    IN_MEMORY,
    COUNTS,
)

FAMILIES = (MIXTRAL, MINIMAX_M2)
