"""Feed-forward layers in tiles, and block inputs in host memory: five steps equal transformers' within the bounds.

A tile of 40 tokens has 10 of the 32 positions of a micro-batch of 4 sequences, 20 of one of 2: the last is shorter.
"""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.parallel.grid import Grid
from tests.parallel.wire_bytes import counting
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, engine_on, micro_batches, train_ours
from tests.ranks import run_grid

TILED: tuple[tuple[str, Any], ...] = (("mlp_tile_tokens", 40),)
OFFLOADED = (("offload_activations", True),)
BOTH = TILED + OFFLOADED
KEPT = (("keep_attention", True),)
RECIPE = Recipe()
DROPPED_RECOMPUTE = {"partition_activations": False}

COVERING = [
    ("gpt2", Place(2, 1, 1, 1, True, settings=TILED)),
    ("llama", Place(2, 1, 2, 3, recompute="full", settings=BOTH)),
    ("qwen3", Place(1, 2, 1, 1, recompute="full", settings=BOTH)),
    ("llama", Place(2, 1, 1, 1, True, recompute="full", settings=BOTH + KEPT)),
    ("llama", Place(cp=2, method="ring", recompute="full", settings=BOTH)),
]
MORE = [
    ("llama", Place(1, 1, 1, 0, settings=TILED)),
    ("llama", Place(1, 1, 2, 3, recompute="full", settings=KEPT)),
    ("llama", Place(1, 2, 1, 1, recompute="full", settings=KEPT)),
    ("gemma2-caps", Place(1, 1, 2, 1, recompute="full", settings=KEPT)),
    ("t5-gated", Place(2, 1, 1, 1, True, recompute="full", settings=KEPT)),
    ("llama", Place(1, 1, 2, 0, recompute="full", settings=OFFLOADED)),
    ("llama", Place(2, 1, 2, 2, True, recompute="selective", settings=TILED)),
    ("llama", Place(1, 1, 2, 3, settings=TILED)),
    ("llama", Place(1, 1, 2, 1, compiled=True, settings=TILED)),
    ("llama", Place(1, 1, 2, 1, recompute="full", compiled=True, settings=BOTH)),
    (
        "llama",
        Place(2, 1, 1, 1, recompute="full", settings=TILED, extra=(("activation_checkpointing", DROPPED_RECOMPUTE),)),
    ),
    ("llama", Place(2, 1, 1, 3, True, cp=2, recompute="full", settings=BOTH)),
    ("gpt2", Place(1, 2, 1, 1, cp=2, method="gather", recompute="full", settings=BOTH)),
    ("gemma2-caps", Place(1, 1, 2, 2, cp=2, recompute="selective", settings=TILED)),
    ("t5-gated", Place(1, 1, 1, 3, cp=2, recompute="full", settings=BOTH)),
    ("bert-pretraining", Place(cp=2, settings=TILED)),
    ("apertus-bias", Place(2, 1, 1, 1, True, recompute="full", settings=BOTH)),
    ("nemotron-bias", Place(1, 1, 2, 3, recompute="full", settings=BOTH)),
    ("gemma2-caps", Place(2, 2, 1, 1, True, recompute="full", settings=BOTH)),
    ("falcon-7b-alibi", Place(1, 1, 2, 2, recompute="full", settings=BOTH)),
    ("bert-pretraining", Place(2, 1, 1, 1, recompute="full", settings=BOTH)),
    ("t5-gated", Place(1, 2, 1, 1, recompute="full", settings=BOTH)),
    ("t5-gated", Place(2, 1, 2, 3, recompute="full", settings=BOTH)),
]


def _step_bytes(grid: Grid, directory: Path, place: Place) -> tuple[Fraction, int]:
    """Bytes and collectives of a step after the first, at which ZeRO-3 records the order of the layers."""
    engine, _ = engine_on(grid, directory, place, RECIPE)
    for step in range(2):
        batches = micro_batches(grid, place, RECIPE, step)
        with counting() as wire:
            engine.train_step(batches, RECIPE.lr)
    return wire.total, sum(wire.calls.values())


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.sweep)])
def test_weights_that_zero_3_divides_are_gathered_once_for_all_tiles(mode: str, references: Any) -> None:
    directory, _ = references("llama", RECIPE)
    place = Place(1, 1, 2, 3, recompute=mode)
    tiled = replace(place, settings=(("mlp_tile_tokens", 8),))
    whole, of_tiles = (run_grid(_step_bytes, place.layout, directory, one)[0] for one in (place, tiled))
    assert whole == of_tiles


@pytest.mark.parametrize(
    ("case", "place"), [*COVERING, *(pytest.param(*one, marks=pytest.mark.sweep) for one in MORE)], ids=str
)
def test_five_steps_equal_transformers(case: str, place: Place, references: Any) -> None:
    directory, reference = references(case, RECIPE)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors
