"""Vectors of texts, as sentence-transformers makes them: equal to its formula over transformers' base model, alone and
at a layout, and three mistakes that turn the verification red."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.cli.verify import lines
from megatron_ds.hf import weights
from megatron_ds.models import hidden_output
from megatron_ds.models.config import ModelConfig
from megatron_ds.verify import verify_hf
from tests.hf.sentence_models import save_sentence_model
from tests.made_once import MakeOnce
from tests.parity.label_head_cases import FIRSTS

QWEN3 = {**FIRSTS["qwen3"], "architectures": ["Qwen3Model"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "bert-cls": ({**FIRSTS["bert"], "architectures": ["BertModel"]}, {"pooling_mode_cls_token": True}, True),
    "bert-mean": ({**FIRSTS["bert"], "architectures": ["BertModel"]}, {"pooling_mode": "mean"}, False),
    "qwen3-last": ({**QWEN3, "tie_word_embeddings": False}, {"pooling_mode_lasttoken": True}, True),
    "qwen3-tied": ({**QWEN3, "tie_word_embeddings": True}, {"pooling_mode": ["mean"]}, True),
}


@pytest.fixture(scope="session")
def made(once: MakeOnce) -> Callable[[str], Path]:
    return lambda case: once(save_sentence_model, *CASES[case])[0]


def check(directory: Path, *place: Any) -> None:
    report = verify_hf(directory, *place[:2], sequence=place[2])
    assert report.ok, lines(report)
    assert report.inputs[0].name == "padded"
    assert all(list(one.outputs)[-1] == "embedding" for one in report.inputs)
    assert report.inputs[0].gradients.keys() == report.round_trip.sha256.keys()


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("bert-cls", (1, 1, False)),
        ("bert-mean", (2, 2, True)),
        ("qwen3-last", (2, 2, True)),
        ("qwen3-tied", (1, 1, False)),
        pytest.param("bert-mean", (1, 1, False), marks=pytest.mark.sweep),
        pytest.param("bert-cls", (2, 2, True), marks=pytest.mark.sweep),
        pytest.param("qwen3-last", (1, 1, False), marks=pytest.mark.sweep),
        pytest.param("qwen3-tied", (2, 2, True), marks=pytest.mark.sweep),
        pytest.param("qwen3-tied", (2, 1, False), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_vectors_equal_the_formula(case: str, place: tuple[int, int, bool], made: Callable[[str], Path]) -> None:
    check(made(case), *place)


def pick_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hidden_output._token_positions
    monkeypatch.setattr(hidden_output, "_token_positions", lambda *given: (right(*given) - 1).clamp(0))


def mean_over_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = hidden_output.mean_state
    monkeypatch.setattr(hidden_output, "mean_state", lambda hidden, mask, tp: right(hidden, None, tp))


def not_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    right = weights.pooled

    def pooled(core: ModelConfig, directory: Path) -> ModelConfig:
        found = right(core, directory)
        assert found.pooling is not None
        return replace(found, pooling=replace(found.pooling, normalize=False))

    monkeypatch.setattr(weights, "pooled", pooled)


@pytest.mark.parametrize(
    ("mutate", "case"),
    [(pick_off_by_one, "qwen3-last"), (mean_over_padding, "bert-mean"), (not_normalised, "bert-cls")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_mistake_turns_the_verification_red(
    mutate: Callable[[pytest.MonkeyPatch], None],
    case: str,
    made: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = made(case)
    mutate(monkeypatch)
    report = verify_hf(directory)
    assert not report.ok and report.inputs[0].wrong_outputs == ["embedding"]
    assert not report.inputs[0].loss.within(1e-5) and report.inputs[0].wrong_gradients
    assert all(one.first_difference is None for one in report.inputs), "what precedes the vector is right"
