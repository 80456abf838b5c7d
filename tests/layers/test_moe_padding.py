"""Rows of experts are padded to few sizes on a CPU, and the padding changes nothing."""

import pytest
import torch

from megatron_ds.layers.moe.experts import Experts
from megatron_ds.layers.moe.grouped import Groups
from megatron_ds.layers.moe.padding import DEVICES, Padding, padded_size
from megatron_ds.layers.moe.shape import MoEShape, RouterShape
from megatron_ds.parallel.expert import ExpertParallel

COUNTS = torch.tensor([3, 0, 17, 16, 1])
H, M = 24, 40


def test_sizes_are_few_and_close() -> None:
    sizes = [padded_size(size) for size in range(10_000)]
    assert all(padded >= size and padded - size <= max(15, size / 8) for size, padded in enumerate(sizes))
    assert len(set(sizes)) < 70
    assert [padded_size(size) for size in (0, 1, 16, 17, 257, 1000)] == [0, 16, 16, 32, 288, 1024]


def test_rows_keep_their_order_and_padding_is_zero() -> None:
    padding = Padding.of(Groups(COUNTS))
    assert padding.groups.sizes == [16, 0, 32, 16, 16] == padding.groups.counts.tolist()
    rows = torch.randn(37, H, dtype=torch.float64, requires_grad=True)
    padded = padding.add(rows)
    for size, group, given in zip(COUNTS.tolist(), padded.split(padding.groups.sizes), rows.split(COUNTS.tolist())):
        assert torch.equal(group[:size], given) and not group[size:].any()
    assert torch.equal(padding.remove(padded), rows)
    torch.autograd.gradcheck(lambda x: padding.remove(padding.add(x).sin() + 1), rows)


def test_no_rows() -> None:
    padding = Padding.of(Groups(torch.zeros(5, dtype=torch.int64)))
    assert padding.remove(padding.add(torch.empty(0, H))).shape == (0, H)


@pytest.mark.parametrize("bias", [False, True])
def test_experts_compute_the_same_without_padding(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    router = RouterShape(num_experts=len(COUNTS), top_k=1)
    shape = MoEShape(hidden_size=H, ffn_size=M, router=router, activation="silu", std=1.0, out_std=1.0, bias=bias)
    experts = Experts(shape, ExpertParallel()).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    rows, weights = torch.randn(37, H, dtype=torch.float64, requires_grad=True), torch.randn(37, H).double()

    def results() -> list[torch.Tensor]:
        found = experts(rows, Groups(COUNTS))
        return [found, *torch.autograd.grad((found * weights).sum(), [rows, *experts.parameters()])]

    padded = results()
    monkeypatch.setattr("megatron_ds.layers.moe.padding.DEVICES", ())
    assert DEVICES == ("cpu",)
    for one, other in zip(padded, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
