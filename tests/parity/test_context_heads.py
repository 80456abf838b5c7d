"""Sequences divided over context ranks, with other heads than a vocabulary's, adapters, images' models, and dropout.

The runs and bounds are those of the tests of each of these at other layouts.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.parallel.grid import Grid
from tests.parity import adapter_cases, label_heads, test_adapters, test_label_head_steps, test_own_head
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.context_cases import FOUR, GATHER_2, GATHER_2X2, RING_2, RING_2X2, RING_4, TWO, ULYSSES_2, with_axes
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.label_head_cases import LABEL_HEAD_CASES
from tests.parity.ours import Place, engine_on, micro_batches, train_ours
from tests.parity.own_head import train_reference_with_head, train_with_head
from tests.parity.reference import make_model
from tests.parity.vision_language_cases import VISION_LANGUAGE_CASES
from tests.ranks import run_grid

PLACES = (*TWO, *FOUR, with_axes(RING_2, 2, 1, 1, 1, True), with_axes(GATHER_2X2, 1, 2, 1, 1))
RECIPE = Recipe()


def over_places(sample: Mapping[str, Place], names: Any, places: tuple[Place, ...] = PLACES) -> list[Any]:
    """Each name at one place, and in the sweep all of them at all places."""
    rest = [(name, place) for name in names for place in places if sample.get(name) != place]
    return [*sample.items(), *(pytest.param(*one, marks=pytest.mark.sweep) for one in rest)]


# ---- heads for labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "place"),
    over_places({"llama-sequence": RING_2X2, "bert-token": GATHER_2}, test_label_head_steps.CASES),
    ids=str,
)
def test_heads_for_labels_train_as_transformers(case: str, place: Place, once: Any) -> None:
    test_label_head_steps.check(case, place, once)


METRICS = ("llama-regression", "roberta-regression", "llama-token", "bert-multi", "modernbert-mean", "t5-sequence")


@pytest.mark.parametrize(
    ("case", "place"),
    over_places({"roberta-regression": RING_2, "llama-token": ULYSSES_2, "modernbert-mean": GATHER_2X2}, METRICS),
    ids=str,
)
def test_metrics_of_validation_are_those_of_one_process(case: str, place: Place, once: Any) -> None:
    """Each sample is counted once, and what is kept of the samples is in their order."""
    directory, _ = once(_save_labelled, case)
    expected = run_grid(_validated, Place().layout, directory, Place())[0]
    assert len(expected) > 2
    for found in run_grid(_validated, place.layout, directory, place):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}"
            )


def _save_labelled(case: str, directory: Path) -> None:
    make_model(LABEL_HEAD_CASES[case]).save_pretrained(directory)


def _validated(grid: Grid, directory: Path, place: Place) -> dict[str, Tensor]:
    """Loss and metrics of a validation, and the logits of its batch on ranks that have them."""
    engine, model = engine_on(grid, directory, place, RECIPE)
    columns = label_heads.label_columns(model.core)
    labels = label_heads.draw_labels(label_heads.head_of_model(model.core))
    losses = engine.evaluate([{**columns, engine.head.label_columns[0]: labels}])
    found = {"loss": losses.mean, **losses.terms, **losses.metrics}
    return {name: torch.tensor(value) for name, value in found.items()}


# ---- heads of other packages, adapters, models of images -----------------------------------------------------------


@pytest.mark.parametrize(("case", "place"), over_places({"llama": RING_2X2}, ("llama", "qwen2-tied")), ids=str)
def test_a_head_of_another_package(case: str, place: Place, once: Any) -> None:
    """Its terms, metrics and counts are of tokens."""
    directory, expected = once(train_reference_with_head, case, RECIPE)
    found = run_grid(train_with_head, place.layout, directory, place, RECIPE)[0]
    assert found["tokens"] == expected["tokens"]
    errors = test_own_head.errors_of(found, expected)
    assert test_own_head.within(errors), errors


ADAPTERS = ("all", "dora", "scalings-shared-biased", "encoder-decoder", "tables")


@pytest.mark.parametrize(("name", "place"), over_places({"all": RING_2X2}, ADAPTERS), ids=str)
def test_adapters_train_as_those_of_peft(name: str, place: Place, once: Any) -> None:
    case, config = test_adapters.CONFIGS[name]
    directory, expected = once(adapter_cases.train_peft, case, config, RECIPE)
    errors = relative_errors(adapter_cases.train_ours(directory, place, RECIPE), expected)
    assert within_fp32(errors), errors


@pytest.mark.parametrize(
    ("case", "place"), over_places({"gemma3-windows": RING_2X2}, VISION_LANGUAGE_CASES, (*TWO, *FOUR)), ids=str
)
def test_text_of_models_of_images(case: str, place: Place, references: Any) -> None:
    directory, reference = references(case, RECIPE)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


# ---- dropout -------------------------------------------------------------------------------------------------------

RATES = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


def _save_dropping(directory: Path) -> None:
    make_model({**CONFIGS["gpt2"], **RATES}).save_pretrained(directory)


def _dropped(grid: Grid, directory: Path, place: Place) -> dict[str, Any]:
    """Losses and norms of two steps, and where the first dropout of hidden states keeps its input."""
    engine, _ = engine_on(grid, directory, place, RECIPE)
    kept: list[Tensor] = []
    first = next(part for part in engine.deepspeed.module.modules() if isinstance(part, HiddenDropout))
    first.register_forward_hook(lambda part, inputs, output: kept.append((output != 0).clone()))
    results = [engine.train_step(micro_batches(grid, place, RECIPE, step), RECIPE.lr) for step in range(2)]
    return {"curve": [(result.loss, result.grad_norm) for result in results], "kept": kept[0]}


@pytest.mark.parametrize(
    "place", [ULYSSES_2, *(pytest.param(one, marks=pytest.mark.sweep) for one in (GATHER_2, RING_4, RING_2X2))], ids=str
)
def test_dropout_differs_between_parts_and_is_drawn_again_to_the_bit(place: Place, once: Any) -> None:
    directory, _ = once(_save_dropping)
    plain = run_grid(_dropped, place.layout, directory, place)
    masks = [found["kept"] for found in plain]
    assert all(0.6 < float(mask.float().mean()) < 0.8 for mask in masks)
    for index, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:index])
    for mode in ("selective", "full"):
        again = run_grid(_dropped, place.layout, directory, replace(place, recompute=mode))
        assert [found["curve"] for found in again] == [found["curve"] for found in plain], mode
