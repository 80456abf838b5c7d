"""Agreement of a launcher's ranks on what they run, through the store of their rendezvous, before anything is built.

Each rank reads its own run file, environment and disks. It sends a digest of them, and rank 0 compares the digests: one
small message of each rank, whatever the size of the world. The facts themselves are stored once for each digest, where
rank 0 reads them if digests differ.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist
import xxhash

from megatron_ds.errors import ConfigError, LaunchError, MegatronDSError, TopologyError, show
from megatron_ds.log import get_logger
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rendezvous import FIRST_MESSAGE_S, LONGEST_SILENCE_S, RankGroup, name_ranks

Facts = Mapping[str, Mapping[str, str]]
"""Kind, such as "versions" -> name -> value. Kinds and names are in the order in which they are reported."""

TELL_S = 10.0  # rank 0, which may host the store, leaves after this time if a rank has not read its conclusion
POLL_S = 0.02
MAX_POLL_S = 0.5
MAX_NAMES, MAX_VALUES, MAX_SETS_OF_FACTS, MAX_HOSTS = 4, 4, 64, 4
ABSENT = "not set"


class Council:
    """Exchange of short texts between ranks that have met. Every method is collective over the world.

    Args:
        info: this rank.
        group: from `meet`.
    """

    def __init__(self, info: RankInfo, group: RankGroup) -> None:
        self.info = info
        self._group = group
        self._store = dist.PrefixStore("agreement", group.store)

    def from_first(self, topic: str, value: str) -> str:
        """Return rank 0's value; the others' is ignored.

        Raises:
            TopologyError, LaunchError: see `ask`.
        """
        with _connected(topic):
            if self.info.rank == 0:
                self._store.set(f"{topic}/first", value)
                return value
            self._wait([f"{topic}/first"], topic)
            return self._get(f"{topic}/first")

    def ask(self, topic: str, own: str, judge: Callable[[Sequence[str]], str]) -> str:
        """Send a text to rank 0, and return what it concludes from those of all ranks.

        Args:
            topic: unique in the group.
            own: this rank's text.
            judge: called on rank 0 with the texts in the order of the ranks; returns the conclusion.

        Raises:
            TopologyError: a rank sends nothing within the time limit of the start.
            LaunchError: the connection to rank 0 is lost.
        """
        keys = [f"{topic}/{rank}" for rank in range(self.info.world_size)]
        with _connected(topic):
            self._store.set(keys[self.info.rank], own)
            if self.info.rank > 0:
                self._wait([f"{topic}/conclusion"], topic)
                return self._get(f"{topic}/conclusion")
            self._wait(keys, topic)
            conclusion = judge([text.decode() for text in self._store.multi_get(keys)])
            self._store.set(f"{topic}/conclusion", conclusion)
            return conclusion

    def wait_until_known(self, topic: str) -> None:
        """Have rank 0, which may host the store, wait until all ranks know a conclusion after which they end."""
        with suppress(dist.DistError):  # this rank knows the conclusion
            self._store.add(f"{topic}/told", 1)
            until = time.monotonic() + TELL_S
            while self.info.rank == 0 and time.monotonic() < until:
                if self._store.add(f"{topic}/told", 0) >= self.info.world_size:
                    break
                time.sleep(POLL_S)

    def decide(self, topic: str, own: str, judge: Callable[[Sequence[str]], str]) -> None:
        """Send a text to rank 0, which judges those of all ranks.

        Args:
            topic, own: see `ask`.
            judge: called on rank 0 with the texts in the order of the ranks; returns a problem, or an empty text.

        Raises:
            ConfigError: the problem, on rank 0 and on the first rank of each other machine; the other ranks exit with
                status 2.
            TopologyError, LaunchError: see `ask`.
        """
        problem = self.ask(topic, own, judge)
        if problem:
            self.wait_until_known(topic)
            self._refuse(problem)

    def put(self, key: str, value: str) -> None:
        """Store a value that every rank would store under this key, unless another rank has done so."""
        if not self._store.check([key]):
            self._store.set(key, value)

    def get(self, key: str) -> str:
        """Return a value of `put`."""
        return self._get(key)

    def _get(self, key: str) -> str:
        return self._store.get(key).decode()

    def _wait(self, keys: list[str], topic: str) -> None:
        """Wait until all keys are set; the first rank of each machine logs which ranks have not set theirs."""
        began_s, next_message_s = time.monotonic(), FIRST_MESSAGE_S
        limit_s = self._group.timeout_s
        more_s = TELL_S if self.info.rank > 0 else 0.0  # rank 0 knows best who is silent, and must be the first to end
        while not self._store.check(keys):
            waited_s = time.monotonic() - began_s
            if limit_s and waited_s > limit_s + more_s:
                raise TopologyError(
                    f"no word of {self._name_silent(keys)} about {topic} within train.start_timeout={limit_s:g} s; the "
                    "log of that rank or its machine's storage may say why; a larger train.start_timeout waits longer"
                )
            if waited_s > next_message_s:
                next_message_s = waited_s + min(waited_s, LONGEST_SILENCE_S)
                if self.info.local_rank == 0 or self.info.rank == 0:
                    silent = self._name_silent(keys)
                    get_logger().warning("waiting for word of %s about %s since %.0f s", silent, topic, waited_s)
            time.sleep(min(POLL_S + waited_s / 20, MAX_POLL_S))

    def _name_silent(self, keys: Sequence[str]) -> str:
        silent = [int(key.rpartition("/")[2]) for key in keys if key[-1].isdigit() and not self._has(key)]
        return name_ranks(silent) if silent else "rank 0"

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _refuse(self, problem: str) -> NoReturn:
        if self.info.rank == 0 or self.info.local_rank == 0:
            raise ConfigError(problem)
        sys.exit(2)


@contextmanager
def _connected(topic: str) -> Iterator[None]:
    """Raise a `LaunchError` where the store cannot be reached any more."""
    try:
        yield
    except dist.DistError as error:
        raise LaunchError(
            f"the connection to rank 0 was lost while ranks compared {topic}; its own log says why"
        ) from error


def agree(council: Council, topic: str, gather: Callable[[], Facts], fixes: Mapping[str, str]) -> None:
    """Check that all ranks have the same facts. Collective over the world.

    Args:
        council: the ranks.
        topic: what is compared, for messages; unique in the group.
        gather: returns this rank's facts. If it raises an error of the user's, that is the problem of all ranks.
        fixes: kind -> what the user can do about a difference.

    Raises:
        ConfigError: they differ; the message names each of the first names that do, their values and ranks. See
            `Council.decide`.
    """
    own = {"host": socket.gethostname(), "digest": "", "problem": ""}
    defect: Exception | None = None
    try:
        facts = gather()
        own["digest"] = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())  # in whatever order
        council.put(f"{topic}/facts/{own['digest']}", json.dumps(facts))
    except MegatronDSError as problem:
        own["problem"] = " ".join(str(problem).split())
    except Exception as problem:  # the others must not wait for this rank
        defect, own["problem"] = problem, f"{type(problem).__name__}: {' '.join(str(problem).split())}"

    def judge(texts: Sequence[str]) -> str:
        everyone = [json.loads(text) for text in texts]
        hosts = [one["host"] for one in everyone]
        for rank, one in enumerate(everyone):
            if one["problem"]:
                return one["problem"] if rank == 0 else f"rank {rank} on {one['host']}: {one['problem']}"
        ranks_of: dict[str, list[int]] = defaultdict(list)
        for rank, one in enumerate(everyone):
            ranks_of[one["digest"]].append(rank)
        if len(ranks_of) == 1:
            return ""
        read = list(ranks_of.items())[:MAX_SETS_OF_FACTS]
        found = [(ranks, json.loads(council.get(f"{topic}/facts/{digest}"))) for digest, ranks in read]
        return describe_differences(found, hosts, fixes)

    try:
        council.decide(topic, json.dumps(own), judge)
    finally:
        if defect is not None:
            raise defect


def describe_differences(
    found: Sequence[tuple[Sequence[int], Facts]], hosts: Sequence[str], fixes: Mapping[str, str]
) -> str:
    """Return a line such as `optimizer.lr is 0.5 on rank 1 (node2) and 0.001 on ranks 0, 2-7 (node1); try ...`.

    Only the first kind of facts that differs is named: later ones may follow from it.

    Args:
        found: ranks and their facts.
        hosts: the machine of each rank.
        fixes: kind -> the end of the line.
    """
    for kind in dict.fromkeys(kind for _, facts in found for kind in facts):
        parts = []
        for name in dict.fromkeys(name for _, facts in found for name in facts.get(kind, {})):
            ranks_of: dict[str, list[int]] = defaultdict(list)
            for ranks, facts in found:
                ranks_of[facts.get(kind, {}).get(name, ABSENT)].extend(ranks)
            if len(ranks_of) > 1:
                parts.append(_describe(name, ranks_of, hosts))
        if parts:
            more = f"; {len(parts) - MAX_NAMES} more differ" if len(parts) > MAX_NAMES else ""
            return f"{'; '.join(parts[:MAX_NAMES])}{more}; {fixes[kind]}"
    raise AssertionError("facts with different digests are equal")


def _describe(name: str, ranks_of: Mapping[str, Sequence[int]], hosts: Sequence[str]) -> str:
    fewest_first = sorted(ranks_of.items(), key=lambda item: (len(item[1]), min(item[1])))
    values = [f"{show(value)} on {name_places(ranks, hosts)}" for value, ranks in fewest_first]
    if len(values) > MAX_VALUES:
        values = [*values[: MAX_VALUES - 1], f"{len(values) - MAX_VALUES + 1} other values on the rest"]
    return f"{name} is {', '.join(values[:-1])} and {values[-1]}"


def name_places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return `rank 1`, or `ranks 0, 2-7`, with their machines if the world has several.

    Args:
        ranks: the ranks.
        hosts: the machine of every rank of the world.
    """
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
    machines = list(dict.fromkeys(hosts[rank] for rank in sorted(ranks)))
    if len(machines) > MAX_HOSTS:
        machines = [*machines[:MAX_HOSTS], f"{len(machines) - MAX_HOSTS} more"]
    where = f" ({', '.join(machines)})" if len(set(hosts)) > 1 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{where}"
