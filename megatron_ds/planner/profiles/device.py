"""Profiles of devices: peaks, memory, and how much of them matrix products, attention and streams reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_ds.config.schema_base import Count, CountOrZero, Section, Text
from megatron_ds.monitor import peak_flops
from megatron_ds.planner.profiles.link import Link, NotNegative, Positive, as_tuple

GIB = 1 << 30
_PRECISIONS: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "tf32": "fp32"}
"""torch's names of the dtypes whose peaks `monitor.peak_flops` knows -> its own."""

Share = Annotated[float, Field(gt=0, le=1)]


class Tile(Section):
    """A part (m, n) of a product's result that one core computes at a time, and its speed relative to the best."""

    m: Count
    n: Count
    speed: Share = 1.0


TILES = (
    Tile(m=256, n=128),
    Tile(m=128, n=256),
    Tile(m=128, n=128, speed=0.92),
    Tile(m=128, n=64, speed=0.75),
    Tile(m=64, n=128, speed=0.75),
    Tile(m=64, n=64, speed=0.6),
)
"""Tiles of cuBLAS. Smaller ones read their factors more often; how much slower they are is assumed."""


class ProductSpeed(Section):
    """The speed of matrix products on a device.

    Attributes:
        sustained: share of the peak that large products reach in long runs, at the clock that their power allows.
        sustained_fp8: the same of products in fp8; None = as `sustained`.
        fill_us: time of the start and the end of the largest tile; of smaller ones in proportion to their area.
        num_cores: multiprocessors that compute tiles at the same time.
        tiles: sizes of the parts that a result is divided into.
    """

    sustained: Share
    sustained_fp8: Share | None = None
    fill_us: NotNegative
    num_cores: Count
    tiles: Annotated[tuple[Tile, ...], BeforeValidator(as_tuple), Field(min_length=1)] = TILES

    def sustained_of(self, dtype: str) -> float:
        """Return the share of the peak that large products of a dtype reach."""
        return self.sustained_fp8 if dtype.startswith("float8") and self.sustained_fp8 else self.sustained


class AttentionSpeed(Section):
    """The speed of fused attention kernels on a device.

    Attributes:
        forward, backward: share of the peak for long sequences and wide heads.
        fill_keys: keys of a query at which half of it is reached.
        fill_dim: size of a head at which half of it is reached.
    """

    forward: Share
    backward: Share
    fill_keys: NotNegative
    fill_dim: NotNegative


class StreamSpeed(Section):
    """The speed of operations that are limited by memory.

    Attributes:
        share: of the memory's bandwidth that large tensors reach.
        launch_us: of a kernel that has nothing to do, on the device.
    """

    share: Share
    launch_us: NotNegative


class MeasuredProduct(Section):
    """Median time of a product on this device; see `planner.operations.Product`."""

    m: Count
    n: Count
    k: Count
    batch: Count = 1
    dtype: Text
    us: Positive


class MeasuredAttention(Section):
    """Median time of attention on this device; see `planner.operations.Attention`."""

    rows: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    queries: Count
    keys: Count
    pairs: Count
    backward: bool
    dtype: Text
    masked: bool = False
    us: Positive


class MeasuredStream(Section):
    """Median time of a stream of one kernel on this device; see `planner.operations.Stream`."""

    name: str = ""
    num_bytes: CountOrZero
    us: Positive


class Device(Section):
    """A device.

    Attributes:
        name: of the profile.
        source: of the numbers: data sheets, papers, measurements.
        type: torch's device type.
        gpu: name that torch reports, by which `monitor.peak_flops` knows the peak; None if `tflops` has all.
        tflops: peaks of dtypes that it does not know, by torch's name without `torch.`, and `tf32`.
        memory_gib: memory that torch reports.
        memory_gb_s: 10^9 bytes per second of the memory.
        host_us: time of the host to start one eager operation, autograd and Python included. A CPU is its own host, and
            computes nothing meanwhile.
        hook_us: time of the host for DeepSpeed's hooks of one pass of a module at ZeRO-3, which fetch and release its
            weights.
        host_gb_s: 10^9 bytes per second of a copy between the device and pinned memory of its host, in each direction.
        steady: speed after seconds without a pause, relative to that of measured times, which are of undisturbed
            bursts. A GPU's limit of power slows down products in 16 and 8 bits; the operating system and other
            programs disturb all that a CPU computes.
        skew: share by which the ranks' computation between two collectives is longer on the slowest of them, beyond the
            mean: on a CPU the operating system and other programs disturb one rank, and the others wait.
        products, attention, streams: shares of the peaks that are reached.
        link: between neighbouring devices, or the name of its file.
        island: devices that this link joins, if that is not the number of a node's devices.
        network: text of the network between islands, see `find_network`.
        measured_products, measured_attention, measured_streams: times that correct the formulas.
    """

    name: Text
    source: Text
    type: Literal["cuda", "cpu"] = "cuda"
    gpu: Text | None = None
    tflops: dict[str, Positive] = Field(default_factory=dict)
    memory_gib: Positive
    memory_gb_s: Positive
    host_us: NotNegative = 0.0
    hook_us: NotNegative = 0.0
    host_gb_s: Positive = 20.0
    steady: Share = 1.0
    skew: NotNegative = 0.0
    products: ProductSpeed
    attention: AttentionSpeed
    streams: StreamSpeed
    link: Text | Link
    island: Count | None = None
    network: Text = "400Gb/s"
    measured_products: Annotated[tuple[MeasuredProduct, ...], BeforeValidator(as_tuple)] = ()
    measured_attention: Annotated[tuple[MeasuredAttention, ...], BeforeValidator(as_tuple)] = ()
    measured_streams: Annotated[tuple[MeasuredStream, ...], BeforeValidator(as_tuple)] = ()

    def __hash__(self) -> int:  # of every field it would take longer than what is cached by it
        return hash(self.name)

    @property
    def memory_bytes(self) -> int:
        """Memory of the device."""
        return int(self.memory_gib * GIB)

    def peak_flops(self, dtype: str) -> float:
        """Return the peak of dense products; of a dtype without its own, that of the fastest one it is computed in.

        Args:
            dtype: torch's name without `torch.`, or "tf32".
        """
        if dtype in self.tflops:
            return self.tflops[dtype] * 1e12
        if self.gpu is not None and dtype in _PRECISIONS:
            known = peak_flops(self.gpu, _PRECISIONS[dtype], tf32=True)
            if known is not None:
                return known
        return self.tflops["float32"] * 1e12
