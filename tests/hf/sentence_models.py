"""Small directories of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

from tests.parity.reference import make_model

MODELS = "sentence_transformers.models"


def save_sentence_model(config: dict[str, Any], pooling: dict[str, Any], normalize: bool, directory: Path) -> None:
    """Save a random model with a pooling of these fields, and perhaps a normalisation."""
    make_model(config).save_pretrained(directory)
    write_modules(directory, pooling, normalize)


def write_modules(directory: Path, pooling: dict[str, Any], normalize: bool = False) -> None:
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{MODELS}.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
