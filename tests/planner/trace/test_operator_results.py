"""Operators whose results are repeated: the same sizes, memory and aliases as torch's own, and the same traces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.config import read_model
from megatron_ds.planner.trace.layers import trace_layers
from megatron_ds.planner.trace.operator_results import OperatorResults
from megatron_ds.planner.trace.setting import TraceSetting
from tests.parity.reference import ALL_CONFIGS
from tests.ranks import run_alone

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def facts(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(facts, value))
    return value.shape, value.stride(), value.dtype, value.device, value.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("func", "make"),
    [
        (aten.add.Tensor, lambda: (meta(3, 4), meta(4))),
        (aten.add.Tensor, lambda: (meta(3, 4).t(), meta(4, 3))),
        (aten.mm.default, lambda: (meta(3, 4), meta(4, 5))),
        (aten._softmax.default, lambda: (meta(3, 4), -1, False)),
        (aten.sum.dim_IntList, lambda: (meta(3, 4), [0], True)),
        (aten.cat.default, lambda: ([meta(3, 4), meta(1, 4)],)),
        (aten.topk.default, lambda: (meta(3, 4), 2)),
        (aten.add_.Tensor, lambda: (meta(3, 4), meta(4))),
        (aten.view.default, lambda: (meta(3, 4), [12])),
        (aten._unsafe_view.default, lambda: (meta(3, 4), [12])),
        (aten._to_copy.default, lambda: (meta(3, 4),)),
    ],
)
def test_a_repeated_result_is_that_of_torch(func: Any, make: Callable[[], tuple[Any, ...]]) -> None:
    results = OperatorResults()
    for _ in range(3):
        args = make()
        found, expected = results.call(func, args, {}), func(*args)
        assert facts(found) == facts(expected)
        assert (found is args[0]) == (expected is args[0])
        if isinstance(args[0], Tensor) and isinstance(found, Tensor):
            shares = [one.untyped_storage()._cdata == args[0].untyped_storage()._cdata for one in (found, expected)]
            assert shares[0] == shares[1]


def test_sizes_strides_dtypes_and_options_are_told_apart() -> None:
    results = OperatorResults()
    for args, kwargs in (
        ((meta(3, 4),), {}),
        ((meta(4, 3).t(),), {}),
        ((meta(3, 4, dtype=torch.bfloat16),), {}),
        ((meta(3, 4),), {"dtype": torch.bfloat16}),
        ((meta(3, 4),), {"memory_format": torch.contiguous_format}),
        ((meta(4, 3).t(),), {"memory_format": torch.contiguous_format}),
    ):
        assert facts(results.call(aten._to_copy.default, args, kwargs)) == facts(aten._to_copy.default(*args, **kwargs))
    for keeps in (0, False, 1, True):
        args = (meta(3, 4), [0], bool(keeps))
        assert facts(results.call(aten.sum.dim_IntList, args, {})) == facts(aten.sum.dim_IntList(*args))


def test_an_output_that_is_given_is_returned() -> None:
    results = OperatorResults()
    for _ in range(2):
        out = meta(3, 5)
        assert results.call(aten.mm.out, (meta(3, 4), meta(4, 5)), {"out": out}) is out
    out = torch.empty(0, device="meta")
    for _ in range(2):  # torch gives it a size
        out = torch.empty(0, device="meta")
        results.call(aten.mm.out, (meta(3, 4), meta(4, 5)), {"out": out})
        assert out.shape == (3, 5)


def test_tensors_with_values_are_computed() -> None:
    results, x = OperatorResults(), torch.arange(4.0)
    for _ in range(2):
        assert torch.equal(results.call(aten.add.Tensor, (x, x), {}), x + x)


class AlwaysCalled(OperatorResults):
    """Operators of which nothing is remembered."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def traces_are_equal(case: str) -> bool:
    layers, results = read_model(ALL_CONFIGS[case]).core.build_layers, OperatorResults()
    settings = [TraceSetting(32), TraceSetting(32, micro_batch_size=2, recompute="full", zero_stage=3)]
    settings += [TraceSetting(32, tensor=2, sequence=True), TraceSetting(32, precision="fp32", kernels="torch")]
    return all(
        trace_layers(layers, one, results) == trace_layers(layers, one, AlwaysCalled())
        for one in (*settings, settings[0])
    )


def test_traces_are_those_of_called_operators() -> None:
    assert run_alone(traces_are_equal, "qwen3_moe-renormalised")
