"""Products of half-precision operands with fp32 results: the numbers, on the device, and what CUDA is asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ds.layers.products import add_product_, linear, multiply_into

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = (torch.bfloat16, torch.float16)


def operands(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((40, 33), (33, 24)))
    return left.to(device, dtype), right.to(device, dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_sums_are_not_rounded_to_the_dtype_of_the_operands(dtype: torch.dtype) -> None:
    left, right = operands(dtype, DEVICE)
    exact = left.double() @ right.double()
    total = torch.empty(40, 24, device=DEVICE)
    multiply_into(total, left, right)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)
    for _ in range(3):
        add_product_(total, left, right)
    torch.testing.assert_close(total.double(), 4 * exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_results_in_the_dtype_of_the_operands_are_rounded_once(dtype: torch.dtype) -> None:
    left, right = operands(dtype, DEVICE)
    rounded = torch.empty(40, 24, device=DEVICE, dtype=dtype)
    multiply_into(rounded, left, right)
    torch.testing.assert_close(rounded, (left.double() @ right.double()).to(dtype), rtol=2.0**-7, atol=2.0**-7)


class Asked(TorchDispatchMode):
    """The operators that are called, which are not computed: torch's meta kernel of `addmm.dtype` is wrong in 2.11."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), args, kwargs or {}))
        return (kwargs or {}).get("out", args[0])


def test_elsewhere_than_on_a_cpu_one_product_does_it() -> None:
    """No copy of an operand, and the sum is read and written by the product itself."""
    left, right = operands(torch.bfloat16, torch.device("meta"))
    total = torch.empty(40, 24, device="meta")
    with Asked() as asked:
        multiply_into(total, left, right)
        add_product_(total, left, right)
    (first, first_args, first_out), (second, second_args, second_out) = asked.calls
    assert (first, second) == ("aten.mm.dtype_out", "aten.addmm.dtype_out")
    assert first_args[2:] == (torch.float32,) and first_out["out"] is total
    assert second_args[0] is total and second_args[3:] == (torch.float32,) and second_out["out"] is total


@pytest.mark.parametrize("summed", [False, True], ids=["own gradient", "summed gradient"])
@pytest.mark.parametrize("layout", ["rows in order", "batch first", "parts of a row"])
def test_all_rows_are_one_product(layout: str, summed: bool) -> None:
    """Torch alone would multiply the rows of each position by themselves where a view cannot fold them."""
    x, weight, grad = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3, 8), (4, 8), (5, 3, 4)))
    expected = torch.autograd.grad(x.requires_grad_() @ weight.requires_grad_().t(), (x, weight), grad)
    x, weight = x.detach(), weight.detach().requires_grad_()
    if layout == "batch first":
        x, grad = (one.transpose(0, 1).contiguous().transpose(0, 1) for one in (x, grad))
    if layout == "parts of a row":
        x = torch.cat([x, x], dim=-1)[..., :8]
    total = torch.zeros(4, 8) if summed else None
    if summed:
        x, grad, weight = x.float(), grad.float(), weight.detach().float().requires_grad_()
    with Called() as called:
        y = linear(x.requires_grad_(), weight, total=total)
        y.backward(grad)
    torch.testing.assert_close(y, x @ weight.t())
    found = (x.grad, weight.grad if total is None else total)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    assert called.names.count("aten.mm") + called.names.count("aten.addmm_") == 3 and "aten.bmm" not in called.names


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))
