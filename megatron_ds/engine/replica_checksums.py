"""Checksums of the state that several ranks hold, to find a rank whose copy has changed by itself.

Ranks that hold the same parameters compute the same updates from the same reduced gradients, so that their copies are
equal bit for bit. A copy that differs was damaged: in a device's memory, by a wrong result, or on a link (Dixit et al.
2021, "Silent data corruptions at scale"; Megatron-LM compares weights over data ranks for the same reason).

Which ranks hold a tensor depends on ZeRO:

| state | ZeRO-0 | ZeRO-1 and 2 | ZeRO-3 |
| --- | --- | --- | --- |
| weights, frozen ones and biases of routers | `replica` and tensor | `replica` and tensor | tensor |
| fp32 masters, moments, averages | `replica` and tensor | tensor | tensor |
| weights that ZeRO-3 keeps gathered | | | `replica` and tensor |
| state of full parameters, such as Adafactor's | all that hold a part | all that hold a part | all that hold a part |
| number of steps, scale of the loss | all | all | all |

"Tensor" stands for those ranks of the tensor axis whose shard is the same: all of them for norms, neighbours for a few
key and value heads. The parameters of experts have the ranks of `expert_shard` as replicas, and no others. Random
streams are not compared: they are seeded again in every step, from seed, step and place.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ds.engine.base import Engine
from megatron_ds.engine.optimizer_shards import OptimizerShard, optimizer_shards
from megatron_ds.layers.param_spec import ParamSpec, spec_of
from megatron_ds.parallel.consensus import gather_objects

_PIECE = 2**21  # elements that are multiplied at a time
_MIX = -7046029254386353131  # odd, so that no difference of two numbers becomes 0 modulo 2^64
_MODULUS = 2**64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checksums:
    """Exact checksums of tensors on their devices, in integers modulo 2^64.

    Each element, as an integer, is multiplied by an odd number that depends on its place. A change of one element
    always changes the sum, because no difference times an odd number is 0 modulo 2^64.
    """

    def __init__(self) -> None:
        self._factors: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def of(self, tensor: Tensor) -> Tensor:
        """Return the checksum of a tensor's bits, () int64 on its device."""
        flat = tensor.detach().reshape(-1)
        factors = self._factors_on(tensor.device)
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for piece in flat.view(_INTEGERS[flat.element_size()]).split(_PIECE):
            total = total * _MIX + (piece * factors[: len(piece)]).sum()
        return total

    def on_host(self, tensors: Sequence[Tensor]) -> list[int]:
        """Return the checksums of tensors, read from each device at once."""
        sums = [self.of(tensor) for tensor in tensors]
        found = [0] * len(sums)
        for device in {one.device for one in sums}:
            places = [index for index, one in enumerate(sums) if one.device == device]
            for index, value in zip(places, torch.stack([sums[index] for index in places]).tolist()):
                found[index] = value % _MODULUS
        return found

    def _factors_on(self, device: torch.device) -> Tensor:
        if device not in self._factors:
            self._factors[device] = torch.arange(1, 2 * _PIECE, 2, device=device)
        return self._factors[device]


@dataclass(frozen=True)
class Copy:
    """A tensor that other ranks hold as well.

    Attributes:
        holders: text that is equal on exactly the ranks that hold it.
        name: its name, the same on these ranks.
        tensor: the tensor, live.
    """

    holders: str
    name: str
    tensor: Tensor


