"""A router's choice and weights, and the gradient through them, equal those of a formula over all experts."""

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.moe.router import Router, Routing
from megatron_ds.layers.moe.shape import RouterShape
from megatron_ds.parallel.expert import ExpertParallel

T, E, H = 40, 8, 16
SHAPES = {
    "softmax": RouterShape(num_experts=E, top_k=2),
    "not-renormalised": RouterShape(num_experts=E, top_k=3, renormalise=False),
    "of-chosen": RouterShape(num_experts=E, top_k=3, score="softmax_of_chosen"),
    "of-chosen-bias": RouterShape(num_experts=E, top_k=2, score="softmax_of_chosen", bias=True, scale=1.5),
    "sigmoid": RouterShape(num_experts=E, top_k=2, score="sigmoid"),
    "sigmoid-scale": RouterShape(num_experts=E, top_k=4, score="sigmoid", renormalise=False, scale=2.5),
    "least-sum": RouterShape(num_experts=E, top_k=2, least_sum=0.4, choice_bias=True),
    "softmax-choice-bias": RouterShape(num_experts=E, top_k=3, choice_bias=True, renormalise=False),
    "groups-max": RouterShape(num_experts=E, top_k=3, num_groups=4, top_groups=2, group_score="max"),
    "groups-top2": RouterShape(
        num_experts=E, top_k=3, score="sigmoid", num_groups=4, top_groups=2, choice_bias=True, scale=2.5
    ),
    "all-groups": RouterShape(num_experts=E, top_k=2, num_groups=2, top_groups=2),
    "all-experts": RouterShape(num_experts=E, top_k=E, score="sigmoid"),
}


def build_router(shape: RouterShape) -> Router:
    """A router with random weights and biases."""
    torch.manual_seed(3)
    router = Router(shape, H, ExpertParallel(), std=0.02)
    with torch.no_grad():
        for tensor in (router.weight, router.bias, router.choice_bias):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape) / 2)
    return router


def weights_of_all(shape: RouterShape, logits: Tensor, choice_bias: Tensor | None) -> Tensor:
    """The weight of every expert for every token, (T, E), 0 where it is not chosen, token by token."""
    return torch.stack([_weights_of_one(shape, row, choice_bias) for row in logits])


def _weights_of_one(shape: RouterShape, logits: Tensor, choice_bias: Tensor | None) -> Tensor:
    scores = logits.sigmoid() if shape.score == "sigmoid" else logits.softmax(0)
    by = (logits if shape.score == "softmax_of_chosen" else scores).detach()
    by = by + choice_bias if choice_bias is not None else by
    size = shape.num_experts // shape.num_groups
    groups = [by[start : start + size].tolist() for start in range(0, shape.num_experts, size)]
    best = [max(group) if shape.group_score == "max" else sum(sorted(group)[-2:]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda group: best[group])[-shape.top_groups :]
    allowed = [expert for expert in range(shape.num_experts) if expert // size in kept]
    chosen = sorted(allowed, key=lambda expert: float(by[expert]))[-shape.top_k :]
    mask = torch.zeros(shape.num_experts).index_fill(0, torch.tensor(chosen), 1.0)
    if shape.score == "softmax_of_chosen":
        return logits.masked_fill(mask == 0, float("-inf")).softmax(0) * shape.scale
    weights = scores * mask
    if shape.renormalise:
        weights = weights / torch.clamp(weights.sum(), min=shape.least_sum)
    return weights * shape.scale


def spread(routing: Routing, num_experts: int) -> Tensor:
    """The weight of every expert for every token, (T, E)."""
    return torch.zeros(len(routing.chosen), num_experts).scatter(1, routing.chosen, routing.weights)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_choice_weights_and_gradients_equal_the_formula(shape: RouterShape) -> None:
    router = build_router(shape)
    tokens, upstream = torch.randn(T, H, requires_grad=True), torch.randn(T, E)
    parameters = [tokens, *router.parameters()]
    found = spread(router.route(router(tokens)), E)
    ours = torch.autograd.grad(found, parameters, upstream)
    expected = weights_of_all(shape, torch.nn.functional.linear(tokens, *router.parameters()), router.choice_bias)
    theirs = torch.autograd.grad(expected, parameters, upstream)
    assert torch.equal(found != 0, expected != 0) and (found != 0).sum() == T * shape.top_k
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shares_are_a_distribution(shape: RouterShape) -> None:
    router = build_router(shape)
    routing = router.route(router(torch.randn(T, H)))
    torch.testing.assert_close(routing.shares.sum(-1), torch.ones(T))
    assert (routing.shares.argsort(-1) == routing.logits.argsort(-1)).all()


def test_the_bias_of_the_choice_is_not_in_the_weights() -> None:
    router = build_router(RouterShape(num_experts=E, top_k=1, score="sigmoid", renormalise=False, choice_bias=True))
    router.choice_bias = torch.eye(E)[5] * 100
    logits = torch.randn(T, E)
    routing = router.route(logits)
    assert (routing.chosen == 5).all() and torch.equal(routing.weights[:, 0], logits[:, 5].sigmoid())
    assert not router.choice_bias.requires_grad and "choice_bias" not in dict(router.named_parameters())


def test_the_choice_in_a_tie_depends_on_neither_rows_nor_place() -> None:
    """Such rows are those of padding, and of a router of zeros."""
    for shape in SHAPES.values():
        router = build_router(shape)
        if router.choice_bias is not None:
            router.choice_bias.zero_()
        logits = torch.randn(1, E).round().repeat(33, 1)
        alone = router.route(logits[:1]).chosen
        for rows in (2, 7, 33):
            assert torch.equal(router.route(logits[:rows]).chosen, alone.expand(rows, -1))
        mixed = torch.cat([torch.randn(5, E), logits[:1], torch.randn(5, E)])
        assert torch.equal(router.route(mixed).chosen[5:6], alone)


@pytest.mark.parametrize("fp32", [False, True])
def test_logits_are_fp32_where_the_shape_says_so(fp32: bool) -> None:
    router = build_router(RouterShape(num_experts=E, top_k=2, bias=True, fp32=fp32)).bfloat16()
    tokens = torch.randn(T, H).bfloat16()
    exact = torch.nn.functional.linear(tokens.float(), *(one.float() for one in router.parameters()))
    found = router(tokens)
    assert found.dtype == torch.float32 and torch.equal(found, exact if fp32 else exact.bfloat16().float())


def test_no_token_has_an_empty_choice() -> None:
    for shape in SHAPES.values():
        router = build_router(shape)
        routing = router.route(router(torch.empty(0, H)))
        assert routing.chosen.shape == routing.weights.shape == (0, shape.top_k)
