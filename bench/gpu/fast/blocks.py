"""Blocks alone, forward and backward: four layers of an 8 B Llama, ours and transformers', and Gemma 2's layers.

`experts.py` measures layers with experts in the same way.

`python -m bench.gpu.fast.blocks llama|gemma`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from bench.gpu.fast.measure import block_flops_per_token, measure_runs
from bench.gpu.fast.models import BLOCKS, GEMMA
from bench.gpu.fast.profile import profile
from bench.gpu.fast.targets import (
    CAPPED,
    COMPILED,
    GEMMA_BLOCKS,
    LLAMA_BLOCKS,
    OURS,
    THEIRS,
    THEIRS_COMPILED,
    UNCAPPED,
)
from bench.gpu.fast.weights import DrawnWeights, draw, fill
from bench.gpu.record import guarded, release_memory, torch_device, wait_for_turn
from bench.work import Work
from megatron_ds.engine import preload
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.layers.kernels import select_kernels
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.layers.recompute import Recompute
from megatron_ds.models.context import BuildContext

SAME_OUTPUT = 3e-2  # relative L2 difference of outputs and gradients in bf16 after a few layers

CLASSES = {"llama": "Llama", "qwen3_moe": "Qwen3Moe"}
"""How transformers' classes of a model type begin."""

Blocks = Sequence[nn.Module]
Run = Callable[[], tuple[Tensor, Tensor]]
"""Run forward and backward; returns the output and the gradient of the input, (S, B, H) each."""


def build_ours(model: HFModel, *, compiled: bool = False, recompute: str = "none") -> list[nn.Module]:
    """Build the blocks of a model with drawn weights, and the kernels that a run would choose."""
    device, before = torch_device(), torch.get_default_dtype()
    kernels = select_kernels("auto", device)
    ctx = BuildContext(compiled=compiled, recompute=Recompute(recompute), kernels=kernels)
    weights, made = DrawnWeights(model, device), []
    torch.set_default_dtype(torch.bfloat16)
    try:
        for layer in model.core.build_layers(ctx):
            if not layer.is_block:
                continue
            with device:
                made.append(layer.build())
            for name, parameter in made[-1].named_parameters():
                with torch.no_grad():
                    parameter.copy_(weights.shard(f"{layer.name}.{name}", spec_of(parameter), {}))
    finally:
        torch.set_default_dtype(before)
    return made


def inputs(work: Work) -> tuple[Tensor, Tensor]:
    """Draw hidden states and the gradient of the output, (S, B, H) each."""
    shape = (work.seq_length, work.batch, work.model["hidden_size"])
    return tuple(draw(name, shape, torch.bfloat16, torch_device()) for name in ("hidden", "gradient"))  # type: ignore[return-value]


def run_of_ours(blocks: Blocks, work: Work) -> Run:
    """Return a run of our blocks."""
    hidden, gradient = inputs(work)

    def run() -> tuple[Tensor, Tensor]:
        x = hidden.detach().requires_grad_()
        activations = {"hidden": x}
        for block in blocks:
            activations = block(activations)
        activations["hidden"].backward(gradient)
        return activations["hidden"].detach(), _cleared(blocks, x)

    return run


def run_of_theirs(work: Work, *, compiled: bool = False, experts: str = "eager") -> Run:
    """Return a run of transformers' layers with the same weights.

    Args:
        work: the model, whose type is in `CLASSES`, and its input.
        compiled: each layer is a graph.
        experts: how transformers computes experts.
    """
    from transformers import AutoConfig

    fields, kind = dict(work.model), work.model["model_type"]
    config: Any = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation, config._experts_implementation = "sdpa", experts
    module = import_module(f"transformers.models.{kind}.modeling_{kind}")
    make_layer, make_rotary = (getattr(module, CLASSES[kind] + end) for end in ("DecoderLayer", "RotaryEmbedding"))
    hidden, gradient = (one.transpose(0, 1).contiguous() for one in inputs(work))
    model = nn.Module()
    with torch_device():
        layers = [make_layer(config, number) for number in range(config.num_hidden_layers)]
        rotary = make_rotary(config)
    model.add_module("model", nn.ModuleDict({"layers": nn.ModuleList(layers)}))
    fill(model.to(torch.bfloat16))
    turned = rotary(hidden, torch.arange(work.seq_length, device=hidden.device)[None])
    calls: list[Any] = [torch.compile(layer) if compiled else layer for layer in layers]

    def run() -> tuple[Tensor, Tensor]:
        x = y = hidden.detach().requires_grad_()
        for call in calls:
            y = call(y, position_embeddings=turned, attention_mask=None)
        y.backward(gradient)
        return y.detach().transpose(0, 1), _cleared(layers, x).transpose(0, 1)

    return run


