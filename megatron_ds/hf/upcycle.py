"""A mixture of experts made of a dense model: each expert starts as a copy of its feed-forward layer.

The routers start at random, and the weights of the chosen experts sum to 1, so the model computes what the dense one
computes, to rounding, until training makes its experts differ (Komatsuzaki et al. 2022). A shared expert, which some
families cannot leave out, is a copy too. Its gate starts at 0, that is at a weight of 1/2, and so the outputs of the
other experts are halved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.family import Part
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import ParamSpec, initial_shard
from megatron_ds.models.config import ModelConfig


@dataclass(frozen=True)
class Upcycling:
    """The mixture of experts to make.

    Attributes:
        num_experts, top_k: experts of a layer, and those that each token uses.
        every: the last of each `every` layers gets experts; the others stay dense.
        seed: of the routers.

    Raises:
        ConversionError: a value is out of its range.
    """

    num_experts: int
    top_k: int = 2
    every: int = 1
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise ConversionError(f"--experts={self.num_experts} must be at least 2; nearest: 2")
        if self.top_k < 2:
            raise ConversionError(
                f"--top-k={self.top_k} must be at least 2, because the weight of a single expert is always 1, from "
                "which no router learns; nearest: 2"
            )
        if self.every < 1:
            raise ConversionError(f"--moe-every={self.every} must be at least 1; nearest: 1")
        if self.top_k > self.num_experts:
            raise ConversionError(
                f"--top-k={self.top_k} must be at most --experts={self.num_experts}; nearest: {self.num_experts}"
            )


@dataclass(frozen=True)
class _Target:
    """The family of mixtures that can compute what a dense family computes.

    Attributes:
        model_type: its name.
        num_experts: name of the field with the number of experts.
        fields: transformers' config object of the dense model -> further fields, with the values that its mixture has.
        some_layers: it can have dense layers too.
    """

    model_type: str
    num_experts: str
    fields: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    some_layers: bool = False


def _qwen2(config: Any) -> dict[str, Any]:
    width = config.intermediate_size
    return {
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "norm_topk_prob": True,
        "qkv_bias": True,
    }


def _qwen3(config: Any) -> dict[str, Any]:
    """Return the fields of a mixture whose layers all have a window, or none: see `_check_same`."""
    has_window = "sliding_attention" in config.layer_types
    return {
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "use_sliding_window": has_window,
        "sliding_window": config.sliding_window if has_window else None,
    }


TARGETS = {
    "llama": _Target("mixtral", "num_local_experts"),
    "mistral": _Target("mixtral", "num_local_experts"),
    "qwen2": _Target("qwen2_moe", "num_experts", _qwen2, some_layers=True),
    "qwen3": _Target("qwen3_moe", "num_experts", _qwen3, some_layers=True),
    "granite": _Target("granitemoe", "num_local_experts"),
}
"""`model_type` of a dense model -> the family that its mixture belongs to."""

# Fields of config.json that decide options of a decoder which a target may lack.
_FIELD_OF_OPTION = {
    "qkv_bias": "attention_bias",
    "attention_out_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "windows": "layer_types",
}


class UpcycledWeights:
    """The parameters of the mixture, from those of the dense model, one at a time.

    Args:
        dense: the dense model.
        upcycling: what to make of it.

    Attributes:
        model: the mixture.

    Raises:
        ConversionError: no family of mixtures computes what this model computes.
    """

    def __init__(self, dense: HFWeights, upcycling: Upcycling) -> None:
        self.model = mixture_of(dense.model, upcycling)
        self._dense, self._seed = dense, upcycling.seed
        (self._stack,) = self.model.core.stacks.values()
        assert self._stack.moe is not None, self._stack
        self._moe = self._stack.moe

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor) of every native parameter; use one before asking for the next.

        The experts of a layer are views of one copy.
        """
        for name, full in self._dense.each():
            block, _, part = name.partition(".mlp.")
            if part and int(block.rpartition(".")[2]) in self._moe.layers:
                yield from self._of_mixture(f"{block}.mlp", part, full)
            else:
                yield name, full

    def parts(self) -> Iterator[tuple[Part, Tensor]]:
        """Yield as `HFWeights.parts` does."""
        return ((Part(name), full) for name, full in self.each())

    def _of_mixture(self, mlp: str, part: str, full: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield what becomes of one weight of a dense layer, `part`: "up.weight" or "down.weight"."""
        halved = self._moe.shared_gate and part == "down.weight"
        expert = full * 0.5 if halved else full
        yield f"{mlp}.experts.{part.replace('.', '_')}", expert.expand(self._moe.router.num_experts, *full.shape)
        if self._moe.shared_ffn_size:
            yield f"{mlp}.shared.{part}", full
        if part == "up.weight":
            yield from self._routing(mlp, full.dtype)

    def _routing(self, mlp: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        name, hidden = f"{mlp}.router.weight", self._stack.hidden_size
        spec = ParamSpec((self._moe.router.num_experts, hidden), std=self._stack.init_std)
        yield name, initial_shard(name, spec, self._seed, {}).to(dtype)
        if self._moe.shared_gate:
            yield f"{mlp}.shared_gate.weight", torch.zeros((1, hidden), dtype=dtype)


def mixture_of(dense: HFModel, upcycling: Upcycling) -> HFModel:
    """Return the mixture of experts that computes what a dense model computes.

    Raises:
        ConversionError: no family in `TARGETS` has such a mixture, or not with experts in these layers.
    """
    target = _target_of(dense, upcycling)
    rules = FAMILIES[target.model_type].fields
    given = {name: value for name, value in dense.config.to_dict().items() if name in rules}
    of_experts = {
        **target.fields(dense.config),
        target.num_experts: upcycling.num_experts,
        "num_experts_per_tok": upcycling.top_k,
        **({"decoder_sparse_step": upcycling.every} if target.some_layers else {}),
    }
    names = {"model_type": target.model_type, "architectures": [FAMILIES[target.model_type].architecture]}
    made = read_model({**given, **of_experts, **names}).with_tied(dense.core.tied)
    _check_same(dense, made)
    return made


def _target_of(dense: HFModel, upcycling: Upcycling) -> _Target:
    """Return the family of the mixture.

    Raises:
        ConversionError: no family in `TARGETS` is one, or not with experts in these layers.
    """
    model_type = dense.family.model_type
    target = TARGETS.get(model_type)
    if target is None:
        raise ConversionError(
            f"--experts={upcycling.num_experts} cannot make a mixture of experts of {model_type}; supported: "
            f"{', '.join(TARGETS)}"
        )
    if not target.some_layers and upcycling.every > 1:
        raise ConversionError(
            f"--moe-every={upcycling.every} leaves dense layers, which a {target.model_type} made of this {model_type} "
            "cannot have; nearest: 1"
        )
    num_layers = dense.config.num_hidden_layers
    if upcycling.every > num_layers:
        raise ConversionError(
            f"--moe-every={upcycling.every} must be at most num_hidden_layers={num_layers}; nearest: {num_layers}"
        )
    return target


def _check_same(dense: HFModel, made: HFModel) -> None:
    """Check that two models differ only in their feed-forward layers.

    Raises:
        ConversionError: the first option that differs.
    """
    wanted, found = _options_of(dense.core), _options_of(made.core)
    for option, value in wanted.items():
        if found[option] != value:
            field = _FIELD_OF_OPTION.get(option, option)
            raise ConversionError(
                f"{field}={getattr(dense.config, field, value)!r} of this {dense.family.model_type} is not supported "
                f"by {made.family.model_type}; try a model without it"
            )


def _options_of(core: ModelConfig) -> dict[str, Any]:
    """Return the options of a decoder by name, without its experts."""
    found = {one.name: getattr(core, one.name) for one in fields(core) if one.name not in ("family", "moe")}
    return {**found, "windows": found["windows"] if any(found["windows"]) else ()}
