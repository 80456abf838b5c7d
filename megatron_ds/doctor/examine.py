"""All examinations of a machine, one group after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_ds.doctor.devices import find_compilers, find_devices
from megatron_ds.doctor.finding import Finding, problem
from megatron_ds.doctor.machine import find_disk, find_machine
from megatron_ds.doctor.network import find_network
from megatron_ds.doctor.packages import find_packages
from megatron_ds.doctor.ranks import CollectiveResult, describe_speeds, sum_as_rank, sum_locally
from megatron_ds.errors import MegatronDSError
from megatron_ds.parallel.rank_info import RankInfo


@dataclass(frozen=True)
class Examination:
    """A group of findings.

    Attributes:
        title: of the group.
        findings: made while they are iterated over.
    """

    title: str
    findings: Iterable[Finding]


def examine(folder: Path, num_ranks: int, launched: RankInfo | None = None) -> Iterator[Examination]:
    """Yield the examinations of this machine; nothing stays on it.

    Args:
        folder: the directory whose disk is tested.
        num_ranks: number of ranks to start on this machine for the test of collectives; 0 or 1 = no test.
        launched: this rank, if a launcher started it: then its ranks are tested.
    """
    yield Examination("packages", find_packages())
    yield Examination("devices", chain(find_devices(), find_compilers()))
    yield Examination("machine", chain(find_machine(), _once(lambda: find_disk(folder))))
    yield Examination("network", find_network())
    if launched is not None and launched.world_size > 1:
        yield Examination("ranks", _once(lambda: _compare([sum_as_rank(launched)], launched.world_size)))
    elif num_ranks > 1:
        yield Examination("ranks", _once(lambda: _compare(sum_locally(num_ranks), num_ranks)))


def _once(find: Callable[[], Finding]) -> Iterator[Finding]:
    """Yield one finding, which is made when it is asked for; an error of the user's is a problem."""
    try:
        yield find()
    except MegatronDSError as failure:
        message, _, fix = str(failure).rpartition("; ")
        yield problem("collectives", message or str(failure), fix if message else "")


def _compare(results: list[CollectiveResult], num_ranks: int) -> Finding:
    first = results[0]
    value = f"{num_ranks} ranks over {first.backend} on {first.device}"
    wrong = sorted({num_bytes for one in results for num_bytes in one.wrong})
    if wrong:
        sizes = ", ".join(f"{num_bytes:,} bytes" for num_bytes in wrong)
        return problem(
            "collectives",
            f"{value}: sums of {sizes} are wrong",
            "other devices, or NCCL_P2P_DISABLE=1 to find the broken link",
        )
    return Finding("collectives", f"{value}: sums are right, {describe_speeds(first.speeds)}")
