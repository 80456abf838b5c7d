"""The rendezvous of a launcher's ranks at MASTER_ADDR and MASTER_PORT, with messages that name the missing ranks.

Rank 0 hosts a TCP store there; under torchrun its agent does. torch's own rendezvous waits without a message, or logs
stack traces of C++, so this one tries the address first and polls. A store may outlive a group of ranks, as torchrun's
does when it restarts them. Therefore rank 0 issues an invitation, a new name, and every rank answers the newest one.
The name is the group's prefix in the store, where nothing is left of an earlier group.

A rank that cannot take part, because it cannot read its run file or was given another number of ranks, says so in the
store. Rank 0 then calls the meeting off: every rank that has come, or comes within `TELL_S`, ends with that problem.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import resource
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_ds.errors import ConfigError, TopologyError
from megatron_ds.log import get_logger
from megatron_ds.parallel.launcher_process import end_with_launcher
from megatron_ds.parallel.rank_info import LAST_PORT, RankInfo, RankSource, rank_source

START_TIMEOUT_S = 300.0  # the default of train.start_timeout
NAME_TIMEOUT_S = 60.0  # an unknown host name may still be published, as in a cluster that starts
FIRST_MESSAGE_S = 5.0  # launchers start ranks within seconds of each other
LONGEST_SILENCE_S = 60.0
CONNECT_S = 3.0  # time limit of one try
MAX_POLL_S = 0.5
MAX_NAMED_RANKS = 8
TELL_S = 30.0  # time in which ranks may still come to learn that a meeting is called off
OTHER_SIZE_S = 5.0  # a rank of an earlier group, which is being ended, may find the invitation of the next one
UNKNOWN_S = 2.0  # instead of `TELL_S` where it is not known how many ranks there are
POLL_TOLD_S = 0.05
OWN_FILES, FILES_OF_A_RANK = 256, 8
_HAS_BEGUN: ContextVar[bool] = ContextVar("has begun to meet", default=False)


@dataclass(frozen=True)
class RankGroup:
    """Ranks that have met.

    Attributes:
        name: unique among the groups that use the same store.
        store: the keys of this group.
        timeout_s: the time limit of its start in seconds; 0 = none.
    """

    name: str
    store: dist.Store
    timeout_s: float


def has_begun_to_meet() -> bool:
    """Return whether this process has called `meet`, so that its peers do not wait for it without a message."""
    return _HAS_BEGUN.get()


def meet(
    info: RankInfo,
    timeout_s: float = START_TIMEOUT_S,
    environ: Mapping[str, str] = os.environ,
    problem: str = "",
) -> RankGroup:
    """Wait at MASTER_ADDR and MASTER_PORT until every rank has come. Collective over the world.

    Every rank logs for whom it waits, first after `FIRST_MESSAGE_S`, then at growing intervals. From here on it ends if
    its launcher does.

    Args:
        info: this rank, from `rank_from_environment`.
        timeout_s: time limit in seconds; 0 = none.
        environ: has MASTER_ADDR and MASTER_PORT.
        problem: the reason why this rank cannot take part, if there is one; the others raise it too.

    Raises:
        TopologyError: the port is in use, the host name is unknown, or a rank is missing after the time limit.
        ConfigError: a rank cannot take part.
    """
    end_with_launcher(info.rank, environ)
    _HAS_BEGUN.set(True)
    _allow_connections(info)
    wait = _Wait(info, environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), timeout_s, rank_source(environ))
    is_hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun's agent
    while True:
        store = _host(wait) if info.rank == 0 and not is_hosted else _connect(wait, is_hosted)
        keys = dist.PrefixStore("megatron_ds", store)
        try:
            name = _invite(keys, info, wait, problem) if info.rank == 0 else _answer(keys, info, wait, problem)
        except dist.DistNetworkError:
            wait.pause(wait.of_all("rank 0"), "the connection was lost")
            continue
        if wait.has_spoken:
            get_logger().info("all %d ranks have come after %.0f s", info.world_size, wait.elapsed_s)
        return RankGroup(name, dist.PrefixStore(f"megatron_ds/{name}", store), timeout_s)


def _allow_connections(info: RankInfo) -> None:
    """Raise this process's limit of open files, often 1,024, where its connections may reach it.

    gloo connects each rank to every other one in each group, and rank 0's store has a few connections of each rank.
    Beyond the limit both would wait without a message.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OWN_FILES + FILES_OF_A_RANK * info.world_size
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    is_enough = hard == resource.RLIM_INFINITY or hard >= wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if is_enough else hard, hard))
    if not is_enough and info.local_rank == 0:
        text = "at most %d files may be open here (ulimit -Hn); connections of %d ranks may need %d; try a larger limit"
        get_logger().warning(text, hard, info.world_size, wanted)


