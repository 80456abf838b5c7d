"""Training systems by what they do differently: kernels, precision, what they overlap, and how they divide state.

A model's layers are traced once, as this package computes them. A `System` rewrites the traces: a system of 2021 writes
the scores of its attention to memory, one of 2024 multiplies in fp8, another gathers each layer's weights before it
computes. The settings are those of systems, which the papers and recipes of the systems describe, not those of runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ds.planner.operations import Attention, Collective, LayerTrace, Operation, Product, Stream, Work
from megatron_ds.planner.profiles.device import Device

FP8 = "float8_e4m3fn"
_HALVES = ("bfloat16", "float16")
AttentionKernel = Literal["unfused", "flash1", "flash2", "newest"]
State = Literal["replicated", "zero1", "distributed", "sharded"]


@dataclass(frozen=True)
class System:
    """Kernels, precision, overlap and division of state of a training system.

    Attributes:
        name: of it.
        attention: its kernel. "unfused" writes the scores to memory, in half precision; "newest" is the one that device
            profiles describe, FlashAttention-2 on A100, and FlashAttention-3 or cuDNN 9 on newer devices.
        drops_scores: unfused attention has dropout.
        fp8: products of blocks in half precision are in fp8; routers, which are in fp32, are not.
        fuses_gradients: products add gradients of weights to fp32 sums. Otherwise sums in `gradient_bytes` are another
            pass over memory in each micro-batch.
        gradient_bytes: of an element of these sums, and of what is reduced over data ranks.
        hides_tensor: "backward": the gradient's collective hides behind the weight's product, as this package does;
            "none"; "chunks": collectives run in `num_tensor_chunks` parts behind the products that they feed, and one
            part remains.
        schedule: "1f1b" or "deepspeed" of one chunk a rank; more chunks are interleaved.
        hides_messages: interleaved schedules send while they compute. Others wait for messages.
        splits_messages: without sequence parallelism each tensor rank sends its part, which are then gathered.
        state: "replicated": all-reduce of gradients; "zero1": the same, and a gather of weights (DeepSpeed);
            "distributed": reduce-scatter and gather (Megatron's distributed optimizer); "sharded": weights are gathered
            for each layer (FSDP, ZeRO-3), but only once a step where there are pipeline stages.
        hides_state: these run behind the first forward and the last backward pass.
    """

    name: str
    attention: AttentionKernel = "newest"
    drops_scores: bool = False
    fp8: bool = False
    fuses_gradients: bool = True
    gradient_bytes: int = 4
    hides_tensor: Literal["none", "backward", "chunks"] = "backward"
    schedule: Literal["1f1b", "deepspeed"] = "1f1b"
    hides_messages: bool = False
    splits_messages: bool = True
    state: State = "replicated"
    hides_state: bool = False


_SPEEDS: dict[tuple[AttentionKernel, bool], tuple[float, float]] = {
    ("flash1", False): (0.65, 0.65),
    ("flash1", True): (0.32, 0.30),
    ("flash2", True): (0.58, 0.60),
}


def attention_speed(system: System, device: Device) -> tuple[float, float]:
    """Return the speed of a system's attention kernels relative to the newest ones, forward and backward.

    FlashAttention-1 reaches about 110 TFLOP/s on A100 where 2 reaches 170 (Dao 2023). FlashAttention-2 reaches 328
    TFLOP/s on H100 (Azure/AI-benchmarking-guide), where 3 and cuDNN 9 reach 570 to 650 (Shah et al. 2024).
    """
    has_fp8 = device.peak_flops(FP8) > device.peak_flops("bfloat16")
    return _SPEEDS.get((system.attention, has_fp8), (1.0, 1.0))


TENSOR_CHUNKS = 4
"""Parts in which collectives of a tensor axis hide behind products (Megatron-Bridge, performance guide)."""
SCORE_BYTES, MASK_BYTES = 2, 1


def apply(system: System, trace: LayerTrace, recompute: str = "none") -> LayerTrace:
    """Return a layer's trace as a system computes it.

    Args:
        system: to apply.
        trace: of the layer as this package computes it, without recomputation.
        recompute: "none", "full" (of blocks), "selective" (of the scores of unfused attention, and what reads them), or
            "half" (every other product, and all that memory limits).
    """
    forward, backward = _pass(system, trace, trace.forward), _pass(system, trace, trace.backward, backward=True)
    again = Work()
    if trace.is_block:
        again = _repeated(system, trace.forward, forward, recompute)
    return replace(trace, forward=forward, backward=backward + again, recompute=again)


def _repeated(system: System, traced: Work, forward: Work, recompute: str) -> Work:
    if recompute == "full":
        return forward
    if recompute == "selective" and system.attention == "unfused":
        return _sum(_unfused(system, one).times(count) for one, count in traced.items() if isinstance(one, Attention))
    if recompute == "half":
        return Work({one: _half(one, count) for one, count in forward.items() if not isinstance(one, Attention)})
    return Work()


def _half(one: Operation, count: int) -> int:
    return count - count // 2 if isinstance(one, Product) else count


def _pass(system: System, trace: LayerTrace, work: Work, *, backward: bool = False) -> Work:
    found = Work()
    for one, count in work.items():
        if isinstance(one, Attention) and system.attention == "unfused":
            found += _unfused(system, one).times(count)
        elif isinstance(one, Product) and system.fp8 and trace.is_block and one.dtype in _HALVES:
            found += Work({replace(one, dtype=FP8): count})
        elif isinstance(one, Collective) and one.axis == "tensor":
            found += _tensor(system, one, count, backward)
        else:
            found[one] += count
    if system.fp8 and trace.is_block:
        found += _casts(trace.forward, backward)
    return found


def _unfused(system: System, one: Attention) -> Work:
    """Return attention that writes its scores to memory: all pairs, products, and streams of a softmax with dropout."""
    heads = one.rows * one.heads
    pairs = heads * one.queries * one.keys
    to_scores = Product(one.queries, one.keys, one.head_dim, heads, one.dtype)
    from_scores = Product(one.queries, one.head_dim, one.keys, heads, one.dtype)
    drops = int(system.drops_scores)
    dropped = Stream(pairs * (2 * SCORE_BYTES + MASK_BYTES))
    values = heads * one.head_dim
    if one.backward:
        work = Work({to_scores: 2, from_scores: 2, Stream(pairs * 3 * SCORE_BYTES): 1})
        return work + Work({dropped: drops, Stream(2 * SCORE_BYTES * values * (one.queries + 2 * one.keys)): 1})
    work = Work({to_scores: 1, from_scores: 1, Stream(pairs * 2 * SCORE_BYTES): 1})
    return work + Work({dropped: drops, Stream(2 * SCORE_BYTES * values * one.queries): 1})


def _tensor(system: System, one: Collective, count: int, backward: bool) -> Work:
    if system.hides_tensor == "none":
        return Work({replace(one, hidden=False): count})
    if system.hides_tensor == "chunks" and one.num_bytes > 1 << 20:
        left = replace(one, num_bytes=one.num_bytes // TENSOR_CHUNKS, hidden=False)
        return Work({left: count}) if not one.hidden else Work()
    return Work({one: count})


def _casts(forward: Work, backward: bool) -> Work:
    """Return the casts to fp8 of what products multiply: read in 2 bytes, written as rows and as columns."""
    found = Work()
    for one, count in forward.items():
        if isinstance(one, Product) and one.dtype in _HALVES:
            elements = one.batch * one.m * (one.n if backward else one.k)
            found[Stream(4 * elements)] += count
    return found


def _sum(each: Iterator[Work]) -> Work:
    found = Work()
    for one in each:
        found += one
    return found


def gradient_work(system: System, num_elements: int) -> Work:
    """Return what a micro-batch does with the gradients of a layer's weights after their products."""
    if system.fuses_gradients or num_elements == 0:
        return Work()
    return Work({Stream(num_elements * (2 + 2 * system.gradient_bytes), launches=4): 1})


def gathered(system: System, trace: LayerTrace, weights: dict[str, tuple[int, int]]) -> LayerTrace:
    """Return a layer's trace with the gathers of its weights and the reductions of their gradients.

    Args:
        system: of state "sharded".
        trace: of the layer.
        weights: axis -> number of elements of this rank's part of the model that the axis divides, and its ranks.
    """
    if system.state != "sharded":
        return trace
    forward, backward = Work(trace.forward), Work(trace.backward)
    for axis, (num, ranks) in weights.items():
        if ranks > 1 and num:
            gather = Collective("all_gather", axis, 2 * num, ranks, hidden=True)
            forward[gather] += 1
            backward[gather] += 1
            backward[Collective("reduce_scatter", axis, system.gradient_bytes * num, ranks, hidden=True)] += 1
    return replace(trace, forward=forward, backward=backward)


def update_work(system: System, weights: dict[str, tuple[int, int]]) -> tuple[Work, Work]:
    """Return the communication and the streams of a step's end, after all micro-batches.

    Adam reads and writes fp32 weights and two moments, reads fp32 gradients and writes weights in half precision: 30
    bytes of an element of a rank's part; norm and scaling of gradients read and write those that the rank has.
    """
    sent, streams = Work(), Work()
    for axis, (num, ranks) in weights.items():
        part = num if system.state == "replicated" else num // ranks
        local = part if system.state == "sharded" else num
        streams[Stream(30 * part + 2 * system.gradient_bytes * local)] += 1
        if ranks == 1 or not num:
            continue
        grads = Collective("all_reduce", axis, system.gradient_bytes * num, ranks, hidden=system.hides_state)
        gather = Collective("all_gather", axis, 2 * num, ranks, hidden=system.hides_state)
        if system.state in ("replicated", "zero1"):
            sent[grads] += 1
        if system.state == "distributed":
            sent[replace(grads, kind="reduce_scatter")] += 1
        if system.state in ("zero1", "distributed"):
            sent[gather] += 1
    return sent, streams
