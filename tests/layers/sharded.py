"""Run a layer on tensor ranks and put the ranks' parts together, to be compared with plain torch on one process.

Hidden states are (S, B, H). Sums run in another order on ranks than on one process: fp32 results agree to a relative
1e-5 or an absolute 1e-5 (outputs and gradients here are around 1), where a part that is missing or counted twice is off
by its size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_ds.parallel.grid import Axis, Grid, Layout
from megatron_ds.parallel.tensor import TensorParallel
from tests.ranks import run_alone, run_grid

S, B, H = 8, 2, 16
LAYOUTS = [(1, False), (2, False), (2, True)]
"""Tensor ranks, sequence parallelism."""
SEQUENCE, FEATURES, NONE = "sequence", "features", "none"


@dataclass(frozen=True)
class Case:
    """A layer and what plain torch makes of the same parameters.

    Attributes:
        build: the layer on a tensor axis; called as layer(*inputs).
        plain: (parameters, *inputs) -> output, in unsharded tensors.
        parameters: name -> unsharded shape.
        split: name -> the dim of a parameter that the axis divides; the others every rank holds.
        heads: name -> units of that dim which are held whole: with fewer of them than ranks, several hold the same.
        inputs: unsharded shape of each.
        x, y: how inputs and output are divided: along the sequence if that is parallel, by features, or not at all.
    """

    build: Callable[[TensorParallel], nn.Module]
    plain: Callable[..., Tensor]
    parameters: Mapping[str, tuple[int, ...]]
    split: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ((S, B, H),)
    x: str = SEQUENCE
    y: str = SEQUENCE


@dataclass(frozen=True)
class Found:
    """What a layer gives for fixed inputs and a fixed gradient of its output; unsharded, by name."""

    output: Tensor
    inputs: list[Tensor]
    parameters: dict[str, Tensor]


def draw(case: Case) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Parameters and inputs, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    parameters = {name: torch.randn(shape, generator=generator) / 3 for name, shape in case.parameters.items()}
    return parameters, [torch.randn(shape, generator=generator) for shape in case.inputs]


def gradient_of(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(6))


def plainly(case: Case) -> Found:
    """Compute a case with torch on one process."""
    parameters, inputs = draw(case)
    for tensor in (*parameters.values(), *inputs):
        tensor.requires_grad_()
    output = case.plain(parameters, *inputs)
    output.backward(gradient_of(output))
    return Found(output.detach(), _gradients(inputs), dict(zip(parameters, _gradients(parameters.values()))))


def sharded(grid: Grid, sequence: bool, cases: Mapping[str, Case], outputs: Mapping[str, Tensor]) -> dict[str, Found]:
    """Compute this rank's part of every case, on one layout."""
    tp = TensorParallel(grid.tensor, sequence)
    return {name: _run(case, tp, outputs[name]) for name, case in cases.items()}


def _run(case: Case, tp: TensorParallel, whole_output: Tensor) -> Found:
    layer = case.build(tp)
    parameters, inputs = draw(case)
    named = dict(layer.named_parameters())
    assert named.keys() == parameters.keys(), named.keys() ^ parameters.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(_held(parameters[name], case.split.get(name), tp.axis, case.heads.get(name)))
    mine = [_cut(x, case.x, tp).clone().requires_grad_() for x in inputs]
    output = layer(*mine)
    output.backward(_cut(gradient_of(whole_output), case.y, tp))
    return Found(output.detach(), _gradients(mine), dict(zip(named, _gradients(named.values()))))


def check(cases: Mapping[str, Case], tp: int, sequence: bool) -> None:
    """Compare outputs and all gradients of all cases with plain torch, at a layout."""
    expected = run_alone(lambda: {name: plainly(case) for name, case in cases.items()})
    outputs = {name: found.output for name, found in expected.items()}
    ranks = run_grid(sharded, Layout(tensor=tp), sequence, cases, outputs)
    for name, case in cases.items():
        whole, parts = expected[name], [rank[name] for rank in ranks]
        divided = {SEQUENCE: 0 if sequence and tp > 1 else None, FEATURES: -1, NONE: None}
        _equal(f"{name}: output", whole.output, [part.output for part in parts], divided[case.y])
        for index, gradient in enumerate(whole.inputs):
            _equal(f"{name}: input {index}", gradient, [part.inputs[index] for part in parts], divided[case.x])
        for one, gradient in whole.parameters.items():
            shards = [part.parameters[one] for part in parts]
            if one in case.heads and case.heads[one] % tp:
                _equal(f"{name}: {one}", gradient, shards, None)
            else:
                _equal(f"{name}: {one}", gradient, shards, case.split.get(one))


def _equal(what: str, whole: Tensor, parts: list[Tensor], dim: int | None) -> None:
    """Compare the parts, divided along `dim`, with the full tensor; where `dim` is None each part is all of it."""
    found = [torch.cat(parts, dim)] if dim is not None else parts
    for one in found:
        torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")


def _held(whole: Tensor, dim: int | None, axis: Axis, heads: int | None) -> Tensor:
    """A rank's shard of a parameter; all of it where there are too few heads to divide."""
    if dim is None or (heads is not None and heads % axis.size):
        return whole
    return whole.chunk(axis.size, dim)[axis.rank]


def _cut(whole: Tensor, how: str, tp: TensorParallel) -> Tensor:
    if how == FEATURES:
        return whole.chunk(tp.axis.size, -1)[tp.axis.rank]
    if how == SEQUENCE and tp.splits_sequence:
        return whole.chunk(tp.axis.size, 0)[tp.axis.rank]
    return whole


def _gradients(tensors: object) -> list[Tensor]:
    found = [tensor.grad for tensor in tensors]  # type: ignore[attr-defined]
    assert all(gradient is not None for gradient in found)
    return found
