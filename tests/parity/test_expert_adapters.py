"""Adapters of mixtures of experts are what peft on transformers makes of them, wherever the experts are.

Bounds as in `test_adapters`. With frozen experts no rank hangs DeepSpeed's marker of experts; with trained ones that do
not lie on the tensor axis, every rank does.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.layers.moe import experts
from megatron_ds.layers.moe.layer import MoE
from tests.parity.adapter_cases import train_on, train_ours, train_peft
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place
from tests.ranks import run_alone, run_grid

RECIPE = Recipe(steps=3)
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": (
        "mixtral-four-experts",
        {"target_modules": [], "target_parameters": FUSED, "rank_pattern": {".*gate_up_proj": 3}},
    ),
    "all": (
        "qwen2_moe-windows-dense-first",
        {"target_modules": "all-linear", "target_parameters": [*FUSED, "gate.weight"]},
    ),
    "frozen": ("mixtral-four-experts", {"target_modules": ["q_proj", "o_proj"]}),
    "inputs-first": ("gpt_oss-yarn", {"target_modules": ["v_proj"], "target_parameters": [*FUSED, "router.weight"]}),
    "in-full": ("glm4_moe-dense-first", {"target_modules": ["v_proj"], "modules_to_save": ["experts", "mlp.gate"]}),
}
COVERING = [
    ("experts", Place(1, 1, 1, 1)),
    ("experts", Place(2, 1, 1, 1, True)),
    ("experts", Place(1, 1, 2, 1, expert=2)),
    ("experts", Place(1, 1, 2, 3, expert=2)),
    ("experts", Place(1, 2, 1, 1)),
    ("all", Place(2, 1, 1, 2)),
    ("all", Place(2, 1, 2, 1, True, expert=4, recompute="full")),
    ("frozen", Place(1, 1, 2, 3, expert=2)),
    ("frozen", Place(1, 2, 2, 1, expert=2)),
    ("inputs-first", Place(2, 1, 1, 1, True, expert=1)),
    ("in-full", Place(1, 1, 2, 2, expert=2)),
]
PLACES = [
    *(Place(2, 1, 1, 1), Place(2, 1, 2, 3, True), Place(2, 1, 2, 2, True, expert=4), Place(1, 2, 2, 1, expert=2)),
    *(Place(1, 1, 2, zero, expert=2) for zero in (0, 1, 3)),
    *(Place(2, 1, 2, 0, expert=1), Place(2, 2, 2, 1, True, expert=4, recompute="full")),
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Name -> (directory with base and adapter, what peft's training gave)."""
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in known:
            case, config = CONFIGS[name]
            directory = tmp_path_factory.mktemp(name)
            given = {"r": 4, "lora_alpha": 6, **config}
            known[name] = directory, run_alone(train_peft, case, given, RECIPE, directory)
        return known[name]

    return get


@pytest.mark.parametrize(("name", "place"), COVERING, ids=str)
def test_three_steps_equal_peft(name: str, place: Place, made: Any) -> None:
    directory, reference = made(name)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "place"),
    [(name, place) for name in CONFIGS for place in PLACES if (name, place) not in COVERING],
    ids=str,
)
def test_every_layout_equals_peft(name: str, place: Place, made: Any) -> None:
    directory, reference = made(name)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


def _unscaled() -> None:
    """alpha / r is left out of the adapters of experts."""
    make = experts.ExpertAdapter.__init__

    def unscaled(self: Any, *given: Any) -> None:
        *others, low, parallel = given
        make(self, *others, replace(low, scale=1.0), parallel)

    experts.ExpertAdapter.__init__ = unscaled  # type: ignore[method-assign]


def _own_tokens_alone() -> None:
    """The router's adapter is left with the gradient of each rank's own tokens."""
    adapt = MoE.adapt

    def alone(self: MoE, *args: Any) -> None:
        adapt(self, *args)
        for adapter in self.adapters.values():
            adapter.enter = lambda parameter: parameter  # type: ignore[assignment]

    MoE.adapt = alone  # type: ignore[method-assign]


def _in_the_trap(grid: Any, trap: Callable[[], None], directory: Path, place: Place) -> dict[str, Any]:
    trap()
    return train_on(grid, directory, place, RECIPE)


@pytest.mark.parametrize(
    ("trap", "name", "place"),
    [
        (_unscaled, "experts", Place(1, 1, 1, 1)),
        (_own_tokens_alone, "all", Place(2, 1, 1, 2)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_trap_turns_it_red(trap: Callable[[], None], name: str, place: Place, made: Any) -> None:
    directory, reference = made(name)
    caught = relative_errors(run_grid(_in_the_trap, place.layout, trap, directory, place)[0], reference)
    assert not within_fp32(caught), caught
