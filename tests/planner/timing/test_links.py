"""Times of collectives against published measurements, and by hand where a formula is exact.

The measurements are bus bandwidths of nccl-tests: bytes that each rank sends in a ring, by the time.
"""

import pytest

from megatron_ds.planner.operations import Collective, CollectiveKind, Message, Stream, Work
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.profiles.link import Link, MeasuredTime, Steps
from megatron_ds.planner.profiles.network import Network
from megatron_ds.planner.timing.links import communication_seconds, seconds
from megatron_ds.planner.timing.placement import Placement

MB = 1 << 20
A100_DEVICE = find_device("a100-80", measured=False)
A100 = find_network("200Gb/s", A100_DEVICE, 8)
H100 = find_network("400Gb/s", find_device("h100", measured=False), 8)


def bus_gb_s(kind: CollectiveKind, num_bytes: int, placement: Placement, network: Network) -> float:
    operation = Collective(kind, "data", num_bytes, placement.ranks)
    return float(operation.sent_bytes) / seconds(operation, placement, network) / 1e9


@pytest.mark.parametrize(
    ("network", "megabytes", "measured"),
    [
        *((A100, *row) for row in ((1, 36), (4, 71), (16, 109), (64, 167), (256, 214), (1024, 228), (8192, 232))),
        *((H100, *row) for row in ((4, 129), (16, 234), (64, 362), (256, 423), (1024, 466), (8192, 479))),
    ],
)
def test_all_reduces_of_one_node_take_the_measured_time(network: Network, megabytes: int, measured: float) -> None:
    """Azure/AI-benchmarking-guide, 8 GPUs; four numbers of a profile describe the curve."""
    assert bus_gb_s("all_reduce", megabytes * MB, Placement(8, 1, 8), network) == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize(("num_bytes", "us"), [(4096, 17), (512 << 10, 20), (MB, 27)])
def test_small_all_reduces_take_the_measured_latency(num_bytes: int, us: float) -> None:
    """NVIDIA/dgxc-benchmarking, nccl/README.md, 8 H100."""
    time_s = seconds(Collective("all_reduce", "tensor", num_bytes, 8), Placement(8, 1, 8), H100)
    assert time_s * 1e6 == pytest.approx(us, rel=0.25)


@pytest.mark.parametrize(
    ("network", "placement", "measured"),
    [
        (H100, Placement(2, 2, 1), 47.0),  # 46 to 48 of one NDR card: nccl-tests issue 290
        (H100, Placement(32, 4, 8), 320.0),  # 8 cards of 400 Gb/s a node: nccl issue 1221
        (
            find_network("4x200Gb/s", A100_DEVICE, 8),
            Placement(24, 3, 8),
            96.0,
        ),  # nccl-tests issue 119
    ],
)
def test_all_reduces_between_nodes_take_the_measured_time(
    network: Network, placement: Placement, measured: float
) -> None:
    assert bus_gb_s("all_reduce", 16 << 30, placement, network) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(("placement", "measured"), [(Placement(16, 2, 8), 90.0), (Placement(32, 4, 8), 61.0)])
def test_exchanges_of_experts_are_limited_by_the_network_cards(placement: Placement, measured: float) -> None:
    """DeepEP's README, H100 with CX7 of 400 Gb/s: bytes of all tokens by the time."""
    num_bytes = 1 << 30
    time_s = seconds(Collective("all_to_all", "expert", num_bytes, placement.ranks), placement, H100)
    assert num_bytes / time_s / 1e9 == pytest.approx(measured, rel=0.06)


