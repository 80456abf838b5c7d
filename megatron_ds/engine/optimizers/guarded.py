"""The base class of optimizers under DeepSpeed, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.optimizers.weight_average import WeightAverage
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.parallel.grid import Grid
from megatron_ds.registry import Registry

STEPS = "step"
"""The name in an optimizer's state of the number of updates of a tensor, (); all else is state of its elements."""

ADAM_STATE = (STEPS, "exp_avg", "exp_avg_sq")
"""Adam's state: the number of steps, and the averages of gradients and of their squares (Kingma and Ba 2015)."""


LR_FACTOR = "lr_factor"
"""Key of a parameter group: its learning rate divided by that of the run."""


class Place(NamedTuple):
    """The elements of a parameter in a tensor that DeepSpeed puts into `param_groups`.

    Attributes:
        tensor: the tensor.
        start, stop: its elements.
    """

    tensor: Tensor
    start: int
    stop: int

    def of(self, values: Tensor | None) -> Tensor:
        """View the parameter's elements in a tensor of the shape of `tensor`."""
        assert values is not None
        return values.view(-1)[self.start : self.stop]


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimizer that can skip a step. Derive from it first and from a torch optimizer second.

    DeepSpeed calls `step` once for each tensor that it puts into `param_groups`, when all gradients are reduced. Under
    ZeRO these are flat fp32 partitions, (n,), of many parameters: the update must be elementwise, or at least
    independent of a parameter's shape. DeepSpeed itself skips a step whose gradient norm is not finite, except with
    ZeRO-0; it does not look at the loss.

    Attributes:
        state_kinds: names of what it keeps, such as `ADAM_STATE`: in `state` of each tensor `STEPS`, and fp32 tensors
            of one number for each element, which begin at 0; and what is in `whole_state`. Checkpoints hold them
            besides the fp32 weights, for any layout. A class sets it, or an instance if it depends on options. None =
            it does not say; runs that save or resume are refused.
        optional_kinds: those of `state_kinds` that only some parameters have.
        why_unsaved: the reason, if `state_kinds` is None.
        device_type: the only type of device that it runs on; None = it runs on all.
        package: a package that it needs; None = it needs no more than is installed.
        works_on_nvme: DeepSpeed may keep its state on NVMe.
        has_adam_state: the same as `state_kinds = ADAM_STATE`.
        should_step: called at the first tensor of every step; its answer must be the same on all ranks. It may
            communicate: DeepSpeed reaches this point on all ranks or on none.
        average: the average of the weights, updated after each step that is not skipped; None = the weights are not
            averaged.
    """

    state_kinds: tuple[str, ...] | None = None
    optional_kinds: ClassVar[tuple[str, ...]] = ()
    why_unsaved: ClassVar[str] = "its class does not list its state in state_kinds"
    device_type: ClassVar[str | None] = None
    package: ClassVar[str | None] = None
    works_on_nvme: ClassVar[bool] = True
    has_adam_state: ClassVar[bool] = False
    should_step: Callable[[], bool] | None = None
    average: WeightAverage | None = None
    _answer: bool | None = None
    _number = 0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.has_adam_state and cls.state_kinds is None:
            cls.state_kinds = ADAM_STATE

    @classmethod
    def from_section(cls, *args: Any, **options: Any) -> GuardedOptimizer:
        """Return the optimizer of a run: `from_section(groups, section, device, **options)`.

        Args:
            groups: list of parameter groups, each `{"params": [...], "weight_decay": ...}`.
            section: the run file's `OptimizerSection`; the engine sets `lr` in `param_groups` before each step.
            device: the device of the parameters.
            options: the section's `options`; the signature of the override declares them.

        Raises:
            ConfigError: the options exclude one another.
        """
        raise NotImplementedError(f"{cls.__qualname__} has no from_section")

    @classmethod
    def group_options(cls, spec: ParamSpec, section: OptimizerSection) -> Mapping[str, Any]:
        """Return keys of the parameter group of a parameter, by which parameters are in different groups.

        `LR_FACTOR` counts unless `optimizer.groups` sets a learning rate.

        Args:
            spec: the parameter's declaration.
            section: the run file's section.
        """
        return {}

    @classmethod
    def update_bytes(cls, sizes: Sequence[int]) -> int:
        """Return the memory that an update of tensors needs besides them, their gradients and their state.

        Plans count it. It is for updates that are elementwise.

        Args:
            sizes: elements of each tensor.
        """
        return 0

    def check_groups(self, grid: Grid) -> None:
        """Check that the parameters of all pipeline stages suit the optimizer. May be collective over the world.

        Raises:
            ConfigError: they do not.
        """

    @property
    def skipped(self) -> bool:
        """True if `should_step` refused this step."""
        return self._answer is False

    def begin_step(self, number: int) -> None:
        """Let the next call of `step` ask `should_step` again.

        Args:
            number: of the step in the run, from 1, skipped ones counted.
        """
        self._answer, self._number = None, number

    def step(self, closure: Any = None) -> Any:
        """Update the parameters in `param_groups`, unless this step is to be skipped."""
        if self._answer is None:
            self._answer = self.should_step() if self.should_step is not None else True
        if not self._answer:
            return None
        result = super().step(closure)
        if self.average is not None:
            self.average.update(self, self._number)
        return result

    def kinds_in(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return those of `state_kinds` that the tensors of a parameter group have."""
        return self.state_kinds or ()

    def whole_state(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """Return those of `state_kinds` of a parameter of the model that have no number for each element.

        They are fp32, live, and the same on all ranks that hold some of its elements, at every layout.
        """
        return {}

    def create_state(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Create the state of a tensor as zeros if it is missing, so that a checkpoint can be read into it.

        Args:
            parameter: a tensor that DeepSpeed puts into `param_groups`, (n,) or a parameter's own shape.
            group: its parameter group.
        """
        if self.state[parameter]:
            return
        on_device = group.get("fused") or group.get("capturable")
        device = parameter.device if on_device else torch.device("cpu")
        for kind in self.kinds_in(group):
            self.state[parameter][kind] = (
                torch.zeros((), dtype=torch.float32, device=device)
                if kind == STEPS
                else torch.zeros_like(parameter, memory_format=torch.preserve_format)
            )


OPTIMIZERS: Registry[type[GuardedOptimizer]] = Registry("optimizer")


def make_optimizer(groups: list[dict[str, Any]], section: OptimizerSection, device: torch.device) -> GuardedOptimizer:
    """Return the optimizer of a run; see `GuardedOptimizer.from_section`."""
    return OPTIMIZERS.get(section.name, "optimizer.name").from_section(groups, section, device, **section.options)


def state_kinds_of(section: OptimizerSection) -> tuple[str, ...] | None:
    """Return the `state_kinds` of the optimizer of a run, before there are parameters.

    Raises:
        ConfigError: its options exclude one another.
    """
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}]
    return make_optimizer(groups, section, torch.device("cpu")).state_kinds
