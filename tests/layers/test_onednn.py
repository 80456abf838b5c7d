"""Products by oneDNN: when they are used, and that results and gradients are those of torch's."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_ds.layers import onednn, products
from megatron_ds.layers.kernels import LogitFinish
from megatron_ds.layers.products import add_product_, linear, multiply, multiply_into
from tests.layers.sharded import check
from tests.layers.test_cross_entropy import _check as check_head
from tests.layers.test_linear import CASES

AMD = "processor : 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n"
INTEL = AMD.replace("AuthenticAMD", "GenuineIntel")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Have oneDNN compute every product, in tiles of few elements; the shapes of its results."""
    shapes: list[tuple[int, ...]] = []
    multiply_by_onednn = onednn.multiply

    def recorded(left: Tensor, right: Tensor) -> Tensor:
        result = multiply_by_onednn(left, right)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(onednn, "faster_here", lambda: True)
    monkeypatch.setattr(onednn, "multiply", recorded)
    for module, name, value in ((onednn, "SMALLEST", 0), (onednn, "NARROWEST", 1), (products, "TILE_ELEMENTS", 150)):
        monkeypatch.setattr(module, name, value)
    return shapes


@pytest.mark.parametrize(
    ("cpu_info", "capability", "environment", "faster"),
    [
        (AMD, "AVX512", {}, True),
        (AMD, "AVX512", {onednn.VARIABLE: "1"}, True),
        (AMD, "AVX512", {onednn.VARIABLE: "0"}, False),
        (AMD, "AVX2", {}, False),
        (INTEL, "AVX512", {}, False),
        ("CPU implementer : 0x41\n", "AVX512", {}, False),
        ("", "DEFAULT", {}, False),
    ],
)
def test_processors(cpu_info: str, capability: str, environment: dict[str, str], faster: bool) -> None:
    assert onednn.faster_than_mkl(capability, cpu_info, environment) is faster


def test_all_three_products_of_a_layer_are_computed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "faster_here", lambda: True)
    wide = {(128, 128, 128), (512, 64, 64), (8, 512, 512), (32000, 512, 8), (513, 511, 1021)}
    for m, k, n in wide | {(127, 128, 128), (64, 64, 64), (1, 2048, 32000), (7, 2048, 4096), (0, 512, 512)}:
        x, weight, grad = torch.empty(m, k), torch.empty(n, k), torch.empty(m, n)
        chosen = [onednn.computes(*pair) for pair in ((x, weight.t()), (grad, weight), (grad.t(), x))]
        assert chosen == [(m, k, n) in wide] * 3, (m, k, n)


def test_others_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(512, 512), torch.ones(512, 512)
    monkeypatch.setattr(onednn, "faster_here", lambda: True)
    assert onednn.computes(x, weight)
    for dtype in (torch.bfloat16, torch.float64):
        assert not onednn.computes(x.to(dtype), weight.to(dtype))
    assert not onednn.computes(x.to("meta"), weight.to("meta"))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not onednn.computes(x, weight)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    monkeypatch.setattr(onednn, "faster_here", lambda: False)
    assert not onednn.computes(x, weight)
    y = linear(x.requires_grad_(), weight)
    assert type(y.grad_fn).__name__ != "_ProductBackward" and torch.equal(y, F.linear(x, weight))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _layouts(rows: int, columns: int) -> Iterator[Tensor]:
    """A matrix in rows, in columns, with gaps in rows, with gaps in columns, without a unit stride, and of one row."""
    yield _random(rows, columns)
    yield _random(columns, rows).t()
    yield _random(rows, columns + 3)[:, :columns]
    yield _random(columns, rows + 3)[:, :rows].t()
    yield _random(rows, columns, 2)[..., 1]
    yield _random(1, columns).expand(rows, columns)


