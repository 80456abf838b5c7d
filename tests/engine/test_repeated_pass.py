"""Passes of a micro-batch outside of DeepSpeed: they repeat their bits, leave nothing, and show a changed gradient."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.engine import RepeatedPass, repeated_pass
from megatron_ds.engine.repeated_pass import are_close
from megatron_ds.parallel.grid import Grid
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on, micro_batches
from tests.ranks import run_grid

RECIPE = Recipe(steps=2)


def _passes(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> tuple[list[str], list[str], Any, Any]:
    """What differs between two passes by bits and by norms; the gradient norms of a step after them, and without."""
    norms = []
    for repeats in (True, False):
        engine, _ = engine_on(grid, directory, place, recipe)
        batches = micro_batches(grid, place, recipe, 0)
        engine.train_step(batches, recipe.lr)
        if repeats:
            by_bits = RepeatedPass(engine, is_exact=True).differing(batches[0])
            by_norms = RepeatedPass(engine, is_exact=False).differing(batches[0])
        norms.append([engine.train_step(batches, recipe.lr).grad_norm for _ in range(2)])
    return by_bits, by_norms, *norms


CASES: Mapping[str, tuple[str, Place, Recipe]] = {
    "tensor": ("llama", Place(2, 1, 1, 1, sp=True, recompute="full"), RECIPE),
    "experts": ("mixtral-four-experts", Place(1, 1, 2, 2, expert=2), RECIPE),
    "bf16": ("llama", Place(1, 1, 2, 1, recompute="selective"), Recipe(steps=2, precision="bf16")),
    "stages": ("mistral-no-window-tied", Place(1, 2, 2, 1), Recipe(steps=2, precision="bf16")),
    "ZeRO-0": ("mistral-no-window-tied", Place(1, 1, 2, 0), RECIPE),
}


@pytest.mark.parametrize(
    "case", ["tensor", *(pytest.param(name, marks=pytest.mark.sweep) for name in CASES if name != "tensor")]
)
def test_passes_repeat_themselves_and_leave_nothing_behind(case: str, references: Any, tmp_path: Path) -> None:
    """With dropout, whose masks are the same in both passes."""
    model, place, recipe = CASES[case]
    directory = tmp_path / "model"
    shutil.copytree(references(model, RECIPE)[0], directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    for by_bits, by_norms, after, without in run_grid(_passes, place.layout, directory, place, recipe):
        assert by_bits == by_norms == []
        assert after == without


def _faulty(grid: Grid, directory: Path, place: Place, factor: float) -> list[list[str]]:
    """What differs where one gradient is multiplied by a factor in every other pass."""
    engine, _ = engine_on(grid, directory, place, RECIPE)
    calls = [0]

    def scale(gradient: Tensor) -> Tensor:
        calls[0] += 1
        return gradient * (factor if calls[0] % 2 else 1.0)

    batches = micro_batches(grid, place, RECIPE, 0)
    engine.train_step(batches, RECIPE.lr)
    layer = dict(engine.deepspeed.module.named_modules()).get("blocks.3.mlp")
    if layer is not None:  # it is on this stage
        layer.register_forward_hook(lambda module, given, out: out.register_hook(scale) and None)
    return [RepeatedPass(engine, is_exact=exact).differing(batches[0]) for exact in (True, False)]


def test_norms_see_what_is_large_against_rounding(references: Any) -> None:
    directory, _ = references("llama", RECIPE)
    place = Place(1, 1, 1, 1)
    ((by_bits, by_norms),) = run_grid(_faulty, place.layout, directory, place, 1 + 1e-6)
    assert by_bits and by_norms == []
    ((by_bits, by_norms),) = run_grid(_faulty, place.layout, directory, place, 1.01)
    assert "blocks.3.mlp.down.weight" in by_norms and set(by_norms) <= set(by_bits)
    assert "the forward pass" not in by_bits, "the forward pass is the same"


def test_norms_and_signed_sums_are_made_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_pass, "PIECE", 4)
    values = torch.tensor([3.0, -4.0, 12.0, 0.5, 2.0, -1.0])
    passes = RepeatedPass(None, is_exact=False)  # type: ignore[arg-type]
    norm, signed = passes._summarize(values).tolist()
    signs = (1 - 2 * (torch.arange(4) * 2654435761 // 65536 % 2)).repeat(2)[:6]
    assert norm == pytest.approx(values.norm().item()) and signed == (values * signs).sum().item()
    assert set(signs.tolist()) == {-1, 1}


def test_an_overflow_is_no_difference_unless_one_pass_alone_has_it() -> None:
    inf, nan = float("inf"), float("nan")
    assert are_close([inf, nan], [inf, inf], 1e-2) and are_close([nan, nan], [nan, nan], 1e-2)
    assert not are_close([inf, inf], [1.0, 1.0], 1e-2) and not are_close([1.0, 1.0], [nan, nan], 1e-2)
    assert are_close([1.0, 0.5], [1.005, 0.495], 1e-2) and not are_close([1.0, 0.5], [1.0, 0.52], 1e-2)


@pytest.mark.sweep
def test_a_stage_shows_its_own_fault_alone(references: Any) -> None:
    """The faulty layer is in the last of two stages, which passes no gradient on to the first one."""
    directory, _ = references("llama", RECIPE)
    place = Place(1, 2, 1, 1)
    (first, _), (last, _) = run_grid(_faulty, place.layout, directory, place, 1 + 1e-6)
    assert first == [] and "blocks.3.mlp.down.weight" in last
