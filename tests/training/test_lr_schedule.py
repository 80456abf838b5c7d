"""The learning rate: warm-up reaches the peak, the last step has min_lr, between them it only falls."""

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest

from megatron_ds.checkpoint.progress import DataPosition, Progress
from megatron_ds.config import OptimizerSection, RunConfig, ScheduleSection
from megatron_ds.training.lr_schedule import describe_jump, learning_rate

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


BEFORE = {"optimizer": {"lr": 3e-3}, "schedule": {"name": "cosine", "warmup_steps": 2, "min_lr": 3e-4}}


def saved_by(run: RunConfig, step: int) -> Progress:
    lr = learning_rate(step - 1, run.train.steps, run.optimizer, run.schedule)
    return Progress(step=step, applied=step, lr=lr)


@pytest.mark.parametrize(
    ("step", "changes", "rates"),
    [
        (10, {"train": {"steps": 20}}, "from 3.00e-04 at step 10 to 1.65e-03 at step 11"),  # it had ended
        (5, {"train": {"steps": 20}}, "from 2.17e-03 at step 5 to 2.68e-03 at step 6"),
        (5, {"optimizer": {"lr": 6e-3}}, "from 2.17e-03 at step 5 to 3.15e-03 at step 6"),
        (5, {"schedule": {"name": "linear"}}, "from 2.17e-03 at step 5 to 1.65e-03 at step 6"),
        (4, {"schedule": {"warmup_steps": 8}}, "from 2.60e-03 at step 4 to 1.87e-03 at step 5"),
        (5, {"schedule": {"min_lr": 2e-3}}, "from 2.17e-03 at step 5 to 2.50e-03 at step 6"),
    ],
)
def test_a_rate_that_jumps_on_resume_is_said(
    make_run: Callable[..., RunConfig], step: int, changes: dict[str, Any], rates: str
) -> None:
    first = make_run(**BEFORE, train={"steps": 10})
    now = {section: {**BEFORE.get(section, {}), **changes.get(section, {})} for section in (*BEFORE, "train")}
    said = describe_jump(saved_by(first, step), make_run(**{**now, "train": {"steps": 10, **now["train"]}}))
    assert said is not None and said.startswith(f"the learning rate jumps {rates}: train.steps, optimizer.lr or "), said
    lr = saved_by(first, step).lr
    assert said.endswith(f"or continue with schedule.name=constant optimizer.lr={lr:.3g}")


@pytest.mark.parametrize("step", [1, 2, 5, 9, 10])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_rate_that_continues_is_not_said(make_run: Callable[..., RunConfig], name: str, step: int) -> None:
    run = make_run(schedule={"name": name}, train={"steps": 10})
    assert describe_jump(saved_by(run, step), run) is None
    assert describe_jump(Progress(), run) is None, "a new run"
    longer = make_run(schedule={"name": "constant"}, train={"steps": 20})
    assert describe_jump(saved_by(make_run(schedule={"name": "constant"}, train={"steps": 10}), step), longer) is None


def test_a_checkpoint_of_an_earlier_version_knows_its_steps(make_run: Callable[..., RunConfig]) -> None:
    longer = make_run(**BEFORE, train={"steps": 20})
    old = Progress(step=10, applied=10, data=DataPosition(settings={"train.steps": 10}))
    said = describe_jump(old, longer)
    assert said is not None and "from 3.00e-04 at step 10 to 1.65e-03 at step 11" in said
    assert describe_jump(Progress(step=10, applied=10), longer) is None, "nothing is known"
