"""Products of groups of rows equal a loop over the groups: outputs and all gradients, by both of our ways."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from megatron_ds.layers.moe import grouped
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.moe.grouped import Groups, grouped_linear
from megatron_ds.layers.moe.layer import MoE
from megatron_ds.layers.moe.shape import MoEShape, RouterShape
from megatron_ds.layers.products import keep_gradient_sum
from megatron_ds.parallel.expert import ExpertParallel

IN, FFN = 16, 24
COUNTS = {"uneven": (3, 0, 5, 1), "none": (0, 0, 0, 0), "first": (7, 0, 0, 0), "last": (0, 0, 0, 2), "even": (4,) * 4}


def _drawn(counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows, weights of shape (G, 2, F, in), biases."""
    torch.manual_seed(2)
    shapes = (sum(counts), IN), (len(counts), 2, FFN, IN), (len(counts), 2, FFN)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _loop(x: Tensor, counts: tuple[int, ...], weight: Tensor, bias: Tensor | None) -> Tensor:
    parts = [
        F.linear(rows, weight[group].flatten(0, 1), bias[group].flatten() if bias is not None else None)
        for group, rows in enumerate(x.split(counts))
    ]
    return torch.cat(parts)


def _both(counts: tuple[int, ...], dtype: torch.dtype, with_bias: bool, upstream: Tensor | None) -> list[list[Tensor]]:
    """Output and gradients, ours and of the loop. `upstream` None = that of a sum."""
    found = []
    for compute in (
        lambda x, *others: grouped_linear(x, Groups(torch.tensor(counts)), *others),
        lambda x, *o: _loop(x, counts, *o),
    ):
        drawn = _drawn(counts, dtype)[: 3 if with_bias else 2]
        y = compute(*drawn) if with_bias else compute(*drawn, None)
        y.sum().backward() if upstream is None else y.backward(upstream)
        found.append([y.detach(), *(one.grad for one in drawn)])  # type: ignore[misc]
    return found


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_equal_a_loop(dtype: torch.dtype, counts: tuple[int, ...], with_bias: bool) -> None:
    upstream = torch.randn(sum(counts), 2 * FFN, generator=torch.Generator().manual_seed(4)).to(dtype)
    ours, theirs = _both(counts, dtype, with_bias, upstream)
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours, theirs, **bound)


