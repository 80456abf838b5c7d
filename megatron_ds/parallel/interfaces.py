"""The network interface of each rank, checked and chosen before gloo and NCCL use one.

gloo listens at the address of the machine's own name, which Debian and Ubuntu set to 127.0.1.1 in /etc/hosts; NCCL
takes any interface that is neither loopback nor named docker. Neither asks whether the other machines can reach it. The
interface by which a rank reaches MASTER_ADDR is one that they can.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from megatron_ds.errors import TopologyError
from megatron_ds.log import get_logger
from megatron_ds.parallel.agreement import Council
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rendezvous import RankGroup, name_place
from megatron_ds.processes import boot_id

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
CONNECT_S = 5.0
_INTERFACES = Path("/sys/class/net")
_NETWORK = Path("/proc/self/ns/net")


@dataclass(frozen=True)
class _Place:
    """A rank's machine and its connection to the store.

    Attributes:
        network: a text that ranks share if and only if they have the same network interfaces.
        address: the address by which the rank reaches MASTER_ADDR; empty if unknown.
        master: the address of MASTER_ADDR as the rank reaches it.
    """

    network: str
    address: str
    master: str


def choose_interfaces(
    info: RankInfo, group: RankGroup, variables: Sequence[str], environ: MutableMapping[str, str] = os.environ
) -> None:
    """Check the interfaces that the environment names; where it names none, choose those that reach other machines.

    gloo's variable is set to the interface by which the master is reached. NCCL's is set only where it could take a
    bridge or a tunnel of this machine, and excludes these. Nothing is set where all ranks are on one machine.

    Collective over the world: small messages through the group's store, at a constant cost per rank except on rank 0.

    Args:
        info: this rank.
        group: a launcher's ranks, which have met.
        variables: `GLOO` and `NCCL`, as far as they are used.
        environ: has MASTER_ADDR and MASTER_PORT; the variables are set in it.

    Raises:
        TopologyError: on every rank, if one names an interface that does not exist or does not reach the others; or a
            rank sends nothing within the time limit of the start.
        LaunchError: the connection to rank 0 is lost.
    """
    interfaces = addresses_of_interfaces()
    problem = next((text for name in variables if (text := _unknown(name, environ, interfaces))), "")
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    own, council = _find_place(host, port), Council(info, group)
    found = json.loads(council.ask("their machines", json.dumps(asdict(own)), _first_away))
    reached = _Place(**found) if found is not None else None
    if reached is not None and not problem:
        address = own.address if own.network != reached.network else _address_towards(reached)
        names = [name for name, addresses in interfaces.items() if address in addresses]
        problem = _choose(variables, environ, interfaces, names, (host, port)) if names else ""
    mine = f"{name_place(info)} cannot connect to the others: {problem}" if problem else ""
    first = council.ask("their network interfaces", mine, lambda texts: next(filter(None, texts), ""))
    if first:
        council.wait_until_known("their network interfaces")
        raise TopologyError(first)


def addresses_of_interfaces() -> dict[str, list[str]]:
    """Return the IP addresses of this machine's interfaces."""
    return {
        name: [one.address.partition("%")[0] for one in found if one.family in (socket.AF_INET, socket.AF_INET6)]
        for name, found in psutil.net_if_addrs().items()
    }


def _unknown(variable: str, environ: Mapping[str, str], interfaces: Mapping[str, Sequence[str]]) -> str:
    """Return the problem of a variable that names no interface of this machine; empty without any.

    gloo takes exact names; NCCL takes beginnings of names, exact ones after `=`, and excluded ones after `^`.
    """
    given = environ.get(variable, "")
    if not given or given.startswith("^"):
        return ""
    exact = given.startswith("=") or variable == GLOO
    for name in given.lstrip("=").split(","):
        if any(one == name if exact else one.startswith(name) for one in interfaces):
            return ""
    with_address = ", ".join(name for name, addresses in interfaces.items() if addresses)
    return f"{variable}={given} in the environment; set it to one of {with_address}"


def _find_place(host: str, port: int) -> _Place:
    network = boot_id() or socket.gethostname()
    if _NETWORK.exists():
        network += f" {os.stat(_NETWORK).st_ino}"  # of each machine's first network the same
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            return _Place(network, connection.getsockname()[0], connection.getpeername()[0])
    except OSError:  # the store was reached just before; without an address nothing is chosen here
        return _Place(network, "", "")


def _first_away(texts: Sequence[str]) -> str:
    """Return the first rank's place that is on another machine than rank 0's; `null` if all are on one."""
    own, *others = (_Place(**json.loads(text)) for text in texts)
    away = next((place for place in others if place.network != own.network and place.address), None)
    # those on rank 0's machine reach it by an address that says nothing; the place carries rank 0's network
    return json.dumps(None if away is None else asdict(replace(away, network=own.network)))


def _address_towards(reached: _Place) -> str:
    """Return the address of this machine, rank 0's, from which another machine is reached."""
    with socket.socket(socket.AF_INET6 if ":" in reached.address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((reached.address, 9))  # sends nothing: the system looks up the route
        except OSError:
            return reached.master
        return str(probe.getsockname()[0])


def _choose(
    variables: Sequence[str],
    environ: MutableMapping[str, str],
    interfaces: Mapping[str, Sequence[str]],
    names: Sequence[str],
    master: tuple[str, int],
) -> str:
    """Set the variables that are unset, and return the problem of one that is set; empty without any."""
    for variable in variables:
        given = environ.get(variable, "")
        if not given:
            chosen = names[0] if variable == GLOO else _without_bridges(interfaces, names)
            if chosen:
                environ[variable] = chosen
                get_logger().info("%s=%s: %s is reached by %s", variable, chosen, master[0], names[0])
            continue
        own = [address for name in given.split(",") for address in interfaces.get(name, ())]
        if variable == GLOO and not any(_reaches(address, names, interfaces, master) for address in own):
            return (
                f"{variable}={given} in the environment does not reach {master[0]}:{master[1]}; set it to {names[0]}, "
                "or unset it"
            )
    return ""


def _without_bridges(interfaces: Mapping[str, Sequence[str]], names: Sequence[str]) -> str:
    """Return a value of NCCL's variable that excludes bridges and tunnels other than `names`; empty without any.

    NCCL excludes loopback and Docker's by itself, but not where the variable is set.
    """
    inner = [
        name for name in interfaces if any((_INTERFACES / name / kind).exists() for kind in ("bridge", "tun_flags"))
    ]
    excluded = [name for name in inner if name not in names]
    if not any(interfaces[name] and not name.startswith("docker") for name in excluded):
        return ""
    return "^=" + ",".join(["lo", *excluded])


def _reaches(
    address: str, names: Sequence[str], interfaces: Mapping[str, Sequence[str]], master: tuple[str, int]
) -> bool:
    """Return whether the others can connect to an address of this machine, as far as this machine can tell."""
    if any(address in interfaces[name] for name in names):
        return True
    if ipaddress.ip_address(address).is_loopback:
        return False
    try:
        socket.create_connection(master, timeout=CONNECT_S, source_address=(address, 0)).close()
    except OSError:
        return False
    return True
