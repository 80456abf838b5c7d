"""The command end to end: what it prints, its JSON, its exit status, and what it refuses."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import megatron_ds as mds
from megatron_ds.cli.main import _run
from megatron_ds.cli.verify import lines
from megatron_ds.errors import ConversionError, TopologyError
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.probe import BEYOND, MOST_TOKENS, RANDOM_LENGTH
from megatron_ds.verify.compare import difference
from tests.cli.conftest import Fork, Start, fork, start  # noqa: F401
from tests.parity.cases import CONFIGS

Directories = Callable[[dict[str, Any]], Path]
WINDOWED = {**CONFIGS["mistral"], "sliding_window": 70, "max_position_embeddings": 128}


@pytest.mark.parametrize(("tp", "pp", "sequence"), [(1, 1, False), (2, 2, True), (4, 1, False)])
def test_equal_at_every_layout(tp: int, pp: int, sequence: bool, directory_of: Directories) -> None:
    report = mds.verify_hf(directory_of(WINDOWED), tp, pp, sequence=sequence)
    assert report.ok, lines(report)
    names = [(one.name, one.batch) for one in report.inputs]
    assert names == [("random", 2), ("past the window", 1)]
    assert report.inputs[1].length >= 70 + BEYOND
    for one in report.inputs:
        assert list(one.hidden) == ["entry", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
        assert one.first_difference is None
    assert report.inputs[0].gradients.keys() == report.round_trip.sha256.keys()


@pytest.mark.parametrize(
    ("cp", "method", "tp", "world"), [(2, "gather", 1, "2 = tp 1 x cp 2"), (2, "auto", 2, "4 = tp 2")]
)
def test_equal_on_context_ranks(cp: int, method: Any, tp: int, world: str, directory_of: Directories) -> None:
    notes: list[str] = []
    report = mds.verify_hf(directory_of(WINDOWED), tp, cp=cp, cp_method=method, sequence=tp > 1, note=notes.append)
    shown = lines(report)
    assert report.ok and len(report.inputs) == 2, shown
    assert list(report.inputs[0].hidden) == ["entry", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert all(one.first_difference is None for one in report.inputs), "hidden states are gathered in order"
    assert shown[1].startswith(f"world       {world}") and any("context 2 = " in note for note in notes)


def test_the_hash_is_that_of_the_bytes(directory_of: Directories) -> None:
    directory = directory_of(CONFIGS["qwen3"])
    report = mds.verify_hf(directory)
    with safe_open(directory / "model.safetensors", framework="np") as weights:
        whole = weights.get_tensor("model.embed_tokens.weight")
    expected = hashlib.sha256(f"F32 {whole.shape}".encode() + whole.tobytes()).hexdigest()
    assert report.round_trip.sha256["model.embed_tokens.weight"] == expected


def test_the_command(directory_of: Directories, start: Start, tmp_path: Path) -> None:  # noqa: F811
    directory = directory_of(CONFIGS["llama"])
    process = start("-m", "megatron_ds", "verify", directory, "--tp", "2", "--json", "report.json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), (out, err)
    assert out.splitlines()[0] == "transformers: outputs, loss and gradients", "DeepSpeed does not speak first"
    assert out.splitlines()[-1] == f"verdict     equal to transformers: {directory}"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and report["tp"] == 2 and report["bounds"]["logits"] == 1e-5
    assert 0 < report["inputs"][0]["gradients"]["lm_head.weight"]["relative"] < 1e-5


def test_exit_status_1_where_it_is_off(
    directory_of: Directories,
    fork: Fork,  # noqa: F811
    tmp_path: Path,
) -> None:
    """One element too large for a softmax to survive: both sides compute NaN, which equals nothing."""
    directory = tmp_path / "broken"
    shutil.copytree(directory_of(CONFIGS["llama"]), directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    process = fork("-m", "megatron_ds", "verify", directory)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "differs     first in blocks.2" in out and out.splitlines()[-1].startswith("verdict     NOT equal")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cp", "0"], "error: --cp=0 is less than one rank; nearest: 1"),
        (["--cp-method", "ring"], "error: --cp-method=ring does nothing with --cp=1; try --cp=2"),
        (
            ["--cp", "2", "--cp-method", "rings"],
            "error: --cp-method=rings is not one of auto, ulysses, gather, ring; did you mean ring?",
        ),
        (
            ["--tp", "2", "--cp", "3", "--cp-method", "ulysses"],
            "error: --cp=3 with --cp-method=ulysses does not divide the 4 query heads of a tensor rank "
            "(num_attention_heads=8 / --tp=2); nearest: 2 or 4, or try --cp-method=auto",
        ),
        (["--tp", "3"], "error: --tp=3 does not divide num_attention_heads=8; nearest: 2 or 4"),
        (["--pp", "5"], "error: --pp=5 is more than num_layers=4, and each stage needs a layer; nearest: 4"),
        (["--tp", "0"], "error: --tp=0 is less than one rank; nearest: 1"),
        (["--json", "no/such/report.json"], "error: --json=no/such/report.json is not a file in a directory"),
    ],
)
def test_refused_in_one_line(arguments: list[str], message: str, directory_of: Directories, fork: Fork) -> None:  # noqa: F811
    process = fork("-m", "megatron_ds", "verify", directory_of(CONFIGS["llama"]), *arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.startswith(message) and err.count("\n") == 1


def test_a_report_over_a_file_of_the_model_is_refused(
    directory_of: Directories,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = Path(shutil.copytree(directory_of(CONFIGS["llama"]), tmp_path / "model"))
    (tmp_path / "link.json").symlink_to(directory / "config.json")
    before = (directory / "config.json").read_bytes()
    for report in (directory / "config.json", tmp_path / "link.json"):
        assert _run(["verify", str(directory), "--json", str(report)]) == 2
        assert f"--json={report} would replace a file of {directory}, which is read" in capsys.readouterr().err
    assert (directory / "config.json").read_bytes() == before


def test_a_launchers_rank_is_refused(directory_of: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TopologyError, match="starts its own ranks"):
        mds.verify_hf(directory_of(CONFIGS["llama"]))


def test_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no config\.json"):
        mds.verify_hf(tmp_path)


def decoder(config: dict[str, Any]) -> DecoderConfig:
    from megatron_ds.hf.config import read_model

    return read_model(config).core


def test_inputs_go_past_windows_and_stay_within_tables() -> None:
    (only,), missed = decoder(CONFIGS["llama"]).probes(1)
    assert (only.input_ids.shape, missed) == ((2, RANDOM_LENGTH), None)
    (only,), missed = decoder(CONFIGS["mistral"]).probes(1)  # 64 tokens are past a window of 7
    assert missed is None
    short = decoder({**CONFIGS["gpt2"], "n_positions": 33})
    assert short.probes(1)[0][0].input_ids.shape == (2, 33)
    assert short.probes(4)[0][0].input_ids.shape == (2, 32)
    long = decoder({**CONFIGS["mistral"], "sliding_window": 10 * MOST_TOKENS})
    inputs, missed = long.probes(1)
    assert len(inputs) == 1 and missed is not None and "81,920" in missed


def test_differences_are_not_hidden() -> None:
    import torch

    one = torch.ones(4)
    assert difference(one, one).within(0.0)
    assert not difference(one, one * float("nan")).within(1.0)
    assert not difference(one, torch.zeros(4)).within(1.0)
    assert not difference(one, torch.ones(5)).within(1.0)
    assert difference(one * 1.5, one).relative == pytest.approx(0.5)
