"""Differences that rounding explains, and mistakes in a model in which rounding alone exceeds the bounds."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megatron_ds as mds
from megatron_ds.cli.verify import lines
from megatron_ds.hf.family import Family
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.tensor_mapping import Op
from megatron_ds.layers.linear import RowParallelLinear
from megatron_ds.verify import compare, report
from megatron_ds.verify.compare import Difference
from megatron_ds.verify.reference import change_weights
from tests.made_once import MakeOnce
from tests.verify.badly_conditioned import save_badly_conditioned
from tests.verify.test_mutations import BLOCK, with_option, with_row

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("relative", "rounding", "judgement"),
    [
        (1e-5, None, "ok"),  # within the bound of 1e-4
        (1e-5, NAN, "ok"),
        (2e-4, None, "off"),
        (2e-4, 1.1e-4, "ok"),
        (2e-4, 0.9e-4, "off"),
        (2e-4, NAN, "off"),
        (2e-4, INF, "ok"),
        (1e-3, 1e-2, "ok"),
        (1.1e-3, 1e-2, "unclear"),
        (1.1e-3, 5e-4, "off"),
        (NAN, INF, "off"),
        (INF, INF, "off"),
    ],
)
def test_the_rule(relative: float, rounding: float | None, judgement: str) -> None:
    assert Difference(1.0, relative, rounding).judge(1e-4) == judgement


def test_weights_change_by_the_smallest_step() -> None:
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.bias.zero_()
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    change_weights(layer, 0)
    steps = layer.weight.detach().view(torch.int32) - before["weight"].view(torch.int32)
    assert set(steps.flatten().tolist()) == {-1, 1} and abs(float(steps.double().mean())) < 0.1
    assert torch.equal(layer.bias, before["bias"]), "a zero may stand for a weight that is not there"


@pytest.fixture
def bad(once: MakeOnce) -> Path:
    return once(save_badly_conditioned, 0, {})[0]


@pytest.fixture
def low_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that rounding exceeds on every kind of CPU."""
    for name in ("GRADIENT_BOUND", "LOGITS_BOUND"):
        monkeypatch.setattr(report, name, 1e-7)
        monkeypatch.setattr(compare, name, 1e-7)


@pytest.mark.parametrize("tp", [1, 2])
def test_rounding_is_no_mistake(tp: int, bad: Path, low_bounds: None, tmp_path: Path) -> None:
    notes: list[str] = []
    found = mds.verify_hf(bad, tp, note=notes.append)
    shown = lines(found)
    (one,) = found.inputs
    assert found.verdict == "ok" and found.ok, shown
    assert one.exceeds and one.first_difference is None and one.wrong_outputs == []
    assert sum("times more" in note for note in notes) == 1
    for difference in (*one.gradients.values(), *one.outputs.values(), *one.hidden.values()):
        assert difference.rounding is not None
        assert difference.relative < 1e-3
    name, worst = one.worst_gradient or ("", one.loss)
    assert worst.relative > 1e-6
    line = next(number for number, text in enumerate(shown) if text.startswith("  gradients ok  "))
    assert name in shown[line]
    moved = f"{'':<12}transformers itself moves by {worst.rounding:.1e} if its weights are rounded differently"
    assert shown[line + 1] == moved
    assert shown[-1] == f"verdict     equal to transformers: {bad}"
    found.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert (content["ok"], content["verdict"], content["inputs"][0]["verdict"]) == (True, "ok", "ok")
    assert content["rounding"] == {"factor": 2.0, "most": 1e-3, "samples": 4}
    assert content["inputs"][0]["gradients"][name]["rounding"] == worst.rounding
    assert content["inputs"][0]["loss"]["rounding"] is not None


def test_rounding_as_large_as_mistakes_is_undecidable(
    bad: Path, low_bounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "MOST_ROUNDING", 1e-6)
    found = mds.verify_hf(bad)
    assert (found.verdict, found.ok) == ("unclear", False)
    shown = lines(found)
    assert shown[-1].startswith("verdict     undecidable in fp32, where rounding alone takes transformers as far")
    assert any(text.startswith("  gradients ??? ") for text in shown)
    assert found.inputs[0].wrong_gradients == []


def test_nothing_more_runs_within_the_bounds(bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADIENT_BOUND", "LOGITS_BOUND"):
        monkeypatch.setattr(report, name, 1e-2)
    notes: list[str] = []
    found = mds.verify_hf(bad, note=notes.append)
    assert found.ok and found.inputs[0].loss.rounding is None
    assert not any("times more" in note for note in notes)


# ---- mistakes, at the bounds that users have -------------------------------------------------------------------------


def another_epsilon(family: Family) -> Family:
    """1e-5 instead of 1e-6, next to squares around 1."""
    return replace(family, translate=lambda config: _with_epsilon(family, config))


def _with_epsilon(family: Family, config: Any) -> Any:
    core: Any = family.translate(config)
    assert core.norm.eps == 1e-6
    return replace(core, norm=replace(core.norm, eps=1e-5))


def two_heads_swapped(family: Family) -> Family:
    """The first and the second half of the heads of each group have one another's queries."""
    op = Op(("(g k d) h",), "(k g d) h")
    return with_row(family, f"{BLOCK}.attention.qkv.q_weight", lambda row: replace(row, op=op, split="k"))


def scores_scaled_a_little_more(family: Family) -> Family:
    return with_option(family, attention_scale=1.0001 * 4**-0.5)


def bias_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of attention's output, in all layers."""
    forward = RowParallelLinear.forward

    def without(self: RowParallelLinear, x: Tensor) -> Tensor:
        found = forward(self, x)
        return found - self.bias if self.bias is not None else found

    monkeypatch.setattr(RowParallelLinear, "forward", without)


def of_family(mutate: Callable[[Family], Family]) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(FAMILIES._entries, "llama", mutate(FAMILIES["llama"]))

    patch.__name__ = mutate.__name__
    return patch


MISTAKES = [
    of_family(another_epsilon),
    of_family(two_heads_swapped),
    of_family(scores_scaled_a_little_more),
    bias_left_out,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: getattr(one, "__name__", ""))
def test_a_mistake_is_seen_in_a_badly_conditioned_model(
    mistake: Callable[[pytest.MonkeyPatch], None], bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    found = mds.verify_hf(bad)
    assert found.verdict == "off", lines(found)
    assert lines(found)[-1] == f"verdict     NOT equal to transformers: {bad}"
