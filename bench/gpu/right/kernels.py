"""Every candidate of every operation against PyTorch's formula, on its examples and on shapes of real models.

`python -m bench.gpu.right.kernels` checks those that are made at once, `... compiled` those that are compiled for each
kind of call.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from bench.gpu.record import DEVICE, guarded, pick, record, torch_device, wait_for_turn
from bench.gpu.right.chosen_kernels import write_choice
from megatron_ds.layers.kernels import KERNELS, AttentionCall, Candidate, Operation
from megatron_ds.layers.kernels.check import TOLERANCE, largest_error, supported_examples
from megatron_ds.layers.kernels.cross_entropy import LogitFinish, LossCall
from megatron_ds.layers.kernels.reference import Example, Random, RotaryCall, smaller_attention

TOKENS, HIDDEN, FFN = pick(2048, 64), pick(4096, 64), pick(14336, 128)
VOCAB = pick(128_256, 500)


def _attention(heads: int, kv_heads: int, dim: int, **options: Any) -> Example:
    """Return an example of attention with these options; tensors in them are replaced by random ones."""
    q, k = (torch.empty(1, 1, count, dim) for count in (heads, kv_heads))
    return smaller_attention(q, k, k, AttentionCall(dim**-0.5, **options))


def _learned_bias(random: Random, length: int) -> tuple[Any, ...]:
    """Return arguments of a T5 encoder's attention, at a length from which a kernel computes it."""
    call = AttentionCall(1.0, causal=False, distance_bias=random(8, 2 * length - 1).float())
    return random(length, 1, 8, 64), random(length, 1, 8, 64), random(length, 1, 8, 64), call


def _geglu(random: Random, approximation: str) -> tuple[Any, ...]:
    return random(TOKENS, 1, 2 * FFN), approximation


def _rotary(random: Random, positions: bool, adjacent: bool) -> tuple[Any, ...]:
    """Return arguments of rotary embeddings of 32 query and 8 key heads, at positions 0, 1, 2, ... or at given ones."""
    angles = random(TOKENS, 1, 1, 64)
    pairs = angles.repeat_interleave(2, dim=-1) if adjacent else torch.cat([angles, angles], dim=-1)
    at = torch.arange(TOKENS, device=angles.device).remainder(TOKENS // 3)[None] if positions else None
    return random(TOKENS, 1, 32, 128), random(TOKENS, 1, 8, 128), RotaryCall(pairs.cos(), pairs.sin(), at, adjacent)


def _loss(random: Random, **options: Any) -> tuple[Any, ...]:
    """Return arguments of a cross entropy over a vocabulary that is padded at its end."""
    logits = random(pick(256, 8), VOCAB + 64)
    labels = torch.arange(len(logits), device=logits.device) * 37 % VOCAB
    return logits, labels, LossCall(0, VOCAB, **options)


SOME = torch.empty(0)

LARGER: dict[str, tuple[Example, ...]] = {
    "rms_norm": (lambda random: (random(TOKENS, 1, HIDDEN), random(HIDDEN), 1e-5),),
    "add_rms_norm": (lambda random: (random(TOKENS, 1, HIDDEN), random(TOKENS, 1, HIDDEN), random(HIDDEN), 1e-5),),
    "fp32_rms_norm": (lambda random: (random(TOKENS, 1, HIDDEN), random(HIDDEN), 1e-6, 1.0),),
    "swiglu": (lambda random: (random(TOKENS, 1, 2 * FFN),),),
    "geglu": tuple(partial(_geglu, approximation=approximation) for approximation in ("none", "tanh")),
    "rotary": tuple(partial(_rotary, positions=given, adjacent=given) for given in (False, True)),
    "cross_entropy": (_loss, partial(_loss, finish=LogitFinish(0.5, 30.0), scale=4.0)),
    "attention": (
        _attention(32, 8, 128),
        _attention(32, 8, 128, window=40),
        _attention(8, 4, 256, softcap=50.0, window=40),
        _attention(8, 4, 256, softcap=50.0),
        _attention(8, 8, 64, key_mask=SOME),
        _attention(8, 8, 64, key_bias=SOME),
        _attention(8, 8, 64, causal=False, key_mask=SOME),
        _attention(8, 8, 64, causal=False, key_mask=SOME, window=40),
        _attention(64, 8, 64, sinks=SOME),
        _attention(64, 8, 64, sinks=SOME, window=40),
        lambda random: _learned_bias(random, pick(2048, 64)),
    ),
}
"""Arguments at the width of an 8 B model, by operation, and attention with each option; see `_compare`."""


def main() -> None:
    """Check the candidates that are made at once; an operation with a wrong one is computed by its first right one.

    The other parts read this choice.
    """
    choice: dict[str, str] = {}
    for operation in KERNELS.values():
        at_once = [name for name in operation.names if not operation[name].deferred]
        checked = {name: _check(operation, name, operation[name]) for name in at_once}
        right = [name for name, result in checked.items() if result]
        choice[operation.name] = "auto" if False not in checked.values() else right[0] if right else "torch"
        write_choice(choice)
    record("kernels", "chosen for the other parts", None, **choice)


def compiled() -> None:
    """Check the candidates that are compiled for each kind of call; a row for each, as that takes seconds."""
    for operation in KERNELS.values():
        for name in operation.names:
            candidate = operation[name]
            if not candidate.deferred:
                continue
            if DEVICE not in candidate.devices:
                record("kernels", f"{operation.name}, {name}", None, skipped=f"not for {DEVICE}")
                continue
            examples = [*LARGER.get(operation.name, ()), *operation.examples]
            for number, example in enumerate(supported_examples(operation, candidate, torch_device(), examples), 1):
                title = f"{operation.name}, {name}, call {number}"
                guarded("kernels", title, partial(_compare_one, operation, candidate, title, example))


def _compare_one(operation: Operation, candidate: Candidate, title: str, example: Example) -> None:
    error = largest_error(operation, candidate.make(), torch_device(), [example])
    record("kernels", title, error <= TOLERANCE, version=candidate.label, bound=TOLERANCE, call=error)


def _check(operation: Operation, name: str, candidate: Candidate) -> bool | None:
    """Check a candidate and record the result; None = it cannot run here."""
    title = f"{operation.name}, {name}"
    if DEVICE not in candidate.devices or not candidate.is_installed:
        reason = "not installed" if DEVICE in candidate.devices else f"not for {DEVICE}"
        record("kernels", title, None, skipped=reason)
        return None
    return bool(guarded("kernels", title, partial(_compare, operation, candidate, title)))


def _compare(operation: Operation, candidate: Candidate, title: str) -> bool:
    """Compare a candidate on the examples that it computes, and record the largest error on each kind of them."""
    device, kernel, errors = torch_device(), candidate.make(), {}
    for kind, examples in (("examples", operation.examples), ("real_shapes", LARGER.get(operation.name, ()))):
        supported = supported_examples(operation, candidate, device, examples)
        if supported:
            errors[kind] = largest_error(operation, kernel, device, supported)
    right = bool(errors) and all(error <= TOLERANCE for error in errors.values())
    record("kernels", title, right, version=candidate.label, bound=TOLERANCE, **errors)
    return right


if __name__ == "__main__":
    wait_for_turn()
    compiled() if sys.argv[1:] == ["compiled"] else main()
