"""The test before the first step: right results pass, and each wrong one names its rank."""

from collections.abc import Callable
from pathlib import Path
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


def _as_rank(info: RankInfo, faulty: int, fault: str) -> str:
    if info.rank == faulty:
        module, name, wrong, _ = FAULTS[fault]
        setattr(module, name, wrong)
    try:
        return "; ".join(run_device_test(info, torch.device("cpu")))
    except HardwareError as problem:
        return str(problem)
    except SystemExit as end:
        return f"exit {end.code}"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_result_names_its_rank(fault: str) -> None:
    message, other = run_ranks(_as_rank, 2, 1, fault)
    assert message.startswith("train.device_test: rank ") and FAULTS[fault][3] in message, message
    assert "rank 1 (host " in message and other == "exit 1"


def test_right_results_pass_on_ranks_and_alone() -> None:
    line, other = run_ranks(_as_rank, 2, -1, "product")
    assert line == other and line.startswith(
        "device test of 2 ranks: products and 0.00 GB of memory are right, and links"
    )
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


def test_a_run_says_what_was_tested(make_run: Callable[..., Any]) -> None:
    import megatron_ds as mds
    from megatron_ds.monitor import SilentReporter
    from tests.ranks import preload

    preload()
    run = make_run(train={"steps": 2, "device_test": True})
    file = Path(run.output).parent / "notes"

    class Notes(SilentReporter):
        def note(self, text: str) -> None:
            with open(file, "a") as opened:
                opened.write(text + "\n")

        def __enter__(self) -> "Notes":
            return self

        def __exit__(self, *args: object) -> None:
            pass

    mds.train(run, reporter=Notes)
    assert file.read_text().startswith("device test of 1 ranks: products")
