"""The bench's cases on a CPU, predicted by one number for each number of ranks: the speed of one case."""

from statistics import median

import pytest

from megatron_ds.planner.profiles import find_device
from tests.planner.bench_cases import compared, measured, scaled

PROFILES = {1: find_device("cpu"), 2: find_device("cpu")}


def test_cases_follow_from_one_of_them() -> None:
    """Other lengths, models and layouts than those of the first cases, `one` and `tp2`."""
    found = scaled(compared(PROFILES, measured(), ["one", "tp2", "bert", "zero1", "pp2"]))
    assert len(found) == 8
    assert max(abs(one.error) for one in found) <= 0.15, found


@pytest.mark.sweep
def test_all_cases() -> None:
    """Small products and mixtures of experts need the measured times of a calibration, which one number is not."""
    found = scaled(compared(PROFILES, measured()))
    errors = [abs(one.error) for one in found]
    assert median(errors) <= 0.08
    assert sum(error <= 0.15 for error in errors) >= 0.8 * len(errors)
    rest = {one.case for one in found if abs(one.error) > 0.15}
    assert rest <= {"small", "moe", "moe2", "t5"}, rest
