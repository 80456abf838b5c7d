"""Adafactor: the average of squared gradients of a matrix is kept as those of its rows and columns (Shazeer and Stern
2018).

A step is the gradient divided by the root of row * column / mean, bounded in its root mean square, and as long as the
learning rate times the root mean square of the matrix's weights. Each matrix has these of its own; see
`ParamSpec.matrices`. Norms and biases, which have no rows, keep squares of each element.

Sums over rows, columns and elements are the only communication; see `TensorSums`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.optimizers.guarded import OPTIMIZERS, STEPS, GuardedOptimizer, Place
from megatron_ds.engine.tensor_sums import SummedPart, Sums, TensorSums
from megatron_ds.layers.param_spec import ParamSpec

FACTORED = "factored"
"""Key of a parameter group: its parameters consist of matrices."""

MOMENTUM, SQUARES, ROWS, COLUMNS = "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"

_LEAST_SQUARE, _LEAST_SCALE = 1e-30, 1e-3  # the paper's epsilon 1 and 2


class Settings(NamedTuple):
    """Settings under transformers' names; see `GuardedAdafactor.from_section`."""

    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    scale_parameter: bool = True


class Factors(NamedTuple):
    """Averages of squared gradients of a parameter's matrices, fp32, on every rank that holds some of its elements.

    Attributes:
        rows: means along the rows, (blocks, matrices, rows): the order of the parameter's rows.
        columns: means along the columns, (matrices, columns).
    """

    rows: Tensor
    columns: Tensor


class AdafactorPlan(NamedTuple):
    """The plan of the update of all tensors of a parameter group that DeepSpeed has updated in one call of `step`.

    Attributes:
        sums: over their parameters.
        places: index of a parameter -> the elements that this rank holds.
        factors: index of a parameter with matrices -> its averages.
    """

    sums: TensorSums
    places: Mapping[int, Place]
    factors: Mapping[int, Factors]

    def elements(self, part: SummedPart, values: Tensor | None) -> Tensor:
        """View a part's elements, (blocks, rows, columns), in a tensor of the shape of its place's."""
        return part.piece.of(self.places[part.parameter].of(values))


class Adafactor(torch.optim.Optimizer):
    """Adafactor with a learning rate from outside.

    Args:
        groups: parameter groups, those of matrices with `FACTORED`.
        lr: the learning rate.
        settings: all others.

    Attributes:
        plans: id of the first tensor of a group -> the plan of its update, set before the first step.
        factors: id of a parameter of the model -> the averages of its squared gradients, likewise.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, settings: Settings) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.settings = settings
        self.plans: dict[int, AdafactorPlan] = {}
        self.factors: dict[int, Factors] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters in `param_groups`. Collective over the pipeline stage.

        A group of matrices takes two all-reduces, of a number for each row, column and matrix; others take one.
        """
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            if group["params"]:
                self._update(group, self.plans[id(group["params"][0])])

    def _update(self, group: Mapping[str, Any], plan: AdafactorPlan) -> None:
        for tensor in group["params"]:
            if tensor.grad is None:  # without ZeRO: an expert without tokens
                tensor.grad = torch.zeros_like(tensor)
            self.state[tensor][STEPS] += 1
        device = group["params"][0].device
        beta2 = 1.0 - float(self.state[group["params"][0]][STEPS]) ** self.settings.decay_rate
        weights = plan.sums.zeros(device, of_rows=bool(group.get(FACTORED)))
        for part, place in self._counted(plan):
            weights.add(part, plan.elements(part, place.tensor).square())
        if group.get(FACTORED):
            self._divide_by_factors(plan, weights, beta2)
        else:
            for tensor in group["params"]:
                squares = self.state[tensor][SQUARES]
                squares.mul_(beta2).add_(tensor.grad.square().add_(_LEAST_SQUARE), alpha=1.0 - beta2)
                tensor.grad.mul_(squares.rsqrt())
            plan.sums.reduce(weights)
        updates = plan.sums.zeros(device, of_rows=False)
        for part, place in self._counted(plan):
            updates.add(part, plan.elements(part, place.tensor.grad).square())
        plan.sums.reduce(updates)
        self._apply(group, plan, weights, updates)

    def _divide_by_factors(self, plan: AdafactorPlan, sums: Sums, beta2: float) -> None:
        """Update the averages of rows and columns, and divide the gradients, in place. Reduces `sums`."""
        for part, place in self._counted(plan):
            sums.add_along(part, plan.elements(part, place.tensor.grad).square())
        plan.sums.reduce(sums)
        for number, (rows, columns) in plan.factors.items():
            shape = plan.sums.shapes[number]
            of_rows, of_columns = sums.rows[number] / shape.columns, sums.columns[number] / (shape.blocks * shape.rows)
            rows.mul_(beta2).add_((of_rows + _LEAST_SQUARE).float(), alpha=1.0 - beta2)
            columns.mul_(beta2).add_((of_columns + _LEAST_SQUARE).float(), alpha=1.0 - beta2)
        for part in plan.sums.parts:
            number, matrix = part.parameter, part.piece.matrix
            blocks, along_rows, along_columns = (slice(*along) for along in part.piece.place)
            of_rows, of_columns = plan.factors[number].rows[:, matrix], plan.factors[number].columns[matrix]
            gradient = plan.elements(part, plan.places[number].tensor.grad)
            gradient.mul_((of_rows / of_rows.mean())[blocks, along_rows, None].rsqrt())
            gradient.mul_(of_columns[along_columns].rsqrt())

    def _apply(self, group: Mapping[str, Any], plan: AdafactorPlan, weights: Sums, updates: Sums) -> None:
        """Add the updates, which are in the gradients, to the weights.

        Args:
            group, plan: of the update.
            weights, updates: sums of their squares.
        """
        clip, beta1 = self.settings.clip_threshold, self.settings.beta1
        for part in plan.sums.parts:
            number, place = part.parameter, plan.places[part.parameter]
            lr: Any = group["lr"]
            each = plan.sums.shapes[number].each
            if self.settings.scale_parameter:
                lr = lr * _root_mean(weights, part, each).clamp_(min=_LEAST_SCALE)
            factor = lr / (_root_mean(updates, part, each) / clip).clamp_(min=1.0)
            update = plan.elements(part, place.tensor.grad).mul_(factor)
            if beta1 is not None:
                average = plan.elements(part, self.state[place.tensor][MOMENTUM])
                update = average.mul_(beta1).add_(update, alpha=1.0 - beta1)
            plan.elements(part, place.tensor.data).mul_(1.0 - group["weight_decay"] * lr).sub_(update)

    def _counted(self, plan: AdafactorPlan) -> Iterator[tuple[SummedPart, Place]]:
        return ((part, plan.places[part.parameter]) for part in plan.sums.parts if part.is_counted)


