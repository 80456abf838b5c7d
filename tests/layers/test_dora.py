"""DoRA layers against the formula in plain torch, with and without dropout; layouts are in tests/parity."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.adapter_layers import LoRASpec, Output
from megatron_ds.layers.dora import column_adapter, row_adapter
from megatron_ds.layers.linear import QKVLinear, RowParallelLinear
from megatron_ds.parallel.tensor import TensorParallel

H, HEADS, KV_HEADS, D, RANK, SCALE = 12, 4, 2, 3, 2, 1.5


def _filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


class _Half(nn.Module):
    """Dropout whose mask is known."""

    def forward(self, x: Tensor) -> Tensor:
        return x * _mask(x)


def _mask(x: Tensor) -> Tensor:
    return 2.0 * (torch.arange(x.numel()).view(x.shape) % 3 == 0)


def _plain(x: Tensor, output: Tensor, weight: Tensor, a: Tensor, b: Tensor, m: Tensor, drops: bool) -> Tensor:
    """The paper's formula; the input of all but the frozen layer's own output has the dropout, as in peft."""
    gain = m / (weight + SCALE * b @ a).norm(dim=1).detach()
    given = x * _mask(x) if drops else x
    merged = gain[:, None] * (weight + SCALE * b @ a) if not drops else None
    if merged is not None:
        return output - F.linear(x, weight) + F.linear(x, merged)
    return output + (gain - 1) * F.linear(given, weight) + gain * SCALE * F.linear(F.linear(given, a), b)


def _equal_with_gradients(ours: Tensor, plain: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, ours.numel()).view(ours.shape)
    mine = torch.autograd.grad((ours * weights).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((plain * weights).sum(), inputs, retain_graph=True)
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_queries_keys_and_values(drops: bool, bias: bool) -> None:
    tp = TensorParallel()
    layer = _filled(QKVLinear(H, HEADS, KV_HEADS, D, tp, q_std=1.0, kv_std=1.0, bias=bias)).requires_grad_(False)
    assert isinstance(layer, QKVLinear)
    low = LoRASpec(RANK, SCALE, dropout=0.5 if drops else 0.0, dora=True)
    sizes = {"k": Output(KV_HEADS * D, KV_HEADS), "v": Output(KV_HEADS * D, KV_HEADS)}
    adapter = _filled(column_adapter(H, sizes, low, tp, None, layer.frozen(D)))
    adapter.dropout = _Half() if drops else nn.Identity()
    x = torch.randn(5, 2, H, requires_grad=True)
    q, kv = layer(x)
    k, v = kv.unflatten(-1, (-1, 2, D)).unbind(-2)
    found = adapter.adapted(x, {"q": q.unflatten(-1, (-1, D)), "k": k, "v": v})  # type: ignore[operator]
    assert torch.equal(found["q"].flatten(2), q)
    weights = layer.kv_weight.unflatten(0, (-1, 2, D))
    a = adapter.get_parameter("a")
    for index, (name, output) in enumerate((("k", k), ("v", v))):
        b, m = adapter.get_parameter(f"b_{name}"), adapter.get_parameter(f"m_{name}")
        plain = _plain(x, output.flatten(2), weights[:, index].flatten(0, 1), a, b, m, drops)
        _equal_with_gradients(found[name].flatten(2), plain, [x, a, b, m])


@pytest.mark.parametrize("drops", [False, True])
def test_a_layer_into_the_residual_stream(drops: bool) -> None:
    tp = TensorParallel()
    layer = _filled(RowParallelLinear(H, 7, tp, std=1.0, bias=True)).requires_grad_(False)
    assert isinstance(layer, RowParallelLinear)
    low = LoRASpec(RANK, SCALE, dropout=0.5 if drops else 0.0, dora=True)
    adapter = _filled(row_adapter(H, 7, low, tp, None, layer.frozen()))
    adapter.dropout = _Half() if drops else nn.Identity()
    x = torch.randn(5, 2, H, requires_grad=True)
    a, b, m = (adapter.get_parameter(name) for name in "abm")
    plain = _plain(x, layer(x), layer.weight, a, b, m, drops)
    _equal_with_gradients(adapter.around(layer, x), plain, [x, a, b, m])  # type: ignore[operator]
    adapter.eval()
    undropped = _plain(x, layer(x), layer.weight, a, b, m, drops=False)
    torch.testing.assert_close(adapter.around(layer, x), undropped, rtol=1e-5, atol=1e-5)  # type: ignore[operator]
