"""DeepSpeed's fragments and logical tensors: what this rank's optimizer holds, and where that lies in each parameter.

ZeRO flattens a rank's parameters into a few long vectors and cuts those over the data ranks. A fragment is what such a
vector has of one parameter: a range of the flattened local share. `fragments` finds them at every stage of ZeRO and
without it; as boxes of whole tensors they mean the same at every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.checkpoint.state_keys import KINDS, MASTER
from megatron_ds.checkpoint.tensor_slices import Box, boxes_of_range, in_whole
from megatron_ds.engine import Engine
from megatron_ds.layers.param_spec import ParamSpec, spec_of

_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """What this rank's optimizer holds of one parameter.

    Attributes:
        name: the parameter's, in the whole model.
        spec: its declaration.
        parameter: itself.
        shape: of this tensor rank's share.
        start: where it begins in the flattened share.
        vectors: kind -> (n,) fp32, live; what lies behind the share's end is left out.
        steps: () how often the optimizer has updated it, live; one with all that is in the same vector.
    """

    name: str
    spec: ParamSpec
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    vectors: Mapping[str, Tensor]
    steps: Tensor

    def pieces(self, rank: int, size: int) -> Iterator[tuple[Box, dict[str, Tensor]]]:
        """The fragment as boxes of the whole tensor, without padding, each with live views of its elements by kind.

        Args:
            rank, size: place on the tensor axis.
        """
        at = 0
        for local in boxes_of_range(self.shape, self.start, self.start + len(self.vectors[MASTER])):
            box = in_whole(local, self.spec, rank, size)
            if box is not None:
                real = tuple(slice(0, length) for length in box.shape)  # padding is at the end of a dim
                yield (
                    box,
                    {
                        kind: vector[at : at + local.numel].view(local.shape)[real]
                        for kind, vector in self.vectors.items()
                    },
                )
            at += local.numel


def fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's fragments of all parameters that are trained. Without ZeRO all data ranks have the same."""
    for name, parameter in engine.local_parameters():
        if parameter.requires_grad:
            found = _locate(engine, parameter)
            if found is not None:
                yield Fragment(name, spec_of(parameter), parameter, *found)


def _locate(engine: Engine, parameter: Any) -> tuple[tuple[int, ...], int, dict[str, Tensor], Tensor] | None:
    """Shape of the share, start in it, vectors, steps; None where this rank has nothing of the parameter."""
    optimizer, inner = engine.deepspeed.optimizer, engine.optimizer
    if hasattr(parameter, "ds_id"):  # ZeRO-3: each data rank has an equal part of each parameter, the last ones padded
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat, start = optimizer.fp32_partitioned_groups_flat[group], engine.grid.shard.rank * length
        length = min(length, parameter.ds_numel - start)
        if length <= 0:
            return None
        shape = tuple(parameter.ds_shape)
    elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: each data rank has an equal part of all of a group
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = inner.param_groups[mapping.param_group_index]["params"][0]
        start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset, shape = mapping.hp_fragment_address.start, tuple(parameter.shape)
    else:
        flat, start, offset, length, shape = parameter, 0, 0, parameter.numel(), tuple(parameter.shape)
    state = inner.state[flat]
    vectors = {MASTER: flat.data, **{kind: state[kind] for kind in KINDS[1:]}}
    return shape, start, {kind: one.view(-1)[offset : offset + length] for kind, one in vectors.items()}, state["step"]


def owned(engine: Engine) -> Iterator[Fragment]:
    """The fragments that this rank writes: of what several ranks hold, the first one's. Collective.

    Tensor ranks hold whole parameters and shares of key and value heads alike, pipeline stages tied ones, data ranks
    everything where there is no ZeRO.
    """
    grid = engine.grid
    first_here = {name for name, _, _ in engine.inventory()[grid.pipeline.rank]}
    alike = engine.deepspeed.zero_optimization_stage() == 0
    for fragment in fragments(engine):
        spec, axis = fragment.spec, grid.tensor
        first = axis.rank == 0 if spec.split_dim is None else spec.holds_first(axis.rank, axis.size)
        if first and fragment.name in first_here and not (alike and grid.replica.rank > 0):
            yield fragment


@torch.no_grad()
def refresh_weights(engine: Engine) -> None:
    """Make the weights of the model those of the fp32 masters, after these were written to. Collective over data."""
    optimizer, stage = engine.deepspeed.optimizer, engine.deepspeed.zero_optimization_stage()
    if stage == 0:
        return
    if stage < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # small parameters are kept gathered: let go of those copies
    for fragment in fragments(engine):
        share: Any = fragment.parameter
        master = fragment.vectors[MASTER]
        share.ds_tensor.data.view(-1)[: len(master)].copy_(master)
    optimizer.checkpoint_event_epilogue()


def loss_scale(engine: Engine) -> dict[str, float]:
    """State of fp16's dynamic loss scale; empty where there is none."""
    scaler = _loss_scaler(engine)
    return {name: getattr(scaler, name) for name in _LOSS_SCALER_STATE} if scaler is not None else {}


def set_loss_scale(engine: Engine, state: Mapping[str, float]) -> None:
    """Go on with a loss scale, where this run has one too."""
    scaler = _loss_scaler(engine)
    for name, value in state.items() if scaler is not None else ():
        setattr(scaler, name, value)


def _loss_scaler(engine: Engine) -> Any:
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