def _root_mean(sums: Sums, part: SummedPart, count: int) -> Tensor:
    return (sums.each[part.parameter][part.piece.matrix] / count).sqrt().float()


@OPTIMIZERS.register("adafactor")
class GuardedAdafactor(GuardedOptimizer, Adafactor):
    """Adafactor (Shazeer and Stern 2018), with the run file's schedule instead of its relative step sizes."""

    state_kinds = (STEPS, SQUARES, ROWS, COLUMNS)
    optional_kinds = (SQUARES, ROWS, COLUMNS)
    works_on_nvme = False

    @classmethod
    def from_section(
        cls,
        groups: list[dict[str, Any]],
        section: OptimizerSection,
        device: torch.device,
        *,
        clip_threshold: Annotated[float, Field(gt=0)] = 1.0,
        decay_rate: Annotated[float, Field(lt=0)] = -0.8,
        beta1: Annotated[float, Field(ge=0, lt=1)] | None = None,
        scale_parameter: bool = True,
    ) -> GuardedAdafactor:
        """Return Adafactor.

        Args:
            groups, section, device: see `GuardedOptimizer.from_section`.
            clip_threshold: bound of the root mean square of a matrix's step, before the learning rate.
            decay_rate: the weight of earlier squares in step t is 1 - t ** decay_rate.
            beta1: weight of earlier steps in their average; None = there is no average.
            scale_parameter: the learning rate is relative to the root mean square of a matrix's weights, at least 1e-3.
        """
        made = cls(groups, section.lr, Settings(clip_threshold, decay_rate, beta1, scale_parameter))
        made.state_kinds = (*cls.state_kinds, *((MOMENTUM,) if beta1 is not None else ()))
        return made

    @classmethod
    def group_options(cls, spec: ParamSpec, section: OptimizerSection) -> Mapping[str, Any]:
        """Return `FACTORED` for all but norms and biases."""
        return {FACTORED: True} if spec.decay and len(spec.shape) > 1 else {}

    def kinds_in(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the kinds of state of each element."""
        momentum = (MOMENTUM,) if self.settings.beta1 is not None else ()
        return (STEPS, *momentum) if group.get(FACTORED) else (STEPS, SQUARES, *momentum)

    def whole_state(self, parameter: Any) -> Mapping[str, Tensor]:
        """Return the averages of rows, (blocks, matrices, rows), and of columns, (matrices, columns)."""
        if id(parameter) not in self.factors:
            return {}
        rows, columns = self.factors[id(parameter)]
        return {ROWS: rows, COLUMNS: columns}
