"""Models and places at which sequences are divided over context ranks."""

from dataclasses import replace

from tests.parity.cases import Recipe
from tests.parity.ours import Place

RECIPE = Recipe()
# An update is proportional to its gradient, so that a wrong scale of a gradient shows in the weights too.
SCALE = Recipe(eps=1e-2)
PACKED = Recipe(packed=True)
ODD = Recipe(length=27)  # divided by no number of ranks
ODD_PACKED = Recipe(packed=True, length=29)
# Rows of 0, 5, ..., 20 tokens of padding before 32 of text: the first context ranks see padding alone.
PADDED = Recipe(attention_mask=True, padding_step=5)
# transformers makes something else of a position of Bloom that sees nothing.
SEEN = replace(PADDED, labels_first=False)

# Grouped heads and a stretched rope; windows and bounded scores; windows, two ropes, norms of heads; biases by
# distance; learned positions; norms of heads; no causality, segments, a pooler and two losses; two stacks with learned
# biases.
FAMILIES = (
    *("llama", "gemma2-caps", "gemma3_text-two-ropes", "bloom-tied", "gpt2", "qwen3"),
    *("bert-pretraining", "t5-gated"),
)
DECODERS = FAMILIES[:6]
EXPERTS = "mixtral-four-experts"
# One, two and three key heads a rank or for several; groups that a rank has a part of.
FEW_KEY_HEADS = ("qwen2-2kv", "llama-1kv", "llama-uneven")

ULYSSES_2 = Place(cp=2, method="ulysses")
GATHER_2 = Place(cp=2, method="gather", ulysses=1)
RING_2 = Place(cp=2, method="ring", ulysses=1)
ULYSSES_4 = Place(cp=4, method="ulysses")
GATHER_4 = Place(cp=4, method="gather", ulysses=1)
RING_4 = Place(cp=4, method="ring", ulysses=1)
GATHER_2X2 = Place(cp=4, method="gather", ulysses=2)
RING_2X2 = Place(cp=4, method="ring", ulysses=2)
TWO = (ULYSSES_2, GATHER_2, RING_2)
FOUR = (ULYSSES_4, GATHER_4, RING_4, GATHER_2X2, RING_2X2)


def with_axes(place: Place, tp: int, pp: int, dp: int, zero: int, sp: bool = False) -> Place:
    return replace(place, tp=tp, pp=pp, dp=dp, zero=zero, sp=sp)


BESIDE = ((2, 1, 1, 1, True), (1, 2, 1, 1), (1, 1, 2, 3), (2, 1, 2, 2, True))
"""The other axes that two context ranks are combined with: tp, pp, dp, zero, sp."""

PLACES = (*TWO, *FOUR, *(with_axes(place, *axes) for axes in BESIDE for place in TWO))
RING_3 = Place(cp=3, method="ring", ulysses=1)
RING_8 = Place(cp=8, method="ring", ulysses=2)


def offloading(place: Place, *parts: str) -> Place:
    section = {"stage": place.zero, **{f"offload_{part}": {"device": "cpu"} for part in parts}}
    return replace(place, extra=(("zero_optimization", section),))


_SPLIT = (("activation_checkpointing", {"partition_activations": True, "cpu_checkpointing": True}),)
_TILES = (("mlp_tile_tokens", 3), ("offload_activations", True))
_KEPT = (("keep_attention", True),)
# Numbers of ranks that are no powers of two, more than heads, chosen by the model; all axes; windows on both sides,
# sinks; and what else keeps, moves or divides activations and states.
UNUSUAL = (
    *((case, RING_3, RECIPE) for case in ("llama", "t5-gated", "bert-pretraining")),
    ("llama", replace(RING_3, method="gather"), PACKED),
    ("llama-uneven", Place(cp=6, method="ring", ulysses=3), RECIPE),
    ("llama-uneven", Place(tp=2, cp=4), RECIPE),
    *(("llama", place, ODD_PACKED) for place in (RING_8, Place(cp=8))),
    ("gemma2-caps", replace(RING_8, method="gather"), PADDED),
    ("llama", with_axes(RING_2, 2, 2, 1, 1, True), ODD_PACKED),
    ("gemma2-caps", with_axes(ULYSSES_2, 2, 2, 1, 1, True), PADDED),
    ("t5-gated", with_axes(GATHER_2, 2, 2, 1, 1, True), ODD),
    ("gpt2", with_axes(RING_2, 1, 2, 2, 1), SCALE),
    ("qwen3", with_axes(RING_2, 1, 4, 1, 1), SCALE),
    *(("modernbert-masked", place, ODD) for place in (GATHER_4, RING_4)),
    *(("gpt_oss-yarn", place, PACKED) for place in (RING_4, ULYSSES_2)),
    ("llama", replace(with_axes(RING_2, 2, 1, 1, 1), recompute="full", extra=_SPLIT), RECIPE),
    *(("t5-gated", replace(GATHER_4, zero=3, recompute=mode), RECIPE) for mode in ("selective", "full")),
    *(("llama", replace(RING_4, zero=3, recompute=mode), PADDED) for mode in ("selective", "full")),
    (EXPERTS, replace(with_axes(RING_2, 1, 1, 2, 3), expert=4, recompute="full"), SCALE),
    ("qwen2", offloading(RING_2, "optimizer"), RECIPE),
    ("qwen2", offloading(with_axes(ULYSSES_2, 1, 1, 2, 3), "optimizer", "param"), RECIPE),
    ("llama", replace(RING_2, recompute="full", settings=_TILES), RECIPE),
    *(("llama", replace(place, recompute="full", settings=_KEPT), PADDED) for place in (RING_2, GATHER_2, ULYSSES_2)),
    ("gpt2", replace(RING_2X2, recompute="full", settings=_KEPT), ODD_PACKED),
    ("t5-gated", replace(with_axes(GATHER_2, 1, 2, 1, 1), recompute="full", settings=_TILES), ODD),
    (EXPERTS, replace(with_axes(RING_2, 1, 2, 1, 1), expert=2), PACKED),
)

EXPERT_PLACES = tuple(
    replace(with_axes(place, *axes), expert=expert)
    for axes, expert in (((1, 1, 1, 1), 2), ((2, 1, 1, 1, True), 2), ((1, 1, 2, 3), 2), ((2, 1, 2, 2, True), 4))
    for place in TWO
)
