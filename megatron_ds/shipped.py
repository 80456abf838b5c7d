"""The files that come with the package: DeepSpeed JSONs and examples.

They lie at the root of a clone, and in `share/` of an installed package, where setup.py puts them.
"""

from pathlib import Path

SHARE = "share"
"""The folder inside an installed package; setup.py reads it."""
FOLDERS = ("ds_configs", "examples")
"""What an installed package holds besides its code; setup.py reads it."""
_PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """Return the directory of one of `FOLDERS`."""
    installed = _PACKAGE / SHARE / folder
    return installed if installed.is_dir() else _PACKAGE.parent / folder


def existing_or_shipped(path: str) -> Path:
    """Return the file of a path, or the shipped file where `ds_configs/NAME` does not exist."""
    file = Path(path)
    if not file.exists() and file.parts[:-1] == ("ds_configs",):
        return shipped("ds_configs") / file.name
    return file
