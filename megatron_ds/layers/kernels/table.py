"""The table of operations and of the candidates that may compute each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from megatron_ds.layers.kernels.by_call import KernelsByCall
from megatron_ds.layers.kernels.cross_entropy import CrossEntropy, capped_input, reference_cross_entropy, wide_input
from megatron_ds.layers.kernels.reference import (
    AddRMSNorm,
    AttentionKernel,
    Example,
    FP32RMSNorm,
    Gated,
    GeGLU,
    RMSNorm,
    Rotary,
    add_norm_input,
    attention_input,
    attention_variant,
    bounds_input,
    documents_input,
    documents_rotary_input,
    fp32_norm_input,
    gated_input,
    gelu_gated_input,
    gelu_tanh_gated_input,
    heads_norm_input,
    is_plain_attention,
    last_queries_input,
    norm_input,
    reference_add_rms_norm,
    reference_attention,
    reference_fp32_rms_norm,
    reference_geglu,
    reference_rms_norm,
    reference_rotary,
    reference_swiglu,
    rotary_input,
    sinks_input,
    smaller_attention,
)
from megatron_ds.registry import Registry


@dataclass(frozen=True)
class Kernels:
    """The kernels that layers use; None = the layer's own PyTorch code.

    Attributes:
        rms_norm: RMSNorm of hidden states and heads, as Llama rounds it.
        swiglu: the gated SiLU.
        attention: attention in half precision: one kernel for plain calls, or several, chosen call by call.
        cross_entropy: losses and gradients of the output head's logits.
        add_rms_norm: the residual sum and its RMSNorm.
        fp32_rms_norm: RMSNorm of hidden states and heads, as Gemma and OLMo 2 round it.
        geglu: the gated GELU.
        rotary: rotation of queries and keys.
        names: the kernels in use that are not PyTorch's, with their versions, for the log.
    """

    rms_norm: RMSNorm | None = None
    swiglu: Gated | None = None
    attention: AttentionKernel | KernelsByCall | None = None
    cross_entropy: CrossEntropy | None = None
    add_rms_norm: AddRMSNorm | None = None
    fp32_rms_norm: FP32RMSNorm | None = None
    geglu: GeGLU | None = None
    rotary: Rotary | None = None
    names: tuple[str, ...] = ()


REFERENCE = Kernels()
"""PyTorch alone."""


@dataclass(frozen=True)
class Candidate:
    """An implementation of an operation.

    Attributes:
        package: the Python package that it needs.
        make: () -> the kernel; called only for a device that it runs on.
        distribution: the package's name for pip, whose version is logged; None = it is not installed by pip.
        devices: the device types that it runs on, by torch's names.
        supports: (the kernel's arguments) -> whether it computes this call; None = as the operation says.
        deferred: it is made and checked at its first call instead of at the start, because that takes long.
    """

    package: str
    make: Callable[[], Callable[..., Any]]
    distribution: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    supports: Callable[..., bool] | None = None
    deferred: bool = False

    @property
    def is_installed(self) -> bool:
        """True if its package is installed; a folder of that name, left by another distribution, is not enough."""
        # in this order: to look for a module inside a package imports the package
        return (self.distribution is None or self.version is not None) and find_spec(self.package) is not None

    @property
    def version(self) -> str | None:
        """Version of the distribution; None = not installed, or no distribution is named."""
        try:
            return version(self.distribution) if self.distribution is not None else None
        except PackageNotFoundError:
            return None

    @property
    def label(self) -> str:
        """Name and version, for the log and errors."""
        return " ".join(filter(None, [self.distribution or self.package, self.version]))


class Operation(Registry[Candidate]):
    """An operation of the layers, and the candidates that may compute it, by name.

    Args:
        name: a field of `Kernels`.
        reference: PyTorch's formula, which every candidate must match. It returns a tensor or a tuple of them.
        examples: functions that make the arguments of the comparison from random tensors.
        differentiable: whether autograd differentiates it; False = it returns its gradients among its results.
        supports: (the kernel's arguments) -> whether a candidate that does not say computes this call. With it the
            kernels are chosen call by call; None = every candidate computes every call.
        variant, smaller: for candidates that are deferred, (the kernel's arguments) -> the options of the call that are
            checked, and an example with the same options.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        examples: tuple[Example, ...],
        differentiable: bool = True,
        supports: Callable[..., bool] | None = None,
        variant: Callable[..., Hashable] | None = None,
        smaller: Callable[..., Example] | None = None,
    ) -> None:
        super().__init__(f"{name} kernel")
        self.name, self.reference, self.examples, self.differentiable = name, reference, examples, differentiable
        self.supports, self.variant, self.smaller = supports, variant, smaller


KERNELS: Mapping[str, Operation] = {
    "rms_norm": Operation("rms_norm", reference_rms_norm, (norm_input, heads_norm_input)),
    "swiglu": Operation("swiglu", reference_swiglu, (gated_input,)),
    "attention": Operation(
        "attention",
        reference_attention,
        (attention_input, documents_input, bounds_input, sinks_input, last_queries_input),
        supports=is_plain_attention,
        variant=attention_variant,
        smaller=smaller_attention,
    ),
    "cross_entropy": Operation("cross_entropy", reference_cross_entropy, (wide_input, capped_input), False),
    "add_rms_norm": Operation("add_rms_norm", reference_add_rms_norm, (add_norm_input,)),
    "fp32_rms_norm": Operation("fp32_rms_norm", reference_fp32_rms_norm, (fp32_norm_input,)),
    "geglu": Operation("geglu", reference_geglu, (gelu_gated_input, gelu_tanh_gated_input)),
    "rotary": Operation("rotary", reference_rotary, (rotary_input, documents_rotary_input)),
}
