"""Attention equals its formula, written out, on one process and on tensor ranks: outputs and every gradient.

Each case has what could be lost by itself: groups of query heads, a key head that several ranks hold, masks, windows,
documents that share a sequence, norms of heads, rotation, caps, sinks, another stack's states.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.attention import Attention
from megatron_ds.layers.attention_shape import AttentionShape, QueryTemperature
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.rotary import RotaryConfig, RotaryTable
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.sharded import LAYOUTS, B, Case, H, S, check

HEADS, DIM, CONTEXT = 4, 4, 12
EPS, THETA = 1e-5, 100.0
PLAIN = AttentionShape(
    hidden_size=H,
    num_heads=HEADS,
    num_kv_heads=2,
    head_dim=DIM,
    scale=0.6,
    causal=True,
    qkv_bias=False,
    out_bias=False,
    qk_norm=None,
    qk_norm_across_heads=False,
    window=None,
    softcap=None,
    alibi=None,
    relative=None,
    dropout=0.0,
    q_std=1.0,
    kv_std=1.0,
    out_std=1.0,
)
KEY_MASK = torch.ones(B, S, dtype=torch.bool)
KEY_MASK[0, 5:] = False
LEFT_PADDED = KEY_MASK.flip(1)
POSITIONS = torch.stack([torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])])
Parameters = dict[str, Tensor]


def seen(shape: AttentionShape, length: int, key_mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """(B, S, C) bool, one pair of positions after the other."""
    allowed = torch.ones(B, S, length, dtype=torch.bool)
    for row in range(B):
        for query in range(S):
            for key in range(length):
                distance = query - key
                hidden = (shape.causal and distance < 0) or (shape.window is not None and abs(distance) >= shape.window)
                hidden |= key_mask is not None and not key_mask[row, key]
                if positions is not None:  # the query's document begins so many positions before it
                    hidden |= distance > int(positions[row, query])
                allowed[row, query, key] = not hidden
    return allowed


def normalised(shape: AttentionShape, parameters: Parameters, part: str, x: Tensor) -> Tensor:
    """(S, B, heads, D)."""
    if shape.qk_norm is None:
        return x
    flat = x.flatten(-2) if shape.qk_norm_across_heads else x
    if shape.qk_norm.kind == "layer":
        flat = flat - flat.mean(-1, keepdim=True)
    normal = flat / (flat.square().mean(-1, keepdim=True) + EPS).sqrt() * parameters[f"{part}_norm.weight"]
    return (normal + parameters.get(f"{part}_norm.bias", torch.zeros(()))).view_as(x)


def rotated(x: Tensor) -> Tensor:
    """(S, B, heads, D): pairs half a head apart turn by position * THETA ** (-pair / pairs)."""
    pairs = DIM // 2
    angles = torch.arange(S)[:, None] * THETA ** (-torch.arange(pairs) / pairs)
    turned = torch.view_as_complex(torch.stack([x[..., :pairs], x[..., pairs:]], -1).contiguous())
    turned = turned * torch.polar(torch.ones(()), angles.float())[:, None, None]
    return torch.cat([turned.real, turned.imag], -1)


def attention(
    shape: AttentionShape,
    parameters: Parameters,
    x: Tensor,
    context: Tensor | None = None,
    key_mask: Tensor | None = None,
    positions: Tensor | None = None,
    rotates: bool = False,
) -> Tensor:
    source = x if context is None else context
    q = F.linear(x, parameters["qkv.q_weight"], parameters.get("qkv.q_bias")).unflatten(-1, (-1, DIM))
    kv = F.linear(source, parameters["qkv.kv_weight"], parameters.get("qkv.kv_bias"))
    k, v = kv.unflatten(-1, (-1, 2, DIM)).unbind(-2)
    steps = [lambda part, x: normalised(shape, parameters, part, x), lambda part, x: rotated(x) if rotates else x]
    for step in reversed(steps) if shape.qk_norm_after_rotary else steps:
        q, k = step("q", q), step("k", k)
    if shape.query_temperature is not None:
        places = torch.arange(S).expand(B, S) if positions is None else positions
        steps_passed = (places // shape.query_temperature.length).float()
        q = q * (1 + shape.query_temperature.beta * torch.log(1 + steps_passed)).t()[..., None, None]
    group = HEADS // shape.num_kv_heads
    k, v = (part.repeat_interleave(group, dim=2) for part in (k, v))
    scores = torch.einsum("sbnd,cbnd->bnsc", q, k) * shape.scale
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    scores = scores.masked_fill(~seen(shape, len(source), key_mask, positions)[:, None], -math.inf)
    if shape.sinks:
        scores = torch.cat([scores, parameters["sinks"].view(1, -1, 1, 1).expand(B, -1, S, 1)], dim=-1)
    mixed = torch.einsum("bnsc,cbnd->sbnd", scores.softmax(-1)[..., : len(source)], v)
    return F.linear(mixed.flatten(2), parameters["out.weight"], parameters.get("out.bias"))


class Called(nn.Module):
    """Attention as a layer of what is differentiated alone; masks and positions are given once."""

    def __init__(self, layer: Attention, **given: Any) -> None:
        super().__init__()
        self.layer, self.given = [layer], given
        for name, part in layer.named_children():
            self.add_module(name, part)
        for name, own in layer.named_parameters(recurse=False):
            self.register_parameter(name, own)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layer[0](x, source=context, **self.given)


def case(shape: AttentionShape, rotates: bool = False, context: bool = False, **given: Tensor) -> Case:
    q, kv = HEADS * DIM, shape.num_kv_heads * 2 * DIM
    parameters: dict[str, tuple[int, ...]] = {
        "qkv.q_weight": (q, H),
        "qkv.kv_weight": (kv, H),
        "out.weight": (H, q),
    }
    split = {"qkv.q_weight": 0, "qkv.kv_weight": 0, "out.weight": 1}
    if shape.qkv_bias:
        parameters |= {"qkv.q_bias": (q,), "qkv.kv_bias": (kv,)}
        split |= {"qkv.q_bias": 0, "qkv.kv_bias": 0}
    if shape.out_bias:
        parameters["out.bias"] = (H,)
    if shape.qk_norm is not None and shape.qk_norm_across_heads:
        parameters |= {"q_norm.weight": (q,), "k_norm.weight": (kv // 2,)}
        split |= {"q_norm.weight": 0, "k_norm.weight": 0}
    elif shape.qk_norm is not None and shape.qk_norm_each_head:
        parameters |= {"q_norm.weight": (HEADS, DIM), "k_norm.weight": (shape.num_kv_heads, DIM)}
        split |= {"q_norm.weight": 0, "k_norm.weight": 0}
    elif shape.qk_norm is not None:
        names = ("weight", "bias") if shape.qk_norm.has_bias else ("weight",)
        parameters |= {f"{part}_norm.{name}": (DIM,) for part in "qk" for name in names}
    if shape.sinks:
        parameters, split = {"sinks": (HEADS,), **parameters}, {"sinks": 0, **split}

    def build(tp: TensorParallel) -> nn.Module:
        rotary = RotaryTable(RotaryConfig(DIM, THETA)) if rotates else None
        return Called(Attention(shape, tp, rotary, Recompute(), None), **given)

    plain: Callable[..., Tensor] = lambda *tensors: attention(shape, *tensors, rotates=rotates, **given)  # noqa: E731
    shared = {"qkv.kv_weight", "qkv.kv_bias", "k_norm.weight"} & split.keys()
    inputs = ((S, B, H), (CONTEXT, B, H)) if context else ((S, B, H),)
    return Case(build, plain, parameters, split, dict.fromkeys(shared, shape.num_kv_heads), inputs)


BOTH_WAYS = replace(PLAIN, causal=False)
NORMED = replace(PLAIN, qk_norm=NormStyle("rms", EPS))
EACH = replace(PLAIN, qk_norm=NormStyle("layer", EPS, bias=False), qk_norm_each_head=True)
GROWING = replace(PLAIN, query_temperature=QueryTemperature(beta=0.2, length=2))
CASES = {
    "grouped heads": case(PLAIN),
    "a key head each, biases": case(replace(PLAIN, num_kv_heads=4, qkv_bias=True, out_bias=True)),
    "one key head that all ranks hold": case(replace(PLAIN, num_kv_heads=1, qkv_bias=True)),
    "window": case(replace(PLAIN, window=3)),
    "capped": case(replace(PLAIN, softcap=0.7)),
    "rotated": case(PLAIN, rotates=True),
    "norms of heads": case(NORMED),
    "norms across heads": case(replace(NORMED, qk_norm_across_heads=True)),
    "norms across one key head that all ranks hold": case(replace(NORMED, qk_norm_across_heads=True, num_kv_heads=1)),
    "norms of heads after the rotation": case(replace(NORMED, qk_norm_after_rotary=True), rotates=True),
    "layer norms of heads": case(replace(PLAIN, qk_norm=NormStyle("layer", EPS)), rotates=True),
    "a norm for each head": case(EACH, rotates=True),
    "a norm for each head, one key head that all ranks hold": case(replace(EACH, num_kv_heads=1)),
    "growing queries": case(GROWING, rotates=True),
    "growing queries of documents": case(GROWING, positions=POSITIONS),
    "documents": case(PLAIN, positions=POSITIONS),
    "documents in a window": case(replace(PLAIN, window=2), positions=POSITIONS),
    "both ways, padded": case(BOTH_WAYS, key_mask=KEY_MASK),
    "both ways, in a window": case(replace(BOTH_WAYS, window=3), rotates=True),
    "both ways, in a window, padded": case(replace(BOTH_WAYS, window=4, softcap=0.7), key_mask=KEY_MASK),
    "sinks": case(replace(PLAIN, sinks=True)),
    "sinks, capped": case(replace(PLAIN, sinks=True, softcap=0.7)),
    "sinks, one key head, documents in a window": case(
        replace(PLAIN, sinks=True, num_kv_heads=1, window=3), positions=POSITIONS
    ),
    "sinks, queries that see no key": case(replace(PLAIN, sinks=True), key_mask=LEFT_PADDED),
    "another stack's states": case(BOTH_WAYS, context=True),
}


@pytest.mark.parametrize(("tp", "sequence"), LAYOUTS)
def test_equals_the_formula(tp: int, sequence: bool) -> None:
    check(CASES, tp, sequence)
