"""The differences that rounding alone makes between transformers and itself, with weights that differ by a rounding.

Errors of rounding grow with the depth of a model and with its condition number. Of a badly conditioned model, each
result in fp32 is 1e-4 and more from the exact one, and how far depends on the kind of CPU. There a difference of ours
that exceeds its bound shows no mistake unless transformers itself keeps closer to its own results
(`Difference.judge`).

To measure it, transformers runs a few times more, each time with all its weights changed at random by the smallest
step of fp32. All later roundings are then others, as another order of the same sums does (Monte Carlo arithmetic,
Parker 1997). One run in fp64 instead would cost twice the memory, and would be a single draw: by chance, a result in
fp32 is often ten times closer to that in fp64 than another result in fp32, which is as good.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_ds.hf.config import HFModel
from megatron_ds.hf.weight_files import open_directory
from megatron_ds.models.probe import Probe
from megatron_ds.verify.compare import count_others, difference, relative_error, smallest_norm
from megatron_ds.verify.loss import ReferenceLoss
from megatron_ds.verify.reference import GRADIENTS, run_reference, typical_gradient

NUM_SAMPLES = 4


@dataclass
class Rounding:
    """The largest relative differences of transformers with changed weights from itself, for one input.

    Attributes:
        loss: of the loss.
        tensors: of the outputs and the hidden states, by name.
        gradients: of the gradients, by Hugging Face name; empty without a backward pass.
        other_experts: name as in `choice_of` -> the most tokens that chose other experts.
    """

    loss: float = 0.0
    tensors: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    other_experts: dict[str, int] = field(default_factory=dict)


def measure_rounding(
    directory: Path,
    model: HFModel,
    inputs: Mapping[int, tuple[Probe, ReferenceLoss]],
    results: Path,
    state: Mapping[str, Tensor] | None = None,
) -> dict[int, Rounding]:
    """Run transformers `NUM_SAMPLES` times with changed weights, and compare with what it wrote to `results`.

    It needs the memory of the first run, and disk space for one more copy of the model.

    Args:
        directory, model, results, state: see `run_reference`.
        inputs: index of an input -> the input, and its loss.

    Returns:
        the largest differences by the index of the input.
    """
    found = {index: Rounding() for index in inputs}
    probes = [probe for probe, _ in inputs.values()]
    for sample in range(NUM_SAMPLES):
        folder = results / f"sample{sample}"
        folder.mkdir()
        losses = run_reference(directory, model, probes, folder, state, change_seed=sample)
        for position, (index, (probe, loss)) in enumerate(inputs.items()):
            one = found[index]
            one.loss = max(one.loss, relative_error(loss.difference(losses[position].value)))
            _add_tensors(one, results / f"{index}.safetensors", folder / f"{position}.safetensors")
            if probe.with_gradients:
                _keep_largest(one.gradients, _gradient_errors(model, results / GRADIENTS, folder / GRADIENTS))
        shutil.rmtree(folder)
    return found


def _add_tensors(found: Rounding, reference: Path, changed: Path) -> None:
    """Compare the tensors of two files by name, and the experts that tokens choose."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(safe_open(file, framework="pt")) for file in (reference, changed))
        for name in one.keys():  # noqa: SIM118, it is no mapping
            before, after = one.get_tensor(name), two.get_tensor(name)
            if torch.is_floating_point(before):
                _keep_largest(found.tensors, [(name, relative_error(difference(after, before)))])
            else:
                others, _ = count_others(after, before)
                found.other_experts[name] = max(others, found.other_experts.get(name, 0))


def _gradient_errors(model: HFModel, reference: Path, changed: Path) -> Iterator[tuple[str, float]]:
    """Compare gradients by name, relative to the same norms as ours."""
    one, two = open_directory(reference), open_directory(changed)
    typical = typical_gradient(one, model.named_in(one.names))
    for name in one.names:
        before = one.tensor(name)
        yield name, relative_error(difference(two.tensor(name), before, smallest_norm(before.numel(), typical)))


def _keep_largest(found: dict[str, float], errors: Iterable[tuple[str, float]]) -> None:
    for name, error in errors:
        found[name] = max(error, found.get(name, 0.0))
