"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024), and AdamW for all other parameters.

The matrices are those of the linear maps inside of a model, one by one: queries, keys and values, gate and up, those of
each expert. Embeddings, output heads, norms, biases and other vectors are AdamW's, as in Moonlight (Liu et al. 2025);
the weights of routers are matrices, as in GLM-4.5 (2025) and Megatron-LM. `ParamSpec.matrices` declares them.

The momentum of an element lies where DeepSpeed has its master weight. What is orthogonalised is a whole matrix, which
`MatrixExchange` brings to one rank and back, in the dtype of the orthogonalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.matrix_exchange import MatrixExchange, MatrixKey, Transfer
from megatron_ds.engine.optimizers.adamw import FUSED
from megatron_ds.engine.optimizers.guarded import ADAM_STATE, LR_FACTOR, OPTIMIZERS, STEPS, GuardedOptimizer, Place
from megatron_ds.engine.optimizers.newton_schulz import COEFFICIENTS, orthogonalize
from megatron_ds.errors import ConfigError, show
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import Grid

MATRICES = "matrices"
"""Key of a parameter group: its parameters consist of matrices that are orthogonalised."""

MOMENTUM = "momentum_buffer"

LR_ADJUSTMENTS: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
"""Factors of the learning rate for a matrix (out, in), under torch's names.

"original" is Jordan's, with which a step changes outputs equally for all shapes; with "match_rms_adamw" (Liu et al.
2025) elements change as much as AdamW's do, so that both take the same learning rate and weight decay.
"""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class MatrixUpdate(NamedTuple):
    """The plan of the update of all tensors of a parameter group that DeepSpeed has updated in one call of `step`.

    Attributes:
        exchange: of the matrices in them.
        places: index of a parameter -> the elements that this rank holds.
    """

    exchange: MatrixExchange
    places: Mapping[int, Place]


class NewtonSchulz(NamedTuple):
    """Settings of the orthogonalisation; see `orthogonalize`."""

    steps: int = 5
    coefficients: tuple[float, float, float] = COEFFICIENTS
    dtype: torch.dtype = torch.bfloat16


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups with `MATRICES`, and AdamW for the others.

    Args:
        groups: parameter groups.
        momentum: weight of earlier gradients in their average.
        nesterov: the average of gradient and momentum is orthogonalised instead of the momentum.
        adjust: (rows, columns) -> factor of the learning rate.
        newton_schulz: settings of the orthogonalisation.
        options: of AdamW.

    Attributes:
        updates: id of the first tensor of a group with `MATRICES` -> the plan of its update, set before the first step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float,
        nesterov: bool,
        adjust: Callable[[int, int], float],
        newton_schulz: NewtonSchulz,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.momentum, self.nesterov, self.adjust, self.newton_schulz = momentum, nesterov, adjust, newton_schulz
        self.updates: dict[int, MatrixUpdate] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters in `param_groups`. Collective over the pipeline stage if there are matrices."""
        assert closure is None, "closures are not supported"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get(MATRICES)]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group.get(MATRICES) and group["params"]:
                self._update_matrices(group)

    def _update_matrices(self, group: Mapping[str, Any]) -> None:
        for tensor in group["params"]:
            if tensor.grad is None:  # without ZeRO: an expert without tokens
                tensor.grad = torch.zeros_like(tensor)
            state = self.state[tensor]
            state[STEPS] += 1
            state[MOMENTUM].lerp_(tensor.grad, 1.0 - self.momentum)
            tensor.mul_(1.0 - group["lr"] * group["weight_decay"])
        exchange, places = self.updates[id(group["params"][0])]

        def read(transfer: Transfer) -> Tensor:
            place = places[transfer.key.parameter]
            average = transfer.piece.of(place.of(self.state[place.tensor][MOMENTUM]))
            gradient = transfer.piece.of(place.of(place.tensor.grad))
            return gradient.lerp(average, self.momentum) if self.nesterov else average

        def write(transfer: Transfer, elements: Tensor) -> None:
            place = places[transfer.key.parameter]
            lr = group["lr"] * self.adjust(*exchange.shapes[transfer.key])
            transfer.piece.of(place.of(place.tensor.data)).add_(elements.to(place.tensor.device), alpha=-lr)

        exchange.run(read, partial(self._orthogonalize, exchange.specs), write, self.newton_schulz.dtype)

    def _orthogonalize(
        self, specs: Mapping[int, ParamSpec], matrices: Mapping[MatrixKey, Tensor]
    ) -> dict[MatrixKey, Tensor]:
        """Return the matrices orthogonalised, (out, in) each. Those of experts share kernels, because they are small.

        Others do not: copies of a matrix in several pipeline stages stay equal, whatever else their owners have.
        """
        stacks: dict[Any, list[MatrixKey]] = {}
        for key in matrices:
            stacks.setdefault(key.parameter if specs[key.parameter].is_of_experts else key, []).append(key)
        steps, coefficients, _ = self.newton_schulz
        found = dict[MatrixKey, Tensor]()
        for keys in stacks.values():
            stack = torch.stack([matrices[key] for key in keys]) if len(keys) > 1 else matrices[keys[0]]
            new = orthogonalize(stack, steps, coefficients)
            found |= dict(zip(keys, new.unbind() if len(keys) > 1 else (new,), strict=True))
        return found


@OPTIMIZERS.register("muon")
class GuardedMuon(GuardedOptimizer, Muon):
    """Muon for matrices, and AdamW with the run file's `betas` and `eps` for the rest."""

    state_kinds = (*ADAM_STATE, MOMENTUM)
    optional_kinds = ("exp_avg", "exp_avg_sq")
    works_on_nvme = False

    @classmethod
    def from_section(
        cls,
        groups: list[dict[str, Any]],
        section: OptimizerSection,
        device: torch.device,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: str = "match_rms_adamw",
        adamw_lr: float | None = None,
        ns_steps: int = 5,
        ns_coefficients: Sequence[float] = COEFFICIENTS,
        ns_dtype: str = "bf16",
    ) -> GuardedMuon:
        """Return Muon.

        Args:
            groups, section, device: see `GuardedOptimizer.from_section`.
            momentum, nesterov: see `Muon`.
            adjust_lr: a name in `LR_ADJUSTMENTS`.
            adamw_lr: peak learning rate of what AdamW updates; None = `optimizer.lr`.
            ns_steps, ns_coefficients, ns_dtype: of the Newton-Schulz iteration.
        """
        _check_options(section.options)
        if adamw_lr is not None and section.lr == 0:
            raise ConfigError(
                f"optimizer.options.adamw_lr={show(adamw_lr)} follows optimizer.lr, which is 0; try 3.0e-4 for both"
            )
        a, b, c = map(float, ns_coefficients)
        newton_schulz = NewtonSchulz(ns_steps, (a, b, c), DTYPES[ns_dtype])
        options = {"lr": section.lr, "betas": section.betas, "eps": section.eps, "fused": device.type in FUSED}
        return cls(groups, momentum, nesterov, LR_ADJUSTMENTS[adjust_lr], newton_schulz, **options)

    @classmethod
    def group_options(cls, spec: ParamSpec, section: OptimizerSection) -> Mapping[str, Any]:
        """Return `MATRICES` for parameters of matrices, and the factor of `adamw_lr` for others."""
        if spec.matrix_shape is not None:
            return {MATRICES: True}
        lr = section.options.get("adamw_lr")
        return {} if lr is None else {LR_FACTOR: lr / section.lr}

    def check_groups(self, grid: Grid) -> None:
        """Check that some pipeline stage trains matrices. Collective over the world; see `GuardedOptimizer`."""
        count = sum(len(group["params"]) for group in self.param_groups if group.get(MATRICES))
        if not all_reduce_(torch.tensor(count), grid.host):
            raise ConfigError(
                "optimizer.name=muon updates matrices, and none is trained here; try optimizer.name=adamw"
            )

    def kinds_in(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the kinds of state of matrices, or those of AdamW."""
        return (STEPS, MOMENTUM) if group.get(MATRICES) else ADAM_STATE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_coefficients(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "momentum": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1; try 0.95"),
    "nesterov": (lambda value: isinstance(value, bool), "true or false"),
    "adjust_lr": (lambda value: value in [*LR_ADJUSTMENTS], f"one of {', '.join(LR_ADJUSTMENTS)}"),
    "adamw_lr": (lambda value: value is None or (_is_number(value) and value >= 0), "a learning rate; try 3.0e-4"),
    "ns_steps": (lambda value: type(value) is int and 0 < value < 100, "an integer from 1 to 99; try 5"),
    "ns_coefficients": (_is_coefficients, f"a list of a, b and c of a x + b x^3 + c x^5; try {list(COEFFICIENTS)}"),
    "ns_dtype": (lambda value: value in [*DTYPES], f"one of {', '.join(DTYPES)}"),
}
"""Option -> whether a value is legal, and the rule."""


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        is_legal, rule = _RULES[name]
        if not is_legal(value):
            raise ConfigError(f"optimizer.options.{name}={show(value)} is not {rule}")