def test_a_ring_waits_for_its_network_once_an_island_and_for_its_link_otherwise() -> None:
    inside = Link(source="x", ring=Steps(base_us=0, step_us=1, gb_s=1000))
    outside = Link(source="x", ring=Steps(base_us=100, step_us=10, gb_s=1))
    network = Network("test", inside, outside, 4)
    gather = seconds(Collective("all_gather", "data", 12, 12), Placement(12, 3, 4), network)
    assert gather == pytest.approx((100 + 2 * 10 + 9 * 1) * 1e-6, rel=1e-3)
    reduce = seconds(Collective("all_reduce", "data", 12, 12), Placement(12, 3, 4), network)
    assert reduce == pytest.approx((100 + 2 * (2 * 10 + 9 * 1)) * 1e-6, rel=1e-3)
    large = seconds(Collective("all_gather", "data", 12 * 10**9, 12), Placement(12, 3, 4), network)
    assert large == pytest.approx(11 / 4, rel=0.01), "4 ranks of an island share its cards"


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"])
def test_more_bytes_and_more_islands_take_longer(kind: CollectiveKind) -> None:
    sizes = [seconds(Collective(kind, "data", 1 << power, 64), Placement(64, 8, 8), H100) for power in range(0, 34, 2)]
    assert sizes == sorted(sizes) and sizes[0] > 1e-6
    spread = [
        seconds(Collective(kind, "data", 64 * MB, ranks), Placement(ranks, ranks, 1), H100) for ranks in (2, 16, 256)
    ]
    assert spread == sorted(spread)
    near = seconds(Collective(kind, "data", 64 * MB, 8), Placement(8, 1, 8), H100)
    assert near < seconds(Collective(kind, "data", 64 * MB, 8), Placement(8, 8, 1), H100) / 3


def test_a_group_of_thousands_sums_along_a_tree() -> None:
    """A ring's latency grows with its ranks; a small sum over 4,096 of them takes less than a millisecond."""
    small = seconds(Collective("all_reduce", "world", 4, 4096), Placement(4096, 512, 8), H100)
    assert small < 3e-4
    gather = seconds(Collective("all_gather", "world", 4 * 4096, 4096), Placement(4096, 512, 8), H100)
    assert gather > 10 * small


def test_messages_and_work() -> None:
    near, far = Placement(2, 1, 2), Placement(4, 4, 1)
    one = Message("pipeline", 64 * MB)
    assert seconds(one, near, H100) < seconds(one, far, H100)
    assert seconds(one, far, H100) == pytest.approx(64 * MB / 47e9, rel=0.02)
    hidden = Collective("all_gather", "data", MB, 4, hidden=True)
    work = Work({one: 3, hidden: 2, Stream(5): 1})
    found = communication_seconds(work, {"pipeline": far, "data": far}, H100)
    assert found == {
        ("pipeline", False): pytest.approx(3 * seconds(one, far, H100)),
        ("data", True): pytest.approx(2 * seconds(hidden, far, H100)),
    }
    assert seconds(Collective("all_reduce", "data", MB, 1), Placement(1), H100) == 0.0


def test_measured_times_are_preferred_and_scaled_to_other_numbers_of_ranks() -> None:
    rows = [
        MeasuredTime(kind="all_gather", ranks=2, num_bytes=1000, us=100),
        MeasuredTime(kind="all_gather", ranks=2, num_bytes=100_000, us=1000),
        MeasuredTime(kind="all_gather", axis="tensor", ranks=2, num_bytes=1000, us=7),
    ]
    link = Link(source="x", ring=Steps(base_us=0, step_us=50, gb_s=1), measured=tuple(rows))
    network = Network("test", link, link, 4)

    def us(axis: str, num_bytes: int, ranks: int = 2, kind: CollectiveKind = "all_gather") -> float:
        return seconds(Collective(kind, axis, num_bytes, ranks), Placement(ranks, 1, ranks), network) * 1e6

    assert us("data", 1000) == pytest.approx(100) and us("data", 100_000) == pytest.approx(1000)
    assert us("data", 50_500) == pytest.approx(550), "straight in bytes"
    assert us("data", 200_000) == pytest.approx(2000) and us("data", 10) == pytest.approx(100)
    assert us("tensor", 1000) == pytest.approx(7), "ranks of one machine that share memory"
    assert us("data", 1000, ranks=4) == pytest.approx(100 * 3 * 50.25 / 50.5, rel=1e-6)
    assert us("data", 1000, kind="reduce_scatter") == pytest.approx(50.5), "by formula: not measured"
