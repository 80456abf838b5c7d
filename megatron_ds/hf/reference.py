"""transformers' model of a directory, the reference for all comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds import hub
from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, named_base
from megatron_ds.hf.peft.new_head import new_head_tensors
from megatron_ds.hf.weight_files import open_directory


def load_reference(
    directory: str | Path, model: HFModel, dtype: Any = "auto", state: Mapping[str, Tensor] | None = None
) -> Any:
    """Load transformers' model on the CPU, in evaluation mode. No code from the directory is run.

    Args:
        directory: config.json and weights; or adapters, whose base model is loaded too.
        model: decides the class and the implementation of attention.
        dtype: of the weights; "auto" = that on disk.
        state: the weights by transformers' names, if those in the directory have others.

    Raises:
        ConversionError: transformers cannot load it, or finds tensors missing or misshapen.
    """
    if (Path(directory) / ADAPTER_CONFIG).is_file():
        return _with_adapters(Path(directory), model, dtype)
    return _load(directory, model, dtype, state)


def _load(
    directory: str | Path,
    model: HFModel,
    dtype: Any,
    state: Mapping[str, Tensor] | None = None,
    not_there: Sequence[str] = (),
) -> Any:
    """Load a model; `not_there`: names of tensors that the directory lacks, or has for another head."""
    if state is None:
        hub.fetch(open_directory(directory).files)
    by_config = model.reworded or state is not None or bool(not_there)
    try:
        with _without_progress_bars():
            loaded: Any = getattr(import_module(model.family.module), model.architecture).from_pretrained(
                directory if state is None else None,
                dtype=dtype,
                attn_implementation=model.family.reference_attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **({"config": deepcopy(model.config)} if by_config else {}),
                **({"ignore_mismatched_sizes": True} if not_there else {}),
                **({"state_dict": dict(state)} if state is not None else {}),
                **model.family.load_options(model.core),
            )
    except Exception as problem:  # transformers and its libraries raise many types
        reason = " ".join(str(problem).split())[:300]
        raise ConversionError(f"{directory}: transformers cannot load it: {reason}") from problem
    theirs, found = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        names = (one if isinstance(one, str) else str(one[0]) for one in found[kind])
        wrong = sorted(name for name in names if name not in not_there)
        if wrong:
            raise ConversionError(f"{directory}: transformers has {kind.replace('_', ' ')}: {', '.join(wrong[:3])}")
    return theirs.eval()


def _with_adapters(directory: Path, model: HFModel, dtype: Any) -> Any:
    """Load the base model that the adapters name, and peft's model on top of it."""
    from peft import PeftModel

    base = hub.local_directory(str(named_base(directory)), f"{directory}: its base")
    of_base = replace(model, reworded=model.reworded or model.rope is not None)
    theirs = _load(base, of_base, dtype, not_there=new_head_tensors(model))
    if theirs.config.vocab_size != model.core.vocab_size:
        theirs.resize_token_embeddings(model.core.vocab_size, mean_resizing=False)  # the adapters have the new tables
    try:
        return PeftModel.from_pretrained(theirs, str(directory), autocast_adapter_dtype=False).eval()
    except Exception as problem:  # many types, as above
        reason = " ".join(str(problem).split())[:300]
        raise ConversionError(f"{directory}: peft cannot load it: {reason}") from problem


# Name of an output in transformers -> our name.
_OUTPUTS = {
    "logits": "logits",
    "prediction_logits": "logits",
    "seq_relationship_logits": "next_sentence",
    "last_hidden_state": "hidden",
    "pooler_output": "pooled",
}


def predict(theirs: Any, model: HFModel, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run transformers' model on a batch's columns; returns its outputs by our names, in fp32 (B, ...).

    If `position_ids` mark documents that share a sequence, the model runs on each document by itself.
    """
    if "position_ids" in columns:
        return _predict_each_document(theirs, model, columns)
    given = {name: column.long() for name, column in columns.items()}
    cache = {"use_cache": False} if model.core.decodes else {}
    found = theirs(**given, **cache)
    return {ours: found[name].float() for name, ours in _OUTPUTS.items() if found.get(name) is not None}


def _predict_each_document(theirs: Any, model: HFModel, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run each document at the start of a sequence of the same length; some rotary frequencies depend on the length."""
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
    """Hide transformers' "Loading weights" progress bar."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
