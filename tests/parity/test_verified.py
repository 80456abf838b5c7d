"""Cases that are compared in one process fail one by one."""

from typing import Any

import pytest

from megatron_ds.errors import MegatronDSError
from megatron_ds.hf.weights import HFWeights
from tests.parity import verified
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.test_families import layout_of
from tests.parity.verified import Verified

PLACE = (1, 1, False)
RIGHT, WRONG = "gpt2-plain", "gpt2-scales"


@pytest.mark.parametrize(("fault", "problem"), [("raises", MegatronDSError), ("differs", AssertionError)])
def test_a_case_that_fails_leaves_the_others(
    fault: str, problem: type[Exception], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(session: Any, weights: HFWeights, *given: Any, real: Any = verified.compare_inputs) -> Any:
        found = real(session, weights, *given)
        if weights.directory.parent.name == WRONG:
            if fault == "raises":
                raise RuntimeError("on purpose")
            found[0].loss += 1.0
        return found

    monkeypatch.setattr(verified, "compare_inputs", faulty)
    both = Verified(FAMILY_CASES, layout_of, [(RIGHT, PLACE), (WRONG, PLACE)], tmp_path_factory)
    both.check(RIGHT, PLACE)
    with pytest.raises(problem):
        both.check(WRONG, PLACE)
    both.check(RIGHT, PLACE)
