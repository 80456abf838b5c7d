"""Which implementation computes what: one table.

PyTorch's are the reference and the default. On a GPU, libraries that are installed take their place, each after it has
shown on a small input that it computes the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.errors import ConfigError


@dataclass(frozen=True)
class AttentionCall:
    """What one attention asks for, beside q (S, B, N, D), k and v (S, B, K, D), N a multiple of K.

    Attributes:
        scale: of the scores.
        window: a query sees this many last keys; None = all.
        softcap: of the scores; None = none.
        positions: (B, S), 0 where a document begins; None = one document a row.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    positions: Tensor | None = None


RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
"""(x, weight, eps) -> weight * (x / rms(x)), the quotient in fp32 and cast down before the product, as Llama does."""
Gated = Callable[[Tensor], Tensor]
"""(..., 2F), gate first -> silu(gate) * up, (..., F)."""
CausalAttention = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
"""(S, B, N, D), (S, B, K, D) twice -> (S, B, N, D)."""


@dataclass(frozen=True)
class Kernels:
    """What layers compute with; None = PyTorch, as the layer has it.

    Attributes:
        rms_norm: of hidden states and heads.
        swiglu: the gated silu.
        attention: causal, without a mask of keys or biases by distance, in half precision.
        names: for people: what is not PyTorch, and of which version.
    """

    rms_norm: RMSNorm | None = None
    swiglu: Gated | None = None
    attention: CausalAttention | None = None
    names: tuple[str, ...] = ()


REFERENCE = Kernels()
"""PyTorch alone."""


def liger_rms_norm() -> RMSNorm:
    """Liger's; forward and backward in one pass each."""
    function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return lambda x, weight, eps: function.apply(x, weight, eps, 0.0, "llama", False)


def liger_swiglu() -> Gated:
    """Liger's, of halves that lie side by side."""
    function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction

    def swiglu(wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return function.apply(gate, up)

    return swiglu


def flash_attention() -> CausalAttention:
    """flash-attn's (Dao 2023): no copy in front of it, and documents that share a row without a mask of S x S."""
    library = importlib.import_module("flash_attn")

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        options: dict[str, Any] = {
            "softmax_scale": call.scale,
            "causal": True,
            "window_size": (-1, -1) if call.window is None else (call.window - 1, 0),
            "softcap": call.softcap or 0.0,
        }
        if call.positions is None:
            return library.flash_attn_func(q, k, v, **options).transpose(0, 1)
        batch, length = call.positions.shape
        begins = (call.positions.flatten() == 0).nonzero().flatten().to(torch.int32)
        bounds = F.pad(begins, (0, 1), value=batch * length)
        rows = (part.flatten(0, 1) for part in (q, k, v))
        y = library.flash_attn_varlen_func(*rows, bounds, bounds, length, length, **options)
        return y.unflatten(0, (batch, length)).transpose(0, 1)

    return attend


# ---- the references that candidates are held against -----------------------------------------------------------------


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `RMSNorm` says; torch's own norm is fp32 inside."""
    return weight * F.rms_norm(x, (x.shape[-1],), None, eps)


def reference_swiglu(wide: Tensor) -> Tensor:
    """As `Gated` says."""
    gate, up = wide.chunk(2, dim=-1)
    return F.silu(gate) * up


def reference_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """The formula, written out."""
    length, heads = q.shape[0], q.shape[2]
    q, k, v = (part.permute(1, 2, 0, 3).float() for part in (q, k, v))
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if call.window is not None:
        seen = seen.triu(1 - call.window)
    if call.positions is not None:
        documents = (call.positions == 0).cumsum(1)
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).permute(2, 0, 1, 3)


def _norm_input(random: Callable[..., Tensor]) -> tuple[Any, ...]:
    return random(3, 2, 64), random(64), 1e-5


def _gated_input(random: Callable[..., Tensor]) -> tuple[Any, ...]:
    return (random(3, 2, 64),)


