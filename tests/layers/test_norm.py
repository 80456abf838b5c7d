"""Norms equal their formulas, on one process and on tensor ranks: outputs, and whole gradients on every rank."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.norm import AcrossHeadsNorm, EachHeadNorm, Norm, NormStyle
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.sharded import FEATURES, LAYOUTS, B, Case, H, S, check
from tests.ranks import run_alone

EPS = 1e-5
LAYER, RMS = NormStyle("layer", EPS), NormStyle("rms", EPS)
GEMMAS = NormStyle("rms", EPS, one_plus=True, fp32_weight=True)
HEADS, DIM = 4, 4
Parameters = dict[str, Tensor]


def layer_norm(parameters: Parameters, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normal * parameters.get("weight", torch.ones(())) + parameters.get("bias", torch.zeros(()))


def rms_norm(parameters: Parameters, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * parameters["weight"]


def one_plus(parameters: Parameters, x: Tensor) -> Tensor:
    return rms_norm({"weight": 1 + parameters["weight"]}, x)


def layer_one_plus(parameters: Parameters, x: Tensor) -> Tensor:
    return layer_norm({**parameters, "weight": 1 + parameters["weight"]}, x)


def across_heads(parameters: Parameters, x: Tensor) -> Tensor:
    """(S, B, D, N): heads last, which ranks divide; normalised over both."""
    return rms_norm(parameters, x.transpose(2, 3).flatten(2)).unflatten(-1, (HEADS, DIM)).transpose(2, 3)


class HeadsLast(AcrossHeadsNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(2, 3)).transpose(2, 3)


WEIGHT = {"weight": (H,)}
CASES = {
    "layer": Case(lambda tp: Norm(H, LAYER, tp), layer_norm, {"weight": (H,), "bias": (H,)}),
    "layer without weight": Case(lambda tp: Norm(H, replace(LAYER, affine=False), tp), layer_norm, {}),
    "layer without bias": Case(lambda tp: Norm(H, replace(LAYER, bias=False), tp), layer_norm, WEIGHT),
    "layer, one plus weight": Case(
        lambda tp: Norm(H, replace(LAYER, one_plus=True), tp), layer_one_plus, {"weight": (H,), "bias": (H,)}
    ),
    "rms": Case(lambda tp: Norm(H, RMS, tp), rms_norm, WEIGHT),
    "rms, weighed in fp32": Case(lambda tp: Norm(H, replace(RMS, fp32_weight=True), tp), rms_norm, WEIGHT),
    "rms, one plus weight": Case(lambda tp: Norm(H, GEMMAS, tp), one_plus, WEIGHT),
    "heads, each by itself": Case(
        lambda tp: EachHead(tp),
        lambda parameters, x: rms_norm({"weight": parameters["norm.weight"]}, x.transpose(2, 3)).transpose(2, 3),
        {"norm.weight": (DIM,)},
        inputs=((S, B, DIM, HEADS),),
        x=FEATURES,
        y=FEATURES,
    ),
    "across heads": Case(
        lambda tp: HeadsLast(HEADS, DIM, RMS, tp),
        across_heads,
        {"weight": (HEADS * DIM,)},
        split={"weight": 0},
        inputs=((S, B, DIM, HEADS),),
        x=FEATURES,
        y=FEATURES,
    ),
}


class EachHead(torch.nn.Module):
    """The norm of queries and keys: each rank has some heads of all positions."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.norm = Norm(DIM, RMS, tp, tp.inside)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(2, 3)).transpose(2, 3)


@pytest.mark.parametrize(("tp", "sequence"), LAYOUTS)
def test_equals_the_formula(tp: int, sequence: bool) -> None:
    check(CASES, tp, sequence)


def _rounded(style: NormStyle) -> tuple[Tensor, Tensor, Tensor]:
    """In bf16: ours, the formula with the product in fp32, and with the product in bf16."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, H, generator=generator).bfloat16()
    norm = Norm(H, style, TensorParallel()).bfloat16()
    assert norm.weight is not None
    with torch.no_grad():
        norm.weight.copy_(torch.randn(H, generator=generator))
        normal, weight = F.rms_norm(x.float(), (H,), None, EPS), norm.weight
        return norm(x), (normal * weight.float()).bfloat16(), normal.bfloat16() * weight


def test_where_half_precision_is_cast_down() -> None:
    """To the bit: Llama's family before the product, others after it."""
    ours, last, first = run_alone(_rounded, RMS)
    assert torch.equal(ours, first) and not torch.equal(ours, last)
    ours, last, first = run_alone(_rounded, replace(RMS, fp32_weight=True))
    assert torch.equal(ours, last) and not torch.equal(ours, first)


def _layer_norms_in_half_precision() -> dict[str, bool]:
    """Compare ours with transformers' in bf16, to the bit: without bias, with 1 + weight, and of each head."""
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    generator, tp = torch.Generator().manual_seed(1), TensorParallel()
    x, heads = (torch.randn(64, *shape, generator=generator).bfloat16() for shape in ((H,), (HEADS, DIM)))
    without = replace(LAYER, bias=False)
    pairs: dict[str, tuple[torch.nn.Module, torch.nn.Module, Tensor]] = {
        "without bias": (Norm(H, without, tp), CohereLayerNorm(H, EPS), x),
        "one plus": (Norm(H, replace(LAYER, one_plus=True), tp), NemotronLayerNorm1P(H, EPS), x),
        "of each head": (EachHeadNorm(HEADS, DIM, without, tp), CohereLayerNorm((HEADS, DIM), EPS), heads),
    }
    equal = {}
    for name, (ours, theirs, given) in pairs.items():
        with torch.no_grad():
            for one, other in zip(ours.bfloat16().parameters(), theirs.bfloat16().parameters()):
                one.copy_(torch.randn(one.shape, generator=generator))
                other.copy_(one)
        equal[name] = torch.equal(ours(given), theirs(given))
    return equal


def test_layer_norms_are_transformers_in_half_precision() -> None:
    assert run_alone(_layer_norms_in_half_precision) == {"without bias": True, "one plus": True, "of each head": True}


def test_a_style_that_no_model_has_is_refused() -> None:
    with pytest.raises(AssertionError):
        replace(LAYER, fp32_weight=True)
    with pytest.raises(AssertionError):
        NormStyle("batch", EPS)
