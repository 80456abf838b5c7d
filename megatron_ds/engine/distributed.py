"""Start and stop of DeepSpeed's communication, quietly and without compiling anything on a CPU."""

from __future__ import annotations

import importlib
import logging
import os
import re
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ds.engine.cpu_collectives import use_messages
from megatron_ds.engine.device_settings import DEFAULT_SETTINGS, DeviceSettings
from megatron_ds.engine.host_memory import keep_freed_memory
from megatron_ds.errors import TopologyError
from megatron_ds.parallel.failure import lost_peer
from megatron_ds.parallel.interfaces import GLOO, NCCL, choose_interfaces
from megatron_ds.parallel.launch import RENDEZVOUS_FILE, RankInfo
from megatron_ds.parallel.rendezvous import RankGroup

# deepspeed.initialize imports them at its first call; importing them before ranks are forked saves each rank seconds.
_LATE_IMPORTS = (
    "torch._dynamo",  # imported by an optimizer's constructor
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.bf16_optimizer",
)


def preload(compiles: bool = False) -> None:
    """Import everything that a rank needs. Runs no multi-threaded operation, so the process can fork afterwards.

    Args:
        compiles: whether ranks use torch.compile.
    """
    _import_muon()
    import deepspeed

    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    if compiles:
        importlib.import_module("torch._inductor.compile_fx")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    torch.optim.AdamW([torch.nn.Parameter(torch.empty(1))])


def _import_muon() -> None:
    """Import DeepSpeed's Muon without torch.compile, whose decorator costs 0.6 s of imports; our runs do not use it."""
    compile_ = torch.compile
    torch.compile = lambda fn=None, **_: fn if fn is not None else lambda other: other  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compile_


def device_type() -> str:
    """Return the type of the device that DeepSpeed will train on: "cpu", "cuda", ... Initialises no device."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name())


def device_count() -> int:
    """Return the number of visible devices of that type on this machine. Initialises no device."""
    from deepspeed.accelerator import get_accelerator

    return int(get_accelerator().device_count())


def start_distributed(
    info: RankInfo,
    timeout_s: float = 1800.0,
    group: RankGroup | None = None,
    settings: DeviceSettings = DEFAULT_SETTINGS,
) -> torch.device:
    """Join the process group, and return this rank's device after making it the current one. Collective over the world.

    Args:
        info: this rank.
        timeout_s: the time limit of a collective, in seconds.
        group: a launcher's ranks, which have met; None for ranks that `run_local` started, which meet at its file.
        settings: of the devices; they are made before the process starts CUDA, if it has not done so.

    Raises:
        ConfigError: see `DeviceSettings.set_environment`.
        TopologyError: the ranks cannot connect to each other, or a launcher's rank has no device.
    """
    settings.set_environment(os.environ)

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    preload()
    accelerator = get_accelerator()
    local_rank = info.local_rank
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile its shared-memory collectives, which takes minutes and a C++ compiler, and leaves a
        # lock file that hangs later runs if a rank dies meanwhile. gloo is used, and `shared_memory` on request.
        deepspeed.ops.__compatible_ops__ = {}
        keep_freed_memory()
    else:
        local_rank = _device_index(info, accelerator.device_count(), is_launched=group is not None)
        accelerator.set_device(local_rank)
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads its device from it
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # of a shell in an MPI job; DeepSpeed fails where they differ
    if not dist.is_initialized():
        # NCCL connects at once to ranks that name their device, and a barrier need not guess it
        bound = accelerator.device_name() == "cuda" and info.world_size > 1
        device = torch.device("cuda", local_rank) if bound else None
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # groups made later wait 10 or 30 min otherwise
            setattr(dist.distributed_c10d, name, timedelta(seconds=timeout_s))
        _connect(accelerator.communication_backend_name(), info, timedelta(seconds=timeout_s), group, device)
    deepspeed.init_distributed(dist_init_required=False if deepspeed.comm.is_initialized() else None, verbose=False)
    device = torch.device(accelerator.current_device_name() if accelerator.device_name() != "cpu" else "cpu")
    if device.type == "cpu":
        use_messages(deepspeed.comm.comm.cdb)
    settings.set_switches(device)
    return device


def _device_index(info: RankInfo, num_devices: int, is_launched: bool) -> int:
    """Return the index of this rank's device among those that it sees.

    Raises:
        TopologyError: a launcher has started more ranks on this machine than it shows devices.
    """
    if is_launched and 1 < num_devices <= info.local_rank:
        raise TopologyError(
            f"LOCAL_RANK={info.local_rank} of rank {info.rank} has no device: it sees {num_devices}, numbered from 0; "
            f"nearest: {num_devices} ranks on each machine"
        )
    return info.local_rank % num_devices  # under `srun --gpus-per-task=1` each rank sees one device


def _connect(
    backend: str, info: RankInfo, timeout: timedelta, group: RankGroup | None, device: torch.device | None
) -> None:
    """Create the process group. Ranks of a launcher, which have met, connect within the time limit of the start."""
    limit = timedelta(seconds=group.timeout_s) if group is not None and group.timeout_s else timeout
    if group is not None:
        group.store.set_timeout(timeout)
        if info.world_size > 1:
            choose_interfaces(info, group, (GLOO, NCCL) if backend == "nccl" else (GLOO,))
    try:
        dist.init_process_group(
            backend=backend,
            init_method=f"file://{os.environ[RENDEZVOUS_FILE]}" if group is None else None,
            store=group.store if group is not None else None,
            rank=info.rank,
            world_size=info.world_size,
            timeout=min(limit, timeout),
            device_id=device,
        )
    except RuntimeError as problem:
        if backend != "gloo" or lost_peer(problem):
            raise
        reason = re.sub(r"^\[.*?\] ", "", str(problem).partition("\n")[0])
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
        raise TopologyError(
            f"rank {info.rank} cannot connect to the others ({reason}); GLOO_SOCKET_IFNAME={interface} in the "
            f"environment; set it to one of {', '.join(name for _, name in socket.if_nameindex())}"
        ) from problem
    if limit < timeout:
        dist.distributed_c10d._set_pg_timeout(timeout)


def stop_distributed() -> None:
    """Leave the process group, so that no rank waits for this one at exit."""
    if dist.is_initialized():
        if RENDEZVOUS_FILE not in os.environ:  # ranks that `run_local` forked end without ending their interpreter
            _let_threads_settle()
        dist.destroy_process_group()


def _let_threads_settle(limit_s: float = 2.0) -> None:
    """Wait until every other thread of this process sleeps, or until the time limit.

    After a collective has returned, a thread of gloo still releases its tensors, and needs Python's interpreter lock
    for that. If the interpreter ends first, Python ends the thread in the middle of a destructor, and C++ aborts the
    process: "terminate called without an active exception". gloo's groups have no call that ends their threads, so this
    gives up the lock and looks at the threads' states.
    """
    threads, own = Path("/proc/self/task"), str(threading.get_native_id())
    until = time.monotonic() + limit_s
    while threads.is_dir() and time.monotonic() < until:
        time.sleep(0.01)  # without the lock
        others = [thread for thread in threads.iterdir() if thread.name != own]
        if all(_is_asleep(thread) for thread in others):
            return


def _is_asleep(thread: Path) -> bool:
    """Return whether a thread, a directory of /proc, sleeps or has ended."""
    try:
        state = (thread / "stat").read_text().rpartition(") ")[2][:1]  # after the name, which may have parentheses
    except OSError:
        return True
    return state in "SDZXI"
