"""Slow ranks by their times: against the median of their peers, after several windows, until they recover."""

from megatron_ds.monitor.stragglers import RankTimes, Stragglers

HOSTS = ["a", "a", "b", "b"]


def times(*compute_s: float, data_s: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)) -> list[RankTimes]:
    """Those of four ranks that wait for the slowest."""
    step_s = max(own + data for own, data in zip(compute_s, data_s))
    return [RankTimes(own, step_s - own - data, data) for own, data in zip(compute_s, data_s)]


def test_a_rank_is_named_after_several_windows_in_a_row_and_again_when_it_has_recovered() -> None:
    found = Stragglers(HOSTS, [range(4)], threshold=0.1, windows=3)
    slow, even = times(1.0, 1.0, 1.3, 1.01), times(1.0, 1.0, 1.0, 1.01)
    assert [found.add(one) for one in (slow, slow, even, slow, slow)] == [[], [], [], [], []]
    (line,) = found.add(slow)
    assert line.startswith(
        "rank 2 (host b) is slow: it computes for 1.300 s of a step, the median of its peers is 1.00"
    )
    assert "23% of each step (3 windows in a row)" in line
    assert found.add(slow) == [], "it is named once"
    assert found.add(even) == ["rank 2 (host b) is no longer slow (compute)"]
    assert found.add(even) == []
    assert found.report(9).describe() == "slow ranks: 2 (host b, in 6 of 9 windows)"


def test_a_late_loader_is_named_with_its_kind() -> None:
    found = Stragglers(HOSTS, [range(4)], threshold=0.1, windows=1)
    (line,) = found.add(times(1.0, 1.0, 1.0, 1.0, data_s=(0.0, 0.01, 0.0, 0.5)))
    assert line.startswith("rank 3 (host b) is slow: it waits for data for 0.500 s of a step")


def test_only_ranks_of_one_stage_are_compared_by_what_they_compute() -> None:
    """The last stage has the output head; a stage of one rank has no peers."""
    found = Stragglers(HOSTS, [[0, 1], [2, 3]], threshold=0.1, windows=1)
    assert found.add(times(1.0, 1.0, 2.0, 2.0)) == []
    (line,) = found.add(times(1.0, 1.0, 2.0, 2.5))
    assert line.startswith("rank 3 "), "of two peers the faster one is what the other is compared with"
    alone = Stragglers(HOSTS[:2], [[0], [1]], threshold=0.1, windows=1)
    assert alone.add(times(1.0, 5.0)[:2]) == []


def test_the_numbers_of_a_window() -> None:
    found = Stragglers(HOSTS, [range(4)], threshold=0.1, windows=1)
    window = times(1.0, 1.0, 1.5, 1.0)
    found.add(window)
    assert found.numbers(window) == {
        "compute_s_median": 1.0,
        "compute_s_max": 1.5,
        "compute_max_rank": 2,
        "communication_s_median": 0.5,
        "communication_s_max": 0.5,
        "communication_max_rank": 0,
        "data_s_median": 0.0,
        "data_s_max": 0.0,
        "data_max_rank": 0,
        "num_slow": 1,
    }
    assert [one.slow_in for one in found.report(1).ranks] == [0, 0, 1, 0]
    assert Stragglers(HOSTS, [range(4)], 0.1, 1).report(0).describe() == ""


def test_of_many_slow_ranks_the_first_are_named() -> None:
    found = Stragglers(["a"] * 100, [range(100)], threshold=0.1, windows=1)
    slow = [RankTimes(1.5 if rank < 20 else 1.0, 0.0, 0.0) for rank in range(100)]
    *named, more = found.add(slow)
    assert len(named) == 8 and more == "the same holds for 12 more ranks: they are slow; see stragglers.json"
    assert found.report(1).describe().endswith("7 (host a, in 1 of 1 windows) and 12 more")
    assert len(found.add([RankTimes(1.0, 0.0, 0.0)] * 100)) == 9
