"""Vocabulary-parallel head and loss: equal to torch's, chunk by chunk, and never a whole tensor of logits."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ds.layers import cross_entropy
from megatron_ds.layers.cross_entropy import LogitFinish, VocabShard, head_loss
from megatron_ds.layers.kernels.cross_entropy import reference_cross_entropy
from megatron_ds.layers.param_spec import ParamSpec, over_tensor, pad_shard
from megatron_ds.parallel.collectives import copy_to
from megatron_ds.parallel.grid import Axis, Grid, Layout
from tests.ranks import run_alone, run_grid

S, B, H = 24, 2, 16


def problem(vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(S, B, H, generator=generator)
    weight = torch.randn(vocab, H, generator=generator)
    targets = torch.randint(0, vocab, (S, B), generator=generator)
    targets[torch.rand(S, B, generator=generator) < 0.3] = -100
    return hidden, weight, targets


PLAIN = LogitFinish()


def _bias(vocab: int) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(1))


def _expected(vocab: int, finish: LogitFinish) -> list[torch.Tensor]:
    hidden, weight, targets = problem(vocab)
    bias = _bias(vocab)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    logits = (hidden @ weight.t() + bias) * finish.multiplier
    if finish.softcap is not None:
        logits = finish.softcap * torch.tanh(logits / finish.softcap)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    (loss * 0.25).backward()
    return [loss.detach(), hidden.grad, weight.grad, bias.grad]


def _ours(grid: Grid, vocab: int, chunk: int, finish: LogitFinish) -> list[torch.Tensor]:
    hidden, weight, targets = problem(vocab)
    spec, axis = ParamSpec((vocab, H), over_tensor(0)), grid.tensor
    (start, stop), _ = spec.local_ranges(grid.model_axes)
    shard = pad_shard(weight[start:stop], spec, grid.model_axes).requires_grad_()
    bias = pad_shard(_bias(vocab)[start:stop], ParamSpec((vocab,), over_tensor(0)), grid.model_axes).requires_grad_()
    hidden.requires_grad_()
    loss = head_loss(copy_to(hidden, axis), VocabShard(shard, bias, vocab, axis, finish), targets, chunk=chunk)
    (loss * 0.25).backward()
    assert shard.grad is not None and bias.grad is not None
    assert not shard.grad[stop - start :].any() and not bias.grad[stop - start :].any(), "padding rows must not learn"
    return [loss.detach(), hidden.grad, shard.grad[: stop - start], bias.grad[: stop - start]]


def _check(vocab: int, tp: int, chunk: int, finish: LogitFinish) -> None:
    loss, grad_hidden, grad_weight, grad_bias = run_alone(_expected, vocab, finish)
    ranks = run_grid(_ours, Layout(tensor=tp), vocab, chunk, finish)
    for rank in ranks:
        torch.testing.assert_close(rank[0], loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank[1], grad_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), grad_weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), grad_bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize(("vocab", "tp"), [(32, 1), (32, 2), (33, 2), (37, 4), (5, 4), (2, 4)])
def test_loss_and_gradients_equal_torch(vocab: int, tp: int, chunk: int) -> None:
    """Also where the vocabulary leaves padding on a rank, or a rank with nothing but padding."""
    _check(vocab, tp, chunk, PLAIN)


@pytest.mark.parametrize("finish", [LogitFinish(0.125), LogitFinish(softcap=3.0), LogitFinish(0.5, 2.0)], ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_done_to_logits_reaches_the_gradients(tp: int, finish: LogitFinish) -> None:
    _check(37, tp, 20, finish)


class _LargestOutput(TorchDispatchMode):
    """The largest tensor that any operation makes with a given last dim."""

    def __init__(self, last_dim: int) -> None:
        super().__init__()
        self.last_dim, self.rows = last_dim, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.last_dim:
                self.rows = max(self.rows, tensor.numel() // self.last_dim)
        return out


def _largest_logits(vocab: int, chunk: int, labelled: int) -> int:
    hidden, weight, targets = problem(vocab)
    targets = torch.arange(S * B).view_as(targets) % vocab
    targets.view(-1)[labelled:] = -100
    hidden.requires_grad_()
    weight.requires_grad_()
    with _LargestOutput(vocab) as largest:
        head_loss(hidden, VocabShard(weight, None, vocab, Axis()), targets, chunk=chunk).backward()
    return largest.rows


def test_no_more_than_a_chunk_of_logits_exists() -> None:
    assert run_alone(_largest_logits, 97, 20, S * B) == 20  # more than H: the transposed weight has H rows
    assert run_alone(_largest_logits, 97, S * B, S * B) == S * B, "the meter must see whole logits where there are any"


def test_tokens_without_a_label_cost_no_logits() -> None:
    assert run_alone(_largest_logits, 97, S * B, 30) == 30


def _all_ignored() -> list[torch.Tensor]:
    hidden, weight, targets = problem(31)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = head_loss(hidden, VocabShard(weight, None, 31, Axis()), torch.full_like(targets, -100))
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


def test_no_labels_give_zero_not_nan() -> None:
    assert all(torch.count_nonzero(value) == 0 for value in run_alone(_all_ignored))


def _half(loss_scale: float) -> list[torch.Tensor]:
    """One frequent target and large hidden states: the weight's gradient of the plain sum is beyond fp16's range."""
    tokens = 4096
    hidden = torch.full((tokens, 1, H), 40.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(50, H, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(tokens, 1, dtype=torch.int64)
    loss = head_loss(hidden, VocabShard(weight, None, 50, Axis()), targets)
    (loss / tokens * loss_scale).backward()
    assert weight.grad is not None
    return [weight.grad.float() / loss_scale, torch.tensor(float(weight.grad.isinf().any()))]


def test_in_fp16_the_loss_scale_reaches_the_head() -> None:
    gradient, overflowed = run_alone(_half, 16.0)
    assert not overflowed
    torch.testing.assert_close(gradient[0], torch.full((H,), -40.0 * 49 / 50), rtol=1e-3, atol=0)
    _, overflowed = run_alone(_half, 2.0**14)
    assert overflowed, "too large a loss scale must show, so that it is lowered"


def test_fp16_gradients_have_a_power_of_two_that_neither_overflows_nor_loses_rare_tokens() -> None:
    """The logits' gradients are at most `multiplier`: scaled to within 2**14 and 2**15, whatever that is."""
    for multiplier in (1.0, 0.0625, 3.0, -0.5):
        half = VocabShard(torch.zeros(4, 2, dtype=torch.float16), None, 4, Axis(), LogitFinish(multiplier))
        scale = half.gradient_scale()
        assert math.log2(scale).is_integer() and 2**14 < scale * abs(multiplier) <= 2**15
        assert torch.tensor(multiplier * scale).half().isfinite()
    assert VocabShard(torch.zeros(4, 2), None, 4, Axis(), LogitFinish(3.0)).gradient_scale() == 1.0


