"""Blocks that share their parameters: what is built, counted and refused. Their training is in tests/parity."""

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.peft.adapters import read_adapters
from megatron_ds.models.bert import EncoderConfig
from megatron_ds.models.sequential import LayerSpec, SequentialModel
from tests.parity.encoder_cases import ENCODER_CASES

MODEL = read_model(ENCODER_CASES["albert-masked"])


def built(core: EncoderConfig) -> SequentialModel:
    with torch.device("meta"):
        return SequentialModel(core.build_layers())


def num_params(core: EncoderConfig) -> int:
    return sum(parameter.numel() for parameter in built(core).parameters())


def albert() -> EncoderConfig:
    assert isinstance(MODEL.core, EncoderConfig)
    return MODEL.core


def test_all_blocks_have_the_parameters_of_the_first() -> None:
    model = built(albert())
    first = dict(model.get_submodule("blocks.0").named_parameters())
    assert len(first) == 14
    for layer in range(1, albert().num_layers):
        own = dict(model.get_submodule(f"blocks.{layer}").named_parameters())
        assert own.keys() == first.keys() and all(own[name] is parameter for name, parameter in first.items())
    assert {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("blocks.")} == {"0"}


def test_flops_count_each_block_and_parameters_one() -> None:
    """Of the other blocks only the biases and norms, which multiply nothing, are not counted."""
    shared = albert()
    each = replace(shared, shared_blocks=False)
    block = built(shared).get_submodule("blocks.0")
    size = sum(parameter.numel() for parameter in block.parameters())
    others = shared.num_layers - 1
    assert num_params(each) - num_params(shared) == others * size
    flops = [core.flops_per_position(32, 0, num_params(core) - core.num_idle_params, 0) for core in (shared, each)]
    assert flops[1] - flops[0] == 6 * others * (size - shared.block_cost(0)) > 0


def test_no_more_than_two_blocks_have_memory_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def build(spec: LayerSpec) -> nn.Module:
        nonlocal most
        layer = spec.build()
        alive.extend(weakref.ref(parameter) for parameter in layer.parameters())
        most = max(most, sum(parameter.numel() for parameter in (one() for one in alive) if parameter is not None))
        return layer

    core = replace(albert(), num_layers=8)
    kept = num_params(core)
    block = sum(parameter.numel() for parameter in built(core).get_submodule("blocks.0").parameters())
    model = SequentialModel([replace(spec, build=partial(build, spec)) for spec in core.build_layers()])
    assert sum(parameter.numel() for parameter in model.parameters()) == kept
    assert most <= kept + block


def test_blocks_that_differ_cannot_share() -> None:
    with pytest.raises(AssertionError, match="differ"):
        replace(albert(), windows=(3, None, 3, None))


def test_adapters_of_shared_blocks_are_refused() -> None:
    """Each block would have adapters of its own, which no directory of peft can hold."""
    with pytest.raises(ConversionError) as caught:
        read_adapters({"r": 4, "target_modules": ["query"]}, MODEL, "base")
    assert str(caught.value) == (
        "peft does not work on model_type=albert, whose blocks share their parameters: each would have adapters of its "
        "own; remove it, to train all parameters"
    )
