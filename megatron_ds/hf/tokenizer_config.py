"""tokenizer_config.json for transformers 4 and 5: the same ids of every text, and the same special tokens.

Version 5 has one list `extra_special_tokens`, which version 4 calls `additional_special_tokens`; it has a mapping of
named tokens under the former name, and fails on a list. Version 5 takes what frames a text from tokenizer.json, where
some classes of version 4 take it from `add_bos_token` and `add_eos_token`, which version 5 does not write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LISTS = ("extra_special_tokens", "additional_special_tokens")
NAMES = frozenset({f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")})
GENERIC_CLASS = "PreTrainedTokenizerFast"
NEW_CLASSES = frozenset({"TokenizersBackend", "Qwen3_5Tokenizer"})
"""Classes that transformers 4 does not have, and whose tokenizer.json is complete."""

FRAMED_BY_CONFIG = {
    "LlamaTokenizer": (True, False),
    "GemmaTokenizer": (True, False),
    "CohereTokenizer": (True, False),
}
"""Class that in transformers 4 ignores the frame in tokenizer.json -> its defaults of add_bos_token, add_eos_token."""


def for_both_versions(config: Mapping[str, Any], backend: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's config with the fields that transformers 4 needs to give the ids of transformers 5.

    Args:
        config: content of tokenizer_config.json.
        backend: content of tokenizer.json; empty = there is no such file.
    """
    changed = merge_lists(config, backend)
    if backend and config.get("tokenizer_class") in NEW_CLASSES:
        changed["tokenizer_class"] = GENERIC_CLASS
    if "backend" in config:  # written by version 5
        named = {name: token for name, token in config.items() if _is_named(name) and isinstance(token, str)}
        if named:
            changed["extra_special_tokens"] = {**named, **changed.get("extra_special_tokens", {})}
    frame = _frame(backend) if backend else None
    defaults = FRAMED_BY_CONFIG.get(str(changed.get("tokenizer_class")).removesuffix("Fast"))
    if frame is not None and defaults is not None:
        for name, adds, default in zip(("add_bos_token", "add_eos_token"), frame, defaults):
            if changed.get(name, default) != adds:
                changed[name] = adds
    return changed


def merge_lists(config: Mapping[str, Any], backend: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping whose list of special tokens has the name that both versions read.

    Version 5 ignores the second list if there are both; of its tokens those stay that are in the vocabulary anyway.
    """
    changed = dict(config)
    extra, additional = (config.get(name) for name in LISTS)
    if "extra_special_tokens" not in config or isinstance(extra, Mapping):
        return changed
    del changed["extra_special_tokens"]
    known = {token["content"] for token in backend.get("added_tokens", ())}
    vocabulary = known | set(_vocabulary(backend))
    second = [one for one in additional or () if not extra or not backend or _text(one) in vocabulary]
    tokens = {_text(one): _text(one) if _text(one) in known else one for one in (*(extra or ()), *second)}
    if tokens:
        changed["additional_special_tokens"] = list(tokens.values())
    return changed


def _is_named(name: str) -> bool:
    """Test whether a field holds a special token of one model, such as `image_token`."""
    return name.endswith("_token") and name not in NAMES


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _vocabulary(backend: Mapping[str, Any]) -> list[str]:
    vocabulary = (backend.get("model") or {}).get("vocab") or ()
    return [entry if isinstance(entry, str) else str(entry[0]) for entry in vocabulary]


def _frame(backend: Mapping[str, Any]) -> tuple[bool, bool] | None:
    """Return whether tokenizer.json puts a token before and after a text; None if it does something else."""
    steps = backend.get("post_processor") or {"type": "ByteLevel"}
    for step in steps.get("processors", ()) if steps["type"] == "Sequence" else (steps,):
        if step["type"] == "TemplateProcessing":
            kinds = ["SpecialToken" if "SpecialToken" in part else "text" for part in step["single"]]
            at = kinds.index("text") if kinds.count("text") == 1 else -1
            return (at == 1, len(kinds) - at == 2) if at in (0, 1) and len(kinds) - at in (1, 2) else None
        if step["type"] != "ByteLevel":
            return None
    return False, False
