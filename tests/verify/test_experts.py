"""Mixtures of experts against transformers: at every sort of layout, and with tokens that choose other experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ds as mds
from megatron_ds.cli.verify import lines
from megatron_ds.errors import ConfigError, TopologyError
from megatron_ds.layers.moe.router import Router
from tests.parity.cases import CONFIGS
from tests.parity.reference import ALL_CONFIGS

Directories = Callable[[dict[str, Any]], Path]


@pytest.mark.parametrize(
    ("case", "layout", "world"),
    [
        ("qwen3_moe-dense-layer-bias", {"tp": 2, "ep": 4, "sequence": True}, "4 = tp 2 x pp 1 x dp 2, ep 4, sequence"),
        ("glm4_moe-all-not-renormalised", {"pp": 2, "ep": 2}, "4 = tp 1 x pp 2 x dp 2, ep 2"),
        ("granitemoe-multipliers-tied", {"tp": 2}, "2 = tp 2 x pp 1"),
    ],
)
def test_equal_at_layouts_of_experts(case: str, layout: dict[str, Any], world: str, directory_of: Directories) -> None:
    report = mds.verify_hf(directory_of(ALL_CONFIGS[case]), **layout)
    shown = lines(report)
    assert report.ok, shown
    assert shown[1].startswith(f"world       {world}")
    (one,) = report.inputs
    gradients = {name for name in report.round_trip.sha256 if not name.endswith("e_score_correction_bias")}
    assert gradients <= one.gradients.keys(), "of every expert"
    if not case.startswith("granitemoe"):
        assert one.other_experts and all(counts == (0, 128) for counts in one.other_experts.values())


def test_a_token_with_other_experts_is_named(directory_of: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = Router._choose

    def choose_another(router: Router, scores: torch.Tensor) -> torch.Tensor:
        chosen = choose(router, scores)
        least = scores.argmin(-1)
        chosen[5, 1] = least[5]
        return chosen

    monkeypatch.setattr(Router, "_choose", choose_another)
    report = mds.verify_hf(directory_of(ALL_CONFIGS["mixtral-four-experts"]))
    assert not report.ok and report.inputs[0].first_difference == "blocks.0"
    assert report.inputs[0].other_experts["blocks.0"] == (1, 128)
    shown = next(line for line in lines(report) if line.startswith("experts "))
    assert shown.startswith("experts     1 of 128 tokens chose others, first in blocks.0: more than rounding follows")
    assert shown.endswith("; in transformers itself up to 0 do after a rounding of its weights"), "no tie"


def test_layouts_that_experts_do_not_have(directory_of: Directories) -> None:
    with pytest.raises(ConfigError, match=r"^--ep=2 is for mixtures of experts, and this model has none; remove it$"):
        mds.verify_hf(directory_of(CONFIGS["llama"]), ep=2)
    directory = directory_of(ALL_CONFIGS["mixtral-four-experts"])
    for ep, message in (
        (3, r"^--ep=3 does not divide the model's 4 experts; nearest: --ep=2 or 4$"),
        (0, r"^--ep=0 is less than one rank; nearest: 1$"),
    ):
        with pytest.raises(TopologyError, match=message):
            mds.verify_hf(directory, ep=ep)
