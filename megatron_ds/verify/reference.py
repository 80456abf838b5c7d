"""The other side: plain transformers in one process, in fp32, with attention written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_ds.hf.config import HFModel
from megatron_ds.hf.reference import load_reference
from megatron_ds.verify.compare import token_loss
from megatron_ds.verify.inputs import Probe

GRADIENTS = "gradients"
FIRST_BLOCK = "blocks.0."


def run_reference(directory: Path, model: HFModel, inputs: Sequence[Probe], results: Path) -> list[float]:
    """Run transformers and save what it computes; returns the loss of each input.

    Written to `results`: `<index>.safetensors` with `logits` and the hidden states by stage, and `gradients/`, a
    Hugging Face directory whose weights are the gradients, so that they stand under the names on disk.

    Raises:
        ConversionError: transformers cannot load the directory, or finds tensors missing.
    """
    losses = []
    for index, probe in enumerate(inputs):
        # anew for each: gradients take the place of its weights, and some models remember lengths
        theirs = load_reference(directory, model.family.reference_attention, torch.float32)
        with torch.set_grad_enabled(probe.with_gradients), hidden_states(theirs, model) as hidden:
            logits = theirs(input_ids=probe.input_ids, use_cache=False).logits.float()
        tensors = {name: state.detach().contiguous() for name, state in hidden.items()}
        save_file({**tensors, "logits": logits.detach().contiguous()}, results / f"{index}.safetensors")
        losses.append(token_loss(logits.detach(), probe.input_ids))
        if probe.with_gradients:
            targets = probe.input_ids[:, 1:].flatten()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).backward()
            _save_gradients(theirs, results / GRADIENTS)
    return losses


@contextmanager
def hidden_states(theirs: nn.Module, model: HFModel) -> Iterator[dict[str, Tensor]]:
    """Within it, a dict that fills with the (B, S, H) input of the first block, "entry", and each block's output."""
    states: dict[str, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states["entry"] = args[0] if args else kwargs["hidden_states"]

    def after(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states[name] = output[0] if isinstance(output, tuple) else output

        return keep

    blocks: Any = theirs.get_submodule(blocks_path(model))
    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after(f"blocks.{index}")) for index, block in enumerate(blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def blocks_path(model: HFModel) -> str:
    """Where transformers keeps the list of blocks, such as "model.layers": read off the names in the table."""
    name = next(row.names[0] for native, row in model.table.items() if native.startswith(FIRST_BLOCK))
    return name[: name.index(".0.")]


@torch.no_grad()
def _save_gradients(theirs: Any, directory: Path) -> None:
    for parameter in theirs.parameters():
        parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(directory)
