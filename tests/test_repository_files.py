"""The files around the code: workflows, the Dockerfile, hooks, the citation and the changelog agree with it.

Docker and the runners of GitHub are not here: these tests read the files, and a build of them has not been seen.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ds.version import __version__

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def read_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def workflow_steps() -> list[dict[str, Any]]:
    return [step for job in read_yaml(".github/workflows/ci.yml")["jobs"].values() for step in job["steps"]]


def test_actions_are_pinned_by_commit_with_the_version_beside() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    uses = re.findall(r"uses: (.*)", text)
    assert len(uses) == sum("uses" in step for step in workflow_steps()) > 4
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in uses), uses
    assert len({one for one in uses if "checkout" in one}) == 1, "one version of an action"


def test_workflow_runs_what_a_clone_does() -> None:
    commands = [shlex.split(step["run"]) for step in workflow_steps() if "run" in step]
    made = [words[1] for words in commands if words[0] == "make"]
    assert set(made) == {"check", "test", "docs"} <= TARGETS
    assert all(words[:2] == ["python", "-m"] for words in commands if words[0] != "make")


def test_workflow_tests_each_python_that_the_package_names() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == named


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_ask_for_something(name: str) -> None:
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])


def test_hooks_are_the_tools_of_make_check() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    installed = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    for hook in local["hooks"]:
        program, *arguments = shlex.split(hook["entry"])
        assert Path(program).name in installed | {"python"}, hook
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/")), hook


def test_citation_and_changelog_name_this_version() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0" and citation["authors"] and citation["message"] and citation["title"]
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert newest.rstrip(",") == __version__


def test_dockerfile_copies_what_is_there_and_names_stages_that_it_has() -> None:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert {line[0] for line in lines} <= INSTRUCTIONS
    stages = [line[3] for line in lines if line[0] == "FROM"]
    assert stages == ["wheel", "cpu", "cuda"], "the last one is built by default"
    arguments = {line[1].partition("=")[0] for line in lines if line[0] == "ARG"}
    assert {line[1].strip("${}") for line in lines if line[0] == "FROM"} == arguments
    assert set(re.findall(r"--mount=from=(\w+)", text)) == {"wheel"}
    assert all((ROOT / source).exists() for line in lines if line[0] == "COPY" for source in line[1:-1])
    (version,) = set(re.findall(r"ARG PYTHON_IMAGE=python:3\.(\d+)-", text))
    assert 11 <= int(version) <= 13
