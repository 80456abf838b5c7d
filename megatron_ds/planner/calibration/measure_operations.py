"""Times of products, attention and streams on this machine's devices, for profiles.

Every operation is called in each of several rounds, so that a disturbance of the machine reaches all of them alike. The
lower quartile over the rounds counts: what else the machine does makes times longer, never shorter. By how much it does
on average is one number for all of them, `steady_share`.

Operations are called as the layers call them: a product by `layers.products`, in the three layouts of a linear layer
(forward, and the gradients of its input and of its weight); attention on views of (S, B, N, D). A CPU's products in
fp32, and streams, get tensors that the caches do not hold, as few of a step's are, and what they return stays alive
until the next round, so that it does not stay in the caches either.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from megatron_ds.layers.products import multiply
from megatron_ds.planner.operations import Attention, Product, Stream

SHORTEST_S = 0.002
"""Calls are repeated until one measurement takes at least so long."""
ROUNDS = 5
STEADY_PARTS = 20
"""Parts of a long run that are timed one after the other."""
CACHE_BYTES, SMALL_BYTES = 64 << 20, 256 << 10
"""Bytes over which a stream is measured in turns, and those of a stream that is small enough to stay in a cache."""
NUM_LAYOUTS = 3
"""Layouts in which a product is measured: forward, and the gradients of its input and of its weight."""
GPU_CACHE_BYTES, MOST_COPIES = 256 << 20, 128
"""`CACHE_BYTES` of a GPU, whose cache is larger, and the most tensors of a stream that are measured in turns."""

Act = Callable[[], object]
Clock = Callable[[], float]


def undisturbed(times_s: Sequence[float]) -> float:
    """Return the lower quartile of measured seconds of an operation."""
    return statistics.quantiles(times_s, n=4)[0] if len(times_s) > 1 else times_s[0]


def steady_share(times_s: Sequence[Sequence[float]]) -> float:
    """Return the seconds of undisturbed operations divided by their mean seconds, of all operations."""
    return sum(map(undisturbed, times_s)) / sum(map(statistics.fmean, times_s))


def time_in_rounds(
    operations: Sequence[Product | Attention | Stream],
    device: torch.device,
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter,
    budget_s: float = math.inf,
) -> list[list[float]]:
    """Return the seconds of each operation in each round.

    Args:
        operations: to measure. A stream has one launch, and a name in `STREAMS`.
        device: that computes.
        rounds: number of times that all of them are measured.
        clock: seconds; `time.thread_time` counts those that one thread computes, whatever else the machine does.
        budget_s: no round is begun after so many seconds, but the first one.
    """
    times_s: list[list[float]] = [[] for _ in operations]
    calls = [0] * len(operations)
    began_s = time.monotonic()
    for number in range(rounds):
        if number and time.monotonic() - began_s > budget_s:
            break
        for index, operation in enumerate(operations):
            acts = prepare(operation, device)  # again in each round: all at once may not fit into memory
            _call(acts if not calls[index] else acts[:1], device)
            time_s = _time(acts, max(1, calls[index]), device, clock)
            if not calls[index]:
                calls[index] = max(1, int(SHORTEST_S / max(time_s * len(acts), 1e-9)))
                time_s = _time(acts, calls[index], device, clock) if calls[index] > 1 else time_s
            times_s[index].append(time_s)
    return times_s


def steady_speed(product: Product, device: torch.device, duration_s: float, clock: Clock = time.perf_counter) -> float:
    """Return the speed of a product after seconds without a pause, relative to that of a burst.

    Args:
        product: a large one, which the device's limit of power slows down.
        device: that computes.
        duration_s: seconds, of which the second half counts.
        clock: seconds.
    """
    acts = prepare(product, device)
    _time(acts, 1, device, clock)
    once_s = _time(acts, 1, device, clock) * len(acts)
    burst_s = _time(acts, max(1, int(SHORTEST_S / once_s)), device, clock)
    calls = max(1, int(duration_s / STEADY_PARTS / once_s))
    later_s = [_time(acts, calls, device, clock) for _ in range(STEADY_PARTS)][STEADY_PARTS // 2 :]
    return burst_s / statistics.mean(later_s)


def _time(acts: Sequence[Act], calls: int, device: torch.device, clock: Clock) -> float:
    """Return the mean seconds of one act."""
    _wait(device)
    began_s = clock()
    for _ in range(calls):
        _call(acts, device)
    _wait(device)
    return (clock() - began_s) / (calls * len(acts))


def _call(acts: Sequence[Act], device: torch.device) -> None:
    """Call all acts; on a CPU their results have memory of their own, which a GPU may lack."""
    if device.type == "cpu":
        [act() for act in acts]
    else:
        for act in acts:
            act()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(operation: Product | Attention | Stream, device: torch.device) -> Sequence[Act]:
    """Return functions that compute an operation, with their memory allocated."""
    match operation:
        case Product():
            return [act for _ in range(_product_copies(operation, device)) for act in _product(operation, device)]
        case Attention():
            return [_attention(operation, device)]
        case Stream():
            cache_bytes = CACHE_BYTES if device.type == "cpu" else GPU_CACHE_BYTES
            copies = min(MOST_COPIES, cache_bytes // operation.num_bytes) if operation.num_bytes > SMALL_BYTES else 1
            return [STREAMS[operation.name](operation.num_bytes, device) for _ in range(max(1, copies))]


def _product_copies(product: Product, device: torch.device) -> int:
    """Return the number of pairs of factors that are multiplied in turns, for each layout.

    Only a CPU's products in fp32 are so fast that it matters whether the cache has the factors.
    """
    moved = 4 * product.batch * (product.m * product.k + product.k * product.n + product.m * product.n)
    if device.type != "cpu" or product.dtype != "float32" or moved <= SMALL_BYTES:
        return 1
    return max(1, min(MOST_COPIES, CACHE_BYTES // (NUM_LAYOUTS * moved)))


def _product(product: Product, device: torch.device) -> Sequence[Act]:
    dtype = getattr(torch, product.dtype)
    m, n, k, batch = product.m, product.n, product.k, product.batch

    def factor(*shape: int) -> Tensor:
        return _numbers((batch, *shape) if batch > 1 else shape, dtype, device)

    compute = torch.bmm if batch > 1 else multiply
    forward = partial(compute, factor(m, k), factor(n, k).mT)
    of_input = partial(compute, factor(m, k), factor(k, n))
    of_weight = partial(compute, factor(k, m).mT, factor(k, n))
    return forward, of_input, of_weight


def _numbers(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random numbers, on which the power of a GPU depends; a CPU, which makes them slowly, gets ones."""
    if device.type == "cpu":
        return torch.ones(*shape, dtype=dtype)
    return torch.randn(*shape, device=device).to(dtype)


