"""The directory that an export writes, and the rules of what it may replace.

A directory is replaced if it is empty, or bears the mark of an export and is unchanged since; any other one on demand.
Never replaced are the files that are read, checkpoints, outputs of runs, the current and the home directory, and any
directory that contains one of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import count, islice
from pathlib import Path

from megatron_ds.errors import ConversionError
from megatron_ds.hf.carried_files import MODULE_FOLDER
from megatron_ds.hf.export_mark import MARK, first_change, path_digest, write_mark
from megatron_ds.log import get_logger

TRAINING_STATE = "training_state"
"""Directory in a checkpoint that holds everything but the model."""

RUN_FILES = ("config.yaml", "metrics.jsonl")
"""Files that the output of every run holds."""

_MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "vocab.txt", "merges.txt"),
    "additional_chat_templates",
    MODULE_FOLDER,
)
_MOST_SEARCHED = 10_000  # entries, so that a check takes seconds at most


class ExportKeptError(ConversionError):
    """A finished export that could not get its name, and is kept under the one in the message."""


@dataclass(frozen=True)
class ExportTarget:
    """A directory that is written as a whole.

    Attributes:
        path: the directory, as the user wrote it.
        field_name: the option that holds it, for messages; "" = the path alone.
        overwrite: replace a directory that is not an unchanged export.
        option: the option that asks for that.
        kept: text for a message -> a place that is read, and that is never replaced.
    """

    path: Path
    field_name: str = ""
    overwrite: bool = False
    option: str = "--overwrite"
    kept: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, target: str | Path | ExportTarget) -> ExportTarget:
        """Return a target; a plain path may replace an unchanged export only."""
        return target if isinstance(target, ExportTarget) else cls(Path(target))

    @property
    def label(self) -> str:
        """The directory in messages."""
        return f"{self.field_name}={self.path}" if self.field_name else str(self.path)

    @property
    def place(self) -> Path:
        """The directory itself, without symbolic links."""
        return self.path.resolve()

    def check(self) -> None:
        """Check that the directory may be written; nothing is read but names, lengths and times.

        Raises:
            ConversionError: the directory would replace what must stay.
        """
        problem = self._problem(thorough=False)
        if problem is not None:
            raise ConversionError(problem)

    def begin(self) -> Path:
        """Make the directory next to the target in which the files are written; write them in `removed_on_failure`.

        Nothing is checked: what took hours to make is not lost because the target changed in the meantime.
        """
        staging = _hidden(self.place, "tmp")
        shutil.rmtree(staging, ignore_errors=True)  # of an export that was killed
        staging.mkdir(parents=True)
        return staging

    def put(self, new: Path) -> None:
        """Give a complete directory the target's name. A former export there is removed.

        Raises:
            ExportKeptError: the target must not be replaced any more, or cannot be.
        """
        if not (new / TRAINING_STATE).is_dir():  # a checkpoint is no export
            write_mark(new, self.place)
        problem = self._problem(thorough=True)
        if problem is None:
            try:
                self._replace(new)
                return
            except OSError as error:
                problem = f"{self.label} cannot be replaced ({error.strerror or error})"
        raise ExportKeptError(f"{problem}; the new files are in {_put_beside(self.place, new)}")

    def _problem(self, *, thorough: bool) -> str | None:
        """Return the reason why the directory must not be written, with its fix; None if it may be."""
        try:
            return self._find_problem(self.place, thorough)
        except OSError as error:
            return f"{self.label} cannot be read ({error.strerror or error}); choose another directory"

    def _find_problem(self, place: Path, thorough: bool) -> str | None:
        if place.exists() and not place.is_dir():
            return f"{self.label} is a file; choose another place for the directory"
        for text, kept in {**self.kept, **_always_kept()}.items():
            if covers(place, kept):
                return f"{self.label} would replace {text}; choose another directory"
        changed = None if _is_free(place) else first_change(place, place, thorough=thorough)
        if changed is None:
            return None
        never = self._never_replaced(place)
        if never is not None:
            return f"{self.label} would be replaced, and {never}; choose another directory"
        if self.overwrite:
            return None
        foreign = [] if (place / MARK).exists() else _foreign_files(place)
        reason = f"holds {foreign[0]}, which is no file of a model" if foreign else changed
        return f"{self.label} would be replaced, and {reason}; choose another directory, or try {self.option}"

    def _never_replaced(self, place: Path) -> str | None:
        """Return the reason why a directory is not even replaced on demand; None if it may be."""
        for parent in place.parents:
            if parent.name == TRAINING_STATE or (parent / TRAINING_STATE).is_dir():
                return f"is part of the checkpoint {parent}, which is never replaced"
        for text, kept in self.kept.items():
            if any(_same(parent, kept) for parent in place.parents):
                return f"is part of {text}"
        kept_ids = {_id(one) for kept in self.kept.values() for one in _places_of(kept) if one.exists()}
        return _first_kept(place, kept_ids, None if self.overwrite else _MOST_SEARCHED)

    def _replace(self, new: Path) -> None:
        place = self.place
        old = _hidden(place, "old")
        shutil.rmtree(old, ignore_errors=True)  # of an export that was killed between its two renames
        if _is_free(place):
            os.replace(new, place)
            return
        os.replace(place, old)
        try:
            if not self.overwrite and first_change(old, place, thorough=False) is not None:
                raise OSError("it was changed at this moment")
            os.replace(new, place)
        except BaseException:
            os.replace(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            get_logger().warning("%s, which %s replaced, could not be removed", old, self.label)


@contextmanager
def removed_on_failure(staging: Path) -> Iterator[None]:
    """Remove an unfinished directory if the block fails."""
    try:
        yield
    except ExportKeptError:
        raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def covers(directory: Path, place: Path) -> bool:
    """Test whether a directory is a place or contains it, or files that it links to.

    The same directory under another name counts too: by a symbolic link, another mount or another case of letters.
    """
    ours = directory.resolve()
    above = {one for found in _places_of(place) for one in (found, *found.parents)}
    return ours in above or any(_same(ours, one) for one in above)


def _places_of(place: Path) -> set[Path]:
    """Return a path as it is written, without symbolic links, and the directories of the files that it links to."""
    found = {Path(os.path.abspath(place)), place.resolve()}
    with suppress(OSError):
        entries = islice(place.iterdir(), _MOST_SEARCHED)
        found |= {entry.resolve().parent for entry in entries if entry.is_symlink()}
    return found


def _always_kept() -> dict[str, Path]:
    found = {"the root directory": Path("/")}
    home = os.path.expanduser("~")
    if home != "~":  # there is one
        found["the home directory"] = Path(home)
    with suppress(OSError):  # it was removed
        found["the current directory"] = Path.cwd()
    return found


def _is_free(place: Path) -> bool:
    """Test whether there is nothing, or an empty directory."""
    return not place.exists() or not any(place.iterdir())


def _foreign_files(directory: Path) -> list[str]:
    """Return names in a directory that no Hugging Face model has."""
    names = sorted(entry.name for entry in directory.iterdir())
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in _MODEL_FILES)]


def _first_kept(place: Path, kept_ids: Collection[tuple[int, int]], most: int | None) -> str | None:
    """Find a checkpoint, the output of a run or a place to keep in a directory; return it as a text, or None.

    Args:
        place: the directory.
        kept_ids: identities of directories to keep, which another mount may bring here.
        most: number of directories that are searched; None = all.
    """
    for folder, directories, files in islice(os.walk(place), most):
        where = "" if Path(folder) == place else f"{Path(folder).relative_to(place)}/"
        if TRAINING_STATE in directories:
            return f"holds {where}{TRAINING_STATE} of a checkpoint, which is never replaced"
        if set(RUN_FILES) <= set(files):
            return f"holds {where}{RUN_FILES[1]} of a run, whose output is never replaced"
        if _id(Path(folder)) in kept_ids:
            return f"holds {where or folder}, which is read"
    return None


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _id(place: Path) -> tuple[int, int]:
    status = place.stat()
    return status.st_dev, status.st_ino


def _hidden(place: Path, kind: str) -> Path:
    """Return a name next to the target that nothing else has."""
    return place.with_name(f".{place.name[:200]}.{path_digest(place)}.{kind}")


def _put_beside(place: Path, new: Path) -> Path:
    """Give a directory the first free name after the target's; return the name that it has."""
    names = (place.with_name(f"{place.name}.{number}") for number in count(1))
    beside = next(name for name in names if not os.path.lexists(name))
    try:
        os.rename(new, beside)
    except OSError:
        return new
    return beside
