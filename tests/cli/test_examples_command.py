"""`megatron-ds examples`: the list, a copy with what it needs, and what is there already."""

from pathlib import Path

import pytest

from megatron_ds.cli.main import _run
from megatron_ds.shipped import shipped
from tests.examples.test_examples import ROOT


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_lists_every_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["examples"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.parent.name for path in ROOT.glob("examples/*/README.md"))
    assert "pretrain_moby_dick    Pretraining from scratch" in lines


def test_copies_an_example_and_those_that_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["examples", "finetune_lora", "try"]) == 0
    assert capsys.readouterr().out == (
        "in try/examples: finetune_lora, finetune_chat, pretrain_blend, continue_pretraining, pretrain_moby_dick; "
        "next: try/examples/finetune_lora/README.md\n"
    )
    copied = [path for path in Path("try").rglob("*") if path.is_file()]
    assert {path.parts[2] for path in copied} == {
        "finetune_lora",
        "finetune_chat",
        "pretrain_blend",
        "continue_pretraining",
        "pretrain_moby_dick",
    }
    assert all(path.read_bytes() == (ROOT / path.relative_to("try")).read_bytes() for path in copied)


def test_keeps_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["examples", "parallel_3d"]) == 0
    assert _run(["examples", "parallel_3d"]) == 0
    mine = Path("examples/parallel_3d/run.yaml")
    mine.write_text("mine")
    Path("examples/parallel_3d/README.md").unlink()
    capsys.readouterr()
    assert _run(["examples", "parallel_3d"]) == 2
    assert capsys.readouterr().err == (
        "error: DIR=.: examples/parallel_3d/run.yaml is there and not the example's; try another DIR\n"
    )
    assert mine.read_text() == "mine"
    assert not Path("examples/parallel_3d/README.md").exists(), "nothing is copied before every file was looked at"


def test_an_unknown_example_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["examples", "classfy"]) == 2
    assert capsys.readouterr().err == "error: NAME=classfy: there is no such example; nearest: classify\n"
    assert list(Path().iterdir()) == []


def test_a_directory_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert _run(["examples", "multi_node", "file"]) == 2
    assert capsys.readouterr().err == "error: DIR=file cannot be written: Not a directory; try another DIR\n"


def test_shipped_files_are_those_of_the_clone() -> None:
    assert shipped("examples") == ROOT / "examples" and shipped("ds_configs") == ROOT / "ds_configs"
