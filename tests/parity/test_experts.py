"""Mixtures of experts: five steps equal transformers and AdamW in one process, with experts on any ranks of a stage.

Bounds are those of `test_layouts.py`; seen errors are below 3e-6. With the eps of `SCALE` an update is proportional to
its gradient, so that a gradient of experts of a wrong scale shows in the weights, which Adam otherwise hides.
"""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ds.errors import TopologyError
from megatron_ds.hf.config import read_model
from megatron_ds.runtime.setup import plan_engine
from tests.covering import covering, uncovered
from tests.halves import swept
from tests.parity.cases import Recipe
from tests.parity.context_cases import offloading
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.family_cases import MOE_CASES
from tests.parity.ours import Place, cost_of, engine_config, train_ours

RECIPE = Recipe()
SCALE = Recipe(eps=1e-2)
CASE = "mixtral-four-experts"
# Expert ranks are the tensor ranks of these ...
ON_TENSOR = [
    Place(1, 1, 1, 0, expert=1),
    Place(2, 1, 1, 1, True, expert=2),
    Place(2, 1, 2, 3, True, expert=2),
    Place(2, 2, 1, 1, True, expert=2),
    Place(2, 1, 1, 1, expert=2),
]
# ... and others here, so that DeepSpeed reduces and divides experts apart.
FOLDED = [
    Place(1, 1, 2, 1, expert=2),
    Place(2, 1, 2, 2, True, expert=4),
    Place(1, 1, 2, 3, expert=2),
    Place(1, 2, 2, 1, expert=2),
    Place(2, 2, 2, 1, True, expert=4),
]
# Replicas over tensor ranks, fewer expert ranks than tensor ranks, no ZeRO.
FURTHER = [
    Place(2, 1, 1, 1, True, expert=1),
    Place(4, 1, 1, 1, expert=2),
    Place(2, 1, 2, 1, expert=1),
    Place(1, 1, 4, 0, expert=2),
    Place(2, 1, 1, 0, True, expert=1),
]
PLACES = [*ON_TENSOR, *FOLDED, *FURTHER]
SWEPT = [*PLACES, Place(4, 1, 1, 3, expert=2)]

FAMILY_OF = {case: config["model_type"] for case, config in MOE_CASES.items()}
EVERYTHING = [
    (case, replace(place, recompute=mode))
    for case in MOE_CASES
    for place in PLACES
    for mode in ("none", "selective", "full")
]
EVERYTHING_SWEPT = [
    (case, replace(place, recompute=mode))
    for case in MOE_CASES
    for place in SWEPT
    for mode in ("none", "selective", "full")
]


def facts(run: tuple[str, Place]) -> set[Any]:
    """The layout, the family, and what recomputation meets."""
    case, place = run
    plain = replace(place, recompute="none")
    folded = "folded" if plain in FOLDED else "on tensor ranks" if plain in ON_TENSOR else "replicated"
    return {plain, FAMILY_OF[case], (place.recompute, folded), (place.recompute, "pipeline", place.pp > 1)}


SAMPLE = covering(EVERYTHING, facts, cost_of)


def check(case: str, place: Place, recipe: Recipe, references: Any) -> None:
    directory, reference = references(case, recipe)
    errors = relative_errors(train_ours(directory, place, recipe), reference)
    assert within_fp32(errors), (place, errors)


@pytest.mark.parametrize(("case", "place"), SAMPLE, ids=str)
def test_five_steps_equal_transformers(case: str, place: Place, references: Any) -> None:
    check(case, place, RECIPE, references)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place"), [pair for pair in EVERYTHING_SWEPT if pair not in SAMPLE], ids=str)
def test_every_combination_equals_transformers(case: str, place: Place, references: Any) -> None:
    check(case, place, RECIPE, references)


SCALED = [FOLDED[1], FOLDED[2], FOLDED[3], FURTHER[4]]


@pytest.mark.parametrize("place", [*SCALED, *swept(*(place for place in SWEPT if place not in SCALED))], ids=str)
def test_gradients_have_the_scale_of_transformers(place: Place, references: Any) -> None:
    check(CASE, place, SCALE, references)


def test_the_sample_covers_families_and_layouts() -> None:
    assert not uncovered(SAMPLE, EVERYTHING, facts)
    assert {replace(place, recompute="none") for _, place in SAMPLE} == set(PLACES)
    assert {FAMILY_OF[case] for case, _ in SAMPLE} == set(FAMILY_OF.values())


@pytest.mark.parametrize(
    "place",
    [
        Place(1, 2, 2, 1, expert=2),
        offloading(Place(1, 2, 2, 1, expert=2), "optimizer"),
        *swept(Place(1, 4, 2, 1, expert=2), Place(2, 2, 2, 1, True, expert=4)),
    ],
    ids=str,
)
def test_a_stage_of_dense_layers_alone_equals_transformers(place: Place, references: Any) -> None:
    """The other stages reduce gradients of experts, and the norm is one."""
    check("glm4_moe-groups-bias", place, SCALE, references)


