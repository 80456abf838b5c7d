"""Steps that fail on all ranks if they fail on one, and the gathering of small objects from all ranks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ds.errors import LaunchError, MegatronDSError

T = TypeVar("T")


def run_on_all_ranks(step: Callable[[], T]) -> T:
    """Return the result of `step()` on this rank if it succeeded on every rank. Collective over the world.

    Without it, a rank that lacks a file would leave its peers waiting in their next collective. Communicates one small
    object; `step` itself must not communicate.

    Raises:
        MegatronDSError: on rank 0, the error of the lowest rank that raised one.
        SystemExit: on the other ranks in that case, with status 2, or 1 for a `LaunchError`: rank 0 reports the error
            for all. With status 1 if another rank raised anything else, which is a defect.
        Exception: a defect, on the rank that raised it.
    """
    result: Any = None
    own_error: MegatronDSError | None = None
    defect: Exception | None = None
    try:
        result = step()
    except MegatronDSError as problem:
        own_error = problem
    except Exception as problem:
        defect = problem
    everyone = gather_objects((own_error, defect is not None))
    if defect is not None:
        raise defect
    if any(is_defect for _, is_defect in everyone):
        sys.exit(1)
    for error, _ in everyone:
        if error is not None and (len(everyone) == 1 or dist.get_rank() == 0):
            raise error
        if error is not None:
            sys.exit(1 if isinstance(error, LaunchError) else 2)
    return result


def run_long_on_all_ranks(step: Callable[[], T], ask_every_s: float = 10.0) -> T:
    """Do as `run_on_all_ranks` for a step that may take longer than a collective may: a download. Collective over the
    world.

    `step` runs in a thread of its own, while the ranks ask one another from time to time whether all are done.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(step)
        while True:
            wait([future], ask_every_s)
            if all(gather_objects(future.done())):
                return run_on_all_ranks(future.result)


def gather_objects(local: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather a small picklable object from every rank on every rank, in the order of the ranks.

    Collective over `group`; None = all ranks. Without a process group, or with one rank, nothing is communicated.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [local]
    everyone = [local] * dist.get_world_size(group)
    with _waiting():
        dist.all_gather_object(everyone, local, group=group)
    return everyone


_WAITING: set[int] = set()


def num_waiting() -> int:
    """Return the number of threads of this process that wait for objects of other ranks."""
    return len(_WAITING)


@contextmanager
def _waiting() -> Iterator[None]:
    """Count this thread among those that wait."""
    _WAITING.add(threading.get_ident())
    try:
        yield
    finally:
        _WAITING.discard(threading.get_ident())


def share_object(value: T) -> T:
    """Return rank 0's small picklable object on every rank. Collective over the world.

    Without a process group, or with one rank, nothing is communicated.

    Args:
        value: the object, on rank 0; the others' is ignored.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
