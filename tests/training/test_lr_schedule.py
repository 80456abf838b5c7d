"""The learning rate: warm-up reaches the peak, the last step has min_lr, between them it only falls."""

import math
from itertools import pairwise, product

import pytest

from megatron_ds.config import OptimizerSection, ScheduleSection
from megatron_ds.training.lr_schedule import learning_rate

OPTIMIZER = OptimizerSection(lr=3e-3)
SIZES = [(steps, warmup) for steps, warmup in product((1, 2, 7, 100), (0, 1, 2, 7, 99, 100)) if warmup <= steps]


def rates(name: str, steps: int, warmup: int, min_lr: float = 3e-4) -> list[float]:
    schedule = ScheduleSection(name=name, warmup_steps=warmup, min_lr=min_lr)
    return [learning_rate(applied, steps, OPTIMIZER, schedule) for applied in range(steps)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), SIZES)
def test_every_schedule(name: str, steps: int, warmup: int) -> None:
    values = rates(name, steps, warmup)
    assert values[:warmup] == pytest.approx([3e-3 * (step + 1) / warmup for step in range(warmup)], rel=1e-15)
    after = values[max(0, warmup - 1) :]
    assert all(0 < rate <= 3e-3 for rate in values)
    assert all(first >= second for first, second in pairwise(after))
    if name == "constant":
        assert set(values[warmup:]) <= {3e-3}
    elif warmup < steps:
        assert values[-1] == pytest.approx(3e-4, rel=1e-12)
        assert all(first > second for first, second in pairwise(after))


def test_warm_up_ends_exactly_at_the_peak() -> None:
    assert rates("cosine", 100, 10)[9] == 3e-3


def test_the_middle_of_the_way_down() -> None:
    middle = (3e-3 + 3e-4) / 2
    assert rates("linear", 110, 10)[59] == pytest.approx(middle)
    assert rates("cosine", 110, 10)[59] == pytest.approx(middle)
    quarter = 3e-4 + (3e-3 - 3e-4) * 0.5 * (1 + math.cos(math.pi / 4))
    assert rates("cosine", 110, 10)[34] == pytest.approx(quarter)