@pytest.mark.parametrize("by_torch", [False, True], ids=["loop", "grouped"])
def test_a_gradient_that_is_not_contiguous(monkeypatch: pytest.MonkeyPatch, by_torch: bool) -> None:
    """That of a sum is one number, seen at every place, which torch's grouped product refuses."""
    monkeypatch.setattr(grouped, "_has_grouped_product", lambda left, right: by_torch)
    torch.testing.assert_close(*_both((3, 0, 5, 1), torch.float32, True, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_grouped_product_equals_our_loop(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, counts: tuple[int, ...]
) -> None:
    """It runs on a CPU too, where our loop is faster."""
    upstream = torch.randn(sum(counts), 2 * FFN, generator=torch.Generator().manual_seed(4)).to(dtype)
    loop = _both(counts, dtype, True, upstream)[0]
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *given, **options: calls.append(1) or real(*given, **options))
    monkeypatch.setattr(grouped, "_has_grouped_product", lambda left, right: True)
    *found, bias = _both(counts, dtype, True, upstream)[0]
    torch.testing.assert_close(found, loop[:-1], rtol=0, atol=0)
    torch.testing.assert_close(bias, loop[-1])  # a sum in another order
    assert len(calls) == 4


def test_the_way_does_not_depend_on_the_number_of_rows() -> None:
    """Only the widths must be multiples of 16 bytes: in every product the rows are a dim of large stride."""
    with FakeTensorMode():
        for num_rows in (0, 1, 7, 16):
            x, wide, narrow = (
                torch.empty(num_rows, width, dtype=torch.bfloat16, device="cuda") for width in (16, 24, 20)
            )
            assert grouped._has_grouped_product(x, wide) and grouped._has_grouped_product(wide, x)
            assert not grouped._has_grouped_product(x, narrow) and not grouped._has_grouped_product(narrow, x)
            assert not grouped._has_grouped_product(x.float(), wide.float())
            assert not grouped._has_grouped_product(x.cpu(), wide.cpu())


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_devices_on_which_torch_computes_a_product_for_each_group(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert grouped._is_one_kernel.__wrapped__(torch.device("cuda", 0)) is expected


def test_an_operand_at_an_address_that_torchs_product_refuses() -> None:
    """A parameter may lie anywhere in the memory that ZeRO keeps all of them in."""
    with FakeTensorMode():
        x, memory = (torch.empty(n, dtype=torch.bfloat16, device="cuda") for n in (16 * 4, 24 * 16 + 8))
        for offset in range(9):
            given = x.view(4, 16), memory.narrow(0, offset, 24 * 16).view(16, 24)
            assert grouped._has_grouped_product(*given) == (offset % 8 == 0)


def test_the_host_reads_nothing_of_a_layer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values have none to read, and torch checks the layouts of its product's operands on them."""
    monkeypatch.setattr(grouped, "_has_grouped_product", lambda left, right: True)
    with torch.device("meta"):
        router = RouterShape(num_experts=4, top_k=2, score="softmax_of_chosen", bias=True)
        shape = MoEShape(
            hidden_size=IN, ffn_size=FFN, router=router, activation="silu", bias=True, std=0.1, out_std=0.1
        )
        layer = MoE(shape, ExpertParallel(), RouterSettings(aux_loss=0.1, z_loss=0.1)).bfloat16()
        total = torch.zeros_like(layer.experts.up_weight, dtype=torch.float32)
        keep_gradient_sum(layer.experts.up_weight, total)
        x = torch.empty(5, 3, IN, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        y.backward(torch.empty_like(y))
        assert layer.experts.up_weight.grad is None
        for tensor in (x, layer.router.weight, layer.experts.down_weight, layer.experts.down_bias):
            assert tensor is not None and tensor.grad is not None and tensor.grad.shape == tensor.shape


def test_sizes_on_the_host_are_used_instead_of_counts() -> None:
    """Counts without values would raise if they were read; those of a device are read once for all products."""
    x, weight, _ = _drawn(COUNTS["uneven"])
    y = grouped_linear(x, Groups(torch.empty(4, dtype=torch.int64, device="meta"), COUNTS["uneven"]), weight)
    y.sum().backward()
    assert torch.equal(y, grouped_linear(x, Groups(torch.tensor(COUNTS["uneven"])), weight))
    groups = Groups(torch.tensor(COUNTS["uneven"]))
    assert groups.sizes is groups.sizes and groups.ends.tolist() == [3, 3, 8, 9]


@pytest.mark.parametrize("by_torch", [False, True], ids=["loop", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_added_to_a_sum_over_micro_batches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, by_torch: bool
) -> None:
    if by_torch:
        monkeypatch.setattr(grouped, "_has_grouped_product", lambda left, right: True)
    counts = (3, 0, 5, 1)
    upstream = torch.randn(sum(counts), 2 * FFN).to(dtype)
    x, weight, _ = _drawn(counts, dtype)
    expected = torch.autograd.grad(_loop(x.float(), counts, weight.float(), None), weight, upstream.float())[0].float()
    total = torch.zeros_like(weight, dtype=torch.float32)
    keep_gradient_sum(weight, total)
    for _ in range(2):
        grouped_linear(x, Groups(torch.tensor(counts)), weight).backward(upstream)
    assert weight.grad is None
    torch.testing.assert_close(total, 2 * expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_needed(frozen: int) -> None:
    drawn = _drawn((3, 0, 5, 1))
    drawn[frozen].requires_grad_(False)
    grouped_linear(drawn[0], Groups(torch.tensor((3, 0, 5, 1))), *drawn[1:]).square().sum().backward()
    assert [one.grad is None for one in drawn] == [index == frozen for index in range(3)]
