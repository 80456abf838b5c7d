"""Adapters are what peft on transformers makes of them: losses, gradient norms and adapters after five steps.

Bounds as in `test_layouts`. Adapters begin at random, B too, so that a wrong one shows at the first step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.layers import adapter_layers as adapter
from megatron_ds.layers import dora
from megatron_ds.parallel.tensor import TensorParallel
from tests.covering import covering, uncovered
from tests.parity.adapter_cases import train_on, train_ours, train_peft
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, cost_of
from tests.ranks import run_alone, run_grid

RECIPE = Recipe()
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "all": ("llama-1kv", {"r": 4, "target_modules": "all-linear"}),
    "ranks": (
        "qwen3",
        {
            "r": 4,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": r".*\.(k_proj|o_proj|gate_proj|down_proj)",
            "layers_to_transform": None,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"o_proj": 5},
        },
    ),
    "fused-inputs-first": ("gpt2", {"r": 4, "target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}),
    "fused-groups": ("falcon-40b", {"r": 4, "target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "fused-gate": ("phi3-plain", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "some-layers": ("llama", {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [0, 2]}),
    "encoder-decoder": ("t5-gated", {"r": 4, "target_modules": ["q", "k", "v", "o", "wi_0", "wo"]}),
    "scalings": (
        "llama",
        {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "scalings-shared-biased": (
        "llama-1kv",
        {"peft_type": "IA3", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}
        | {"feedforward_modules": []},
    ),
    "scalings-fused": (
        "gpt2",
        {"peft_type": "IA3", "target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},
    ),
    "tables": ("llama", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "untied": ("qwen3", {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
    "kept-tied": (
        "qwen3",
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "dora": ("llama-1kv", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_dora": True}),
    "dora-fused": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "dora-fused-gate": ("phi3-plain", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    "pissa": ("llama-1kv", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": "pissa"}),
    "pissa-fused": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "init_lora_weights": "pissa", "use_dora": True}),
    "olora": ("qwen3", {"r": 4, "target_modules": ["v_proj", "o_proj"], "init_lora_weights": "olora"}),
    "encoder": ("bert-pretraining", {"r": 4, "target_modules": ["query", "value", "intermediate.dense"]}),
}
PLACES = [
    Place(1, 1, 1, 1),
    Place(2, 1, 1, 1),
    Place(2, 1, 1, 1, True),
    Place(2, 2, 1, 1, True),
    Place(1, 1, 2, 2),
    Place(2, 1, 2, 3, True),
]
MORE_PLACES = (Place(2, 1, 2, 3), Place(1, 2, 1, 1), Place(1, 1, 2, 3), Place(2, 1, 1, 3))
# More ranks than key heads, which several of them hold.
FOUR_TENSOR_RANKS = (Place(4, 1, 1, 1, True), Place(4, 1, 1, 1), Place(4, 1, 1, 3))
EVERYTHING = [
    *((name, place) for name in CONFIGS for place in [*PLACES, *MORE_PLACES]),
    *(
        (name, Place(2, 1, 1, 2, True))
        for name in ("untied", "kept-tied", "dora-fused", "dora-fused-gate", "pissa-fused")
    ),
    *((name, place) for name in ("all", "scalings-shared-biased", "dora") for place in FOUR_TENSOR_RANKS),
    *(("dora", place) for place in (Place(1, 1, 2, 3, recompute="full"), Place(2, 1, 2, 3, recompute="full"))),
    ("some-layers", Place(2, 1, 1, 2, True, recompute="full")),
    ("llama", Place(1, 2, 2, 1, recompute="full")),
]


def kind(name: str) -> str:
    config = CONFIGS[name][1]
    if config.get("peft_type") == "IA3":
        return "scalings"
    return "DoRA" if config.get("use_dora") else "tables" if "modules_to_save" in config else "LoRA"


def facts(run: tuple[str, Place]) -> set[Any]:
    """The adapter on tensor ranks, the options of the layout, and each of them with each kind of adapter."""
    (name, place), mine = run, kind(run[0])
    return {
        *((name, "tensor") for _ in range(place.tp > 1)),
        *((mine, "tensor", place.tp > 1, place.sp), (mine, "pipeline", place.pp > 1), (mine, "zero", place.zero == 3)),
        *((mine, "heads of several ranks") for _ in range(place.tp == 4)),
        *((name, "several stages") for _ in range(place.pp > 1 and name in ("untied", "kept-tied", "some-layers"))),
        *(("zero", place.zero, "tensor", place.tp > 1 and place.zero == 3), ("data", place.dp > 1)),
        ("recompute", place.recompute, place.pp > 1, place.zero == 3),
    }


COVERING = covering(EVERYTHING, facts, cost_of)
SWEPT = [
    *EVERYTHING,
    ("scalings-shared-biased", Place(2, 2, 1, 1)),
    ("scalings-fused", Place(2, 1, 2, 2, True)),
    ("olora", Place(2, 1, 1, 2, True)),
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Name -> (directory with base and adapter, what peft's training gave)."""
    known: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in known:
            case, config = CONFIGS[name]
            directory = tmp_path_factory.mktemp(name)
            known[name] = directory, run_alone(train_peft, case, config, RECIPE, directory)
        return known[name]

    return get


