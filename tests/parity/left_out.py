"""A model without one of its options: each must be seen, or a case proves nothing about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_ds.layers.moe.shape import RouterShape
from megatron_ds.layers.relative_bias import RelativeBias
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.bert import EncoderConfig
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.models.stack import MoEConfig, StackConfig
from megatron_ds.models.t5 import EncoderDecoderConfig
from tests.parity.alone_batches import Batch

# Options that leave the parameters as they are, and the value that leaves them out.
LEFT_OUT: dict[str, Any] = {
    "padding_id": None,
    "embedding_multiplier": 1.0,
    "rotary": (),
    "alibi": None,
    "relative": None,  # its table is gone; what is left is compared
    "residual_multiplier": 1.0,
    "attention_scale": None,
    "scale_by_layer": False,
    "attention_softcap": None,
    "query_temperature": None,
    "qk_norm_after_rotary": False,
    "attention_sinks": False,  # they are gone; what is left is compared, here and below
    "windows": (),
    "logit_multiplier": 1.0,
    "logit_softcap": None,
}


@dataclass(frozen=True)
class Variant:
    """A model, its batch, and what is done to it once it is built and filled."""

    core: ModelConfig
    batch: Batch
    change: Callable[[SequentialModel], None] = lambda model: None


def without_each_option(core: ModelConfig, batch: Batch) -> dict[str, Variant]:
    """Name of an option that a case sets -> the same model without it."""
    if isinstance(core, EncoderDecoderConfig):
        configs = _without_stack_options(core, batch)
    else:
        configs = _without_fields(core)
    found = {name: Variant(changed, batch) for name, changed in configs.items()}
    if isinstance(core, EncoderDecoderConfig):
        found.update(_without_distances(core, batch))
    if isinstance(core, EncoderConfig) and not core.first_norm:
        found["no norm before the first block"] = Variant(core, batch, _norm_before_the_first_block)
    if not isinstance(core, DecoderConfig):
        found.update({name: Variant(core, batch.without(name)) for name in batch.columns if name.endswith(EXTRA)})
    return found


EXTRA = ("attention_mask", "token_type_ids")  # columns that a model could forget to read


def _without_stack_options(core: EncoderDecoderConfig, batch: Batch) -> dict[str, ModelConfig]:
    found: dict[str, ModelConfig] = {
        f"{name} of the {stack}": replace(core, **{stack: changed})
        for stack in ("encoder", "decoder")
        for name, changed in _without_fields(getattr(core, stack)).items()
    }
    if core.logit_multiplier != 1.0:
        found["logit_multiplier"] = replace(core, logit_multiplier=1.0)
    return found


def _without_fields(config: Any) -> dict[str, Any]:
    """Of a stack, which may be a whole model."""
    changed = {
        option: replace(config, **{option: default})
        for option, default in LEFT_OUT.items()
        if getattr(config, option, default) != default and not (option == "windows" and set(config.windows) == {None})
    }
    plain = tuple(
        rope and RotaryConfig(rope.dim, rope.theta, fp32=rope.fp32, rounded=rope.rounded) for rope in config.rotary
    )
    if plain != config.rotary:
        changed["scaling and pairs of rotary"] = replace(config, rotary=plain)
    if not any(config.windows):
        changed["causal"] = replace(config, causal=not config.causal)
    changed["activation"] = replace(config, activation=_another(config.activation))
    if config.moe is not None:
        changed.update({name: replace(config, moe=moe) for name, moe in _without_expert_options(config.moe).items()})
    if isinstance(config, EncoderConfig):
        changed.update(_without_encoder_options(config))
    return changed


def _without_expert_options(moe: MoEConfig) -> dict[str, MoEConfig]:
    """Experts with another router, or without limits and shared experts."""
    found = {name: replace(moe, router=router) for name, router in _other_routers(moe.router).items()}
    if moe.limit is not None:
        found["limit"] = replace(moe, limit=None)
    if moe.shared_gate:
        found["gate of shared experts"] = replace(moe, shared_gate=False)
    if moe.shared_ffn_size:
        found["shared experts"] = replace(moe, shared_ffn_size=0, shared_gate=False)
    return found


def _other_routers(router: RouterShape) -> dict[str, RouterShape]:
    found = {
        "score": replace(router, score="softmax" if router.score == "sigmoid" else "sigmoid"),
        "number of experts of a token": replace(router, top_k=router.top_k + (1 if router.top_k == 1 else -1)),
    }
    if router.score != "softmax_of_chosen":  # whose sum is 1
        found["renormalise"] = replace(router, renormalise=not router.renormalise)
    if router.scale != 1.0:
        found["scale"] = replace(router, scale=1.0)
    if router.top_groups < router.num_groups:
        found["groups"] = replace(router, num_groups=1, top_groups=1)
    if router.choice_bias:
        found["bias of the choice"] = replace(router, choice_bias=False)
    if router.bias:
        found["bias of the router"] = replace(router, bias=False)
    if router.least_sum > 1e-3:  # else no sum is below it
        found["least sum"] = replace(router, least_sum=0.0)
    return found


def _without_encoder_options(config: EncoderConfig) -> dict[str, EncoderConfig]:
    changed = {
        option: replace(config, **{option: without})
        for option, without in WITHOUT.items()
        if getattr(config, option) != without
    }
    if config.norm_place == "sum":
        changed["norm after the sum"] = replace(config, norm_place="output")
    if any(config.windows):
        wider = tuple(window and window + 1 for window in config.windows)
        changed["width of windows"] = replace(config, windows=wider)
        changed["keys after the query"] = replace(config, causal=True)
    ropes = set(config.rotary)
    if len(ropes) == 2:
        other = dict(zip(ropes, reversed(list(ropes))))
        changed["rotation by kind of layer"] = replace(config, rotary=tuple(other[rope] for rope in config.rotary))
    if config.embedding_size == config.hidden_size:
        narrow = {"projection of the embedding": {"embedding_projection": False}}
        if config.masked_lm:
            narrow["transformation in the head"] = {"head_activation": None}  # type: ignore[dict-item]
        for name, options in narrow.items():
            if any(getattr(config, option) != value for option, value in options.items()):
                changed[name] = replace(config, **options)  # type: ignore[arg-type]
    if config.positions is not None and config.positions.skipped_id is not None:
        changed["padding's position"] = replace(config, positions=replace(config.positions, skipped_id=None))
    if config.masked_lm and config.head_activation is not None:
        changed["activation of the head"] = replace(config, head_activation=_another(config.head_activation))
    return changed


WITHOUT: dict[str, Any] = {  # of encoders alone; the parameters are gone
    "embedding_norm": False,
    "final_norm": False,
    "positions": None,
    "num_token_types": 0,
}


def _norm_before_the_first_block(model: SequentialModel) -> None:
    block = model.get_submodule("blocks.0")
    size = block.config.hidden_size  # type: ignore[union-attr]
    block.attention_norm = torch.nn.LayerNorm(size, elementwise_affine=False)  # type: ignore[arg-type]


def _without_distances(core: EncoderDecoderConfig, batch: Batch) -> dict[str, Variant]:
    """Distances that share biases otherwise, in one stack."""
    found = {}
    for stack in ("encoder", "decoder"):
        config: StackConfig = getattr(core, stack)
        assert config.relative is not None
        other = replace(config.relative, max_distance=config.relative.max_distance * 2)
        found[f"max_distance of the {stack}"] = Variant(
            replace(core, **{stack: replace(config, relative=other)}), batch
        )
        fewer = replace(config.relative, num_buckets=config.relative.num_buckets // 2)
        found[f"num_buckets of the {stack}"] = Variant(core, batch, _each_bias(stack, positions=fewer))
        found[f"direction of the {stack}'s distances"] = Variant(
            core, batch, _each_bias(stack, causal=not config.causal)
        )
    return found


def _each_bias(stack: str, **attributes: Any) -> Callable[[SequentialModel], None]:
    def change(model: SequentialModel) -> None:
        biases = [part for part in model.get_submodule(stack).modules() if isinstance(part, RelativeBias)]
        assert biases
        for bias in biases:
            for name, value in attributes.items():
                setattr(bias, name, value)

    return change


def _another(activation: str) -> str:
    return "relu" if activation != "relu" else "gelu"
