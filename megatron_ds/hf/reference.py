"""transformers' own model of a directory: what everything of ours is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel, read_json
from megatron_ds.hf.peft.config import ADAPTER_CONFIG


def load_reference(directory: str | Path, model: HFModel, dtype: Any = "auto") -> Any:
    """transformers' model on CPU, in evaluation mode. Runs no code from the directory.

    Args:
        directory: config.json and weights; or adapters, whose base is loaded too.
        model: what they are: class and implementation of attention go by it.
        dtype: of the weights; "auto" = as they are.

    Raises:
        ConversionError: transformers cannot load it, or finds tensors missing or misshapen.
    """
    if (Path(directory) / ADAPTER_CONFIG).is_file():
        return _with_adapters(Path(directory), model, dtype)
    try:
        with _without_progress_bars():
            loaded: Any = getattr(import_module(model.family.module), model.architecture).from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation=model.family.reference_attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **model.family.load_options(model.core),
            )
    except Exception as problem:  # of many types, transformers' own and its libraries'
        reason = " ".join(str(problem).split())[:300]
        raise ConversionError(f"{directory}: transformers cannot load it: {reason}") from problem
    theirs, found = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        wrong = sorted(map(str, found[kind]))
        if wrong:
            raise ConversionError(f"{directory}: transformers has {kind.replace('_', ' ')}: {', '.join(wrong[:3])}")
    return theirs.eval()


def _with_adapters(directory: Path, model: HFModel, dtype: Any) -> Any:
    """peft's model on transformers' own of the base that the adapters name."""
    from peft import PeftModel

    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    theirs = load_reference(str(base), model, dtype)
    try:
        return PeftModel.from_pretrained(theirs, str(directory), autocast_adapter_dtype=False).eval()
    except Exception as problem:  # of many types, as above
        reason = " ".join(str(problem).split())[:300]
        raise ConversionError(f"{directory}: peft cannot load it: {reason}") from problem


# What transformers calls what its models predict -> our name.
_OUTPUTS = {
    "logits": "logits",
    "prediction_logits": "logits",
    "seq_relationship_logits": "next_sentence",
    "last_hidden_state": "hidden",
    "pooler_output": "pooled",
}


def predict(theirs: Any, model: HFModel, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' model predicts for a batch's columns, by our names, fp32 (B, ...).

    Documents that share a sequence, as `position_ids` say, are given to it one by one.
    """
    if "position_ids" in columns:
        return _predict_each_document(theirs, model, columns)
    given = {name: column.long() for name, column in columns.items()}
    cache = {"use_cache": False} if model.core.generates else {}
    found = theirs(**given, **cache)
    return {ours: found[name].float() for name, ours in _OUTPUTS.items() if found.get(name) is not None}


def _predict_each_document(theirs: Any, model: HFModel, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each at the head of a sequence as long as the shared one, by which some rotary frequencies go."""
    others = {name: column for name, column in columns.items() if name != "position_ids"}
    rows = []
    for row, positions in enumerate(columns["position_ids"]):
        length = len(positions)
        parts = []
        for start, stop in pairwise([*(positions == 0).nonzero().flatten().tolist(), length]):
            alone = {
                name: F.pad(one[row : row + 1, start:stop].long(), (0, length - stop + start))
                for name, one in others.items()
            }
            found = predict(theirs, model, alone)
            parts.append({name: output[:, : stop - start] for name, output in found.items()})
        rows.append({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers' "Loading weights" bar off our terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
