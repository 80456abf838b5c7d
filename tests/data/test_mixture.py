"""Weights that change during a run: proportions of each phase, and no sample of a source repeated or skipped."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ds.config import DataSection, build_section, parse_start
from megatron_ds.data.blend import Blend, blend_order, mixture_order, normalized, samples_per_source
from megatron_ds.data.mixture import Mixture, Phase, plan_mixture
from megatron_ds.errors import ConfigError
from tests.data.test_blend import Numbers


def test_phases_begin_at_steps_and_at_tokens() -> None:
    weights = [{0: 0.7, 10: 0.2}, 0.3, {"0 tokens": 0.0, "1K tokens": 1.0}]
    found = plan_mixture(weights, lambda step: 4 * step, 32)
    assert found.phases == (
        Phase(0, (0.7, 0.3, 0.0)),
        Phase(32, (0.7, 0.3, 1.0)),  # 1,000 tokens end within sample 31
        Phase(40, (0.2, 0.3, 1.0)),
    )
    assert found.lengths(100) == [32, 8, 60] and found.lengths(35) == [32, 3, 0]
    assert [len(found.begun(count)) for count in (0, 32, 33, 41)] == [1, 1, 2, 3]
    assert plan_mixture([0.5, {0: 1.0, 5: 1.0}], lambda step: step, 8).phases == (Phase(0, (0.5, 1.0)),)


def test_starts_as_a_user_writes_them() -> None:
    assert [parse_start(key) for key in (0, 10.0, "7")] == [(0, 0), (10, 0), (7, 0)]
    tokens = {"5 tokens": 5, "2B tokens": 2 * 10**9, "1.5e3 token": 1500, "1_000 K tokens": 10**6}
    assert {key: parse_start(key).tokens for key in tokens} == tokens
    for key in (-1, True, 1.5, "2B", "tokens", "x"):
        with pytest.raises(
            ConfigError, match=r"which is neither a number of steps nor of tokens; write \{0: 0.7, 1000"
        ):
            parse_start(key)


def test_each_phase_keeps_its_proportions_and_each_source_its_order() -> None:
    mixture = Mixture((Phase(0, (0.7, 0.3, 0.0)), Phase(101, (0.1, 0.1, 0.8)), Phase(350, (0.0, 1.0, 1.0))))
    source, place = mixture_order(mixture, 1000)
    for one in range(3):
        assert place[source == one].tolist() == list(range(np.count_nonzero(source == one))), "no gap, nothing twice"
    for phase, begin, end in zip(mixture.phases, (0, 101, 350), (101, 350, 1000)):
        counts = np.bincount(source[begin:end], minlength=3)
        assert np.abs(counts - (end - begin) * np.array(normalized(phase.weights))).max() <= 1
    for one, requested in enumerate(samples_per_source(mixture, 1000)):
        assert np.count_nonzero(source == one) <= requested
    shorter = mixture_order(mixture, 400)
    assert all(np.array_equal(a[:400], b) for a, b in zip((source, place), shorter))


def test_constant_weights_are_megatrons_blend() -> None:
    weights = [0.5, 0.2, 0.3]
    expected = blend_order(normalized(normalized(weights)), 777)
    found = mixture_order(Mixture.of(weights), 777)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_a_blend_of_phases(tmp_path: Path) -> None:
    parts, names = [Numbers(40), Numbers(90)], ["a", "b"]
    mixture = Mixture((Phase(0, (1.0, 1.0)), Phase(20, (0.0, 1.0))))
    changing, constant = (Blend(parts, names, weights, 60, tmp_path) for weights in (mixture, [1.0, 1.0]))
    assert changing.fingerprint == constant.fingerprint, "of its first phase"
    assert changing.describe().endswith("; from sample 20 on 0.000 a and 1.000 b")
    assert [(one.samples, one.weight) for one in changing.usage(20)] == [(10, 0.5), (10, 0.5)]
    assert [(one.samples, round(one.weight, 3)) for one in changing.usage(60)] == [(10, 0.167), (50, 0.833)]
    first = [changing.sample(index)["input_ids"].tolist() for index in range(20)]
    assert first == [constant.sample(index)["input_ids"].tolist() for index in range(20)]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({10: 1.0}, 'data.train[0].weight={"10": 1.0} has no weight for the first steps; try {0: 0, 10: 1}'),
        ({0: 0.0}, 'data.train[0].weight={"0": 0.0} is always 0; leave the source out'),
        ({0: -1.0}, "data.train[0].weight[0]=-1.0 must be at least 0.0; nearest: 0.0"),
        ({0: 1.0, "0": 2.0}, "data.train: weight has the keys 0 and 0, which are the same time; keep one"),
        ({"2B": 1.0}, "data.train: weight has the key 2B, which is neither a number of steps nor of tokens; write "),
    ],
)
def test_refusals(weight: dict[int | str, float], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_section(DataSection, {"train": [{"path": "a", "weight": weight}, {"path": "b", "weight": 1}]}, "data")
    assert str(refused.value).startswith(message)


def test_a_moment_without_any_source_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.train: all weights are 0 from sample 80 on; give one source a weight"
    ):
        plan_mixture([{0: 1.0, 10: 0.0}, {0: 1.0, 20: 0.0}], lambda step: 4 * step, 8)
    with pytest.raises(ConfigError, match=r"^data.train: weight has two values, 2 and 3, from sample 40 on"):
        plan_mixture([{0: 1.0, 10: 2.0, "320 tokens": 3.0}], lambda step: 4 * step, 8)
