"""Five steps of Muon equal torch.optim.Muon and torch.optim.AdamW in one process, weights to 1e-5, at every layout.

Losses are within 1e-6 and gradient norms within 1e-5. Both sides orthogonalise in fp32, see `MuonAndAdamW`; that ours
in bf16 is torch's bit for bit is tested in `tests/engine/test_muon.py`. Seen errors of weights are below 1e-6 with
Llama and the experts, and 7e-6 with GPT-2, whose gradients have small singular values.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.engine.optimizers import muon
from megatron_ds.errors import ConfigError
from megatron_ds.layers import linear
from megatron_ds.layers.param_spec import Matrices
from tests.checkpoint.runs import offloaded
from tests.engine.test_bad_steps import BAD
from tests.engine.test_bad_steps import _run as run_with_bad_step
from tests.parity.adapter_cases import train_ours as train_adapter
from tests.parity.adapter_cases import train_peft
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors
from tests.parity.ours import Place, train_ours
from tests.parity.test_layouts import BF16_BOUNDS
from tests.ranks import run_alone, run_grid

MATCH = Recipe(optimizer="muon", options=(("ns_dtype", "fp32"),))
ORIGINAL = replace(
    MATCH,
    options=(
        ("adamw_lr", 1e-3),
        ("adjust_lr", "original"),
        ("momentum", 0.9),
        ("nesterov", False),
        ("ns_dtype", "fp32"),
        ("ns_steps", 4),
    ),
)
RECIPES = {"match": MATCH, "original": ORIGINAL}
TORCH_BF16 = Recipe(optimizer="muon", lr=1e-4)


def _with_zero(**settings: Any) -> Place:
    return Place(1, 1, 2, settings["stage"], extra=(("zero_optimization", settings),))


LLAMA, GPT2, EXPERTS = "llama", "gpt2", "mixtral-four-experts"
PLACES = {
    "z0": Place(1, 1, 2, 0),
    "z1": Place(1, 1, 2, 1),
    "z2": Place(1, 1, 2, 2),
    "z3": Place(1, 1, 2, 3),
    "tp2-sp": Place(2, 1, 1, 1, True),
    "tp2-sp-z0": Place(2, 1, 2, 0, True),
    "tp2-sp-z2": Place(2, 1, 2, 2, True),
    "tp2-z3": Place(2, 1, 2, 3),
    "tp4-z1": Place(4, 1, 1, 1),
    "pp2": Place(1, 2, 1, 1),
    "pp2-dp2": Place(1, 2, 2, 1),
    "tp2-pp2-dp2": Place(2, 2, 2, 1, True),
    "cp2-z1": Place(1, 1, 2, 1, cp=2),
    "z2-round-robin": _with_zero(stage=2, round_robin_gradients=True),
    "z3-sub-groups": _with_zero(stage=3, sub_group_size=3000),
    "offload": offloaded(Place(1, 1, 2, 2)),
    "offload-z3": offloaded(Place(1, 1, 2, 3)),
}
FOLDED = {
    "ep2-dp2-z0": Place(1, 1, 2, 0, expert=2),
    "ep2-dp2-z1": Place(1, 1, 2, 1, expert=2),
    "ep2-dp2-z3": Place(1, 1, 2, 3, expert=2),
    "ep4-tp2-dp2-z2": Place(2, 1, 2, 2, True, expert=4),
    "ep2-pp2-dp2": Place(1, 2, 2, 1, expert=2),
    "ep1-tp2": Place(2, 1, 1, 1, True, expert=1),
    "ep1-dp4-z1": Place(1, 1, 4, 1, expert=2),
}
SAMPLE = [
    (LLAMA, "match", "tp2-sp"),
    (LLAMA, "match", "z1"),
    (LLAMA, "match", "z3"),
    (LLAMA, "match", "pp2"),
    (LLAMA, "original", "tp2-sp-z0"),
    (GPT2, "original", "tp2-sp-z2"),
    (EXPERTS, "match", "ep2-dp2-z1"),
]
CASES = (LLAMA, GPT2, EXPERTS, "llama-1kv", "llama-uneven")
OTHER_MODELS = ("bert-pretraining", "albert-masked", "t5-gated", "opt-after-narrow", "qwen2_moe-all")
EVERYTHING = [
    *((case, recipe, place) for case in CASES for recipe in RECIPES for place in PLACES),
    *((EXPERTS, recipe, place) for recipe in RECIPES for place in FOLDED),
    *((case, "match", place) for case in OTHER_MODELS for place in ("z0", "tp2-sp-z2", "z3", "pp2")),
]


def errors_of(case: str, recipe: Recipe, place: Place, references: Any) -> dict[str, float]:
    directory, reference = references(case, recipe)
    return relative_errors(train_ours(directory, place, recipe), reference)


def within(errors: dict[str, float]) -> bool:
    return errors["loss"] < 1e-6 and errors["norm"] < 1e-5 and errors["weights"] < 1e-5


def check(case: str, recipe: str, place: str, references: Any) -> None:
    errors = errors_of(case, RECIPES[recipe], {**PLACES, **FOLDED}[place], references)
    assert within(errors), errors


@pytest.mark.parametrize(("case", "recipe", "place"), SAMPLE)
def test_five_steps_equal_torch(case: str, recipe: str, place: str, references: Any) -> None:
    check(case, recipe, place, references)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "recipe", "place"), [one for one in EVERYTHING if one not in SAMPLE])
def test_five_steps_equal_torch_everywhere(case: str, recipe: str, place: str, references: Any) -> None:
    check(case, recipe, place, references)


ADAPTER = {"r": 4, "target_modules": "all-linear"}  # its A and B are matrices


@pytest.mark.parametrize(
    "place",
    ["tp2-sp-z2", *(pytest.param(one, marks=pytest.mark.sweep) for one in ("z0", "z3", "tp4-z1", "pp2-dp2", "cp2-z1"))],
)
def test_adapters_equal_torch(place: str, tmp_path: Path) -> None:
    reference = run_alone(train_peft, "llama-1kv", ADAPTER, MATCH, tmp_path)
    errors = relative_errors(train_adapter(tmp_path, PLACES[place], MATCH), reference)
    assert within(errors), errors


def test_without_matrices_it_is_refused(references: Any) -> None:
    directory, _ = references(LLAMA, MATCH)
    with pytest.raises(ConfigError, match=r"updates matrices, and none is trained here; try optimizer\.name=adamw"):
        train_ours(directory, Place(), replace(MATCH, frozen=("*proj*",)))


@pytest.mark.parametrize("place", ["z1", *(pytest.param(one, marks=pytest.mark.sweep) for one in ("z2", "z3", "pp2"))])
def test_bf16_runs_stay_near_a_bf16_reference(place: str, references: Any) -> None:
    """Bounds are those of AdamW in `test_layouts.py`."""
    errors = errors_of(LLAMA, Recipe(optimizer="muon", precision="bf16"), PLACES[place], references)
    assert all(errors[name] < bound for name, bound in BF16_BOUNDS.items()), errors


@pytest.mark.parametrize(
    "place",
    [PLACES["z3"], *(pytest.param(PLACES[one], marks=pytest.mark.sweep) for one in ("z0", "z2", "pp2"))],
    ids=str,
)
def test_a_bad_step_leaves_no_trace(place: Place, references: Any) -> None:
    directory, _ = references(LLAMA, MATCH)
    recipe = replace(MATCH, steps=4)
    good, bad = (run_grid(run_with_bad_step, place.layout, directory, place, recipe, kind) for kind in ("none", "loss"))
    for with_it, without in zip(bad, good):
        assert with_it[BAD] == (False, False) and with_it[:BAD] + with_it[BAD + 1 :] == without


# ---- mistakes that must be seen --------------------------------------------------------------------------------------


Trap = Callable[[pytest.MonkeyPatch], None]


def _transposed_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    original = muon.LR_ADJUSTMENTS["original"]
    monkeypatch.setitem(muon.LR_ADJUSTMENTS, "original", lambda rows, columns: original(columns, rows))


def _fused_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "Matrices", lambda alternating=1, block_rows=0: Matrices())


def _each_shard_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that each hold half of the rows orthogonalise them on their own."""

    def alone(self: Any, specs: Any, matrices: Any, real: Any = muon.Muon._orthogonalize) -> dict[Any, Any]:
        halves = {key: [half.contiguous() for half in matrix.chunk(2)] for key, matrix in matrices.items()}
        first, second = (real(self, specs, {key: half[index] for key, half in halves.items()}) for index in range(2))
        return {key: torch.cat([first[key], second[key]]) for key in matrices}

    monkeypatch.setattr(muon.Muon, "_orthogonalize", alone)


@pytest.mark.parametrize("trap", [_transposed_shape, _fused_keys_and_values, _each_shard_alone])
def test_traps_are_seen(
    trap: Callable[[pytest.MonkeyPatch], None], references: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap(monkeypatch)
    assert errors_of(LLAMA, ORIGINAL, Place(2, 1, 1, 1, True), references)["weights"] > 1e-4


def test_bf16_is_that_of_torch(references: Any) -> None:
    """With small steps, in which the rounding of its orthogonalisation is small too."""
    assert within(errors_of(LLAMA, TORCH_BF16, PLACES["z1"], references))
