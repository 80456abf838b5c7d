"""transformers' own model of a directory: what everything of ours is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ds.errors import ConversionError


def load_reference(directory: str | Path, attention: str, dtype: Any = "auto") -> Any:
    """transformers' causal model on CPU, in evaluation mode. Runs no code from the directory.

    Args:
        directory: config.json and weights.
        attention: which implementation of transformers'; see `Family.reference_attention`.
        dtype: of the weights; "auto" = as they are.

    Raises:
        ConversionError: transformers cannot load it, or finds tensors missing or misshapen.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _without_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as problem:  # of many types, transformers' own and its libraries'
        reason = " ".join(str(problem).split())[:300]
        raise ConversionError(f"{directory}: transformers cannot load it: {reason}") from problem
    model, found = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        wrong = sorted(map(str, found[kind]))
        if wrong:
            raise ConversionError(f"{directory}: transformers has {kind.replace('_', ' ')}: {', '.join(wrong[:3])}")
    return model.eval()


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
