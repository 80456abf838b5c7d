"""Encoders and encoder-decoders through the whole verification: every output, both losses, both stacks, and what is
printed of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import megatron_ds as mds
from megatron_ds.cli.verify import lines
from megatron_ds.verify.report import InputReport
from tests.cli.conftest import Fork, fork, start  # noqa: F401
from tests.covering import covering
from tests.halves import swept
from tests.parity.encoder_cases import ENCODER_CASES

Directories = Callable[[dict[str, Any]], Path]
PLACES = [(1, 1, False), (2, 1, True), (2, 2, True), (1, 4, False), (4, 1, False)]
OUTPUTS = {
    "bert-masked": ["logits"],
    "bert-pretraining": ["logits", "next_sentence"],
    "bert-base": ["hidden", "pooled"],
    "roberta-two-types": ["logits"],
    "t5-tied-relu": ["logits"],
    "t5-uneven-few": ["logits"],
}
BLOCKS = [f"blocks.{layer}" for layer in range(4)]


def shape(one: InputReport) -> tuple[str, int, int, int | None]:
    return one.name, one.batch, one.length, one.decoder_length


EVERYTHING = [(case, place) for case in OUTPUTS for place in PLACES]
SAMPLE = covering(EVERYTHING, set, lambda run: run[1][0] * run[1][1] + 0.5)  # each case and each place


@pytest.mark.parametrize(
    ("case", "place"), [*SAMPLE, *swept(*(run for run in EVERYTHING if run not in SAMPLE))], ids=str
)
def test_equal_at_every_layout(case: str, place: tuple[int, int, bool], directory_of: Directories) -> None:
    tp, pp, sequence = place
    report = mds.verify_hf(directory_of(ENCODER_CASES[case]), tp, pp, sequence=sequence)
    assert report.ok, lines(report)
    for one in report.inputs:
        assert list(one.outputs) == OUTPUTS[case]
        assert one.first_difference is None
        if not case.startswith("t5"):
            assert list(one.hidden) == ["entry", *BLOCKS]
    assert report.inputs[0].gradients.keys() == report.round_trip.sha256.keys()


def test_both_stacks_are_looked_at_in_their_order(directory_of: Directories) -> None:
    report = mds.verify_hf(directory_of(ENCODER_CASES["t5-uneven-few"]), pp=4)
    stages = ["encoder.entry", *(f"encoder.{name}" for name in BLOCKS[:3])]
    stages += ["decoder.entry", *(f"decoder.{name}" for name in BLOCKS[:2])]
    assert [list(one.hidden) for one in report.inputs] == [stages]
    assert [shape(one) for one in report.inputs] == [("padded", 3, 64, 48)]


def test_what_is_run(directory_of: Directories) -> None:
    report = mds.verify_hf(directory_of(ENCODER_CASES["bert-masked"]))
    assert [shape(one) for one in report.inputs] == [("padded", 3, 64, None), ("bare", 2, 64, None)]
    report = mds.verify_hf(directory_of(ENCODER_CASES["t5-tied-relu"]))
    assert [shape(one) for one in report.inputs] == [
        ("padded", 3, 64, 48),
        ("past the last distance", 1, 162, 145),
    ]


def test_a_base_encoder_without_a_pooler(directory_of: Directories, tmp_path: Path) -> None:
    source = directory_of(ENCODER_CASES["bert-base"])
    weights = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    report = mds.verify_hf(tmp_path, 2, 2, sequence=True)
    assert report.ok, lines(report)
    assert [list(one.outputs) for one in report.inputs] == [["hidden"], ["hidden"]]
    assert report.inputs[0].gradients.keys() == kept.keys()


def test_the_command(directory_of: Directories, fork: Fork, tmp_path: Path) -> None:  # noqa: F811
    directory = directory_of(ENCODER_CASES["bert-pretraining"])
    process = fork("-m", "megatron_ds", "verify", directory, "--pp", "2", "--json", "report.json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), (out, err)
    shown = out.splitlines()
    assert shown[5].startswith("input       padded, 3 x 64 tokens")
    assert [line[:18] for line in shown[6:10]] == [
        "  logits        ok",
        "  next sentence ok",
        "  loss          ok",
        "  gradients     ok",
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    first = report["inputs"][0]
    assert first["outputs"].keys() == {"logits", "next_sentence"}
    assert first["logits"] == first["outputs"]["logits"], "the key of old"
    assert 0 < first["gradients"]["cls.seq_relationship.weight"]["relative"] < 1e-5
    assert report["bounds"] == {"logits": 1e-5, "outputs": 1e-5, "loss": 1e-5, "gradients": 1e-4}


def test_a_model_without_logits_has_no_such_key(directory_of: Directories) -> None:
    report = mds.verify_hf(directory_of(ENCODER_CASES["roberta-base"]))
    assert "logits" not in report.to_json()["inputs"][0]
    assert report.inputs[0].logits is None
    assert [line[:14] for line in lines(report)[3:5]] == ["  hidden    ok", "  pooled    ok"]


def test_a_broken_stack_is_named(directory_of: Directories, tmp_path: Path) -> None:
    """One element too large for a softmax to survive: both sides compute NaN, which equals nothing."""
    source = directory_of(ENCODER_CASES["t5-tied-relu"])
    weights = load_file(source / "model.safetensors")
    weights["decoder.block.1.layer.1.EncDecAttention.v.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    report = mds.verify_hf(tmp_path)
    assert not report.ok
    assert any(line.startswith("differs     first in decoder.blocks.1, relative") for line in lines(report))
