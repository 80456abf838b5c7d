"""`optimizer.groups`: five steps with learning rates and decay by pattern equal AdamW with the same groups."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint.directory import name_of
from megatron_ds.config import OptimizerGroup, OptimizerSection
from megatron_ds.engine import base
from megatron_ds.errors import ConfigError
from megatron_ds.runtime import load_model
from megatron_ds.runtime.optimizer_groups import grouped_parameters
from tests.checkpoint.runs import CUT, apart, resumed_at, saved_at
from tests.halves import swept
from tests.made_once import MakeOnce
from tests.parity import adapter_cases
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_on, train_ours
from tests.ranks import run_grid

GROUPS = (
    ("model.embed_tokens.*", 0.1, 0.0),
    ("lm_head.*", 0.5, None),
    ("*.layers.1.self_attn.[kv]_proj.*", 3.0, 0.3),
    ("*.layers.1.*", 0.0, None),
    ("*layernorm.weight", 2.0, 0.2),
)
RECIPE = Recipe(groups=GROUPS)
EXPERTS = Recipe(groups=(("*.mlp.experts.*", 0.2, 0.0), ("*.mlp.gate.*", 4.0, None)))
PLACES = [Place(1, 1, 1, 0), Place(1, 1, 2, 3), Place(2, 2, 1, 1, True)]
SWEPT = [
    Place(2, 1, 2, 3),
    Place(2, 1, 2, 2, True),
    Place(1, 1, 2, 1),
    Place(2, 1, 1, 0),
    Place(1, 4, 1, 1),
    Place(1, 1, 4, 3),
    Place(2, 2, 2, 1, True),
]


@pytest.mark.parametrize("place", [*PLACES, *(pytest.param(one, marks=pytest.mark.sweep) for one in SWEPT)], ids=str)
def test_five_steps_equal_adamw_with_the_same_groups(place: Place, references: Any) -> None:
    directory, reference = references("llama", RECIPE)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


@pytest.mark.parametrize(
    "place",
    [
        Place(1, 1, 2, 1, expert=2),
        pytest.param(Place(1, 1, 2, 3, expert=2), marks=pytest.mark.sweep),
        pytest.param(Place(2, 1, 2, 2, True, expert=4), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_experts_and_routers_in_groups_of_their_own(place: Place, references: Any) -> None:
    directory, reference = references("qwen2_moe-windows-dense-first", EXPERTS)
    errors = relative_errors(train_ours(directory, place, EXPERTS), reference)
    assert within_fp32(errors), errors


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (Place(1, 1, 2, 2), Place(1, 2, 1, 1)),
        *swept(*((Place(2, 1, 2, 2, True), other) for other in (Place(1, 2, 1, 1), Place(1, 1, 2, 3)))),
    ],
    ids=str,
)
def test_checkpoints_do_not_depend_on_the_groups(place: Place, other: Place, references: Any, tmp_path: Path) -> None:
    """Saved at one layout; resumed there bit for bit, and at another, whose stages have other groups."""
    directory, _ = references("llama", RECIPE)
    curve = saved_at(directory, place, RECIPE, tmp_path)
    checkpoint = tmp_path / name_of(CUT)
    assert resumed_at(checkpoint, place, RECIPE) == curve[CUT:]
    loss, norm = apart(resumed_at(checkpoint, other, RECIPE), curve[CUT:])
    assert loss < 2e-5 and norm < 1e-4


def _without_factors(grid: Any, directory: Any, place: Place) -> dict[str, Any]:
    base.LR_FACTOR = "ignored"
    return train_on(grid, directory, place, RECIPE)


def test_one_rate_for_all_groups_is_seen(references: Any) -> None:
    directory, reference = references("llama", RECIPE)
    errors = relative_errors(run_grid(_without_factors, PLACES[0].layout, directory, PLACES[0])[0], reference)
    assert errors["weights"] > 1e-2, errors


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PLUS = Recipe(groups=(("*.lora_B.*", 16.0, None),))


def _train_plus(directory: Path) -> dict[str, Any]:
    return adapter_cases.train_peft("llama", LORA, PLUS, directory, plus=16.0)


@pytest.mark.parametrize(
    "place", [Place(2, 2, 1, 1, True), *(pytest.param(one, marks=pytest.mark.sweep) for one in (PLACES[0], PLACES[1]))]
)
def test_five_steps_of_lora_plus_equal_pefts(place: Place, once: MakeOnce) -> None:
    directory, reference = once(_train_plus)
    errors = relative_errors(adapter_cases.train_ours(directory, place, PLUS), reference)
    assert within_fp32(errors), errors


def test_names_of_adapters(references: Any) -> None:
    directory, _ = references("llama", RECIPE)
    model = load_model(directory, peft={"r": 2, "target_modules": ["q_proj", "down_proj"]})
    section = OptimizerSection(groups=[OptimizerGroup(match=["*.lora_B.*"], lr_factor=16.0)])
    found = grouped_parameters(model, section)
    assert set(found.values()) == {0}
    assert len(found) == 2 * CONFIGS["llama"]["num_hidden_layers"]


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (
            [{"match": ["lm_hed.weight"], "lr": 1e-4}],
            "optimizer.groups[0].match=lm_hed.weight matches no tensor that is trained, such as lm_head.weight",
        ),
        (
            [{"match": ["model.norm.*"], "lr": 1e-4}],
            "optimizer.groups[0].match=model.norm.* matches no tensor that is trained",
        ),
        (
            [{"match": ["*k_proj*"], "lr": 1e-4}, {"match": ["*v_proj*"], "lr": 2e-4}],
            "optimizer.groups: model.layers.0.self_attn.k_proj.weight and model.layers.0.self_attn.v_proj.weight are "
            "one parameter here; put both into one group",
        ),
        (
            [{"match": ["*"], "lr": 1e-4}, {"match": ["lm_head.*"], "lr": 2e-4}],
            "optimizer.groups[1].match=lm_head.* matches only tensors of earlier entries, and the first match counts; "
            "try moving it before them, or remove it",
        ),
    ],
)
def test_refused_patterns(groups: list[dict[str, Any]], says: str) -> None:
    model = load_model(CONFIGS["llama"], freeze=["model.norm.weight"])
    section = OptimizerSection(groups=[OptimizerGroup(**group) for group in groups])
    with pytest.raises(ConfigError) as caught:
        grouped_parameters(model, section)
    assert str(caught.value).startswith(says)