def _in_half(dtype: torch.dtype, finish: LogitFinish, chunk: int | None) -> list[torch.Tensor]:
    """Gradients of tokens, labels' rows and other rows, of which all are improbable; and those of the same in fp64."""
    generator = torch.Generator().manual_seed(0)
    tokens, vocab, loss_scale = 64, 20_000, 1024.0
    hidden, weight = torch.randn(tokens, 1, H, generator=generator), 0.1 * torch.randn(vocab, H, generator=generator)
    targets = torch.randint(0, vocab, (tokens, 1), generator=generator)
    found = []
    for wanted in (dtype, torch.float64):
        one, other = (part.to(dtype).to(wanted).requires_grad_() for part in (hidden, weight))
        if wanted is dtype:
            loss = head_loss(one, VocabShard(other, None, vocab, Axis(), finish), targets, chunk=chunk)
        else:
            logits = (one.flatten(0, 1) @ other.t()).to(dtype).double() * finish.multiplier
            loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        (loss / tokens * loss_scale).backward()
        assert one.grad is not None and other.grad is not None
        other_rows = torch.ones(vocab, dtype=torch.bool)
        other_rows[targets.flatten()] = False
        found += [one.grad.double(), other.grad[~other_rows].double(), other.grad[other_rows].double()]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [None, 25])