@pytest.mark.parametrize("place", [Place(2, 1, 2, 2, True, expert=4), *swept(Place(1, 2, 2, 1, expert=2))], ids=str)
def test_padding_equals_transformers(place: Place, references: Any) -> None:
    """transformers routes positions of padding too."""
    check(CASE, place, replace(SCALE, attention_mask=True), references)


@pytest.mark.parametrize("place", [Place(1, 1, 2, 1, expert=2), *swept(Place(2, 2, 1, 1, True, expert=2))], ids=str)
def test_packed_documents_equal_transformers(place: Place, references: Any) -> None:
    check(CASE, place, replace(RECIPE, packed=True), references)


@pytest.mark.parametrize(
    "place",
    [
        offloading(Place(1, 1, 2, 2, expert=2), "optimizer"),
        offloading(Place(1, 1, 2, 3, expert=2), "optimizer", "param"),
        *swept(
            offloading(Place(1, 1, 2, 1, expert=2), "optimizer"),
            offloading(Place(2, 1, 2, 2, True, expert=4), "optimizer"),
            offloading(Place(1, 2, 2, 1, expert=2), "optimizer"),
        ),
    ],
    ids=str,
)
def test_offload_equals_transformers(place: Place, references: Any) -> None:
    check(CASE, place, SCALE, references)


EXPERTS, ROUTERS = "*.mlp.experts.*", "*.mlp.gate.weight"
FROZEN = {
    "experts": (EXPERTS,),
    "routers": (ROUTERS,),
    "all but experts": (ROUTERS, "*embed*", "*norm*", "*self_attn*", "lm_head*"),
    "experts of the first two layers": ("model.layers.[01].mlp.experts.*",),
}


@pytest.mark.parametrize(
    ("frozen", "place"),
    [
        (FROZEN["experts"], Place(1, 1, 2, 2, expert=2)),
        *(
            (FROZEN[name], Place(1, 2, 2, 1, expert=2))
            for name in ("all but experts", "experts of the first two layers")
        ),
        *swept(*((FROZEN[name], Place(1, 2, 2, 1, expert=2)) for name in ("experts", "routers"))),
        *swept(*((FROZEN[name], Place(2, 1, 2, 3, True, expert=4)) for name in ("experts", "all but experts"))),
        *swept((FROZEN["experts"], Place(1, 1, 2, 3, expert=2))),
    ],
    ids=str,
)
def test_what_is_frozen_stays_and_the_rest_equals_transformers(
    frozen: tuple[str, ...], place: Place, references: Any
) -> None:
    check("qwen3_moe-renormalised", place, replace(SCALE, frozen=frozen), references)


# Beyond what dense models show (`test_layouts.py`), rounded logits choose other experts for some tokens. Seen on one
# rank and on several: loss 1.1e-3, norm 1.7e-2, weights 4e-2.
BF16_BOUNDS = {"loss": 2e-3, "norm": 3e-2, "weights": 8e-2}


@pytest.mark.parametrize(
    "place",
    [
        Place(2, 1, 2, 1, True, expert=4),
        Place(1, 1, 2, 3, expert=2),
        *swept(Place(1, 2, 2, 1, expert=2), Place(2, 1, 1, 1, True, expert=1)),
    ],
    ids=str,
)
def test_bf16_stays_near_a_bf16_reference(place: Place, references: Any) -> None:
    recipe = replace(RECIPE, precision="bf16")
    directory, reference = references(CASE, recipe)
    errors = relative_errors(train_ours(directory, place, recipe), reference)
    assert all(errors[name] < bound for name, bound in BF16_BOUNDS.items()), errors


def test_bf16_of_a_stage_of_dense_layers_alone(references: Any) -> None:
    """DeepSpeed's optimizer for bf16 has a norm of its own."""
    recipe = replace(RECIPE, precision="bf16", steps=2)
    directory, reference = references("glm4_moe-groups-bias", recipe)
    errors = relative_errors(train_ours(directory, Place(1, 2, 2, 1, expert=2), recipe), reference)
    assert all(errors[name] < bound for name, bound in BF16_BOUNDS.items()), errors


def test_more_tensor_ranks_than_experts_are_refused(references: Any) -> None:
    directory, _ = references(CASE, SCALE)
    with pytest.raises(TopologyError, match=r"does not divide the model's 4 experts; nearest: parallel[.]expert=4$"):
        plan_engine(engine_config(Place(8, 1, 1, 1), RECIPE), read_model(directory), 8, "cpu")
