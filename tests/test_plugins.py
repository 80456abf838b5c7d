"""Modules from outside: found, imported before the run file is checked, and refused in one line where they fail."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds import plugins
from megatron_ds.config import build_run, load_run
from megatron_ds.errors import ConfigError
from megatron_ds.plugins import import_modules, load_entry_points
from tests.halves import swept


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write modules into the current directory, which is nobody else's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("outside"):
            del sys.modules[name]


RUN = "model: {config: {model_type: llama}, tokenizer: t}\ndata: {train: a.txt}\ntrain: {steps: 1}\noutput: o\n"


def test_a_module_in_the_current_directory_is_imported_once(module: Any, tmp_path: Path) -> None:
    module("outside_once", "print('imported')\nCOUNT = []\n")
    module("outside_package.things", "import outside_once\noutside_once.COUNT.append(1)\n")
    (tmp_path / "run.yaml").write_text(RUN)
    for _ in range(2):
        run = load_run(tmp_path / "run.yaml", ["imports=[outside_once, outside_package.things]"])
    assert run.imports == ["outside_once", "outside_package.things"]
    assert sys.modules["outside_once"].COUNT == [1]


def test_modules_are_imported_before_the_file_is_checked(module: Any, tmp_path: Path) -> None:
    module("outside_first", "")
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(ConfigError, match=r"^trian: unknown key"):
        load_run(tmp_path / "run.yaml", ["imports=[outside_first]", "trian={}"])
    assert "outside_first" in sys.modules
    with pytest.raises(ConfigError, match=r"^imports\[0\]=3 is not text"):
        load_run(tmp_path / "run.yaml", ["imports=[3]"])


def refusal(names: list[str], field: str = "imports[{}]") -> str:
    with pytest.raises(ConfigError) as caught:
        import_modules(names, field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_refused(module: Any) -> None:
    module("outside_there", "")
    fix = "start in its directory, add the directory to PYTHONPATH, or install its package"
    assert refusal(["outside_there", "outside_package"]) == (
        f"imports[1]=outside_package: there is no module outside_package; {fix}"
    )
    assert refusal(["outside_no.things.more"], "--import") == (
        f"--import=outside_no.things.more: there is no module outside_no; {fix}"
    )
    module("outside_package.__init__", "")
    assert refusal(["outside_package.things"]) == (
        f"imports[0]=outside_package.things: there is no module outside_package.things; {fix}"
    )


def test_what_fails_is_refused_with_its_place(module: Any, tmp_path: Path) -> None:
    module("outside_needs", "x = 1\nimport outside_missing_library\n")
    assert refusal(["outside_needs"]) == (
        "imports[0]=outside_needs raised ModuleNotFoundError: No module named 'outside_missing_library' "
        f"({tmp_path}/outside_needs.py, line 2); fix it, or remove it"
    )
    module("outside_broken", "x = (\n")
    assert refusal(["outside_broken"]).startswith("imports[0]=outside_broken raised SyntaxError: ")
    module(
        "outside_taken",
        "from megatron_ds.training.lr_schedule import SCHEDULES\nSCHEDULES.register('cosine', lambda point: 1.0)\n",
    )
    assert refusal(["outside_taken"]).startswith(
        "imports[0]=outside_taken raised ConfigError: schedule cosine is already registered, by "
        "megatron_ds.training.schedules.cosine; rename one ("
    )


def write_distribution(folder: Path, points: str) -> None:
    """A package as pip leaves it: its metadata."""
    info = folder / "outside_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{points}\n")


def test_entry_points_of_installed_packages_are_loaded(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_distribution(tmp_path, "things = outside_plugin.things")
    module("outside_plugin.things", "")
    monkeypatch.syspath_prepend(tmp_path)
    load_entry_points()
    assert "outside_plugin.things" in sys.modules


def test_a_package_that_is_installed_later_is_found(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    load_entry_points()
    module("outside_later", "")
    write_distribution(tmp_path, "later = outside_later")
    load_entry_points()
    assert "outside_later" in sys.modules


def test_a_broken_entry_point_names_its_package(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "things = outside_bad")
    module("outside_bad", "raise ValueError('needs\\na newer one')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        build_run({"data": {"train": "a"}})
    assert str(caught.value) == (
        "the plugin things=outside_bad of package outside-plugin raised ValueError: needs a newer one "
        f"({tmp_path}/outside_bad.py, line 1); update or uninstall outside-plugin"
    )


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["train", "run.yaml", "imports=[outside_bad]"], "imports[0]"),
        (["export", ".", "out", "--import", "outside_bad"], "--import"),
        *swept(
            (["inspect", "run.yaml", "imports=[outside_bad]"], "imports[0]"),
            (["verify", ".", "--import", "outside_bad"], "--import"),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_line_ends_with_one_line_and_status_2(
    arguments: list[str], field: str, module: Any, tmp_path: Path
) -> None:
    """The current directory is searched."""
    module("outside_bad", "raise ValueError('no')")
    (tmp_path / "run.yaml").write_text(RUN)
    line = f"outside_bad raised ValueError: no ({tmp_path}/outside_bad.py, line 1); fix it, or remove it\n"
    command = [str(Path(sys.executable).with_name("megatron-ds")), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {field}={line}")


def test_cores_are_divided_among_ranks_before_a_module_can_import_torch(module: Any, tmp_path: Path) -> None:
    module("outside_threads", "import os\nraise ValueError(os.environ['OMP_NUM_THREADS'] + ' threads')")
    (tmp_path / "run.yaml").write_text(RUN)
    program = str(Path(sys.executable).with_name("megatron-ds"))
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [program, "train", "run.yaml", "imports=[outside_threads]", "--nproc", "2"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    cores = len(os.sched_getaffinity(0))
    assert f"ValueError: {max(1, cores // 2)} threads" in done.stderr