class _Wait:
    """Polling with messages and a time limit."""

    def __init__(self, info: RankInfo, host: str, port: int, timeout_s: float, source: RankSource) -> None:
        self.host, self.port, self.timeout_s = host, port, timeout_s
        self._info, self._world_size, self._source = info, info.world_size, source
        self._began_s = time.monotonic()
        self._next_message_s = FIRST_MESSAGE_S

    @property
    def has_spoken(self) -> bool:
        return self._next_message_s > FIRST_MESSAGE_S

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def of_all(self, ranks: str) -> str:
        """Return `rank 1 of 2` from `rank 1`."""
        return f"{ranks} of {self._world_size}"

    def _describe_host(self) -> str:
        """Return the way in which MASTER_ADDR cannot be rank 0's machine; empty if nothing speaks against it."""
        try:
            addresses = _addresses_of(self.host)
        except OSError as problem:
            unknown = f"MASTER_ADDR={self.host} is not known here: {problem.strerror}"
            return unknown if self._info.rank == 0 else ""  # the others do not get so far
        except UnicodeError:
            return ""
        first = addresses[0]
        if self._info.rank == 0 and not any(map(_is_own_address, addresses)):
            named = f"MASTER_ADDR={self.host}" + (f", {first}," if first != self.host else "")
            return f"{named} is no address of this machine, rank 0's; try its own"
        is_loopback = all(ipaddress.ip_address(one).is_loopback for one in addresses)
        if self._info.rank != self._info.local_rank and is_loopback:
            return (
                f"MASTER_ADDR={self.host} is {first} here, which is this machine itself; if rank 0 is on another "
                "one, set it to an address by which all machines reach that"
            )
        return ""

    def pause(self, missing: str | Callable[[], str], reason: str = "") -> None:
        """Sleep until the next poll.

        Args:
            missing: those that have not come, or a function that names them, which is called only for a message.
            reason: why they cannot be reached, if that is known.

        Raises:
            TopologyError: the time limit has passed.
        """
        elapsed_s = self.elapsed_s
        is_over = self.timeout_s > 0 and elapsed_s >= self.timeout_s
        if is_over or elapsed_s >= self._next_message_s:
            who = missing if isinstance(missing, str) else missing()
            place = f"{who} at {self.host}:{self.port}"
            reason = "; ".join(one for one in (reason, self._describe_host()) if one)
            why = f" ({reason})" if reason else ""
            origin = self._source.describe()
            if is_over:
                limit = f"train.start_timeout={self.timeout_s:g} s"
                raise TopologyError(f"no sign of {place} within {limit}{why}; {origin}")
            get_logger().warning("waiting for %s since %.0f s%s, %s", place, elapsed_s, why, origin)
            self._next_message_s = elapsed_s + min(elapsed_s, LONGEST_SILENCE_S)
        left_s = self.timeout_s - elapsed_s if self.timeout_s else MAX_POLL_S
        time.sleep(max(0.01, min(0.02 + elapsed_s / 20, MAX_POLL_S, left_s)))


