"""Rows and config fields that families with mixtures of experts share. They otherwise use Llama's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.families.llama import NATIVE, THEIRS, attention_rows, family, gated_rows, outer_rows
from megatron_ds.hf.family import Family, Row, each_expert
from megatron_ds.hf.tensor_mapping import FusedPiece, Op, copy
from megatron_ds.layers.moe.shape import RouterShape
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.stack import MoEConfig

MLP = f"{NATIVE}.mlp"


@dataclass(frozen=True)
class ExpertNames:
    """Names of the tensors of a mixture of experts, after the name of the layer.

    Attributes:
        router: weight of the router.
        choice_bias: bias of the choice, and its pattern.
        experts: module of the experts.
        gate, up, down: names of one expert's projections.
        shared: module of the shared experts.
        shared_gate: weight of their gate.
    """

    router: str = "mlp.gate.weight"
    choice_bias: tuple[str, str] = ("mlp.gate.e_score_correction_bias", "x")
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate.weight"


def rows(config: DecoderConfig, names: ExpertNames, *, fused: bool = False) -> list[Row]:
    """Return the table of a model with Llama's names, of whose feed-forward layers some are dense.

    Args:
        config: the model.
        names: of the tensors of its experts.
        fused: whether all experts of a layer are in one tensor, as transformers has them in memory.
    """
    table = [*outer_rows(config), *attention_rows(config)]
    if config.dense_layers:
        dense = gated_rows(MLP, f"{THEIRS}.mlp", bias=config.mlp_bias)
        table += [replace(row, layers=config.dense_layers) for row in dense]
    if config.moe is None:
        return table
    experts = [*_router_rows(config.moe, names), *(_fused if fused else _each)(config.moe, names)]
    return table + [replace(row, layers=config.moe.layers) for row in experts]


def _router_rows(moe: MoEConfig, names: ExpertNames) -> list[Row]:
    """Return the rows of the router and the shared experts."""
    found = [Row(f"{MLP}.router.weight", (f"{THEIRS}.{names.router}",), copy("x h"))]
    if moe.router.choice_bias:
        name, pattern = names.choice_bias
        bias = Row(f"{MLP}.router.choice_bias", (f"{THEIRS}.{name}",), Op((pattern,), "x"), keeps_dtype=True)
        found.append(bias)
    if moe.shared_ffn_size:
        found += gated_rows(f"{MLP}.shared", f"{THEIRS}.{names.shared}", "u")
    if moe.shared_gate:
        found.append(Row(f"{MLP}.shared_gate.weight", (f"{THEIRS}.{names.shared_gate}",), copy("1 h")))
    return found


def _each(moe: MoEConfig, names: ExpertNames) -> list[Row]:
    """Return the rows of experts whose tensors are stored one by one."""
    gate, up, down = (f"{THEIRS}.{names.experts}.{{x}}.{one}.weight" for one in (names.gate, names.up, names.down))
    return [
        each_expert(f"{MLP}.experts.up_weight", (gate, up), Op(("m h",) * 2, "* m h"), moe.router.num_experts),
        each_expert(f"{MLP}.experts.down_weight", (down,), copy("h m"), moe.router.num_experts),
    ]


def _fused(moe: MoEConfig, names: ExpertNames) -> list[Row]:
    """Return the rows of experts that are stored as transformers has them in memory."""
    experts = f"{THEIRS}.mlp.experts"
    return fused_rows(f"{experts}.gate_up_proj", f"{experts}.down_proj")


def fused_rows(gate_up: str, down: str) -> list[Row]:
    """Return the rows of experts in one tensor of gates and ups, (E, 2M, H), and one of downs, (E, H, M)."""
    pattern = "x [m|m] h"
    return [
        Row(
            f"{MLP}.experts.up_weight",
            (gate_up,) * 2,
            Op((FusedPiece(pattern, 0), FusedPiece(pattern, 1)), "x * m h"),
            "x",
        ),
        Row(f"{MLP}.experts.down_weight", (down,), copy("x h m"), "x"),
    ]


def moe_family(
    model_type: str,
    architecture: str,
    translate: Callable[[Any], DecoderConfig],
    fields: FieldRules,
    names: ExpertNames,
    in_memory: ExpertNames | None = None,
    counts: Sequence[str] = (),
) -> Family:
    """Return a family whose experts are stored one by one, or fused as transformers has them in memory.

    Args:
        model_type, architecture, translate, fields: see `Family`.
        names: of the tensors on disk.
        in_memory: those in memory; None = the same, but for the experts.
        counts: the names that the number of experts has in versions of transformers; all are written.
    """
    made = family(model_type, architecture, translate, fields, lambda config: rows(config, names))
    return replace(
        made,
        other_rows=(lambda config: rows(config, in_memory or names, fused=True),),
        load_options=eager_experts,
        config_overrides=lambda config: dict.fromkeys(counts, config.moe.router.num_experts) if config.moe else {},
    )


def eager_experts(config: DecoderConfig) -> dict[str, Any]:
    """transformers' other implementations of experts need widths of certain multiples."""
    return {"experts_implementation": "eager"}


