"""The vector of a text by the files of sentence-transformers, written out: nothing of our models and tables is used."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.untrusted import file_inside, read_json
from megatron_ds.untrusted.limits import MODEL_SETTINGS


def sentence_vectors(directory: Path, states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vectors that the modules after the first one of modules.json make of hidden states.

    Args:
        directory: with modules.json, of which a pooling and a normalisation are known.
        states: (B, S, H) of transformers' base model.
        mask: (B, S), nonzero where a token is; None = everywhere.

    Returns:
        (B, H).
    """
    modules = read_json(directory / "modules.json", MODEL_SETTINGS, ConversionError)
    tokens = torch.ones(states.shape[:2]) if mask is None else mask.ne(0).float()
    vectors = states
    for module in modules[1:]:
        if module["type"].endswith("Pooling"):
            place = file_inside(directory, f"{module['path']}/config.json", "modules.json", ConversionError)
            config = read_json(place, MODEL_SETTINGS, ConversionError)
            vectors = torch.stack([_pool(config, row, seen) for row, seen in zip(states, tokens)])
        else:
            vectors = vectors / vectors.square().sum(1, keepdim=True).sqrt()
    return vectors


def _pool(config: dict[str, object], row: Tensor, seen: Tensor) -> Tensor:
    """Return the vector of one text from its states (S, H) and its mask (S,): (H,)."""
    mode = config.get("pooling_mode")
    positions = seen.nonzero().flatten()
    if mode in ("cls", ["cls"]) or (mode is None and config.get("pooling_mode_cls_token")):
        return row[positions[0]]
    if mode in ("lasttoken", ["lasttoken"]) or (mode is None and config.get("pooling_mode_lasttoken")):
        return row[positions[-1]]
    return row[positions].sum(0) / len(positions)