def _attention(attention: Attention, device: torch.device) -> Act:
    dtype, causal = getattr(torch, attention.dtype), attention.pairs < attention.queries * attention.keys
    heads = (attention.heads, attention.kv_heads, attention.kv_heads)
    lengths = (attention.queries, attention.keys, attention.keys)
    query, key, value = (
        _numbers((length, attention.rows, count, attention.head_dim), dtype, device)
        .permute(1, 2, 0, 3)
        .requires_grad_(attention.backward)
        for count, length in zip(heads, lengths)
    )
    grouped = attention.heads != attention.kv_heads
    if grouped and device.type == "cuda" and dtype == torch.float32:  # as layers do, see `Attention._by_torch`
        groups, grouped = attention.heads // attention.kv_heads, False
        key, value = (
            one.detach().repeat_interleave(groups, 1).requires_grad_(attention.backward) for one in (key, value)
        )
    mask = torch.zeros(attention.queries, attention.keys, dtype=dtype, device=device) if attention.masked else None
    compute = partial(
        functional.scaled_dot_product_attention, query, key, value, mask, is_causal=causal, enable_gqa=grouped
    )
    if not attention.backward:
        return compute
    out = compute()
    grad = torch.ones_like(out)
    return partial(torch.autograd.grad, out, (query, key, value), grad, retain_graph=True)


