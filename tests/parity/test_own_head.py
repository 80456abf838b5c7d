"""An output head from outside, with terms, counts, metrics and a parameter of its own, equals plain torch everywhere.

Bounds as in test_layouts; terms are as exact as losses, and metrics are averages of as many numbers.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.engine import base
from megatron_ds.models.sequential import HeadResult, HeadSpec
from megatron_ds.parallel.grid import Grid
from tests.halves import halved
from tests.parity import own_head
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place
from tests.parity.own_head import GAIN, HEAD, gradients_with_head, train_reference_with_head, train_with_head
from tests.ranks import run_alone, run_grid

RECIPE = Recipe()
PLACES = [
    Place(1, 1, 1, 1),
    Place(2, 1, 1, 1),
    Place(2, 1, 1, 1, True),
    Place(1, 2, 1, 1),
    Place(1, 1, 2, 0),
    Place(1, 1, 2, 1),
    Place(1, 1, 2, 2),
    Place(1, 1, 2, 3),
    Place(2, 1, 2, 3, True),
    Place(2, 2, 1, 1, True),
    Place(1, 2, 2, 1),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """case -> (directory with the initial model, what plain torch computed)."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(case: str) -> tuple[Path, dict[str, Any]]:
        if case not in made:
            directory = tmp_path_factory.mktemp(case)
            made[case] = directory, run_alone(train_reference_with_head, case, RECIPE, directory)
        return made[case]

    return get


def errors_of(ours: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Largest relative errors of losses, norms and weights, and of any term or metric."""
    errors = relative_errors(ours, expected)
    for kind in ("terms", "metrics"):
        assert len(ours[kind]) == len(expected[kind]) == RECIPE.steps + 1
        assert all(list(mine) == list(theirs) for mine, theirs in zip(ours[kind], expected[kind]))
        errors[kind] = max(
            abs(mine[name] / theirs[name] - 1) for mine, theirs in zip(ours[kind], expected[kind]) for name in theirs
        )
    return errors


def within(errors: dict[str, float]) -> bool:
    return within_fp32(errors) and errors["terms"] < 2e-5 and errors["metrics"] < 2e-5


@pytest.mark.parametrize(
    ("case", "place"),
    halved([("llama", place) for place in PLACES] + [("qwen2-tied", place) for place in PLACES[-3:]]),
    ids=str,
)
def test_terms_metrics_and_weights_equal_plain_torch(case: str, place: Place, reference: Any) -> None:
    directory, expected = reference(case)
    for ours in run_grid(train_with_head, place.layout, directory, place, RECIPE)[:1]:
        assert ours["tokens"] == expected["tokens"]
        assert within(errors_of(ours, expected)), errors_of(ours, expected)


@pytest.mark.parametrize(
    "place",
    [Place(2, 1, 1, 0), Place(2, 1, 1, 0, True), Place(1, 2, 1, 0), Place(1, 1, 2, 0), Place(2, 2, 1, 0, True)],
    ids=str,
)
def test_gradients_equal_plain_torch(place: Place, reference: Any) -> None:
    directory, expected = reference("llama")
    recipe = replace(RECIPE, grad_clip=0.0)
    ours = run_grid(gradients_with_head, place.layout, directory, place, recipe)[0]
    assert ours.keys() == expected["gradients"].keys() and GAIN in ours
    for name, gradient in expected["gradients"].items():
        assert float((ours[name] - gradient).norm() / gradient.norm()) < 1e-4, name


# ---- averages that are wrong ----------------------------------------------------------------------------------------


def mean_of_metric_means() -> None:
    """Each micro-batch's metrics are averaged, then the averages."""
    pack = HeadSpec.pack

    def averaged(self: HeadSpec, result: HeadResult) -> torch.Tensor:
        one = torch.ones(())
        metrics = {name: (total / weight.clamp(min=1), one) for name, (total, weight) in result.metrics.items()}
        return pack(self, replace(result, metrics=metrics))

    HeadSpec.pack = averaged  # type: ignore[method-assign]


def one_count_for_both_terms() -> None:
    """The second term is divided by the first one's labels."""
    count = base.Engine._count
    base.Engine._count = lambda self, batches: (count(self, batches)[0],) * 2  # type: ignore[method-assign]


def sums_of_one_rank() -> None:
    """Each data rank logs its own part of the metrics."""
    unpack = base.Losses.unpack.__func__  # type: ignore[attr-defined]

    def own(cls: Any, *given: Any) -> Any:
        losses = unpack(cls, *given)
        parts = {name: (total / 2, weight) for name, (total, weight) in losses.metric_sums.items()}
        return replace(losses, metric_sums=parts)

    base.Losses.unpack = classmethod(own)  # type: ignore[method-assign,assignment]


def gain_seen_in_part() -> None:
    """The gradient of the head's own parameter stays each tensor rank's part."""
    own_head.ZLossHead.losses = _with_partial_gain(own_head.ZLossHead.losses)  # type: ignore[method-assign]


def _with_partial_gain(losses: Any) -> Any:
    def patched(self: Any, *args: Any) -> Any:
        self.tp = replace(self.tp)
        object.__setattr__(self.tp, "inside", lambda parameter: parameter)
        return losses(self, *args)

    return patched


TRAPS: list[tuple[Callable[[], None], str, Place]] = [
    (mean_of_metric_means, "metrics", Place(1, 1, 2, 1)),
    (mean_of_metric_means, "metrics", Place(1, 2, 1, 1)),
    (sums_of_one_rank, "metrics", Place(1, 1, 2, 1)),
    (one_count_for_both_terms, "weights", Place(1, 1, 1, 1)),
    (gain_seen_in_part, "weights", Place(2, 1, 1, 1)),
]


def _train_in_the_trap(grid: Grid, trap: Callable[[], None], directory: Path, place: Place) -> dict[str, Any]:
    trap()
    return train_with_head(grid, directory, place, RECIPE)


@pytest.mark.parametrize(("trap", "wrong", "place"), TRAPS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_wrong_average_turns_it_red(trap: Callable[[], None], wrong: str, place: Place, reference: Any) -> None:
    directory, expected = reference("llama")
    errors = errors_of(run_grid(_train_in_the_trap, place.layout, trap, directory, place)[0], expected)
    assert errors[wrong] > 1e-2, errors


def test_a_head_that_returns_other_names_than_it_declares_is_refused() -> None:
    zero = torch.zeros(())
    with pytest.raises(ValueError, match=r"returned terms \['targets'\], its HeadSpec has \['targets', 'z'\]"):
        HEAD.pack(HeadResult({"targets": zero}))
    with pytest.raises(ValueError, match=r"returned metrics \[\], its HeadSpec has \['log_partition', 'top_quarter'\]"):
        HEAD.pack(HeadResult({"targets": zero, "z": zero}))
