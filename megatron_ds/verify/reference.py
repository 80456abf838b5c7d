"""The reference: plain transformers in one process, in fp32, with eager attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_ds.hf.config import HFModel
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.hf.weight_files import TensorSource
from megatron_ds.models.probe import Probe
from megatron_ds.verify.compare import root_mean_square
from megatron_ds.verify.layer_names import blocks_paths, choice_of, entry_of
from megatron_ds.verify.loss import ReferenceLoss, mean_loss, problem_of, reference_loss
from megatron_ds.verify.sentence_vectors import sentence_vectors

GRADIENTS = "gradients"


def run_reference(
    directory: Path,
    model: HFModel,
    inputs: Sequence[Probe],
    results: Path,
    state: Mapping[str, Tensor] | None = None,
    change_seed: int | None = None,
) -> list[ReferenceLoss]:
    """Run transformers, save its results, and return the loss of each input.

    It writes to `results`: `<index>.safetensors` with the outputs by our names, the hidden states by position and the
    experts that tokens choose, and
    `gradients/`, a Hugging Face directory whose weights are the gradients, so that they have the names on disk.

    Args:
        directory, model, state: see `load_reference`.
        inputs: the inputs.
        results: the directory for the results.
        change_seed: change all weights by a rounding, see `change_weights`; None = leave them as they are.

    Raises:
        ConversionError: transformers cannot load the directory, or finds tensors missing.
    """
    losses = []
    for index, probe in enumerate(inputs):
        # loaded again for each: gradients overwrite its weights, and some models remember lengths
        reference = load_reference(directory, model, torch.float32, state)
        if change_seed is not None:
            change_weights(reference, change_seed)
        problem = problem_of(reference.config)
        recording = hidden_states(reference, model), choices(reference, model)
        with torch.set_grad_enabled(probe.with_gradients), recording[0] as hidden, recording[1] as chosen:
            outputs = predict(reference, model, probe.columns)
            if "embedding_direction" in probe.labels:
                mask = probe.columns.get("attention_mask")
                outputs["embedding"] = sentence_vectors(directory, outputs["hidden"], mask)
        # copies: the last block's output may be one of the outputs
        found = {**hidden, **chosen, **outputs}
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
        save_file(tensors, results / f"{index}.safetensors")
        losses.append(reference_loss(tensors, probe.labels, problem))
        if probe.with_gradients:
            mean_loss(outputs, probe.labels, problem).backward()
            _save_gradients(reference, results / GRADIENTS)
    return losses


def typical_gradient(gradients: TensorSource, model: HFModel) -> float:
    """Return the root mean square of the gradients that `run_reference` wrote; those of buffers do not count.

    Args:
        gradients: the directory, opened.
        model: with the names of that directory (`HFModel.named_in`).
    """
    return root_mean_square(gradients.tensor(name) for name in gradients.names if name in model.tensors)


@torch.no_grad()
def change_weights(reference: nn.Module, seed: int) -> None:
    """Change each fp32 weight at random to the next larger or smaller fp32 number; zero stays zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in reference.parameters():
        upwards = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.bool)
        towards = torch.where(upwards, math.inf, -math.inf)
        parameter.copy_(torch.where(parameter == 0.0, parameter, parameter.nextafter(towards)))


@contextmanager
def hidden_states(reference: nn.Module, model: HFModel) -> Iterator[dict[str, Tensor]]:
    """Record hidden states: a dict of the (B, S, H) input of each stack's first block and the output of every block."""
    states: dict[str, Tensor] = {}

    handles: list[Any] = []
    for prefix, path in blocks_paths(model):
        before, after = _recorders(states, prefix, model.core.stacks[prefix].num_layers)
        blocks: Any = reference.get_submodule(path)
        handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _recorders(states: dict[str, Tensor], prefix: str, num_layers: int) -> tuple[Any, Any]:
    """Return hooks before the first block and after each block of a stack. One module may run as several blocks."""
    calls = 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if calls % num_layers == 0:
            states[entry_of(prefix)] = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal calls
        states[f"{prefix}.{calls % num_layers}"] = output[0] if isinstance(output, tuple) else output
        calls += 1

    return before, after


@contextmanager
def choices(reference: nn.Module, model: HFModel) -> Iterator[dict[str, Tensor]]:
    """Record the experts that tokens choose, (B S, k) ids, where a module `experts` takes them as an argument."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            ids = next((one for one in given if one.dtype == torch.int64 and one.dim() == 2), None)
            if ids is not None:
                found[name] = ids

        return hook

    handles = []
    for prefix, path in blocks_paths(model):
        for layer, block in enumerate(cast("nn.ModuleList", reference.get_submodule(path))):
            for name, module in block.named_modules():
                if name.endswith(".experts"):
                    handle = module.register_forward_pre_hook(keep(choice_of(f"{prefix}.{layer}")), with_kwargs=True)
                    handles.append(handle)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _save_gradients(reference: Any, directory: Path) -> None:
    for parameter in reference.parameters():
        parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    for buffer in reference.buffers():  # among them weights without a gradient, such as a bias of a router's choice
        buffer.zero_()
    reference.save_pretrained(directory)
