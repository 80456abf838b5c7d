"""Small models of every family on the device and by the same code on the CPU, which tests hold against transformers.

fp32: outputs and loss within 1e-5, gradients within 1e-4, as `tests/parity` demands of the CPU. bf16: the loss, with
PyTorch's code and with the chosen kernels. Batches are plain, padded, and, for decoders, packed.

The first case of every family comes first, then the second ones, and so on until the time is over: kernels of attention
are compiled for each kind of call, which takes seconds.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from bench.gpu.record import TINY, guarded, record, torch_device, wait_for_turn
from bench.gpu.right.chosen_kernels import read_choice
from megatron_ds.hf.config import read_model
from megatron_ds.layers.kernels import Kernels, select_kernels
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.log import quiet_libraries
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.verify.compare import difference, root_mean_square, smallest_norm
from tests.parity.alone_batches import Batch, make_batch
from tests.parity.packed import draw_rows, packed
from tests.parity.reference import ALL_CONFIGS

BOUNDS = {"outputs": 1e-5, "loss": 1e-5, "gradients": 1e-4, "bf16_loss": 5e-2, "bf16_kernels_loss": 5e-2}
CASES = dict(list(ALL_CONFIGS.items())[:: 12 if TINY else 1])
BUDGET_S = float(os.environ.get("PARITY_S") or 110.0)  # no case is begun after it
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """One forward and backward pass, on the CPU in fp32."""

    outputs: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]


def main() -> None:
    """Compare all cases; a row for each family with its worst errors, and one for each case that cannot run."""
    quiet_libraries()
    worst: dict[str, dict[str, tuple[float, str]]] = {}
    began_s, compared = time.monotonic(), 0
    for case, config in _by_turns(CASES):
        if time.monotonic() - began_s > BUDGET_S and not TINY:
            break
        family = worst.setdefault(config["model_type"], {})
        guarded("parity", case, partial(_measure, case, config, family))
        compared += 1
    for name, errors in worst.items():
        right = errors.keys() == BOUNDS.keys() and all(errors[kind][0] < bound for kind, bound in BOUNDS.items())
        record("parity", name, right, **{kind: f"{error:.1e} {where}" for kind, (error, where) in errors.items()})
    record("parity", "all", None, compared=compared, cases=len(CASES), families=len(worst))


def _by_turns(cases: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the cases with their configs, one of each family in turn."""
    families: dict[str, list[str]] = {}
    for case, config in cases.items():
        families.setdefault(config["model_type"], []).append(case)
    for turn in zip_longest(*families.values()):
        yield from ((case, dict(cases[case])) for case in turn if case is not None)


def _measure(case: str, config: dict[str, Any], worst: dict[str, tuple[float, str]]) -> None:
    """Compare one case on all kinds of batches, and keep the errors that are larger than the family's so far."""
    core = read_model(dict(config)).core
    template = _random_model(core)
    for kind, batch in _batches(core):
        for name, error in _errors(core, template, batch):
            error = error if error == error else float("inf")
            if error >= worst.get(name, (-1.0, ""))[0]:
                worst[name] = (error, f"{case}, {kind}")


def _random_model(core: ModelConfig) -> SequentialModel:
    model = SequentialModel(core.build_layers()).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            spec = spec_of(parameter)
            parameter.copy_((spec.fill if spec.std is None else 0.0) + 0.08 * torch.randn(parameter.shape))
    return model


def _batches(core: ModelConfig) -> Iterator[tuple[str, Batch]]:
    yield "plain", make_batch(core, padded=False)
    yield "padded", make_batch(core, padded=True)
    if isinstance(core, DecoderConfig):
        columns = packed(draw_rows(3, 0))
        yield "packed", Batch(columns, {"targets": columns.pop("targets")})


def _errors(core: ModelConfig, template: SequentialModel, batch: Batch) -> Iterator[tuple[str, float]]:
    device = torch_device()
    expected = _run(template, batch, CPU)
    found = _run(_moved(copy.deepcopy(template), device), batch, device)
    seen = slice(None) if batch.compared is None else batch.compared
    yield (
        "outputs",
        max(difference(found.outputs[name][seen], expected.outputs[name][seen]).relative for name in expected.outputs),
    )
    yield "loss", abs(found.loss / expected.loss - 1)
    typical = root_mean_square(list(expected.gradients.values()))
    yield (
        "gradients",
        max(
            difference(found.gradients[name], theirs, smallest_norm(theirs.numel(), typical)).relative
            for name, theirs in expected.gradients.items()
        ),
    )
    contexts: dict[str, BuildContext] = {
        "bf16_loss": BuildContext(),
        "bf16_kernels_loss": BuildContext(kernels=_chosen_kernels()),
    }
    for name, context in contexts.items():
        model = SequentialModel(core.build_layers(context)).eval()
        model.load_state_dict(template.state_dict())
        model = _moved(model.to(torch.bfloat16), device)
        yield name, abs(_run(model, batch, device).loss / expected.loss - 1)


def _moved(model: SequentialModel, device: torch.device) -> SequentialModel:
    """Move a model with its weights that are no parameters."""
    for part in model.modules():
        find: Any = getattr(part, "untrained", dict)
        for name, weight in find().items():
            setattr(part, name, weight.to(device))
    return model.to(device)


@cache
def _chosen_kernels() -> Kernels:
    """Return the chosen kernels, which are checked when they are selected."""
    return select_kernels(read_choice(), torch_device())


def _run(model: SequentialModel, batch: Batch, device: torch.device) -> Run:
    columns = {name: column.to(device) for name, column in batch.columns.items()}
    labels = {name: label.to(device) for name, label in batch.labels.items()}
    counts = [one.numel() if one.is_floating_point() else int((one != -100).sum()) for one in batch.labels.values()]
    model.zero_grad()
    loss = (model(columns, labels) / torch.tensor(counts, device=device)).sum()
    loss.backward()
    with torch.no_grad():
        outputs = {name: output.float().cpu() for name, output in model(columns).items()}
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Run(outputs, float(loss.detach()), gradients)


if __name__ == "__main__":
    wait_for_turn()
    main()
