"""Reading ahead: in order, no more than asked for, and gone when its context is left."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megatron_ds.data.prefetch import WINDOW, DataWait, Prefetch, pinned
from megatron_ds.errors import DataError


def prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("ahead", [0, 1, 2, 7])
def test_results_come_in_order_and_the_thread_ends(ahead: int) -> None:
    with Prefetch(lambda key: key * key, range(50), ahead) as results:
        assert len(prefetchers()) == (ahead > 0)
        assert list(results) == [key * key for key in range(50)]
    assert prefetchers() == []


def test_no_thread_starts_before_the_context() -> None:
    Prefetch(lambda key: key, range(5), 2)
    assert prefetchers() == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_read_than_was_asked_for(ahead: int) -> None:
    begun: list[int] = []

    def read(key: int) -> int:
        begun.append(key)
        return key

    def settle() -> int:
        time.sleep(0.05)
        return len(begun)

    with Prefetch(read, range(100), ahead) as results:
        assert settle() == ahead
        for taken in range(1, 5):
            next(results)
            assert settle() == taken + ahead
    assert settle() == 4 + ahead


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("problem", [DataError("line 7 is no JSON"), AssertionError("a defect"), KeyError("a defect")])
def test_a_problem_comes_out_where_its_result_would_have_been(ahead: int, problem: Exception) -> None:
    def read(key: int) -> int:
        if key == 4:
            raise problem
        return key

    with pytest.raises(type(problem)) as caught, Prefetch(read, range(9), ahead) as results:
        for expected in range(4):
            assert next(results) == expected
            time.sleep(0.01)  # the thread has met the problem long before
        next(results)
    assert caught.value is problem
    assert [entry.name for entry in caught.traceback][-1] == "read", "with the traceback of where it happened"
    assert prefetchers() == []


def test_keys_that_fail_are_a_problem_too() -> None:
    def keys() -> Iterator[int]:
        yield 1
        raise DataError("no keys")

    with pytest.raises(DataError, match="no keys"), Prefetch(lambda key: key, keys(), 2) as results:
        assert next(results) == 1
        next(results)


def test_leaving_while_it_waits_for_room_ends_the_thread() -> None:
    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match="the step failed"), Prefetch(lambda key: key, range(1000), 2) as results:
        next(results)
        raise RuntimeError("the step failed")
    assert prefetchers() == [] and time.monotonic() - began_s < 1


def test_storage_that_hangs_does_not_hold_back_who_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ds.data.prefetch.CLOSE_S", 0.1)
    answers = threading.Event()
    began_s = time.monotonic()
    with Prefetch(lambda key: answers.wait(30), range(5), 2):
        pass
    assert time.monotonic() - began_s < 5
    (left,) = prefetchers()
    assert left.daemon, "the process can end without it"
    answers.set()
    left.join(5)
    assert not left.is_alive()


def test_batches_are_pinned_on_the_device_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Column:
        def pin_memory(self) -> str:
            done.append("pin")
            return "pinned"

    class Module:
        @staticmethod
        def set_device(device: torch.device) -> None:
            done.append(str(device))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    batches: list = [{"input_ids": Column()}]
    assert pinned(batches, torch.device("cpu")) is batches and done == []
    assert pinned(batches, torch.device("cuda", 3)) == [{"input_ids": "pinned"}]  # type: ignore[comparison-overlap]
    assert done == ["cuda:3", "pin"]


def test_a_wait_is_told_once_and_not_for_the_first_step() -> None:
    wait = DataWait(2)
    told = [wait.add(5.0 if step == 0 else 0.004, 5.1 if step == 0 else 0.1) for step in range(1 + WINDOW)]
    assert told == [None] * (1 + WINDOW), "4 % of a step is not worth a word, nor is the first step"
    told = [wait.add(0.006, 0.1) for _ in range(3 * WINDOW)]
    words = "steps wait for data: 0.006 of 0.100 s each, 6%; "
    said = [one for one in told if one is not None]
    assert said == [words + "put the data on faster storage, or raise data.prefetch where reading is uneven"]
    without = DataWait(0)
    assert [one for one in (without.add(0.05, 0.1) for _ in range(50)) if one] == [
        "steps wait for data: 0.050 of 0.100 s each, 50%; set data.prefetch=2"
    ]
    hasty = DataWait(2)
    assert not any(hasty.add(0.0005, 0.001) for _ in range(50)), "steps of a millisecond"
