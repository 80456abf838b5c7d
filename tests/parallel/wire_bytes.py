"""Count bytes on the wire, independently of our code: torch.distributed's own functions are wrapped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


class Activations:
    """Bytes that one rank sends, by kind of collective, for ring algorithms; and those of messages, by receiver."""

    def __init__(self) -> None:
        self.bytes: dict[str, Fraction] = {}
        self.sent_to: dict[int, Fraction] = {}
        self.calls: dict[str, int] = {}

    def count(self, kind: str, size_bytes: Fraction) -> None:
        self.bytes[kind] = self.bytes.get(kind, Fraction(0)) + size_bytes
        self.calls[kind] = self.calls.get(kind, 0) + 1

    @property
    def total(self) -> Fraction:
        return sum(self.bytes.values(), Fraction(0))


def _size(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


@contextmanager
def counting() -> Iterator[Activations]:
    """Within it, all communication of this process through torch.distributed is counted."""
    wire = Activations()

    def share(group: Any) -> Fraction:
        size = dist.get_world_size(group)
        return Fraction(size - 1, size)

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> None:
        wire.count("all_reduce", 2 * _size(tensor) * share(kwargs.get("group")))

    def all_gather(output: Any, *args: Any, **kwargs: Any) -> None:
        wire.count("all_gather", _size(output) * share(kwargs.get("group")))

    def reduce_scatter(output: Any, input: Any, *args: Any, **kwargs: Any) -> None:
        wire.count("reduce_scatter", _size(input) * share(kwargs.get("group")))

    def all_to_all(output: Any, input: Any, *args: Any, **kwargs: Any) -> None:
        group, splits = kwargs.get("group"), args[1] if len(args) > 1 else None
        if splits is None:
            wire.count("all_to_all", _size(input) * share(group))
        else:
            to_others = sum(splits) - splits[dist.get_rank(group)]
            wire.count("all_to_all", Fraction(to_others * _size(input[:1]) if to_others else 0))

    def send(tensor: Any, dst: int | None = None, *args: Any, **kwargs: Any) -> None:
        wire.count("send", Fraction(_size(tensor)))
        if dst is None:  # in a batch, the receiver is a rank of the group
            dst = dist.get_global_rank(kwargs["group"], kwargs["group_dst"])
        wire.sent_to[dst] = wire.sent_to.get(dst, Fraction(0)) + _size(tensor)

    counters: dict[str, Callable[..., None]] = {
        "all_reduce": all_reduce,
        "all_gather_single": all_gather,
        "all_gather_into_tensor": all_gather,
        "reduce_scatter_single": reduce_scatter,
        "reduce_scatter_tensor": reduce_scatter,
        "all_to_all_single": all_to_all,
        "send": send,
        "isend": send,
    }
    originals = {
        name: getattr(dist, name) for name in counters if hasattr(dist, name)
    }  # torch before 2.13 has the older names

    calling: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not calling:  # torch's own send calls isend
                counters[name](*args, **kwargs)
            calling.append(name)
            try:
                return originals[name](*args, **kwargs)
            finally:
                calling.pop()

        return counted

    def replace(functions: dict[str, Callable[..., Any]]) -> None:
        for name, function in functions.items():
            setattr(dist, name, function)
        c10d.isend = functions["isend"]  # which the messages of a batch are compared with

    replace({name: wrap(name) for name in originals})
    try:
        yield wire
    finally:
        replace(originals)
