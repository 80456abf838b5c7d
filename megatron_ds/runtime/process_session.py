"""A process in its group of ranks, from joining the group to leaving it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ds.cache import scratch_directory
from megatron_ds.config import EngineConfig, build_section
from megatron_ds.engine import DEFAULT_SETTINGS, DeviceSettings, start_distributed, stop_distributed
from megatron_ds.log import quiet_libraries, setup_logging
from megatron_ds.parallel.agreement import Council, Facts, agree
from megatron_ds.parallel.launch import loopback_interfaces
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo, rank_from_environment
from megatron_ds.parallel.rendezvous import meet
from megatron_ds.parallel.watchdog import watch_peers
from megatron_ds.runtime.loaded_model import LoadedModel
from megatron_ds.runtime.model_engine import ModelEngine
from megatron_ds.runtime.rank_facts import FIXES, in_order, process_facts
from megatron_ds.runtime.setup import build, plan_engine


@dataclass(frozen=True)
class Session:
    """A process that has joined its group of ranks.

    Attributes:
        info: its global rank, the number of ranks and its rank on this machine.
        device: the device of its tensors.
    """

    info: RankInfo
    device: torch.device

    @property
    def rank(self) -> int:
        return self.info.rank

    @property
    def world_size(self) -> int:
        return self.info.world_size

    def build_engine(self, model: LoadedModel, config: EngineConfig | None = None, **fields: Any) -> ModelEngine:
        """Build this rank's part of a model under DeepSpeed. Collective over the world.

        Args:
            model: from `load_model`.
            config: the engine config; None = made from `fields`.
            fields: fields of an `EngineConfig`, such as `parallel={"tensor": 2}`, `deepspeed="ds.json"`,
                `optimizer={"lr": 3e-4}`, `global_batch_size=32`, `micro_batch_size=4`, `recompute="full"`.
                `optimizer=None` builds an engine whose steps compute gradients and change no weight.

        Raises:
            ConfigError: a field is invalid or contradicts the DeepSpeed JSON.
            TopologyError: the model or the batch cannot be divided over the ranks.
        """
        assert config is None or not fields, "pass an engine config or its fields, not both"
        config = config or build_section(EngineConfig, fields, keep=("optimizer",))
        plan = plan_engine(config, model.hf, self.world_size, self.device.type, trains_part=bool(model.frozen))
        return ModelEngine(build(model, plan, self.rank, self.device), model, plan)


@contextmanager
def session(
    timeout_s: float = 1800.0,
    settings: DeviceSettings = DEFAULT_SETTINGS,
    facts: Callable[[], Facts] = dict,
    peer_timeout_s: float | None = None,
) -> Iterator[Session]:
    """Join the ranks that a launcher started, or be the only rank.

    Under torchrun, the `deepspeed` launcher or srun the process takes its rank from the environment. Started alone, it
    is rank 0 of one: a notebook works too, also when its cells are run again. With several ranks the process group is
    left as it is after an exception, because leaving it could wait for ranks that wait for this one; the process is
    expected to end.

    Args:
        timeout_s: time limit of a collective, in seconds.
        settings: of the devices, such as `DeviceSettings(tensor=2, deterministic=True)`. They take effect if the
            process has not used CUDA yet.
        facts: what else than the versions of packages and the environment must be the same on every rank of a
            launcher: kinds of `rank_facts.FIXES`, with names and values.
        peer_timeout_s: the process ends with a message if another rank's process or machine does not respond for so
            long, in seconds; None = `timeout_s`, 0 = no limit.

    Raises:
        ConfigError: see `DeviceSettings.set_environment`; or ranks of a launcher differ.
        TopologyError: a launcher's environment variables are incomplete, or a rank does not come.
    """
    quiet_libraries()
    info = rank_from_environment()
    setup_logging(info.rank if info is not None else 0)
    if info is not None:
        group = None if RENDEZVOUS_FILE in os.environ else meet(info)
        setting = "timeout_s" if peer_timeout_s is None else ""
        with watch_peers(info, group, timeout_s if peer_timeout_s is None else peer_timeout_s, setting):
            if group is not None and info.world_size > 1:
                gather = lambda: in_order({**process_facts(), **facts()})  # noqa: E731
                agree(Council(info, group), "what they run", gather, FIXES)
            yield Session(info, start_distributed(info, timeout_s, group, settings))
            stop_distributed()
        return
    with _own_environment(), tempfile.TemporaryDirectory(prefix="megatron_ds-", dir=scratch_directory()) as folder:
        os.environ |= {RENDEZVOUS_FILE: str(Path(folder) / "rendezvous"), **loopback_interfaces()}
        try:
            device = start_distributed(RankInfo(), timeout_s, settings=settings)
        finally:
            del os.environ[RENDEZVOUS_FILE]
        try:
            yield Session(RankInfo(), device)
        finally:
            stop_distributed()


@contextmanager
def _own_environment() -> Iterator[None]:
    """Restore the variables of a rank and its interfaces, which the next session would take for a launcher's."""
    before = {name: os.environ.get(name) for name in ("LOCAL_RANK", *loopback_interfaces())}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
