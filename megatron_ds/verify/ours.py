"""Our side: one rank's part of the model under DeepSpeed's engine, compared on the spot with the reference's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatron_ds.engine import (
    Engine,
    EngineOptions,
    GradientProbe,
    build_engine,
    start_distributed,
    stop_distributed,
)
from megatron_ds.hf.io import TensorSource, open_directory
from megatron_ds.hf.weights import HFWeights, ToHF
from megatron_ds.layers.cross_entropy import IGNORE_INDEX
from megatron_ds.models.config import DecoderConfig
from megatron_ds.models.gpt import decoder_stages
from megatron_ds.parallel.collectives import all_gather_dim0
from megatron_ds.parallel.grid import Grid, Layout, create_grid
from megatron_ds.parallel.rank import RankInfo
from megatron_ds.verify.compare import Difference, difference, root_mean_square, smallest_norm
from megatron_ds.verify.inputs import Probe
from megatron_ds.verify.reference import GRADIENTS


@dataclass
class Findings:
    """What one rank saw of one input; what it does not hold is absent.

    Attributes:
        loss: ours.
        logits: on the first tensor rank of the last pipeline stage.
        hidden: stage -> difference, on the first tensor rank of the pipeline stage that has it.
        gradients: Hugging Face name -> difference, on rank 0.
    """

    loss: float
    logits: Difference | None = None
    hidden: dict[str, Difference] = field(default_factory=dict)
    gradients: dict[str, Difference] = field(default_factory=dict)


def run_rank(
    info: RankInfo, weights: HFWeights, inputs: Sequence[Probe], layout: Layout, sequence: bool, results: Path
) -> list[Findings]:
    """Run all inputs as one rank of `layout` and compare with what the reference left in `results`."""
    torch.set_num_threads(max(1, torch.get_num_threads() // layout.world_size))
    device = start_distributed(info)
    grid = create_grid(layout, info.rank)
    decoder = without_dropout(weights.model.decoder)
    options = EngineOptions(_deepspeed(inputs[0]), None, sequence, "none", seed=0)
    engine = build_engine(lambda at: decoder_stages(decoder, at), grid, device, options, weights.share)
    found = [_run_probe(engine, probe, weights, sequence, results, index) for index, probe in enumerate(inputs)]
    stop_distributed()
    return found


def without_dropout(decoder: DecoderConfig) -> DecoderConfig:
    """The same model, the same on every run."""
    return replace(decoder, embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)


def _deepspeed(probe: Probe) -> dict[str, Any]:
    """fp32 without ZeRO: gradients stay where autograd leaves them."""
    return {
        "train_batch_size": len(probe.input_ids),
        "train_micro_batch_size_per_gpu": len(probe.input_ids),
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**9,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }


def _run_probe(engine: Engine, probe: Probe, weights: HFWeights, sequence: bool, results: Path, index: int) -> Findings:
    ids = probe.input_ids
    batch = {"input_ids": ids, "targets": torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], dim=1)}
    if probe.with_gradients:
        findings = Findings(engine.train_step([batch], lr=0.0).loss)
        findings.gradients = _compare_gradients(engine, weights, open_directory(results / GRADIENTS))
    else:
        total, tokens = engine.evaluate([batch])
        findings = Findings(total / tokens)
    with _hidden_states(engine, sequence) as hidden:
        logits = engine.logits(ids)
    if engine.grid.tensor.rank == 0:
        with safe_open(results / f"{index}.safetensors", framework="pt") as reference:
            if logits is not None:
                findings.logits = difference(logits, reference.get_tensor("logits"))
            findings.hidden = {name: difference(hidden[name], reference.get_tensor(name)) for name in hidden}
    return findings


def _compare_gradients(engine: Engine, weights: HFWeights, reference: TensorSource) -> dict[str, Difference]:
    """Collective; rank 0 has the result."""
    probe = engine.optimizer
    assert isinstance(probe, GradientProbe)
    to_hf, found = ToHF(weights.model), {}
    typical = root_mean_square(map(reference.tensor, reference.names)) if engine.grid.rank == 0 else 0.0
    for name, gradient in engine.whole_tensors(probe.gradient):
        if gradient is None:
            continue
        for theirs, ours in to_hf.add(name, gradient.cpu()):
            floor = smallest_norm(ours.numel(), typical)
            found[theirs] = difference(ours, reference.tensor(theirs), floor)
    return found


@contextmanager
def _hidden_states(engine: Engine, sequence: bool) -> Iterator[dict[str, Tensor]]:
    """Within it, a dict that fills with the (B, S, H) fp32 outputs of this rank's stages, by name."""
    states: dict[str, Tensor] = {}
    grid: Grid = engine.grid

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            whole = all_gather_dim0(output[0].detach(), grid.tensor) if sequence else output[0].detach()
            states[name] = whole.transpose(0, 1).float().cpu()

        return hook

    modules = dict(engine.deepspeed.module.named_modules())
    names = [name for name in modules if name == "entry" or (name.startswith("blocks.") and name.count(".") == 1)]
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