def _with_tensors(compute: Callable[..., object], moved: int, tensors: int = 1) -> Callable[[int, torch.device], Act]:
    """Return a function of bytes and device that makes a stream.

    Args:
        compute: the operation on tensors of one size.
        moved: number of such tensors that it reads and writes.
        tensors: number of its arguments.
    """

    def make(num_bytes: int, device: torch.device) -> Act:
        width = 512
        rows = max(1, num_bytes // (4 * moved * width))
        given = [_numbers((rows, width), torch.float32, device) for _ in range(tensors)]
        return partial(compute, *given)

    return make


def _adamw(num_bytes: int, device: torch.device) -> Act:
    """Return fused AdamW on fp32: it reads gradients, and reads and writes weights and two moments."""
    parameter = torch.nn.Parameter(_numbers((max(1, num_bytes // (4 * 7)),), torch.float32, device))
    parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([parameter], lr=1e-6, fused=True).step


def _rows_of(compute: Callable[[Tensor, Tensor, Tensor], object], num_tensors: int = 2) -> Callable[..., Act]:
    """Return a function of bytes and device that makes a stream of rows at given places.

    Args:
        compute: of a tensor (rows, 512), the places of all its rows in another order, and another tensor.
        num_tensors: number of such tensors that it reads and writes.
    """

    def make(num_bytes: int, device: torch.device) -> Act:
        rows = max(1, num_bytes // (4 * num_tensors * 512))
        places = torch.arange(rows, device=device).view(-1).flip(0)
        given = (_numbers((rows, 512), torch.float32, device) for _ in range(2))
        return partial(compute, next(given), places, next(given))

    return make


_silu_backward = torch.ops.aten.silu_backward
_gelu_backward = torch.ops.aten.gelu_backward
_safe_softmax = torch.ops.aten._safe_softmax
_softmax_backward = torch.ops.aten._softmax_backward_data
STREAMS: dict[str, Callable[[int, torch.device], Act]] = {
    "": _with_tensors(torch.add, 3, 2),
    "add_": _with_tensors(Tensor.add_, 3, 2),
    "mul": _with_tensors(torch.mul, 3, 2),
    "copy_": _with_tensors(Tensor.copy_, 2, 2),
    "clone": _with_tensors(torch.clone, 2),
    "zero_": _with_tensors(Tensor.zero_, 1),
    "sum": _with_tensors(torch.sum, 1),
    "pow": _with_tensors(partial(torch.pow, exponent=2), 2),
    "exp": _with_tensors(torch.exp, 2),
    "silu": _with_tensors(functional.silu, 2),
    "silu_backward": _with_tensors(_silu_backward, 3, 2),
    "gelu": _with_tensors(functional.gelu, 2),
    "gelu_backward": _with_tensors(_gelu_backward, 3, 2),
    "gelu_tanh": _with_tensors(partial(functional.gelu, approximate="tanh"), 2),
    "gelu_tanh_backward": _with_tensors(partial(_gelu_backward, approximate="tanh"), 3, 2),
    "_safe_softmax": _with_tensors(partial(_safe_softmax, dim=-1), 2),
    "_softmax_backward_data": _with_tensors(lambda grad, out: _softmax_backward(grad, out, -1, torch.float32), 3, 2),
    "_softmax": _with_tensors(partial(torch.softmax, dim=-1), 2),
    "_log_softmax": _with_tensors(partial(torch.log_softmax, dim=-1), 2),
    "native_layer_norm": _with_tensors(partial(functional.layer_norm, normalized_shape=(512,)), 2),
    "cat": _with_tensors(lambda a, b: torch.cat([a, b]), 4, 2),
    "index_select": _rows_of(lambda x, places, _: x.index_select(0, places)),
    "index_copy_": _rows_of(lambda x, places, given: x.index_copy_(0, places, given)),
    "index_add_": _rows_of(lambda x, places, given: x.index_add_(0, places, given)),
    "bernoulli_": _with_tensors(Tensor.bernoulli_, 1),
    "norm": _with_tensors(torch.linalg.vector_norm, 1),
    "adamw": _adamw,
}
"""Streams by name, of tensors with rows of 512 elements in fp32: tensors that are read and written, arguments. The
first one stands for all names that are not here. The names are torch's, and those of `planner.timing.engine_work`."""
