"""Our Triton kernel of the cross entropy, in Triton's interpreter where there is no GPU: against PyTorch and fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.cross_entropy import LogitFinish, VocabShard, head_loss
from megatron_ds.layers.kernels import KERNELS, LossCall
from megatron_ds.layers.kernels.check import validated
from megatron_ds.parallel.grid import Axis, Grid, Layout
from tests.layers.ahead_of_time import Compiled, compile_for
from tests.layers.kernel_errors import device
from tests.layers.test_cross_entropy import problem
from tests.ranks import run_alone, run_grid

OPERATION = KERNELS["cross_entropy"]
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}  # the interpreter cuts bf16 off
FINISHES = [LogitFinish(), LogitFinish(0.125), LogitFinish(softcap=3.0), LogitFinish(2.0, 2.0)]


def kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    return OPERATION["triton"].make()(*arguments)


def exact(logits: Tensor, labels: Tensor, call: LossCall) -> tuple[Tensor, Tensor]:
    """Losses and gradients of the first `valid` columns by autograd in fp64."""
    raw = logits[:, : call.valid].double().requires_grad_()
    final = raw * call.finish.multiplier
    if (cap := call.finish.softcap) is not None:
        final = torch.tanh(final / cap) * cap
    losses = F.cross_entropy(final, labels, reduction="none")
    (losses.sum() * call.scale).backward()
    assert raw.grad is not None
    return losses.detach(), raw.grad


def _equal_fp64(valid: int, width: int, dtype: torch.dtype, finish: LogitFinish) -> None:
    generator = torch.Generator().manual_seed(valid)
    logits = (3.0 * torch.randn(3, width + 3, generator=generator)).to(device(), dtype)[:, :width]
    labels = torch.tensor([0, valid // 2, valid - 1], device=device())
    call = LossCall(0, valid, finish=finish, scale=4.0)
    losses, expected = exact(logits, labels, call)
    bound = ROUNDING[dtype] * call.scale * finish.multiplier
    for compute in (kernel, OPERATION.reference):
        found, grad = compute(logits.clone(), labels, call)
        torch.testing.assert_close(found.double(), losses, rtol=2e-6, atol=2e-6)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad[:, :valid].double(), expected, rtol=0.0, atol=bound)
        assert not grad[:, valid:].any(), "padding has no gradient"


def _all_equal_fp64(valid: int, width: int) -> None:
    for dtype in ROUNDING:
        for finish in FINISHES:
            _equal_fp64(valid, width, dtype, finish)


@pytest.mark.parametrize(("valid", "width"), [(1, 1), (5, 5), (37, 64), (8191, 8192), (8193, 8256)])
def test_losses_and_gradients_equal_fp64(valid: int, width: int) -> None:
    """At odd widths, with padding, and where a row is a little longer than a program reads at a time."""
    run_alone(_all_equal_fp64, valid, width)


def _in_a_buffer() -> Tensor:
    buffer = torch.full((4, 80), 7.0, device=device())
    kernel(buffer[1:3, :50], torch.tensor([3, 49], device=device()), LossCall(0, 45))
    return buffer


def test_rows_beside_the_logits_are_not_written() -> None:
    """The buffer of a chunk is longer than the logits of the last chunk, and its rows may be further apart."""
    buffer = run_alone(_in_a_buffer)
    assert (buffer[[0, 3]] == 7.0).all() and (buffer[:, 50:] == 7.0).all()


def _losses_with(bad: float) -> Tensor:
    logits = torch.zeros(2, 40, device=device())
    logits[1, 17] = bad
    return kernel(logits, torch.tensor([3, 4], device=device()), LossCall(0, 40))[0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_reaches_the_loss() -> None:
    for bad in (torch.nan, torch.inf):
        assert run_alone(_losses_with, bad).isfinite().tolist() == [True, False]


def _shards(grid: Grid, vocab: int, finish: LogitFinish, triton: bool) -> list[Tensor]:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, vocab), torch.randint(0, vocab, (6,))
    axis, width = grid.tensor, -(-vocab // grid.tensor.size)
    start = min(axis.rank * width, vocab)
    valid = min(start + width, vocab) - start
    own = F.pad(logits[:, start : start + valid], (0, width - valid), value=torch.nan).to(device())
    call = LossCall(start, valid, axis, finish)
    return list((kernel if triton else OPERATION.reference)(own, labels.to(device()), call))


@pytest.mark.parametrize(("vocab", "tensor"), [(37, 2), (5, 4), (2, 4)])
def test_on_a_divided_vocabulary_equals_pytorch(vocab: int, tensor: int) -> None:
    """Padding on the last rank, and a rank of which all columns are padding; their logits may be anything."""
    for finish in (FINISHES[0], FINISHES[-1]):
        ours, theirs = (run_grid(_shards, Layout(tensor=tensor), vocab, finish, triton) for triton in (True, False))
        for found, expected in zip(ours, theirs):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found[0], ours[0][0], rtol=0.0, atol=0.0)


def _half_head(triton: bool) -> list[Tensor]:
    hidden, weight, targets = (one.to(device()) for one in problem(50))
    shard = weight.bfloat16().requires_grad_()
    hidden = hidden.bfloat16().requires_grad_()
    head = VocabShard(shard, None, 50, Axis(), kernel=kernel if triton else None)
    loss = head_loss(hidden, head, targets, chunk=20)
    loss.backward()
    assert hidden.grad is not None and shard.grad is not None
    return [loss.detach(), hidden.grad, shard.grad]


def test_the_head_uses_it() -> None:
    """In bf16, over chunks."""
    ours, theirs = run_alone(_half_head, True), run_alone(_half_head, False)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0.0)
    for found, expected in zip(ours[1:], theirs[1:]):
        torch.testing.assert_close(found, expected, rtol=2.0**-6, atol=2.0**-6)
        assert not torch.equal(found, expected), "both used one of them"


def _is_accepted() -> bool:
    return callable(validated(OPERATION, OPERATION["triton"], device()))


def test_the_check_at_the_start_accepts_it() -> None:
    assert run_alone(_is_accepted)


POINTERS = {"logits": "*bf16", "labels": "*i64"}
SIZES = dict.fromkeys(("stride", "start", "valid"), "i32")
NUMBERS = dict.fromkeys(("multiplier", "softcap", "scale", "losses", "peaks", "totals", "picked"), "fp32")
FP32 = dict.fromkeys(("losses", "peaks", "totals", "picked"), "*fp32")


def test_it_compiles_for_gpus_without_spilling_registers() -> None:
    """For A100 and H100, at a large vocabulary: `valid` and `start` are any numbers, sizes multiples of 16."""
    signature = {**POINTERS, **SIZES, **NUMBERS, **FP32}
    fixed = {"HAS_CAP": True, "WIDTH": 50_304, "BLOCK": 8192}
    names = {"whole_rows": {"WANTS_GRADIENT": True}, "part_statistics": {}, "part_gradients": {}}
    kernels = [
        Compiled(f"cross_entropy:{name}", signature, {**fixed, **more}, num_warps=16, unaligned=("valid", "start"))
        for name, more in names.items()
    ]
    for one, usages in zip(kernels, compile_for((80, 90), kernels)):
        for usage in usages:
            assert usage.spilled_bytes == 0 and usage.registers <= 64, (
                one.kernel,
                usage,
            )  # two programs of 512 threads
