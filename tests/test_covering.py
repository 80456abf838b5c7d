"""The choice of samples: all facts, few runs, cheap ones first."""

from itertools import product

from tests.covering import covering, uncovered

Run = tuple[str, int, int]
RUNS: list[Run] = list(product("abc", (1, 2, 4), (0, 3)))


def facts(run: Run) -> set[tuple[int, object]]:
    return set(enumerate(run))


def test_every_fact_is_covered_by_few_runs() -> None:
    sample = covering(RUNS, facts, lambda run: 1.0)
    assert uncovered(sample, RUNS, facts) == set() and len(sample) == 3
    assert sample == sorted(sample, key=RUNS.index) == covering(RUNS, facts, lambda run: 1.0)


def test_pairs_need_more_runs() -> None:
    def pairs(run: Run) -> set[object]:
        return {(run[0], run[1]), (run[0], run[2])}

    sample = covering(RUNS, pairs, lambda run: 1.0)
    assert uncovered(sample, RUNS, pairs) == set() and len(sample) == 9
    assert uncovered(sample[1:], RUNS, pairs) != set()


def test_cheap_runs_are_preferred() -> None:
    sample = covering(RUNS, facts, lambda run: run[1])
    assert [run[1] for run in sample].count(4) == 1 and [run[1] for run in sample].count(1) == 2


def test_a_run_that_later_ones_make_needless_is_dropped() -> None:
    needed = {"first": {1, 2}, "second": {2, 3, 4, 5}, "third": {1, 6}}
    assert covering(list(needed), needed.__getitem__, lambda run: {"first": 0.4}.get(run, 1.0)) == ["second", "third"]
