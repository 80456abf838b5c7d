"""The learning rate: warm-up reaches the peak, the last step has min_lr, between them it only falls."""

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest

from megatron_ds.checkpoint.progress import DataPosition, Progress
from megatron_ds.config import OptimizerSection, RunConfig, ScheduleSection
from megatron_ds.errors import ConfigError
from megatron_ds.training.lr_schedule import check_schedule, describe_jump, learning_rate

OPTIMIZER = OptimizerSection(lr=3e-3)
SIZES = [(steps, warmup) for steps, warmup in product((1, 2, 7, 100), (0, 1, 2, 7, 99, 100)) if warmup <= steps]


def rates(name: str, steps: int, warmup: int, min_lr: float = 3e-4) -> list[float]:
    schedule = ScheduleSection(name=name, warmup_steps=warmup, min_lr=min_lr)
    return [learning_rate(applied, steps, OPTIMIZER, schedule) for applied in range(steps)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "polynomial"])
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


STEPS, WARMUP, LEAST = 120, 20, 0.25


def factors_of(name: str, least: float, warmup: int = WARMUP, **options: Any) -> list[float]:
    """The rates of all steps divided by the peak."""
    schedule = ScheduleSection(name=name, warmup_steps=warmup, min_lr=least, options=options)
    return [learning_rate(applied, STEPS, OptimizerSection(lr=1.0), schedule) for applied in range(STEPS)]


def of_transformers(name: str, **options: Any) -> list[float]:
    """Its factors, which it computes from the number of steps done: one step later than ours."""
    from transformers import optimization

    function = getattr(optimization, name)
    return [function(step, num_warmup_steps=WARMUP, **options) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("decay", ["linear", "1-sqrt", "cosine"])
@pytest.mark.parametrize("options", [{"decay_steps": 30}, {"decay_share": 0.25}])
def test_wsd_is_that_of_transformers(decay: str, options: dict[str, Any]) -> None:
    stages = {"num_stable_steps": STEPS - WARMUP - 30, "num_decay_steps": 30, "min_lr_ratio": LEAST, "num_cycles": 0.5}
    theirs = of_transformers("_get_wsd_scheduler_lambda", warmup_type="linear", decay_type=decay, **stages)
    ours = factors_of("wsd", LEAST, decay=decay, **options)
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:], rel=1e-12)  # its warm-up begins at min_lr


def test_the_exponential_decay_of_wsd_loses_half_of_its_slope() -> None:
    """(Megatron-LM's form, 2 * 0.5 ** t - 1): every step loses the same fraction of the height above -1."""
    tail = factors_of("wsd", 0.0, decay="exponential", decay_steps=30)[-31:]
    assert tail[0] == 1.0 and tail[-1] == pytest.approx(0.0, abs=1e-15)
    ratios = [(after + 1) / (before + 1) for before, after in pairwise(tail)]
    assert ratios == pytest.approx([0.5 ** (1 / 30)] * 30)


def test_wsd_decays_in_a_tenth_of_the_steps() -> None:
    values = factors_of("wsd", 0.0)
    assert values[WARMUP : STEPS - 12] == [1.0] * (STEPS - 12 - WARMUP)
    assert values[STEPS - 12] == pytest.approx(1 - 1 / 12)


@pytest.mark.parametrize("timescale", [None, 7, 500])
def test_inverse_sqrt_is_that_of_transformers(timescale: int | None) -> None:
    theirs = of_transformers("_get_inverse_sqrt_schedule_lr_lambda", timescale=timescale or WARMUP)
    assert factors_of("inverse_sqrt", 0.0, timescale=timescale) == pytest.approx(theirs, rel=1e-12)
    floor = factors_of("inverse_sqrt", 0.9, timescale=timescale)
    assert floor[WARMUP:] == pytest.approx([max(0.9, one) for one in theirs[WARMUP:]], rel=1e-12)


def test_inverse_sqrt_without_warm_up_begins_at_the_peak() -> None:
    values = factors_of("inverse_sqrt", 0.0, warmup=0)
    assert values[0] == pytest.approx(math.sqrt(10_000 / 10_001))


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial_is_that_of_transformers(power: float) -> None:
    name = "_get_polynomial_decay_schedule_with_warmup_lr_lambda"
    theirs = of_transformers(name, num_training_steps=STEPS, lr_end=LEAST, power=power, lr_init=1)
    assert factors_of("polynomial", LEAST, power=power) == pytest.approx(theirs, rel=1e-12)


def test_restarts_are_those_of_transformers_but_for_the_last_step_of_a_cycle() -> None:
    name = "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda"
    theirs = of_transformers(name, num_training_steps=STEPS, num_cycles=4)
    ours = factors_of("cosine_with_restarts", 0.0, cycles=4)
    ends = [WARMUP + 25 * number - 1 for number in (1, 2, 3, 4)]  # there it is at the next peak already
    inner = [step for step in range(STEPS) if step not in ends]
    assert [ours[step] for step in inner] == pytest.approx([theirs[step] for step in inner], rel=1e-9, abs=1e-12)
    assert [ours[step] for step in ends] == pytest.approx([0.0] * 4, abs=1e-15)


def test_cycles_of_growing_length_and_falling_peaks() -> None:
    values = factors_of("cosine_with_restarts", 0.1, warmup=15, cycles=3, length_factor=2.0, peak_factor=0.5)
    after = values[15:]  # 105 steps: cycles of 15, 30 and 60
    assert [step for step, rate in enumerate(after) if rate == pytest.approx(0.1)] == [14, 44, 104]
    assert [after[15], after[45]] == pytest.approx([0.5, 0.25], rel=0.02)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"decay_steps": 120},
            "schedule.options.decay_steps=120 is more than the 100 steps that follow the warm-up; nearest: "
            "decay_steps=100",
        ),
        (
            {"decay_share": 0.9},
            "schedule.options.decay_share=0.9 is more than the 100 steps that follow the warm-up; nearest: "
            "decay_steps=100",
        ),
        (
            {"decay_share": 0.5, "decay_steps": 3},
            "schedule.options.decay_share=0.5 and schedule.options.decay_steps=3 both set the length of the decay; "
            "keep one",
        ),
    ],
)
def test_a_decay_that_does_not_fit(make_run: Callable[..., RunConfig], options: dict[str, Any], says: str) -> None:
    schedule = {"name": "wsd", "warmup_steps": WARMUP, "min_lr": 0.0, "options": options}
    with pytest.raises(ConfigError) as caught:
        check_schedule(make_run(schedule=schedule, train={"steps": STEPS}))
    assert str(caught.value) == says


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


@pytest.mark.parametrize(("step", "jumps"), [(50, False), (90, False), (95, True)])
def test_wsd_is_prolonged_from_before_its_decay(make_run: Callable[..., RunConfig], step: int, jumps: bool) -> None:
    schedule = {"name": "wsd", "warmup_steps": 2, "min_lr": 0.0, "options": {"decay_steps": 10}}
    short, long = (make_run(schedule=schedule, train={"steps": steps}) for steps in (100, 300))
    assert (describe_jump(saved_by(short, step), long) is not None) == jumps


def test_a_checkpoint_of_an_earlier_version_knows_its_steps(make_run: Callable[..., RunConfig]) -> None:
    longer = make_run(**BEFORE, train={"steps": 20})
    old = Progress(step=10, applied=10, data=DataPosition(settings={"train.steps": 10}))
    said = describe_jump(old, longer)
    assert said is not None and "from 3.00e-04 at step 10 to 1.65e-03 at step 11" in said
    assert describe_jump(Progress(step=10, applied=10), longer) is None, "nothing is known"