@pytest.mark.parametrize("multiplier", [1.0, 0.0625])
def test_half_precision_gradients_differ_from_fp64_by_their_rounding(
    dtype: torch.dtype, chunk: int | None, multiplier: float
) -> None:
    """One rounding of the logits' gradients, and one of the results: 2**-9 in bf16, 2**-12 in fp16, each at most.

    Without the scale fp16 would have 4 bits of a probability of 1e-6, and 1e-8 would be zero.
    """
    ours = run_alone(_in_half, dtype, LogitFinish(multiplier), chunk)
    bound = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for found, expected in zip(ours[:3], ours[3:]):
        assert float((found - expected).norm() / expected.norm()) < bound


def _chunks(tokens: int, vocab: int, dtype: torch.dtype, budget: int, width: int = H) -> list[int]:
    """Sizes of the chunks of a head that a kernel computes."""
    shard = VocabShard(torch.zeros(vocab, width, dtype=dtype), None, vocab, Axis(), kernel=reference_cross_entropy)
    cross_entropy.LOGITS_BYTES = {"cpu": budget}  # the process ends with the test
    size = cross_entropy._chunk_tokens(tokens, shard, cross_entropy._Wanted(True, True, False))
    return [min(size, tokens - begin) for begin in range(0, tokens, size)]


def test_chunks_are_even_multiples_of_a_tile() -> None:
    two = torch.bfloat16
    row = 2 * 1000  # bytes of a token's logits
    assert run_alone(_chunks, 2560, 1000, two, 1024 * row) == [1024, 1024, 512]
    assert run_alone(_chunks, 2100, 1000, two, 1024 * row) == [768, 768, 564], "not 1024, 1024, 52"
    assert run_alone(_chunks, 2048, 1000, torch.float32, 1000 * 2 * row) == [768, 768, 512], "a multiple of 256"
    assert run_alone(_chunks, 600, 1000, two, row) == [256, 256, 88], "no less, however large the vocabulary is"
    assert run_alone(_chunks, 900, 1000, two, 1024 * row) == [900]
    assert run_alone(_chunks, 0, 1000, two, 1024 * row) == []


def test_one_chunk_may_weigh_what_the_fp32_sum_would() -> None:
    """In bf16, where the sum over chunks would exist beside the gradient: 2 bytes a logit, 4 a sum."""
    row, width = 2 * 1000, 512
    budget = 256 * row
    assert run_alone(_chunks, 256 + 2 * width, 1000, torch.bfloat16, budget, width) == [256 + 2 * width]
    assert run_alone(_chunks, 257 + 2 * width, 1000, torch.bfloat16, budget, width) == [256] * 5 + [1]
    assert len(run_alone(_chunks, 256 + width, 1000, torch.float32, 2 * budget, width)) == 3


def _aligned(grid: Grid, vocab: int) -> list[torch.Tensor]:
    cross_entropy.ALIGNMENT = {"cpu": 64}
    return _ours(grid, vocab, 20, PLAIN)


@pytest.mark.parametrize(("vocab", "tp"), [(37, 1), (160, 2)])
def test_columns_are_padded_to_multiples_that_tensor_cores_load(vocab: int, tp: int) -> None:
    """By copies of the rows: results are the same."""
    for found, expected in zip(
        run_grid(_aligned, Layout(tensor=tp), vocab), run_grid(_ours, Layout(tensor=tp), vocab, 20, PLAIN)
    ):
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    shard = VocabShard(torch.ones(37, H), torch.ones(37), 37, Axis())
    rows, offsets = run_alone(_operands, shard)
    assert rows.shape == (64, H) and not rows[37:].any() and offsets.shape == (64,) and not offsets[37:].any()


def _operands(shard: VocabShard) -> Any:
    cross_entropy.ALIGNMENT = {"cpu": 64}
    return list(shard.operands())


def _with_positions(labelled: bool) -> list[torch.Tensor]:
    hidden, weight, targets = problem(31)
    hidden.requires_grad_()
    weight.requires_grad_()
    found = (targets.flatten() != -100).nonzero().squeeze(1) if labelled else None
    loss = head_loss(hidden, VocabShard(weight, None, 31, Axis()), targets, found)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


def test_positions_of_labels_may_be_given() -> None:
    for found, expected in zip(run_alone(_with_positions, True), run_alone(_with_positions, False)):
        assert torch.equal(found, expected)