# ---- configs ---------------------------------------------------------------------------------------------------------

ROUTING = frozenset({"num_experts_per_tok"})
AUX_LOSS = frozenset({"router_aux_loss_coef", "output_router_logits"})


def aux_loss(config: Any) -> float:
    """Return the coefficient of the load-balancing loss, which transformers adds only if it outputs router logits."""
    coefficient = config.router_aux_loss_coef or 0.0
    return float(coefficient) if config.output_router_logits else 0.0


def router(config: Any, experts: str, top_k: str = "num_experts_per_tok", **options: Any) -> RouterShape:
    """Translate the fields of a router.

    Args:
        config: transformers' config object.
        experts, top_k: names of the fields with the number of experts, and of those that a token uses.
        options: of `RouterShape`, from the family's other fields.

    Raises:
        ConversionError: a token cannot use so many experts.
    """
    count, chosen = getattr(config, experts), getattr(config, top_k)
    for name, value in ((experts, count), (top_k, chosen)):
        if value is None:
            raise ConversionError(f"{name} is missing, and has no default")
    if chosen > count:
        raise ConversionError(f"{top_k}={chosen} must be at most {experts}={count}; nearest: {count}")
    return RouterShape(num_experts=count, top_k=chosen, **options)


def group_options(config: Any, experts: str) -> dict[str, Any]:
    """Translate `n_group` and `topk_group`: each group is judged by its two best experts.

    Raises:
        ConversionError: the groups do not divide the experts, or hold less than two, or too few of them are chosen.
    """
    count, groups, chosen = getattr(config, experts), config.n_group or 1, config.topk_group or 1
    if count is None or config.num_experts_per_tok is None:
        return {}  # `router` refuses it
    if count % groups or count // groups < 2:
        fitting = [one for one in range(1, count // 2 + 1) if count % one == 0] or [1]
        nearest = min(fitting, key=lambda one: abs(one - groups))
        raise ConversionError(
            f"n_group={groups} must divide {experts}={count} into groups of at least 2; nearest: {nearest}"
        )
    if chosen > groups:
        raise ConversionError(f"topk_group={chosen} must be at most n_group={groups}; nearest: {groups}")
    if chosen * (count // groups) < config.num_experts_per_tok:
        raise ConversionError(
            f"num_experts_per_tok={config.num_experts_per_tok} must be at most the {chosen * (count // groups)} "
            f"experts in topk_group={chosen} of n_group={groups} groups; nearest: {chosen * (count // groups)}"
        )
    return {"num_groups": groups, "top_groups": chosen}


def with_experts(config: DecoderConfig, moe: MoEConfig) -> DecoderConfig:
    """Return a decoder with mixtures of experts; without them if no layer has one."""
    return replace(config, moe=moe) if moe.layers else config
