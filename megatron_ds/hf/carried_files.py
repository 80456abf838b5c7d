"""Files of other programs in a model's directory, which exports and checkpoints carry unchanged.

Processors of images, audio and video, and what sentence-transformers keeps: the list of its modules, a folder for each
of them (pooling, dense layers with weights of their own), prompts, and the length of a text.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
MODULES = "modules.json"
SENTENCE_FILES = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
MODULE_FOLDER = "[0-9]*_*"
_FOLDER = re.compile(r"[0-9]+_\w+")


def carried_files(directory: Path) -> list[str]:
    """Return the paths of these files in a directory."""
    patterns = (*PROCESSOR_FILES, *SENTENCE_FILES)
    found = [file for pattern in patterns for file in sorted(directory.glob(pattern)) if file.is_file()]
    if (directory / MODULES).is_file():
        folders = sorted(one for one in directory.iterdir() if one.is_dir() and _FOLDER.fullmatch(one.name))
        found += [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file.relative_to(directory).as_posix() for file in found]


def copy_carried_files(source: Path, target: Path) -> None:
    """Copy these files to another directory, byte for byte."""
    for name in carried_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
