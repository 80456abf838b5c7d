"""Every family in one process equals transformers in outputs, loss and every gradient, and reads the config we write.

Bounds, fp32, relative L2: 1e-5 for outputs and loss, 1e-4 for gradients. Seen errors are below 2e-6 and 1e-5;
leaving out any option of a case moves them past the bounds, mostly by orders of magnitude. All weights are random,
norms and biases too.
"""

from collections.abc import Callable

import pytest

from megatron_ds.hf.registry import FAMILIES
from tests.parity.alone import Apart, Found, measure_family
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.sampling import in_sample, sampled
from tests.ranks import run_alone

CASES = {**FAMILY_CASES, **ENCODER_CASES}

# Options that leave no trace in a sequence of this length.
NO_TRACE = {"llama-dynamic": {"scaling and pairs of rotary"}}


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What was measured of a case; a family's cases of the sample, or of the sweep, are measured together, once."""
    made: dict[tuple[str, bool], dict[str, Found] | Exception] = {}
    sample = set(in_sample(CASES))

    def get(case: str) -> Found:
        group = CASES[case]["model_type"], case in sample
        if group not in made:
            cases = {name: config for name, config in CASES.items() if (config["model_type"], name in sample) == group}
            try:
                made[group] = run_alone(measure_family, cases, tmp_path_factory.mktemp(group[0]), timeout_s=280.0)
            except Exception as problem:  # told by each of its tests, not measured again
                made[group] = problem
        result = made[group]
        if isinstance(result, Exception):
            raise result
        return result[case]

    return get


def check(apart: Apart) -> None:
    assert apart.within_bounds(), (apart.outputs, apart.loss, apart.worst)


def test_every_family_has_cases() -> None:
    families = [config["model_type"] for config in CASES.values()]
    assert set(families) == set(FAMILIES)
    assert all(families.count(name) >= (1 if family.same_as else 3) for name, family in FAMILIES.items())


@pytest.mark.parametrize("case", sampled(CASES))
def test_equals_transformers(case: str, found: Callable[[str], Found]) -> None:
    check(found(case).apart)


@pytest.mark.parametrize("case", sampled(CASES))
def test_equals_transformers_behind_padding(case: str, found: Callable[[str], Found]) -> None:
    check(found(case).padded)


@pytest.mark.parametrize("case", sampled(CASES))
def test_every_option_of_a_case_matters(case: str, found: Callable[[str], Found]) -> None:
    """Else the case would prove nothing about it."""
    unseen = {name for name, apart in found(case).without.items() if apart.within_bounds()}
    assert unseen == NO_TRACE.get(case, set())


@pytest.mark.parametrize("case", sampled(CASES))
def test_written_config_gives_the_same_outputs(case: str, found: Callable[[str], Found]) -> None:
    assert found(case).config_is_right