class ReplicaChecksums:
    """The copies on this rank, and their comparison with those of other ranks.

    Args:
        engine: the live engine.
        with_tensor_ranks: whether copies on the ranks of the tensor axis are compared. Each computes the gradients of
            its copy itself, so that they are equal only where the same operations give the same bits.
    """

    def __init__(self, engine: Engine, *, with_tensor_ranks: bool) -> None:
        """Find the parameters that several pipeline stages hold. Collective over pipeline."""
        self._engine, self._with_tensor_ranks = engine, with_tensor_ranks
        self._checksums = Checksums()
        self._tied = _tied_names(engine)
        self._alone: set[str] = set()

    def differing(self) -> list[Difference]:
        """Return the tensors whose copies differ. Collective over the world, in host memory.

        Ranks gather one number for each set of holders that they belong to; all checksums of such a set are gathered
        only if these numbers differ. What no other rank holds is left out from the second call on.
        """
        copies = [one for one in self.copies() if one.holders not in self._alone]
        sums = self._checksums.on_host([one.tensor for one in copies])
        tables: dict[str, dict[str, int]] = defaultdict(dict)
        for copy, value in zip(copies, sums):
            tables[copy.holders][copy.name] = value
        group = self._engine.grid.host.group
        digests = gather_objects(_digests(tables), group)
        self._alone |= {holders for holders in tables if sum(holders in one for one in digests) == 1}
        wrong = {holders for holders, _ in differences(digests)}
        if not wrong:
            return []
        details = {holders: table for holders, table in tables.items() if holders in wrong}
        by_name = gather_objects(
            {f"{holders}\n{name}": one for holders, table in details.items() for name, one in table.items()}, group
        )
        return [Difference(key.partition("\n")[2], ranks) for key, ranks in differences(by_name)]

    def copies(self) -> Iterator[Copy]:
        """Yield the tensors of this rank that may have copies; the table of this module says which ranks hold them."""
        engine, stage = self._engine, self._engine.deepspeed.zero_optimization_stage()
        for name, parameter in engine.local_parameters():
            spec, divided = spec_of(parameter), getattr(parameter, "ds_tensor", None)  # of ZeRO-3
            if divided is None:
                yield self._copy("weights", name, spec, parameter)
                continue
            yield self._copy("weights", name, spec, divided, part=engine.grid.shard_of(spec).rank)
            if parameter.numel() == getattr(parameter, "ds_numel", None):
                yield self._copy("gathered weights", name, spec, parameter)
        for shard in optimizer_shards(engine):
            yield from self._of_optimizer(shard, stage)
        yield Copy("all", "number of steps", torch.tensor(engine.steps_begun))
        scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
        if scaler is not None:
            yield Copy("all", "scale of the loss", torch.tensor(float(scaler.loss_scale), dtype=torch.float64))

    def _of_optimizer(self, shard: OptimizerShard, stage: int) -> Iterator[Copy]:
        part = self._engine.grid.shard_of(shard.spec).rank if stage > 0 else None
        own = {"fp32 masters": shard.master} if stage > 0 else {}
        steps = {"optimizer's steps": shard.steps} if shard.steps is not None else {}
        for kind, tensor in {**own, **shard.moments, **steps}.items():
            yield self._copy(kind, shard.name, shard.spec, tensor, part)
        for kind, tensor in shard.whole.items():
            yield Copy(f"{kind} of {shard.name}", f"{shard.name} ({kind})", tensor)

    def _copy(self, kind: str, name: str, spec: ParamSpec, tensor: Tensor, part: int | None = None) -> Copy:
        """Return a tensor of a parameter's shard; `part`: the rank along shard of the only holder of this part."""
        axes, stage = spec.axes_among(self._engine.grid.model_axes), self._engine.grid.pipeline.rank
        shards = tuple((split.axis, split.shard_index(axes[split.axis])) for split in spec.splits)
        place: tuple[Any, ...] = (spec.is_of_experts, shards, part, self._tied.get(name, stage))
        if not self._with_tensor_ranks and not spec.is_of_experts:
            place += (self._engine.grid.tensor.rank,)
        return Copy(repr(place), f"{name} ({kind})", tensor)


@dataclass(frozen=True)
class Difference:
    """A tensor whose copies differ.

    Attributes:
        name: the tensor.
        ranks: checksum -> the ranks with it, in order; the most common checksum first.
    """

    name: str
    ranks: Mapping[int, Sequence[int]]

    @property
    def suspects(self) -> tuple[int, ...]:
        """The ranks that differ from the majority; all ranks without a majority."""
        first, *others = self.ranks.values()
        in_minority = sorted(rank for ranks in others for rank in ranks)
        return tuple(in_minority) if len(first) > len(in_minority) else tuple(sorted([*first, *in_minority]))

    @property
    def majority(self) -> tuple[int, ...]:
        """The ranks of the majority; empty without one."""
        return tuple(rank for ranks in self.ranks.values() for rank in ranks if rank not in self.suspects)


def differences(everyone: Sequence[Mapping[str, int]]) -> list[tuple[str, Mapping[int, Sequence[int]]]]:
    """Return the keys whose values differ, each with the ranks that have each value, the most common value first.

    Args:
        everyone: of every rank, its values; a rank that lacks a key is not compared there.
    """
    by_key: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, values in enumerate(everyone):
        for key, value in values.items():
            by_key[key][value].append(rank)
    return [
        (key, dict(sorted(ranks.items(), key=lambda item: (-len(item[1]), item[1]))))
        for key, ranks in by_key.items()
        if len(ranks) > 1
    ]


def _digests(tables: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Return a number for each set of holders: a sum of the checksums, each times an odd number made of its name."""
    return {
        holders: sum((_number(name) | 1) * value for name, value in table.items()) % _MODULUS
        for holders, table in tables.items()
    }


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _tied_names(engine: Engine) -> Mapping[str, str]:
    """Return the names of parameters that several pipeline stages hold. Collective over pipeline."""
    pipeline = engine.grid.pipeline
    if pipeline.size == 1:
        return {}
    own = [name for name, _ in engine.local_parameters()]
    names = [name for stage in gather_objects(own, pipeline.group) for name in stage]
    return {name: "all stages" for name in names if names.count(name) > 1}
