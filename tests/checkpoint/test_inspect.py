"""What `inspect` tells of a checkpoint, a folder, a model; and what it says of damage."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.checkpoint.directory import LATEST, MANIFEST, PROGRESS, name_of
from megatron_ds.checkpoint.inspect import CheckpointFacts, FolderFacts, inspect
from megatron_ds.checkpoint.progress import Origin, Progress, decode, encode
from megatron_ds.cli.inspect import _progress
from megatron_ds.cli.main import _run
from megatron_ds.errors import CheckpointError
from tests.checkpoint.runs import CUT, saved_at
from tests.parity.cases import Recipe
from tests.parity.ours import Place


@pytest.fixture(scope="module")
def trained(references: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint that two ranks trained in bf16."""
    directory, _ = references("qwen2-tied", Recipe())
    folder = tmp_path_factory.mktemp("bf16")
    saved_at(directory, Place(2, 1, 1, 1), Recipe(precision="bf16"), folder)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "folder")) / name_of(CUT)


def test_inspect_tells_what_is_there(trained: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = inspect(trained)
    assert isinstance(folder, FolderFacts) and folder.latest == name_of(CUT) and len(folder.checkpoints) == 1
    (facts,) = folder.checkpoints
    assert facts.model is not None and facts.progress is not None and not facts.problems and facts.checked
    assert (facts.model.model_type, facts.model.dtypes) == ("qwen2", {"BF16": 50})
    assert facts.progress.step == CUT and facts.state == dict.fromkeys(facts.state, facts.model.num_params)
    assert (
        facts.bytes
        == sum(file.stat().st_size for file in (trained / name_of(CUT)).rglob("*") if file.is_file())
        - (trained / name_of(CUT) / "training_state/manifest.json").stat().st_size
    )
    plain = inspect(saved / "gpt2" / "float16")
    assert isinstance(plain, CheckpointFacts) and plain.progress is None and plain.model is not None
    assert plain.model.dtypes == {"F16": len(load_file(saved / "gpt2" / "float16" / "model.safetensors"))}
    assert _run(["inspect", "--json", str(trained)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["checkpoints"][0]["model"]["num_params"] == facts.model.num_params
    with pytest.raises(CheckpointError, match=r"nowhere does not exist .looked in .*; data are a run file, the PREFIX"):
        inspect(trained / "nowhere")
    (trained / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty is no checkpoint, folder of checkpoints, run output or Hugging"):
        inspect(trained / "empty")


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)


def _looked(path: Path, *, fast: bool = False) -> CheckpointFacts:
    facts = inspect(path, fast=fast)
    assert isinstance(facts, CheckpointFacts)
    return facts


def test_every_damaged_file_is_named_and_the_rest_is_told(copied: Path) -> None:
    state = sorted((copied / "training_state").glob("*.safetensors"))
    _flip(state[0], -1)
    state[1].unlink()
    facts = _looked(copied)
    assert facts.problems == (
        f"{state[0]} does not match its checksum",
        f"{state[1]} is missing",
    )
    assert facts.model is not None and facts.progress is not None and facts.progress.step == CUT
    assert not facts.state and not facts.state_files
    assert [problem.split()[0] for problem in _looked(copied, fast=True).problems] == [str(state[1])]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", PROGRESS, "training_state/state-00000-of-00002.safetensors"]
)
def test_damage_that_lengths_do_not_show(name: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A header that cannot be read is damage, not a mistake of the user: exit status 1, with what else is there."""
    _flip(copied / name, 20)
    assert len(_looked(copied).problems) == 1
    assert _run(["inspect", "--fast", str(copied)]) == 1
    told = capsys.readouterr()
    assert "DAMAGED" in told.out and ("step        2" in told.out) == (name != PROGRESS) and told.err == ""
    assert _run(["inspect", str(copied.parent)]) == 1
    assert f"{name_of(CUT)}  DAMAGED (1 file)" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": 3}', b"\xff"])
def test_a_damaged_manifest(content: bytes, copied: Path) -> None:
    (copied / MANIFEST).write_bytes(content)
    (problem,) = _looked(copied).problems
    assert problem.startswith(f"{copied / MANIFEST} is damaged")


def test_a_version_to_come_does_not_hide_the_others(copied: Path) -> None:
    newer = Path(shutil.copytree(copied, copied.with_name(name_of(9))))
    content = json.loads((newer / PROGRESS).read_text())
    (newer / PROGRESS).write_text(json.dumps({**content, "format_version": 99}))
    folder = inspect(copied.parent)
    assert isinstance(folder, FolderFacts)
    assert [bool(one.problems) for one in folder.checkpoints] == [True, False]


@pytest.mark.parametrize("latest", [None, b"step_00000099", b"\xff\xfe"])
def test_latest_that_leads_nowhere_is_said(
    latest: bytes | None, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied.parent / LATEST
    file.unlink() if latest is None else file.write_bytes(latest)
    assert _run(["inspect", str(copied.parent)]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("latest"))
    assert ("is missing" in said) == (latest is None) and "a run resumes from the newest intact checkpoint" in said


def test_an_export_may_have_the_name_of_a_step(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / name_of(200)
    assert _run(["export", str(saved / "llama" / "float32"), str(target)]) == 0
    assert f"exported {target}: llama (LlamaForCausalLM)" in capsys.readouterr().out
    facts = _looked(target)
    assert facts.model is not None and facts.progress is None and not facts.problems


def test_an_import_has_nothing_trained(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mds.import_hf(saved / "llama" / "float32", tmp_path / "ck")
    assert _run(["inspect", str(tmp_path / "ck")]) == 0
    told = capsys.readouterr().out
    assert "state       none: nothing was trained" in told and "layout" not in told
    assert f"by import of {saved / 'llama' / 'float32'}" in told


def test_a_table_on_a_terminal_and_lines_elsewhere(trained: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "megatron_ds", "inspect", str(trained)]
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60"}
    subprocess.run(command, stdout=theirs, check=True, timeout=120, env=environ)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert _run(["inspect", str(trained)]) == 0
    plain = capfdbinary.readouterr().out
    assert b"\x1b[1m" in shown and b"\x1b[" not in plain
    for word in (b"model", b"qwen2 (Qwen2ForCausalLM)", b"layout", b"1 = tp 1 x pp 1 x dp 1"):
        assert word in shown and word in plain


@pytest.mark.parametrize(
    ("expert", "layout"), [(None, "4 = tp 2 x pp 1 x dp 2, ZeRO-3"), (4, "4 = tp 2 x pp 1 x dp 2, ep 4, ZeRO-3")]
)
def test_a_checkpoint_names_the_expert_ranks_of_its_run(expert: int | None, layout: str, tmp_path: Path) -> None:
    """And only then: earlier versions, which do not know them, read the checkpoints of dense models."""
    written = Origin(world_size=4, tensor=2, data=2, zero_stage=3, expert=expert)
    (tmp_path / "progress.json").write_text(encode(Progress(trained=("head.weight",)), written))
    assert ("expert" in json.loads((tmp_path / "progress.json").read_text())["origin"]) == (expert is not None)
    progress, origin = decode(tmp_path / "progress.json")
    assert origin == written
    assert dict(_progress(progress, origin))["layout"].startswith(layout)
