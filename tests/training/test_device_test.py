"""The test before the first step: right results pass, and each wrong one names its rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.errors import HardwareError
from megatron_ds.parallel import link_speed
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.training import device_test
from megatron_ds.training.device_test import DeviceResult, describe_results, run_device_test
from tests.ranks import run_alone, run_ranks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_test, "MEMORY_BYTES", 2**16)
    monkeypatch.setattr(device_test, "MESSAGE_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(device_test, "PRODUCTS", 2)


def _flipped_product(left: Tensor, right: Tensor) -> Tensor:
    product = left @ right
    product.view(-1)[5:6].view({2: torch.int16, 4: torch.int32}[product.element_size()]).bitwise_xor_(1)
    return product


def _flipped_numbers(num_bytes: int, device: torch.device) -> Tensor:
    numbers = torch.arange(num_bytes // 4, device=device).remainder_(1000).float()
    numbers[-1] += 1
    return numbers


FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "product": (device_test, "_multiply", _flipped_product, r"2 of 131,072 elements of products in float32 are wrong"),
    "memory": (
        device_test,
        "_read_back",
        lambda words, pattern: int((words[3:] != pattern).sum()) + 1,
        r"4 of 8,192 words of memory read back differently",
    ),
    "messages": (link_speed, "_numbers", _flipped_numbers, r"messages from rank 0 arrive wrong"),
}


def _lines(info: RankInfo) -> str:
    try:
        return "; ".join(run_device_test(info, torch.device("cpu")))
    except HardwareError as problem:
        return str(problem)
    except SystemExit as end:
        return f"exit {end.code}"


def _with_faults(info: RankInfo) -> dict[str, str]:
    """The lines of a rank by the fault of rank 1; "" = none."""
    found = {"": _lines(info)}
    for fault, (module, name, wrong, _) in FAULTS.items():
        own = getattr(module, name)
        setattr(module, name, wrong if info.rank == 1 else own)
        found[fault] = _lines(info)
        setattr(module, name, own)
    return found


def test_right_results_pass_and_a_wrong_one_names_its_rank() -> None:
    first, second = run_ranks(_with_faults, 2)
    assert first[""] == second[""]
    assert first[""].startswith(
        "device test of 2 ranks: products and 0.00 GB of memory are right, and links; the slowest"
    )
    for fault, (_, _, _, expected) in FAULTS.items():
        assert first[fault].startswith("train.device_test: rank ") and expected in first[fault], first[fault]
        assert "rank 1 (host " in first[fault] and second[fault] == "exit 1"


def test_sums_over_a_hundred_thousand_ranks_are_exact() -> None:
    numbers = link_speed._numbers(4096, torch.device("cpu"))
    assert int(link_speed.expected_sum(numbers, 2**17).max()) < 2**24
    found = sum((numbers + rank % link_speed.STEPS for rank in range(20)), torch.zeros(()))
    assert torch.equal(found, link_speed.expected_sum(numbers, 20))


def test_a_rank_alone_has_no_links() -> None:
    assert run_alone(run_device_test, RankInfo(), torch.device("cpu")) == [
        "device test of 1 ranks: products and 0.00 GB of memory are right"
    ]


def test_a_slow_link_is_named_among_those_of_its_kind() -> None:
    """Links within a machine are faster than all between machines: ranks 0, 3 and 6 get theirs from another machine."""
    links = [2.0, 20.0, 21.0, 2.1, 6.0, 20.0, 0.5, 20.0, 22.0]
    ranks = [DeviceResult("abc"[rank // 3], (), 0, link * 1e9) for rank, link in enumerate(links)]
    _, within, between = describe_results(ranks)
    assert within == (
        "the link from rank 3 (host b) to rank 4 (host b) is slow: 6.00 GB/s, the median of such links is 20.00 GB/s"
    )
    assert between.startswith("the link from rank 5 (host b) to rank 6 (host c) is slow: 0.50 GB/s")
