"""The option `--json FILE`: check the file before a command computes what it will hold."""

from __future__ import annotations

from pathlib import Path

from megatron_ds.errors import ConfigError


def check_json_file(file: Path | None, read: Path | None = None) -> None:
    """Check that the file of `--json` can be written.

    Args:
        file: the file; None = the option was not given.
        read: a directory that the command reads, in which no file may be replaced.

    Raises:
        ConfigError: it is a directory or in none, or it would replace a file that is read.
    """
    if file is None:
        return
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"--json={file} is not a file in a directory that exists")
    if read is not None and file.exists() and read.resolve() in file.resolve().parents:
        raise ConfigError(f"--json={file} would replace a file of {read}, which is read; choose another file")