def _attention_input(random: Callable[..., Tensor]) -> tuple[Any, ...]:
    call = AttentionCall(0.3, softcap=2.0)
    return random(8, 2, 4, 64), random(8, 2, 2, 64), random(8, 2, 2, 64), call


def _documents_input(random: Callable[..., Tensor]) -> tuple[Any, ...]:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0]], device=random(1).device)
    call = AttentionCall(0.3, window=3, positions=positions)
    return random(8, 2, 4, 64), random(8, 2, 2, 64), random(8, 2, 2, 64), call


@dataclass(frozen=True)
class Candidate:
    """A line of the table.

    Attributes:
        operation: a field of `Kernels`.
        package: that is imported, where it is installed.
        distribution: its name for pip.
        make: the kernel out of it.
        reference: what it must equal.
        examples: its arguments out of random tensors.
    """

    operation: str
    package: str
    distribution: str
    make: Callable[[], Callable[..., Tensor]]
    reference: Callable[..., Tensor]
    examples: tuple[Callable[[Callable[..., Tensor]], tuple[Any, ...]], ...]

    @property
    def version(self) -> str | None:
        """Of what is installed; None = nothing is."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:  # a folder of that name, left by another distribution
            return None


TABLE = (
    Candidate("rms_norm", "liger_kernel", "liger-kernel", liger_rms_norm, reference_rms_norm, (_norm_input,)),
    Candidate("swiglu", "liger_kernel", "liger-kernel", liger_swiglu, reference_swiglu, (_gated_input,)),
    Candidate(
        "attention",
        "flash_attn",
        "flash-attn",
        flash_attention,
        reference_attention,
        (_attention_input, _documents_input),
    ),
)
TOLERANCE = 2e-2  # relative to the largest, in bf16: a rounding is 4e-3


def select_kernels(wanted: str, device: torch.device, table: tuple[Candidate, ...] = TABLE) -> Kernels:
    """What to compute with on a device.

    Args:
        wanted: "auto" = libraries that are there, on CUDA; "torch" = the reference.
        device: where.
        table: of candidates.

    Raises:
        ConfigError: a library cannot be loaded, or computes something else.
    """
    kernels = REFERENCE
    if wanted == "torch" or device.type != "cuda":
        return kernels
    for candidate in table:
        if find_spec(candidate.package) is not None and candidate.version is not None:
            kernel = validated(candidate, device)
            name = f"{candidate.operation}: {candidate.distribution} {candidate.version}"
            kernels = replace(kernels, **{candidate.operation: kernel}, names=(*kernels.names, name))
    return kernels


def validated(candidate: Candidate, device: torch.device) -> Callable[..., Tensor]:
    """The kernel, if results and gradients on small inputs are the reference's."""
    name = f"train.kernels=auto: {candidate.distribution} {candidate.version}, {candidate.operation}"
    nearest = f"nearest: train.kernels=torch, or without {candidate.distribution}"
    try:
        kernel = candidate.make()
        ours, theirs = (_with_gradients(one, candidate, device) for one in (candidate.reference, kernel))
    except Exception as problem:  # whatever an installation that does not fit its GPU raises
        reason = " ".join([f"{type(problem).__name__}:", *str(problem).splitlines()[:1]])
        raise ConfigError(f"{name}: {reason}; {nearest}") from problem
    for expected, found in zip(ours, theirs, strict=True):
        apart = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
        if not apart <= TOLERANCE:
            raise ConfigError(f"{name}: differs from PyTorch by {apart:.1e} of the largest value; {nearest}")
    return kernel


def _with_gradients(kernel: Callable[..., Tensor], candidate: Candidate, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    found = []
    for example in candidate.examples:
        arguments = example(random)
        leaves = [one.requires_grad_() for one in arguments if isinstance(one, Tensor)]
        result = kernel(*arguments)
        grads = torch.autograd.grad(result, leaves, random(*result.shape).to(result.dtype))
        found += [result.detach(), *grads]
    return found
