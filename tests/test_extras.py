"""The optional packages: setup.py's extras, the versions that are tested, and the messages that name them."""

import re
from itertools import chain
from pathlib import Path
from runpy import run_path
from typing import Any
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    """The arguments of setup.py's call of `setup`."""
    with patch("setuptools.setup") as setup:
        run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def pinned(file: str) -> dict[str, str]:
    """Return the versions that a requirements file pins, by package."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    pins = [Requirement(line) for line in lines if line]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def test_tested_versions_are_in_the_ranges_of_setup_py(arguments: dict[str, Any]) -> None:
    pins = pinned("requirements.txt") | pinned("tests/extras.txt")
    ranges = [*arguments["install_requires"], *chain(*arguments["extras_require"].values())]
    for requirement in map(Requirement, ranges):
        name = canonicalize_name(requirement.name)
        if name not in UNTESTED:
            assert pins[name] in requirement.specifier, requirement


# What only a GPU can run, or its driver answers.
UNTESTED = {"bitsandbytes", "nvidia-ml-py"}


def test_all_has_every_extra_but_that_of_the_documentation(arguments: dict[str, Any]) -> None:
    extras = dict(arguments["extras_require"])
    everything, _ = extras.pop("all"), extras.pop("docs")
    assert everything == list(chain(*extras.values()))


def test_every_extra_that_is_named_exists(arguments: dict[str, Any]) -> None:
    files = [*ROOT.glob("megatron_ds/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    names = {name for group in re.findall(r"megatron-ds\[([\w,-]+)\]", text) for name in group.split(",")}
    assert names <= set(arguments["extras_require"]), names


def test_setup_installs_no_optional_package(arguments: dict[str, Any]) -> None:
    optional = {canonicalize_name(Requirement(line).name) for line in chain(*arguments["extras_require"].values())}
    assert not optional & set(pinned("requirements.txt"))