@needs_onednn
@pytest.mark.parametrize(("m", "k", "n"), [(40, 33, 24), (24, 33, 40), (1, 33, 24), (40, 1, 24), (40, 33, 1)])
def test_products_of_all_memory_layouts(m: int, k: int, n: int, calls: list[tuple[int, ...]]) -> None:
    for left in _layouts(m, k):
        for right in _layouts(k, n):
            exact = left.double() @ right.double()
            torch.testing.assert_close(multiply(left, right).double(), exact, rtol=1e-5, atol=1e-5)
            for out in _layouts(m, n):
                total = out.clone() if 0 not in out.stride() else out.contiguous()
                multiply_into(total, left, right)
                torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)
                add_product_(total, left, right)
                torch.testing.assert_close(total.double(), 2 * exact, rtol=1e-5, atol=1e-5)
    assert len(calls) > 36 * 13 or 1 in (m, n), "in tiles"


class _Weights(TorchDispatchMode):
    """The memory layouts of the second operand that oneDNN gets."""

    def __init__(self) -> None:
        super().__init__()
        self.compact: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.compact.append(args[1].is_contiguous() or args[1].t().is_contiguous())
        return func(*args, **(kwargs or {}))


@needs_onednn
def test_onednn_gets_no_layout_that_its_fast_code_does_not_know(calls: list[tuple[int, ...]]) -> None:
    with _Weights() as weights:
        for right in _layouts(33, 24):
            multiply(_random(40, 33), right)
    assert weights.compact == [True] * 6


def _gradients(function: Callable[..., Tensor], operands: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    result = function(*operands)
    wanted = [one for one in operands if one.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, wanted, grad.to(result.dtype))]


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)], ids=["all", "no gradient of x", "no gradient of W"])
def test_results_and_gradients_of_linear(frozen: tuple[int, ...], bias: bool, calls: list[tuple[int, ...]]) -> None:
    """Also of inputs and of gradients that are not contiguous; twice the same bits."""
    inputs = [_random(5, 3, 17), _random(3, 5, 17).transpose(0, 1), _random(15, 17)]
    for x in inputs:
        for expanded in (False, True):
            operands = [x, _random(11, 17), *([_random(22)[::2]] if bias else [])]
            operands = [one.detach().requires_grad_(index not in frozen) for index, one in enumerate(operands)]
            shape = (*x.shape[:-1], 11)
            grad = torch.ones(()).expand(shape) if expanded else _random(*shape[:-1], 22)[..., ::2]
            doubles = [one.detach().double().requires_grad_(one.requires_grad) for one in operands]
            found, again = (_gradients(linear, operands, grad) for _ in range(2))
            expected = _gradients(F.linear, doubles, grad)
            for ours, repeated, theirs in zip(found, again, expected, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
                assert torch.equal(ours, repeated)
    assert calls
    with torch.no_grad():
        assert torch.equal(linear(*operands), found[0])


@needs_onednn
def test_a_gradient_sum_gets_the_gradient_of_the_weight(calls: list[tuple[int, ...]]) -> None:
    x, weight, total = _random(15, 17), _random(11, 17).requires_grad_(), torch.ones(11, 17)
    linear(x, weight, total=total).backward(torch.ones(15, 11))
    assert weight.grad is None and calls[0] == (15, 11)
    torch.testing.assert_close(total, 1.0 + x.sum(0).expand(11, 17), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("summed", [False, True])
def test_recomputation_leaves_out_the_last_product(summed: bool, calls: list[tuple[int, ...]]) -> None:
    """As it does where torch's own autograd saves the operands."""
    first, last = (_random(16, 16).requires_grad_() for _ in range(2))
    total = torch.zeros(16, 16) if summed else None
    x = _random(8, 16).requires_grad_()
    y = checkpoint(lambda one: linear(linear(one, first), last, total=total), x, use_reentrant=False)
    forward = len(calls)
    y.sum().backward()
    assert sum(shape == (8, 16) for shape in calls[forward:]) == 3, "one recomputed, and two gradients of inputs"


@needs_onednn
@pytest.mark.parametrize(("tp", "sequence"), [(2, False), (2, True)])
def test_layers_equal_torch(tp: int, sequence: bool, calls: list[tuple[int, ...]]) -> None:
    check(CASES, tp, sequence)


@needs_onednn
@pytest.mark.parametrize(("chunk", "tp"), [(7, 1), (1024, 2)])
def test_head_equals_torch(chunk: int, tp: int, calls: list[tuple[int, ...]]) -> None:
    check_head(37, tp, chunk, LogitFinish())
