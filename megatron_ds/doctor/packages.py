"""Versions of Python and of the packages that this one requires or can use, by its own metadata."""

from __future__ import annotations

import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from megatron_ds.doctor.finding import Finding, note, problem
from megatron_ds.version import __version__

PACKAGE = "megatron-ds"
_EXTRA = "extra"
_ALL = ("all", "dev", "test")  # extras that repeat others


def find_packages() -> Iterator[Finding]:
    """Yield the versions of this package, of Python, and of all packages that are required or optional."""
    yield Finding(PACKAGE, __version__)
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        fix = "pip install -e . in its clone"
        yield note("requirements", f"unknown: {PACKAGE} is not installed, and runs from its source tree", fix)
        return
    requirements = [Requirement(text) for text in found.requires or ()]
    yield from compare_versions(requirements)
    yield from find_extras(requirements, found.metadata.get_all("Provides-Extra") or [])


def compare_versions(requirements: Sequence[Requirement]) -> Iterator[Finding]:
    """Yield the version of each package that is required without an extra.

    Args:
        requirements: of this package.
    """
    for one in requirements:
        if one.marker is not None and not one.marker.evaluate({_EXTRA: ""}):
            continue
        version = _version(one.name)
        if version is None:
            yield problem(one.name, "not installed", f"pip install {str(one)!r}")
        elif version not in one.specifier:
            yield problem(one.name, f"{version} is not {_in_words(one)}", f"pip install {str(one)!r}")
        else:
            yield Finding(one.name, str(version))


def find_extras(requirements: Sequence[Requirement], extras: Sequence[str]) -> Iterator[Finding]:
    """Yield the optional packages that are installed, and then the extras that install the others.

    Args:
        requirements: of this package.
        extras: their names.
    """
    installed, missing = dict[str, str](), defaultdict[str, list[str]](list)
    for one in requirements:
        extra = _extra_of(one, extras)
        if extra is None:
            continue
        version = _version(one.name)
        if version is None:
            missing[extra].append(one.name)
        elif version not in one.specifier:
            yield note(one.name, f"{version} is not {_in_words(one)}", f"pip install '{PACKAGE}[{extra}]'")
        else:
            installed[one.name] = str(version)
    if installed:
        yield Finding("optional", ", ".join(f"{name} {version}" for name, version in installed.items()))
    if missing:
        names = ", ".join(f"{', '.join(names)} (extra {extra})" for extra, names in missing.items())
        yield Finding("not installed", f"{names}; pip install '{PACKAGE}[EXTRA]' if you want them")


def _extra_of(requirement: Requirement, extras: Sequence[str]) -> str | None:
    """Return the extra that a requirement belongs to; None if it belongs to none, or to another system."""
    if requirement.marker is None or requirement.marker.evaluate({_EXTRA: ""}):
        return None
    return next((one for one in extras if one not in _ALL and requirement.marker.evaluate({_EXTRA: one})), None)


def _version(name: str) -> Version | None:
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def _in_words(requirement: Requirement) -> str:
    return f"in the range {requirement.specifier}" if len(requirement.specifier) > 1 else str(requirement.specifier)
