"""Names, network interfaces, RDMA, and the environment variables of launchers and NCCL."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import psutil

from megatron_ds.doctor.finding import Finding, note, problem
from megatron_ds.errors import TopologyError
from megatron_ds.parallel.rank_info import rank_from_environment, rank_source

_INTERFACE_NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_PREFIXES = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_NCCL_")


def find_network(environ: MutableMapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield the host's name and address, interfaces, RDMA devices, and variables that direct communication."""
    yield compare_host_name(socket.gethostname())
    interfaces = {
        name: [one.address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        for name, addresses in psutil.net_if_addrs().items()
    }
    stats = psutil.net_if_stats()
    up = {name: addresses for name, addresses in interfaces.items() if name in stats and stats[name].isup}
    yield Finding("interfaces", ", ".join(f"{name} ({_shown(found, stats[name].speed)})" for name, found in up.items()))
    yield from compare_interface_names(environ, list(up))
    yield from find_rdma(environ=environ)
    yield find_launcher(environ)
    others = {name: value for name, value in sorted(environ.items()) if name.startswith(_PREFIXES)}
    if others:
        yield Finding("variables", ", ".join(f"{name}={value}" for name, value in others.items()))


def _shown(addresses: list[str], speed: int) -> str:
    text = addresses[0].partition("%")[0] if addresses else "no address"
    return f"{text}, {speed / 1000:g} Gb/s" if speed else text


def compare_host_name(name: str) -> Finding:
    """Return the address of this host by its name, by which other machines reach its rank 0."""
    fix = "an entry for it in /etc/hosts or DNS, or MASTER_ADDR=ADDRESS, if there are several machines"
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return note("host", f"{name} has no address", fix)
    if ipaddress.ip_address(address).is_loopback:
        return note("host", f"{name} is {address}, which other machines cannot reach", fix)
    return Finding("host", f"{name} is {address}")


def compare_interface_names(environ: Mapping[str, str], interfaces: list[str]) -> Iterator[Finding]:
    """Yield the interfaces that variables name and that do not exist.

    Args:
        environ: the environment.
        interfaces: names of those that are up.
    """
    for variable in _INTERFACE_NAMES:
        given = environ.get(variable, "")
        if not given or given.startswith("^"):
            continue
        exact = given.startswith("=") or variable.startswith("GLOO")
        for name in given.lstrip("=").split(","):
            if not any(one == name if exact else one.startswith(name) for one in interfaces):
                fix = f"one of {', '.join(interfaces)}, or unset {variable}"
                yield problem(variable, f"{given}: there is no interface {name} that is up", fix)


def find_rdma(
    folder: Path = Path("/sys/class/infiniband"), environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Yield the RDMA devices (InfiniBand, RoCE) with the state of their ports, and what keeps NCCL from them."""
    devices = sorted(folder.iterdir()) if folder.is_dir() else []
    if not devices:
        yield Finding("rdma", "no devices: machines would communicate over TCP")
        return
    states = {one.name: _port_states(one) for one in devices}
    value = ", ".join(f"{name} {' '.join(found) or 'no port'}" for name, found in states.items())
    if not any("ACTIVE" in one for found in states.values() for one in found):
        yield note("rdma", f"{value}: no port is active", "ibstat; check cables and the subnet manager")
    elif environ.get("NCCL_IB_DISABLE") == "1":
        yield note("rdma", f"{value}, which NCCL_IB_DISABLE=1 leaves alone", "unset NCCL_IB_DISABLE")
    else:
        yield Finding("rdma", value)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        fix = "ulimit -l unlimited (docker run --ulimit memlock=-1)"
        yield note("locked memory", f"up to {soft / 2**20:.0f} MiB; RDMA locks its buffers", fix)


def _port_states(device: Path) -> list[str]:
    """Return the state of each port of an RDMA device, such as `ACTIVE`."""
    found = []
    for file in sorted(device.glob("ports/*/state")):
        try:
            found.append(file.read_text().rpartition(":")[2].strip())
        except OSError:
            found.append("unreadable")
    return found


def find_launcher(environ: MutableMapping[str, str]) -> Finding:
    """Return the launcher's rank that this process has, by the environment."""
    try:
        given = rank_from_environment(environ)
    except TopologyError as failure:
        fix = f"torchrun, or to start alone: unset {' '.join(rank_source(environ).unset)}"
        return problem("launcher", str(failure).partition("; ")[0], fix)
    if given is None:
        return Finding("launcher", "none: commands start their own ranks")
    settings = ", ".join(rank_source(environ).settings)
    return Finding("launcher", f"this is rank {given.rank} of {given.world_size} ({settings})")
