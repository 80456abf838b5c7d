"""Record all that a process sends: the methods of torch's process groups are wrapped, below every Python function.

Collectives count as rings send them, broadcasts and reductions to one rank as an all-gather of the same size; see
`planner.operations.Collective.sent_bytes`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist

Ranks = tuple[int, ...]
WORLD_SEND = "send in the world"


@dataclass
class WireCalls:
    """What one rank sent.

    Attributes:
        calls: (kind, ranks of the group, bytes that the rank sends) -> number of calls. In the group of all ranks,
            which pipelines use too, a message's kind is "send in the world", and its ranks are sender and receiver.
    """

    calls: Counter[tuple[str, Ranks, Fraction]] = field(default_factory=Counter)

    def bytes_by_ranks(self) -> dict[tuple[Ranks, str], Fraction]:
        """Bytes by group and kind."""
        found: dict[tuple[Ranks, str], Fraction] = {}
        for (kind, ranks, size), number in self.calls.items():
            found[ranks, kind] = found.get((ranks, kind), Fraction(0)) + size * number
        return found


def _size(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return int(tensors.numel() * tensors.element_size())
    return sum(_size(one) for one in tensors)


def _all_to_all(arguments: tuple[Any, ...], rank: int, ranks: int) -> Fraction:
    given, splits = arguments[1], arguments[3]
    if not splits:
        return Fraction(_size(given) * (ranks - 1), ranks)
    rows = sum(splits)
    return Fraction(_size(given) * (rows - splits[rank]), rows) if rows else Fraction(0)


def _share_of(argument: int, factor: int = 1) -> Callable[[tuple[Any, ...], int, int], Fraction]:
    """The bytes of an argument, without the rank's own share of them."""
    return lambda arguments, rank, ranks: Fraction(factor * _size(arguments[argument]) * (ranks - 1), ranks)


_Sent = Callable[[tuple[Any, ...], int, int], Fraction]

_SENT: dict[str, tuple[str, _Sent]] = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), ("all_reduce", _share_of(0, 2))),
    **dict.fromkeys(
        (
            *("allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base"),
            *("all_gather_single", "all_gather_single_coalesced"),
        ),
        ("all_gather", _share_of(0)),
    ),
    **dict.fromkeys(
        (
            *("reduce_scatter", "reduce_scatter_tensor_coalesced", "_reduce_scatter_base"),
            *("reduce_scatter_single", "reduce_scatter_single_coalesced"),
        ),
        ("reduce_scatter", _share_of(1)),
    ),
    **dict.fromkeys(("alltoall_base", "all_to_all_single"), ("all_to_all", _all_to_all)),
    "alltoall": ("all_to_all", _share_of(1)),
    "broadcast": ("broadcast", _share_of(0)),
    "reduce": ("broadcast", _share_of(0)),
    "gather": ("gather", _share_of(1)),
    "scatter": ("scatter", _share_of(1)),
}
"""Method of a process group -> kind of its communication, and the bytes that it sends. torch 2.13 has new names."""


@contextmanager
def recording() -> Iterator[WireCalls]:
    """Within it, all calls of this process's process groups of several ranks are recorded."""
    wire = WireCalls()

    def collective(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        kind, sent = _SENT[name]

        def recorded(group: Any, *arguments: Any, **named: Any) -> Any:
            ranks = tuple(sorted(dist.get_process_group_ranks(group)))
            if len(ranks) > 1:
                wire.calls[kind, ranks, sent(arguments, group.rank(), len(ranks))] += 1
            return original(group, *arguments, **named)

        return recorded

    def send(group: Any, tensors: Any, to: int, *arguments: Any, **named: Any) -> Any:
        kind, ranks = "send", tuple(sorted(dist.get_process_group_ranks(group)))
        if len(ranks) == dist.get_world_size():
            kind, ranks = WORLD_SEND, tuple(sorted((dist.get_rank(), dist.get_global_rank(group, to))))
        wire.calls[kind, ranks, Fraction(_size(tensors))] += 1
        return originals["send"](group, tensors, to, *arguments, **named)

    names = [name for name in (*_SENT, "send") if hasattr(dist.ProcessGroup, name)]
    originals = {name: getattr(dist.ProcessGroup, name) for name in names}
    for name in names:
        setattr(dist.ProcessGroup, name, send if name == "send" else collective(name, originals[name]))
    try:
        yield wire
    finally:
        for name in names:
            setattr(dist.ProcessGroup, name, originals[name])
