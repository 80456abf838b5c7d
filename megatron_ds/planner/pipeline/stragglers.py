"""Devices that are slow at random, and steps that wait for the slowest.

A device's factor of slowness stays the same for a run (its cooling, its clock), and each pass has one more (garbage
collection, the network, the operating system). Both are log-normal with mean 1 and a given variance. A stage waits for
the slowest of its tensor and context ranks in every pass, a pipeline for its stages by its timetable, and a step for
the slowest of all data-parallel replicas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_ds.errors import ConfigError
from megatron_ds.parallel.grid import Layout

Array = np.ndarray


@dataclass(frozen=True)
class Jitter:
    """Random slowness, the same for every simulation with the same seed.

    Attributes:
        device_variance: of a device's factor, which stays the same; 0.0001 is a standard deviation of 1 %.
        pass_variance: of a pass's factor on a device.
        devices: devices of a stage that wait for each other in every pass.
        replicas: pipelines that wait for each other in every step.
        seed: of the random numbers.

    Raises:
        ConfigError: a value is out of range.
    """

    device_variance: float = 0.0
    pass_variance: float = 0.0
    devices: int = 1
    replicas: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("device_variance", 0), ("pass_variance", 0), ("devices", 1), ("replicas", 1)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ConfigError(f"jitter: {name}={value} must be finite and at least {least}; nearest: {least}")

    def slow_devices(self, random: np.random.Generator, num_ranks: int) -> Array:
        """(devices, p, replicas): a factor of each device, for a run."""
        return _factors(random, self.device_variance, (self.devices, num_ranks, self.replicas))

    def slow_passes(self, random: np.random.Generator, passes_s: Array, of_devices: Array) -> Array:
        """Return random seconds of passes.

        Args:
            random: generator.
            passes_s: (2, p v, m) without slowness.
            of_devices: see `slow_devices`, here of any number of replicas.

        Returns:
            (2, p v, m, replicas)
        """
        num_chunks = passes_s.shape[1] // of_devices.shape[1]
        shape = (*passes_s.shape, of_devices.shape[2])
        slowest = np.zeros(shape)
        for one in of_devices:
            constant = np.tile(one, (num_chunks, 1))[None, :, None, :]
            np.maximum(slowest, constant * _factors(random, self.pass_variance, shape), out=slowest)
        return passes_s[..., None] * slowest


@dataclass(frozen=True)
class RandomSlowness:
    """Random slowness of a run's devices, whatever its layout.

    Attributes:
        device_variance, pass_variance: see `Jitter`.
    """

    device_variance: float = 0.0
    pass_variance: float = 0.0

    def at(self, layout: Layout) -> Jitter:
        """Return the slowness of the stages of a layout."""
        devices = layout.tensor * layout.context
        return Jitter(self.device_variance, self.pass_variance, devices=devices, replicas=layout.data)


def _factors(random: np.random.Generator, variance: float, shape: tuple[int, ...]) -> Array:
    """Draw log-normal factors with mean 1."""
    if variance == 0:
        return np.ones(shape)
    of_log = math.log1p(variance)
    return np.exp(math.sqrt(of_log) * random.standard_normal(shape) - of_log / 2)
