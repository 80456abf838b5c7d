"""`~` and variables in the paths of commands and of the Python API; those of the run file are in tests/config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.checkpoint.inspect import inspect
from megatron_ds.cli.main import _run
from megatron_ds.errors import ConfigError, MegatronDSError
from megatron_ds.paths import expand_path, expanded


def test_what_a_shell_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("A_1", "b")
    for path, expected in (
        ("~", "/h"),
        ("~/x/", "/h/x/"),
        ("$HOME/$A_1.txt", "/h/b.txt"),
        ("${A_1}c/${HOME}", "bc//h"),
        ("x~", "x~"),
        ("./~", "./~"),
        ("a$", "a$"),
        ("$/b", "$/b"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("data/*.jsonl", "data/*.jsonl"),
    ):
        assert expand_path(path) == expected
    assert expanded(Path("~/x")) == Path("/h/x")
    monkeypatch.setenv("EMPTY", "")
    for path, name in (("$EMPTY/run", "EMPTY"), ("${NOT_SET}", "NOT_SET"), ("a/$NOT_SET_1/b", "NOT_SET_1")):
        with pytest.raises(ConfigError) as refused:
            expanded(path)
        assert str(refused.value) == (
            f"{path} uses the environment variable {name}, which is not set; set it, or write the path out"
        )


@pytest.mark.parametrize("part", ["${OUT:-out}", "$(pwd)", "${oc.env:HOME}", "${{ run }}", "${OUT/a/b}"])
def test_what_only_a_shell_replaces_is_no_name_of_a_folder(part: str) -> None:
    with pytest.raises(ConfigError) as refused:
        expanded(f"{part}/run")
    assert f" has {part}, which only a shell replaces; $NAME and ${{NAME}} are replaced here" in str(refused.value)


COMMANDS = (
    ("train", "{}/run.yaml"),
    ("inspect", "{}/x"),
    ("inspect", "{}/x.jsonl"),
    ("export", "{}/x", "out"),
    ("import", "{}/x", "out"),
    ("verify", "{}/x"),
    ("prepare", "in.txt", "--tokenizer", "{}/x", "--output", "out"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(one) for one in COMMANDS])
def test_commands(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("in.txt").write_text("a\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in ("~", "$HOME"):
        assert _run([word.format(place) for word in command]) == 2
        assert f"{tmp_path}/home/" in capsys.readouterr().err
    assert _run([word.format("${NOT_SET}") for word in command]) == 2
    assert "uses the environment variable NOT_SET, which is not set" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["in.txt"]


@pytest.mark.parametrize(
    "call",
    [
        mds.load_run,
        mds.load_model,
        inspect,
        lambda path: mds.import_hf(path, "out"),
        lambda path: mds.export_hf(path, "out"),
        lambda path: mds.export_hf("out", "hf", base=path),
    ],
)
def test_python(call: Callable[[str], Any]) -> None:
    with pytest.raises(MegatronDSError, match="uses the environment variable NOT_SET, which is not set"):
        call("$NOT_SET/x")
