"""`make test` has every family, every size of an axis and every option that the parity tests of the sweep have."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_ds.hf.registry import FAMILIES
from tests.parity.cases import Recipe
from tests.parity.label_head_cases import BASE_CASES, LABEL_HEAD_CASES
from tests.parity.ours import Place
from tests.parity.reference import ALL_CONFIGS

CONFIGS = {**ALL_CONFIGS, **LABEL_HEAD_CASES, **BASE_CASES}
# Numbers of context ranks that are no powers of two, or more than a layout of `make test` has.
SWEPT_ONLY = {("cp", 3), ("cp", 6), ("cp", 8), ("ulysses", 3)}
# Options that tests of `make test` add to a place themselves: `test_compiled`, and `test_layouts` of recomputation.
ADDED = {
    ("compiled", True),
    ("activation_checkpointing", "partition_activations"),
    ("activation_checkpointing", "cpu_checkpointing"),
}


def modules() -> list[ModuleType]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    return [importlib.import_module(f"tests.parity.{name}") for name in names]


def parameters(module: ModuleType) -> Iterator[tuple[bool, Any]]:
    """(in `make test`, value) of every value of a test's parameters."""
    for name, function in vars(module).items():
        marks = getattr(function, "pytestmark", ()) if name.startswith("test_") else ()
        kinds = {mark.name for mark in marks}
        for mark in marks:
            names, sets = mark.args if mark.name == "parametrize" else ("", ())
            for one in sets:
                own = {other.name for other in getattr(one, "marks", ())}
                values = one.values if hasattr(one, "marks") else (one,) if isinstance(names, str) else one
                yield from (("sweep" not in kinds | own, value) for value in values)


def facts(value: Any) -> Iterator[Any]:
    """The family of a case, and the options of a place and of a recipe, each with its value."""
    if isinstance(value, str) and value in CONFIGS:
        yield "family", CONFIGS[value]["model_type"]
    if isinstance(value, Place):
        names = ("tp", "pp", "dp", "cp", "zero", "sp", "recompute", "compiled", "shared", "expert", "method", "ulysses")
        yield from ((name, getattr(value, name)) for name in names)
        yield from ((section, key) for section, options in value.extra for key in options)
    if isinstance(value, Recipe):
        yield from ((name, getattr(value, name)) for name in ("precision", "packed", "attention_mask", "optimizer"))


def test_the_sample_has_each_family_axis_and_option_of_the_sweep() -> None:
    found: dict[bool, set[Any]] = {False: set(), True: set()}
    for module in modules():
        for in_test, value in parameters(module):
            found[in_test].update(facts(value))
    assert {name for kind, name in found[True] if kind == "family"} == set(FAMILIES)
    assert not found[False] - found[True] - SWEPT_ONLY - ADDED
    assert {size for kind, size in found[True] if kind == "zero"} == {0, 1, 2, 3}
    assert {kind for kind, _ in found[True]} >= {"tp", "pp", "dp", "cp", "precision", "zero_optimization"}
