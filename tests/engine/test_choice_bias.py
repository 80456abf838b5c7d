"""The biases of a router's choice: updated once for each step that is applied, by the tokens of the global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.models.sequential import OutputHead
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.halves import swept
from tests.parity.batches import batch_for
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_config, micro_batches, session_of
from tests.ranks import run_alone, run_grid

CASE = "glm4_moe-dense-first"
RECIPE = Recipe(steps=2)
RATE = 0.02
PLACES = [
    Place(1, 1, 1, 1, expert=1),
    Place(2, 1, 1, 3, True, "full", expert=2),
    Place(1, 2, 2, 1, recompute="full", expert=2),
    *swept(Place(2, 1, 2, 3, True, "full", expert=4), Place(2, 1, 1, 1, expert=1)),
]


def _biases(engine: Any) -> dict[str, torch.Tensor]:
    """All biases on rank 0, after a check that those of this rank are fp32."""
    found = dict[str, torch.Tensor]()
    for name, parameter in engine.local_parameters():
        assert not name.endswith("choice_bias") or parameter.dtype == torch.float32
    for name, full in engine.full_parameters():
        if name.endswith("choice_bias") and full is not None:
            found[name] = full.clone()
    return found


def _train(grid: Grid, directory: Path, place: Place, recipe: Recipe, rate: float) -> list[dict[str, torch.Tensor]]:
    """The biases at the start, and after a step, an evaluation and a step that is skipped, and another step."""
    config = engine_config(place, recipe, moe_bias_rate=rate)
    engine = session_of(grid).build_engine(load_model(directory), config).engine
    batches = [micro_batches(grid, place, recipe, step, "glm4_moe") for step in range(2)]
    assert len(batches[0]) > 1
    seen = [_biases(engine)]
    assert engine.train_step(batches[0], recipe.lr).applied
    seen.append(_biases(engine))
    engine.evaluate(batches[1])
    heads = [module for module in engine.deepspeed.module.modules() if isinstance(module, OutputHead)]
    hooks = [head.register_forward_hook(lambda module, given, losses: losses + float("inf")) for head in heads]
    assert not engine.train_step(batches[1], recipe.lr).applied
    for hook in hooks:
        hook.remove()
    seen.append(_biases(engine))
    assert engine.train_step(batches[1], recipe.lr).applied
    return [*seen, _biases(engine)]


def _chosen(directory: Path) -> dict[str, torch.Tensor]:
    """How many tokens of the first global batch transformers sends to each expert, (E,) by the bias's native name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager", dtype=torch.float32)
    counts = dict[str, torch.Tensor]()
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            name = f"blocks.{index}.mlp.router.choice_bias"

            def count(module: Any, given: Any, name: str = name) -> None:
                counts[name] = torch.bincount(given[1].flatten(), minlength=8).double()

            layer.mlp.experts.register_forward_pre_hook(count)
    model(batch_for("glm4_moe", RECIPE, 0)["input_ids"])
    return counts


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_one_update_for_each_applied_step(place: Place, references: Any) -> None:
    """Under accumulation and recomputation too; the first is by transformers' choices, the same at all layouts."""
    directory, _ = references(CASE, RECIPE)
    counts = run_alone(_chosen, directory)
    start, first, skipped, second = run_grid(_train, place.layout, directory, place, RECIPE, RATE)[0]
    assert start.keys() == counts.keys() and len(counts) == 3
    for name, given in start.items():
        assert torch.equal(first[name], given + RATE * torch.sign(counts[name].mean() - counts[name]).float()), name
        assert torch.equal(skipped[name], first[name]), name
        step = second[name] - skipped[name]
        assert step.any() and all(min(abs(abs(one) - size) for size in (0, RATE)) < 1e-6 for one in step.tolist())


def test_without_a_rate_they_stay(references: Any) -> None:
    directory, _ = references(CASE, RECIPE)
    place = Place(1, 1, 2, 1, expert=2)
    start, *others = run_grid(_train, place.layout, directory, place, Recipe(steps=2, precision="bf16"), 0.0)[0]
    assert all(torch.equal(one[name], start[name]) for one in others for name in start)
