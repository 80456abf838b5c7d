"""Our side: one rank's part of the model under DeepSpeed's engine, compared with the reference's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatron_ds.config import EngineConfig, ModelSection, ParallelSection
from megatron_ds.engine import Engine, GradientProbe, start_distributed, stop_distributed
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weight_files import TensorSource, open_directory
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.moe.layer import MoE
from megatron_ds.models.probe import Probe
from megatron_ds.models.sequential import HIDDEN, Activations
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.tensor import TensorParallel
from megatron_ds.parallel.watchdog import watch_peers
from megatron_ds.runtime import LoadedModel, Session
from megatron_ds.verify.compare import Difference, count_others, difference, smallest_norm
from megatron_ds.verify.layer_names import choice_of, position_names
from megatron_ds.verify.reference import GRADIENTS, typical_gradient


@dataclass
class Findings:
    """The differences that one rank found for one input; tensors that it does not hold are absent.

    Attributes:
        loss: our loss.
        outputs: name of an output -> difference, on the first tensor rank of the last pipeline stage.
        hidden: position in the model -> difference, on the first tensor rank of the pipeline stage that has it.
        gradients: Hugging Face name -> difference, on rank 0.
        other_experts: position -> (tokens that chose other experts, all tokens), on the same ranks as `hidden`.
    """

    loss: float
    outputs: dict[str, Difference] = field(default_factory=dict)
    hidden: dict[str, Difference] = field(default_factory=dict)
    gradients: dict[str, Difference] = field(default_factory=dict)
    other_experts: dict[str, tuple[int, int]] = field(default_factory=dict)


def run_rank(
    info: RankInfo, weights: HFWeights, inputs: Sequence[Probe], parallel: ParallelSection, results: Path
) -> list[Findings]:
    """Run all inputs on one rank and compare with the reference's results in `results`. Collective over the world."""
    with watch_peers(info):
        return _run_rank(info, weights, inputs, parallel, results)


def _run_rank(
    info: RankInfo, weights: HFWeights, inputs: Sequence[Probe], parallel: ParallelSection, results: Path
) -> list[Findings]:
    torch.set_num_threads(max(1, torch.get_num_threads() // info.world_size))
    found = compare_inputs(Session(info, start_distributed(info)), weights, inputs, parallel, results)
    stop_distributed()
    return found


def compare_inputs(
    session: Session, weights: HFWeights, inputs: Sequence[Probe], parallel: ParallelSection, results: Path
) -> list[Findings]:
    """Run all inputs on a rank of a session and compare, as `run_rank` does. Collective over the world."""
    hf = replace(weights.model, core=weights.model.core.without_dropout())
    model = LoadedModel(hf, ModelSection(path=str(weights.directory)), weights)
    samples, data = len(inputs[0].input_ids), session.world_size // parallel.model_ranks
    config = EngineConfig(
        parallel=parallel,
        deepspeed={"zero_optimization": {"stage": 0}},  # in fp32 gradients stay where autograd leaves them
        optimizer=None,
        global_batch_size=samples * data,  # each data rank gets all of them: their mean is the same
        micro_batch_size=samples,
        moe_aux_loss=0.0 if hf.core.shape().num_experts else None,
    )
    engine = session.build_engine(model, config).engine
    tp = TensorParallel(engine.grid.tensor, parallel.sequence, context=engine.context)
    return [_run_probe(engine, probe, weights, tp, results, index) for index, probe in enumerate(inputs)]


def _run_probe(
    engine: Engine, probe: Probe, weights: HFWeights, tp: TensorParallel, results: Path, index: int
) -> Findings:
    if probe.with_gradients:
        findings = Findings(engine.train_step([probe.batch], lr=0.0).loss)
        findings.gradients = _compare_gradients(engine, weights, open_directory(results / GRADIENTS))
    else:
        findings = Findings(engine.evaluate([probe.batch]).mean)
    positions = position_names(weights.model.core)
    with _hidden_states(engine, positions, tp) as hidden, _choices(engine, positions, tp) as chosen:
        outputs = engine.outputs(probe.columns) or {}
    if engine.grid.tensor.rank == 0:
        with safe_open(results / f"{index}.safetensors", framework="pt") as reference:
            findings.outputs = {name: difference(outputs[name], reference.get_tensor(name)) for name in outputs}
            findings.hidden = {name: difference(hidden[name], reference.get_tensor(name)) for name in hidden}
            shown = set(reference.keys())
            findings.other_experts = {
                name: count_others(ids.flatten(0, 1), reference.get_tensor(choice_of(name)))
                for name, ids in chosen.items()
                if choice_of(name) in shown
            }
    return findings


def _compare_gradients(engine: Engine, weights: HFWeights, reference: TensorSource) -> dict[str, Difference]:
    """Return the differences of all gradients on rank 0, nothing elsewhere. Collective over the world."""
    probe = engine.optimizer
    assert isinstance(probe, GradientProbe)
    model = weights.model.named_in(reference.names)  # transformers may write other names than it reads
    to_hf, found = ToHF(model), {}
    typical = typical_gradient(reference, model) if engine.grid.rank == 0 else 0.0
    for name, gradient in engine.full_tensors(probe.gradient):
        if gradient is None:
            continue
        for hf_name, ours in to_hf.add(name, gradient.cpu()):
            floor = smallest_norm(ours.numel(), typical)
            found[hf_name] = difference(ours, reference.tensor(hf_name), floor)
    return found


@contextmanager
def _hidden_states(engine: Engine, layers: Sequence[str], tp: TensorParallel) -> Iterator[dict[str, Tensor]]:
    """Record the (B, S, H) fp32 outputs of the `layers` that this rank has, in a dict in execution order.

    Each is gathered over context, and over tensor under sequence parallelism.
    """
    states: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Activations) -> None:
            states[name] = tp.gather(output[HIDDEN].detach()).transpose(0, 1).float().cpu()

        return hook

    modules = dict(engine.deepspeed.module.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in layers if name in modules]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _choices(engine: Engine, blocks: Sequence[str], tp: TensorParallel) -> Iterator[dict[str, Tensor]]:
    """Record the experts that each token chooses, (B, S, k), in the `blocks` that this rank has, by their names.

    Each is gathered over context, and over tensor under sequence parallelism.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(layer: MoE, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0]
            chosen = layer.router.route(layer.router(x.flatten(0, 1))).chosen.view(*x.shape[:2], -1)
            found[name] = tp.gather(chosen).transpose(0, 1).cpu()

        return hook

    modules = dict(engine.deepspeed.module.named_modules())
    layers = {name: modules.get(f"{name}.mlp") for name in blocks}
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items() if isinstance(layer, MoE)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