@pytest.mark.parametrize(("name", "place"), COVERING, ids=str)
def test_five_steps_equal_peft(name: str, place: Place, made: Any) -> None:
    directory, reference = made(name)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


def test_the_sample_covers_adapters_and_layouts() -> None:
    assert not uncovered(COVERING, EVERYTHING, facts)
    assert {name for name, _ in COVERING} == set(CONFIGS)
    assert {place.zero for _, place in COVERING} >= {1, 2, 3}


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "place"), [run for run in SWEPT if run not in COVERING], ids=str)
def test_every_layout_equals_peft(name: str, place: Place, made: Any) -> None:
    directory, reference = made(name)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


TILED = (("mlp_tile_tokens", 40), ("offload_activations", True))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("all", Place(2, 1, 2, 3, recompute="full", settings=TILED)),
        ("all", Place(1, 1, 2, 1, settings=TILED[:1])),
        ("dora", Place(2, 1, 1, 2, True, recompute="full", settings=TILED)),
        ("scalings", Place(2, 1, 2, 3, True, recompute="full", settings=TILED)),
        ("some-layers", Place(cp=2, zero=3, recompute="full", settings=TILED)),
    ],
    ids=str,
)
def test_tiles_and_inputs_in_host_memory_equal_peft(name: str, place: Place, made: Any) -> None:
    directory, reference = made(name)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


def _partial_a() -> None:
    """A is left with each rank's part of its gradient."""
    adapter.copy_to = lambda x, axis: x


def _partial_under_sequence() -> None:
    """What sequence parallelism leaves partial stays so."""
    TensorParallel.between = lambda self, parameter: parameter  # type: ignore[method-assign]


def _unscaled() -> None:
    """alpha / r is left out."""
    low = adapter.LoRASpec.__init__

    def without(self: Any, *args: Any, **options: Any) -> None:
        low(self, *args, **{**options, "scale": 1.0})

    adapter.LoRASpec.__init__ = without  # type: ignore[method-assign]


def _shards_alone() -> None:
    """Key heads that several ranks hold learn from each rank's own queries alone."""
    TensorParallel.shared = lambda self, parameter, num_shards: parameter  # type: ignore[method-assign]


def _norms_of_shards() -> None:
    """Each rank takes the norm of its own part of a row."""
    whole = dora.row_norms
    dora.row_norms = lambda *args: whole(*args[:4])


def _in_the_trap(grid: Any, trap: Callable[[], None], directory: Path, place: Place) -> dict[str, Any]:
    trap()
    return train_on(grid, directory, place, RECIPE)


@pytest.mark.parametrize(
    ("trap", "name", "place"),
    [
        (_partial_a, "llama", Place(2, 1, 1, 1)),
        (_partial_under_sequence, "llama", Place(2, 1, 1, 1, True)),
        (_unscaled, "llama", Place(1, 1, 1, 1)),
        (_shards_alone, "all", Place(4, 1, 1, 1)),
        (_shards_alone, "scalings-shared-biased", Place(4, 1, 1, 1)),
        (_norms_of_shards, "dora", Place(2, 1, 1, 1)),
        (_partial_under_sequence, "scalings-shared-biased", Place(4, 1, 1, 1, True)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_trap_turns_it_red(trap: Callable[[], None], name: str, place: Place, made: Any) -> None:
    directory, reference = made(name)
    caught = relative_errors(run_grid(_in_the_trap, place.layout, trap, directory, place)[0], reference)
    assert not within_fp32(caught), caught