def _host(wait: _Wait) -> dist.Store:
    """Start the store on this machine; if all ranks are on it, the store listens on its loopback interface alone."""
    listener = _loopback_listener(wait.host, wait.port)
    try:
        return dist.TCPStore(
            "127.0.0.1",
            wait.port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    except dist.DistNetworkError as problem:
        found = re.search(r"message: (.*)", str(problem))
        why = found.group(1) if found else str(problem).partition("\n")[0]
        raise TopologyError(
            f"MASTER_PORT={wait.port} in the environment: rank 0 cannot listen there ({why}); nearest: "
            f"{_free_port_above(wait.port)}, the same on every rank"
        ) from None


def _loopback_listener(host: str, port: int) -> socket.socket | None:
    """Return a socket that listens on the loopback interface; None if the host is not this machine's 127.0.0.1.

    None also if the port cannot be listened at: an earlier group of this process may have its store there, which torch
    shares, and otherwise torch says why.
    """
    try:
        if socket.gethostbyname(host) != "127.0.0.1":
            return None
        listener = socket.socket()
    except (OSError, UnicodeError):  # an unknown name, which the other ranks report
        return None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        return None
    return listener


def _free_port_above(port: int) -> int:
    """Return the lowest port above `port`, and above those that only root may use, that is free on this machine now."""
    for candidate in range(max(port + 1, 1024), LAST_PORT + 1):
        with socket.socket() as listener:
            try:
                listener.bind(("", candidate))
            except OSError:
                continue
            return candidate
    return 29500


def _connect(wait: _Wait, is_hosted: bool) -> dist.Store:
    """Connect to the store of rank 0, or of torchrun's agent, once it listens."""
    missing = "torchrun's agent" if is_hosted else wait.of_all("rank 0")
    while True:
        reason = _reason_unreachable(wait)
        if not reason:
            attempt = _Attempt(wait)
            while attempt.is_running():
                wait.pause(missing, "the port is open, but what listens there is not a store of torch's")
            if attempt.store is not None:
                return attempt.store
            reason = attempt.reason
        wait.pause(missing, reason)


def _addresses_of(host: str) -> list[str]:
    """Return the IP addresses of a host, those of IPv4 first.

    Raises:
        OSError: the name is not known.
        UnicodeError: it is not a host name.
    """
    found = [str(place[0]).partition("%")[0] for *_, place in socket.getaddrinfo(host, None)]
    return sorted(dict.fromkeys(found), key=lambda address: ":" in address)


def _is_own_address(address: str) -> bool:
    """Return whether an address is one of this machine's."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
            listener.bind((address, 0))
    except OSError:
        return False
    return True


def _reason_unreachable(wait: _Wait) -> str:
    """Return why a connection to the store is impossible now; empty if something listens there.

    Raises:
        TopologyError: the host name has been unknown for `NAME_TIMEOUT_S`.
    """
    try:
        socket.create_connection((wait.host, wait.port), timeout=CONNECT_S).close()
    except socket.gaierror as problem:
        reason = f"MASTER_ADDR={wait.host} is not known here: {problem.strerror}"
        if wait.elapsed_s >= NAME_TIMEOUT_S:
            raise TopologyError(f"{reason}; set it to the name or the IP address of rank 0's machine") from None
        return reason
    except UnicodeError:
        raise TopologyError(f"MASTER_ADDR={wait.host} is not a host name; set it to that of rank 0's machine") from None
    except TimeoutError:
        return "no response; is the address right, and the port open in the firewall?"
    except OSError as problem:
        return os.strerror(problem.errno).lower() if problem.errno else str(problem)
    return ""


class _Attempt:
    """A thread that connects to a store. torch sets no time limit where a port is open and nothing answers.

    Attributes:
        store: the connected store, if the attempt succeeded.
        reason: why not, if it failed.
    """

    def __init__(self, wait: _Wait) -> None:
        self.store: dist.Store | None = None
        self.reason = ""
        self._wait = wait
        self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        self._thread.join(MAX_POLL_S)
        return self._thread.is_alive()

    def _run(self) -> None:
        limit = timedelta(seconds=self._wait.timeout_s or START_TIMEOUT_S)
        try:
            self.store = dist.TCPStore(self._wait.host, self._wait.port, is_master=False, timeout=limit)
        except dist.DistError as problem:
            self.reason = str(problem).partition("\n")[0]


def _invite(store: dist.Store, info: RankInfo, wait: _Wait, problem: str) -> str:
    """Invite the other ranks, wait for their answers, and publish the members. Rank 0 only."""
    name = uuid.uuid4().hex
    answers = {rank: f"{name}/{rank}" for rank in range(1, info.world_size)}
    store.set("invitation", json.dumps([name, info.world_size]))
    if problem:
        _call_off(store, name, answers, problem, TELL_S)
    while answers and not store.check(list(answers.values())):
        _look_for_problem(store, name, answers)
        wait.pause(lambda: wait.of_all(name_ranks([rank for rank, key in answers.items() if not store.check([key])])))
    _look_for_problem(store, name, answers)
    members = [store.get(key).decode() for key in answers.values()]
    store.set(f"{name}/members", json.dumps(["", *members]))
    return name


def _look_for_problem(store: dist.Store, name: str, answers: Mapping[int, str]) -> None:
    """Call the meeting off if a rank cannot take part. Rank 0 only."""
    for key, patience_s in (("problem", TELL_S), ("other size", UNKNOWN_S)):
        if store.check([f"{name}/{key}"]):
            _call_off(store, name, answers, store.get(f"{name}/{key}").decode(), patience_s)


def _call_off(store: dist.Store, name: str, answers: Mapping[int, str], problem: str, patience_s: float) -> NoReturn:
    """Publish a problem instead of the members until all ranks know it, or the time is over. Rank 0 only.

    Raises:
        ConfigError: the problem.
    """
    until, told = time.monotonic() + patience_s, 0
    come: dict[str, str] = {}  # the first process of each rank: a second one belongs to the next group
    while told < len(answers) and time.monotonic() < until:
        new = [key for key in answers.values() if key not in come and store.check([key])]
        come |= {key: store.get(key).decode() for key in new}
        store.set(f"{name}/members", json.dumps([problem, *come.values()]))
        time.sleep(POLL_TOLD_S)
        told = store.add(f"{name}/told", 0)
    raise ConfigError(problem)


def _answer(store: dist.Store, info: RankInfo, wait: _Wait, problem: str) -> str:
    """Answer the newest invitation until its members include this process.

    An invitation of an earlier group can be found before rank 0 issues a new one; its members are other processes.
    """
    process, answered, reason = uuid.uuid4().hex, "", ""
    other_size_since: dict[str, float] = {}  # invitation -> the time when it was found
    while True:
        if store.check(["invitation"]):
            name, world_size = json.loads(store.get("invitation"))
            reason = "" if world_size == info.world_size else f"its WORLD_SIZE is {world_size}, not {info.world_size}"
            if reason and wait.elapsed_s - other_size_since.setdefault(name, wait.elapsed_s) >= OTHER_SIZE_S:
                _refuse_size(store, name, world_size, info)
            if not reason and name != answered:
                if problem:  # before the answer, so that rank 0 finds both
                    store.set(f"{name}/problem", problem)
                store.set(f"{name}/{info.rank}", process)
                answered = name
        members = f"{answered}/members"
        if answered and store.check([members]):
            called_off, *processes = json.loads(store.get(members))
            if process in processes:
                if not called_off:
                    return answered
                store.add(f"{answered}/told", 1)
                raise ConfigError(called_off)
        try:
            wait.pause(wait.of_all("rank 0" if reason or not answered else "other ranks"), reason)
        except TopologyError:
            if answered:
                store.delete_key(f"{answered}/{info.rank}")  # rank 0 may wait longer than this one
            raise


def _refuse_size(store: dist.Store, name: str, world_size: int, info: RankInfo) -> NoReturn:
    problem = (
        f"WORLD_SIZE is {world_size} on rank 0 and {info.world_size} on {name_place(info)}; start the same number of "
        "ranks on every machine"
    )
    store.set(f"{name}/other size", problem)
    raise ConfigError(problem)


def name_place(info: RankInfo) -> str:
    """Return `rank 1 on node2` of this process."""
    return f"rank {info.rank} on {socket.gethostname()}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Return `rank 1`, `ranks 1, 2`, or for many `ranks 1, 2, 3 and 60 more`."""
    shown = ", ".join(map(str, ranks[:MAX_NAMED_RANKS]))
    more = f" and {len(ranks) - MAX_NAMED_RANKS} more" if len(ranks) > MAX_NAMED_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
