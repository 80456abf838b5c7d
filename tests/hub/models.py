"""Directories of tiny models as they lie on the hub: with a tokenizer, and weights in several files."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.hf.models import SMALL
from tests.parity.reference import make_model
from tests.training.tiny import write_tokenizer

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_model(folder: Path, **fields: object) -> Path:
    """A Llama of four layers with a tokenizer; the embedding and the first two layers are in `FIRST`."""
    make_model({**SMALL, "num_hidden_layers": 4, "vocab_size": 64, **fields}).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    of_first = ("embed_tokens", ".layers.0.", ".layers.1.")
    file_of = {name: FIRST if any(part in name for part in of_first) else SECOND for name in weights}
    for file in (FIRST, SECOND):
        save_file({name: one for name, one in weights.items() if file_of[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder)
    (folder / "README.md").write_text("A model card.\n")
    return folder