def _cleared(blocks: Blocks, x: Tensor) -> Tensor:
    """Return the gradient of the input after clearing those of the parameters."""
    for block in blocks:
        for parameter in block.parameters():
            parameter.grad = None
    assert x.grad is not None
    return x.grad


def difference(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """Return the larger relative L2 difference, of outputs and of gradients."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def llama() -> None:
    """Measure our layers and transformers', eager and compiled, on the same weights."""
    model = read_model(BLOCKS.model)
    contestants: dict[str, Callable[[], Run]] = {
        THEIRS: lambda: run_of_theirs(BLOCKS),
        OURS: lambda: run_of_ours(build_ours(model), BLOCKS),
        COMPILED: lambda: run_of_ours(build_ours(model, compiled=True), BLOCKS),
        THEIRS_COMPILED: lambda: run_of_theirs(BLOCKS, compiled=True),
    }
    compete(LLAMA_BLOCKS, BLOCKS, contestants, SAME_OUTPUT)


def compete(section: str, work: Work, contestants: Mapping[str, Callable[[], Run]], bound: float) -> None:
    """Measure contestants one after the other, each of which is built for its turn, and profile ours.

    Args:
        section: the section of their results.
        work: the model and its input.
        contestants: by name.
        bound: largest difference from the results of the first.
    """
    flops = work.tokens * block_flops_per_token(read_model(work.model), work.seq_length)
    expected: list[tuple[Tensor, Tensor]] = []

    def take_turn(name: str) -> None:
        run = contestants[name]()
        results = run()
        if not expected:
            expected.append(results)
        off = difference(results, expected[0])
        del results
        facts = {"tokens": work.tokens, "flops": flops, "off": float(f"{off:.3g}")}
        measure_runs(section, name, run, ok=off <= bound, **facts)  # type: ignore[arg-type]
        if name.startswith("ours"):
            guarded("profile", f"{section}, {name}", lambda: profile(f"{section}, {name}", run))

    for name in contestants:
        guarded(section, name, lambda name=name: take_turn(name))  # type: ignore[misc]
        torch._dynamo.reset()  # its caches keep the weights of compiled layers
        release_memory()


def gemma() -> None:
    """Measure Gemma 2's layers with and without its bound of the attention logits."""
    for name, cap in ((CAPPED, GEMMA.model["attn_logit_softcapping"]), (UNCAPPED, None)):
        model = read_model({**GEMMA.model, "attn_logit_softcapping": cap})
        flops = GEMMA.tokens * block_flops_per_token(model, GEMMA.seq_length)

        def measure(name: str = name, model: HFModel = model, flops: float = flops) -> None:
            run = run_of_ours(build_ours(model), GEMMA)
            measure_runs(GEMMA_BLOCKS, name, run, tokens=GEMMA.tokens, flops=flops)
            guarded("profile", f"{GEMMA_BLOCKS}, {name}", lambda: profile(f"{GEMMA_BLOCKS}, {name}", run))

        guarded(GEMMA_BLOCKS, name, measure)
        release_memory()


if __name__ == "__main__":
    preload(compiles=True)
    wait_for_turn()
    {"llama": llama, "gemma": gemma}[sys.argv[1]]()
