"""Explanation of a path that is no Hugging Face directory, with the nearest one that is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path

from megatron_ds.errors import ConversionError
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.untrusted import read_json, read_text
from megatron_ds.untrusted.limits import MODEL_SETTINGS, SHORT_TEXT
from megatron_ds.untrusted.names import is_inside_name

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_ADDRESS = re.compile(r"(?:https?://huggingface\.co/|hf://)(?:models/)?([\w.-]+(?:/[\w.-]+)?)(?:/.*)?")

# Files and folders of other formats -> the format.
_FORMATS = {
    "*.gguf": "GGUF, for inference",
    "*.nemo": "NeMo's",
    "consolidated.*.pth": "Meta's",
    "consolidated*.safetensors": "Mistral's",
    "latest_checkpointed_iteration.txt": "Megatron's",
    "mp_rank_*": "Megatron's",
    "global_step*": "DeepSpeed's",
    "tf_model.h5": "TensorFlow's",
    "flax_model.msgpack": "Flax's",
    "*.onnx": "ONNX",
}


def why_missing(path: Path, key: str = "") -> str:
    """Return why a file of a Hugging Face directory is not there, and what to do.

    Args:
        path: the file, such as DIR/config.json.
        key: the key of the run file that names the directory; "" = a command's argument does.
    """
    place = path.parent

    def named(other: object) -> str:
        return f"{key}={other}" if key else str(other)

    if not place.exists():
        return f"{named(place)} {_absent(place, named)}"
    if place.is_file():
        return f"{named(place)} is a file, and a Hugging Face directory is needed{_of_file(place, named)}"
    if path.name != CONFIG:
        holds = "the directory is empty" if not any(place.iterdir()) else ""
        if path.name == ADAPTER_CONFIG:
            is_model = (place / CONFIG).is_file()
            holds = holds or ("it holds a full model" if is_model else "is it a directory that peft wrote?")
        return f"{named(place)}: no {path.name} here{'; ' if holds else ''}{holds}"
    return f"{named(place)}: no {CONFIG} here; {_of_directory(place, named)}"


def _absent(place: Path, named: Callable[[object], str]) -> str:
    if place.is_symlink():
        return f"is a link to {place.readlink()}, which does not exist"
    address = _HUB_ADDRESS.fullmatch(str(place).replace(":/", "://", 1))  # Path takes one of two slashes
    name = address[1] if address else str(place)
    if address or _may_be_on_the_hub(name):
        folder = Path(name).name
        return (
            "does not exist here, and nothing is downloaded by itself; if it is a model of the hub, try `hf download "
            f"{name} --local-dir {folder}` and {named(folder)}"
        )
    if re.match(r"[a-z][a-z0-9]+:/", str(place)):
        return "is not on this machine, and nothing is downloaded by itself; copy the directory here first"
    parent = next(folder for folder in place.absolute().parents if folder.is_dir())
    missing = place.absolute().relative_to(parent).parts[0]
    near = [one for one in _nested(parent) if one.name in difflib.get_close_matches(missing, [one.name], cutoff=0.6)]
    if near:
        return f"does not exist; nearest: {named(_as_given(near[0], place))}"
    return f"does not exist; there is no {missing} in {parent}"


def _may_be_on_the_hub(name: str) -> bool:
    """Test for organisation/model, or a model without an organisation, as the hub's first ones are named."""
    if "/" in name:
        return bool(_HUB_NAME.fullmatch(name)) and not Path(name).parent.exists()
    return bool(re.fullmatch(r"[\w.-]+", name)) and any(family in name.lower() for family in FAMILIES.names)


def _of_file(place: Path, named: Callable[[object], str]) -> str:
    if place.name == CONFIG:
        return f"; try {named(place.parent)}"
    if place.name == "latest":
        name = _short_text(place)
        if is_inside_name(name) and (place.parent / name / CONFIG).is_file():
            return f": it names the newest checkpoint of {place.parent}; try {named(place.parent / name)}"
        return f": it names the newest checkpoint of {place.parent}, which was {name!r} and is not there"
    kind = next((kind for pattern, kind in _FORMATS.items() if place.match(pattern)), None)
    if kind is not None:
        return f"; the file's format is {kind}; try the Hugging Face directory of the same model"
    if (place.parent / CONFIG).is_file():
        return f"; try {named(place.parent)}"
    return ""


def _of_directory(place: Path, named: Callable[[object], str]) -> str:
    base = _base_of_adapters(place)
    if base is not None:
        model = f"model.path={base}" if base else "the base model's directory as model.path"
        return f"it holds adapters; try {model} and peft={place}"
    nested = _nested(place)
    if nested:
        return f"nearest: {named(nested[-1])}"
    kind = next((kind for pattern, kind in _FORMATS.items() if any(place.glob(pattern))), None)
    if kind is not None:
        return f"its files' format is {kind}; try the Hugging Face directory of the same model"
    if not any(place.iterdir()):
        return "the directory is empty"
    return "is it a Hugging Face directory?"


def _base_of_adapters(place: Path) -> str | None:
    """Return the base model that a directory of adapters names, "" if it names none; None if it is no such one."""
    if not (place / ADAPTER_CONFIG).is_file():
        return None
    try:
        content = read_json(place / ADAPTER_CONFIG, MODEL_SETTINGS, ConversionError)
    except ConversionError:
        return ""
    return str(content.get("base_model_name_or_path") or "") if isinstance(content, dict) else ""


def _short_text(file: Path) -> str:
    """Return a text of one line for a message; empty if there is no such text."""
    try:
        return read_text(file, SHORT_TEXT, ConversionError).strip()
    except ConversionError:
        return ""


def _nested(place: Path) -> list[Path]:
    """Return the Hugging Face directories in a folder, in a run's checkpoints or in the hub's cache, sorted by name."""
    found = (
        config.parent for pattern in ("", "checkpoints/", "snapshots/") for config in place.glob(f"{pattern}*/{CONFIG}")
    )
    return sorted(found)


def _as_given(found: Path, place: Path) -> Path:
    """Return a path relative to the working directory if the one that the user gave is."""
    return found.relative_to(Path.cwd()) if not place.is_absolute() and found.is_relative_to(Path.cwd()) else found
