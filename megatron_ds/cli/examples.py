"""`megatron-ds examples`: list the examples that come with the package, and copy one."""

from __future__ import annotations

import difflib
import re
import shutil
from pathlib import Path
from typing import Annotated

import typer

from megatron_ds.errors import ConfigError
from megatron_ds.paths import expanded
from megatron_ds.shipped import shipped

HELP = """List the examples that come with megatron-ds, or copy one.

An example is copied into DIR/examples, with the other examples that it names. The commands in its README.md run in DIR.
Files that are there already are kept if they are equal to the example's, and no file is changed.

Examples:

\b
  megatron-ds examples
  megatron-ds examples pretrain_moby_dick
  megatron-ds examples finetune_lora try
"""

_NAMED = re.compile(r"(?:\bexamples|\.\.)/(\w+)/")


def examples(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Copy this example; without it, list all.")] = "",
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The directory to copy it to.")] = ".",
) -> None:
    """Run the command; see HELP."""
    source = shipped("examples")
    known = sorted(readme.parent.name for readme in source.glob("*/README.md"))
    if not name:
        width = max(map(len, known))
        for one in known:
            print(f"{one.ljust(width)}  {_title(source / one)}")
        return
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1, cutoff=0)
        raise ConfigError(f"NAME={name}: there is no such example; nearest: {nearest[0]}")
    target = expanded(directory)
    needed = _needed(source, name, known)
    _copy(source, target / "examples", needed)
    print(f"in {target / 'examples'}: {', '.join(needed)}; next: {target / 'examples' / name / 'README.md'}")


def _title(example: Path) -> str:
    return (example / "README.md").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _needed(source: Path, name: str, known: list[str]) -> list[str]:
    """Return the example and those whose files its files name, and so on, in order."""
    needed = [name]
    for one in needed:  # grows
        text = "\n".join(file.read_text(encoding="utf-8") for file in _files(source / one))
        needed += [other for other in sorted(set(_NAMED.findall(text)) & set(known)) if other not in needed]
    return needed


def _files(example: Path) -> list[Path]:
    return sorted(file for file in example.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _copy(source: Path, target: Path, names: list[str]) -> None:
    """Copy examples, after a look at every file that is there already.

    Raises:
        ConfigError: a file is there with other content, or the directory cannot be written.
    """
    pairs = [(file, target / file.relative_to(source)) for name in names for file in _files(source / name)]
    for file, place in pairs:
        if place.exists() and (not place.is_file() or place.read_bytes() != file.read_bytes()):
            raise ConfigError(f"DIR={target.parent}: {place} is there and not the example's; try another DIR")
    try:
        for file, place in pairs:
            if place.exists():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    except OSError as problem:
        raise ConfigError(f"DIR={target.parent} cannot be written: {problem.strerror}; try another DIR") from None
