"""The gradient norm under ZeRO, which reaches the host in the read that fetches the step's losses.

Between the backward pass and the optimizer, DeepSpeed 0.19.8 waits for the device several times: it searches every
gradient for overflow, sends constants to the device, compares the norm, and compares it again for each parameter group
that it clips. All of this depends on one number. With the number on the host it costs no wait.

DeepSpeed has three optimizers for ZeRO, with a method each that is replaced here. What they decide stays as it is: a
norm that is not finite skips the step and lowers a dynamic loss scale. The search for overflow is left out, because a
gradient that is not finite makes the norm so on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import (
    bwc_tensor_model_parallel_rank,
    combine_grad_norm_groups,
    is_model_parallel_parameter,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import get_norm_dtype
from deepspeed.utils import groups
from torch import Tensor

_LEAST_GROUPS = 4
"""The least number of parameter groups that a norm is computed of, with zeros for those that are missing: with weight
decay or without, of experts or not. Sums of other shapes are rounded otherwise, and this keeps the bits of runs."""

ReadNorm = Callable[[Tensor], Tensor]
"""The norm on the device, a scalar -> the same on the host. Called on all ranks, so it may communicate."""


def read_norm_once(zero: Any, read: ReadNorm) -> None:
    """Make DeepSpeed's optimizer take its gradient norm from the host. Collective over the model-parallel ranks.

    Args:
        zero: the optimizer of stage 1, 2 or 3.
        read: called once a step with the norm of the gradients, which a loss scale still multiplies.
    """
    if isinstance(zero, BF16_Optimizer):
        zero.step = partial(_step_of_bf16, zero, read)
        return
    zero.has_overflow = lambda partition_gradients=True: False
    most = _most_groups(zero)
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero._get_norm_groups = partial(_norms_of_stage_3, zero, zero._get_norm_groups, read, most)
    else:
        assert isinstance(zero, DeepSpeedZeroOptimizer), type(zero)
        zero.scaled_global_norm = partial(_norm_of_stages_1_and_2, zero, read, most)


def _most_groups(zero: Any) -> int:
    """Return the number of parameter groups of the stage that has most of them. Collective over the model's ranks."""
    most = torch.tensor(max(len(zero.optimizer.param_groups), _LEAST_GROUPS), device=_device())
    _reduce_over(most, zero.model_parallel_group, dist.ReduceOp.MAX)
    return int(most)


def _norm_of_stages_1_and_2(zero: Any, read: ReadNorm, most: int) -> Tensor:
    if zero.cpu_offload:  # the gradients are in host memory; DeepSpeed would reduce a norm for each parameter group
        return read(zero.complete_grad_norm_calculation_for_cpu_offload(list(chain(*zero.params_in_partition))))
    return read(torch.linalg.vector_norm(_norms(zero, zero.params_in_partition, torch.float32, most)))


def _norms_of_stage_3(zero: Any, of_offloaded: Callable[[], list[Tensor]], read: ReadNorm, most: int) -> list[Tensor]:
    if zero.offload_optimizer:  # a norm that is not finite is -1 there
        return [read(combine_grad_norm_groups(of_offloaded()))]
    return [read(torch.linalg.vector_norm(_norms(zero, zero.fp16_groups, get_norm_dtype(), most)))]


def _norms(zero: Any, parameter_groups: Sequence[Sequence[Tensor]], dtype: torch.dtype, most: int) -> Tensor:
    """Return the L2 norm of the gradients of each parameter group, as DeepSpeed counts them, and zeros: (most,).

    Of what several tensor ranks hold, the first rank counts, and the first pipeline stage of what several stages hold.
    One all-reduce over shard, and one over the model-parallel ranks. Stages whose groups are different ones add norms
    of different groups, which does not change the norm of all.

    Args:
        zero: the optimizer, with the gradients of this rank's partition.
        parameter_groups: the parameters of each group in this rank's partition.
        dtype: the dtype of the sums of squares that are reduced.
        most: see `_most_groups`.
    """
    sums = []
    for index, parameters in enumerate(parameter_groups):
        gradients = [one for one in zero.averaged_gradients[index] if not getattr(one, "_zero_padding", False)]
        counted = [
            gradient
            for gradient, parameter in zip(gradients, parameters)
            if not getattr(parameter, "ds_pipe_replicated", False)
            and (is_model_parallel_parameter(parameter) or zero.model_parallel_rank == 0)
        ]
        sums.append(_sum_of_squares(counted, get_norm_dtype()))
    sums += [torch.zeros_like(sums[0])] * (most - len(sums))
    by_group = torch.stack(sums).to(dtype)
    for group in (zero.dp_process_group, zero.model_parallel_group):
        _reduce_over(by_group, group)
    return by_group.sqrt()


def _reduce_over(x: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce in place over a group of DeepSpeed's, which may be None or hold this rank alone."""
    if group is not None and dist.get_world_size(group=group) > 1:
        dist.all_reduce(x, op=op, group=group)


def _device() -> str:
    return str(get_accelerator().current_device_name())


def _sum_of_squares(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the sum of the squares of all elements, a scalar of `dtype`. One kernel reads many tensors."""
    if not tensors:
        return torch.zeros((), dtype=dtype, device=_device())
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype)).square().sum()


@torch.no_grad()
def _step_of_bf16(zero: Any, read: ReadNorm) -> None:
    """Do a step of `BF16_Optimizer`: ZeRO-1 in bf16, with all gradients in fp32 on every data rank.

    Of the gradients it clips those alone that this rank's optimizer reads.
    """
    gradients, of_experts = zero.get_grads_for_norm()
    squares = _sum_of_squares(gradients, torch.float32)
    if zero.has_moe_layers:  # after their sum every rank of a stage has it, and one of its tensor ranks adds it
        for name in zero.expert_gradients:
            of_stage = _sum_of_squares(of_experts.get(name, []), torch.float32)
            _reduce_over(of_stage, groups._get_expert_parallel_group(name))
            squares += of_stage if bwc_tensor_model_parallel_rank(zero.mpu) == 0 else 0.0
    _reduce_over(squares, zero.mpu.get_model_parallel_group())
    norm = read(squares.sqrt())
    zero.overflow = not bool(norm.isfinite())
    if zero.overflow:
        zero._global_grad_norm = float("inf")
        zero.clear_hp_grads()
        zero.clear_lp_grads()
        return
    zero._global_grad_norm = norm
    flat = zero.fp32_groups_gradient_flat_partition
    factor = zero.clip_grad / (norm + 1e-6)
    if zero.clip_grad > 0.0 and factor < 1:
        torch._foreach_mul_(flat, float(factor))
    for parameter, gradient in zip(zero.fp32_groups_flat_partition, flat):
        parameter.grad = gradient.to(parameter.dtype)
    zero.optimizer.step()
    zero._lazy_init_hp_params_optimizer_state()
    zero.update_lp_params()
    zero.clear_hp_grads()
