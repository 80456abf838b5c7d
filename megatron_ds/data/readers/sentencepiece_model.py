"""Tokenizers of a SentencePiece model alone: the directories of 2023, with tokenizer.model and no tokenizer.json.

transformers converts the model by the class that it finds for the directory. A class that was written for another model
gives other ids without an error: a missing `tokenizer_class`, or one that differs from the model's type, drops the
blank before the first word. Each conversion is therefore compared with SentencePiece itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ds.errors import DataError

_CLASSES = {
    "tokenizer.model": ("LlamaTokenizer", "GemmaTokenizer"),
    "spiece.model": ("T5Tokenizer", "AlbertTokenizer"),
    "sentencepiece.bpe.model": ("XLMRobertaTokenizer",),
}
"""File of a SentencePiece model -> classes of transformers that read it, the usual one first."""

_PROBES = ("The quick brown fox jumps over 13 lazy dogs.", "def f(x): return x + 1", "Grüße aus München")


def sentencepiece_file(directory: Path) -> Path | None:
    """Return the SentencePiece model of a directory that has no other form of its tokenizer; None = it has."""
    if (directory / "tokenizer.json").is_file():
        return None
    return next((directory / name for name in _CLASSES if (directory / name).is_file()), None)


def load_sentencepiece(file: Path, declared: str | None) -> Any:
    """Load the tokenizer of a SentencePiece model by the class of transformers that segments text as the model does.

    Args:
        file: the model.
        declared: `tokenizer_class` of its tokenizer_config.json.

    Raises:
        DataError: a package is missing, the file is damaged, or no class segments text as the model does.
    """
    model, tried = _open(file), []
    for name, tokenizer in _conversions(file, declared):
        if all(_same_pieces(tokenizer, model, text) for text in _PROBES):
            return tokenizer
        tried.append(name)
    raise DataError(
        f"tokenizer {file.parent}: {' and '.join(tried)} of transformers segment text otherwise than {file.name} does; "
        "save it as tokenizer.json with the class that it was made with, and use that directory as model.tokenizer"
    )


def _open(file: Path) -> Any:
    try:
        import google.protobuf  # noqa: F401  transformers reads the model's own settings with it
        from sentencepiece import SentencePieceProcessor
    except ImportError as problem:
        raise DataError(
            f"tokenizer {file.parent}: {file.name} is a SentencePiece model, and {problem.name} is not installed; "
            "pip install sentencepiece protobuf"
        ) from problem
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as problem:
        raise DataError(
            f"tokenizer {file.parent}: {file.name} is damaged, or no SentencePiece model; try to download it again"
        ) from problem
    return model


def _conversions(file: Path, declared: str | None) -> Iterator[tuple[str, Any]]:
    """Yield class name -> tokenizer: by AutoTokenizer, by the declared class, by the classes for such a file."""
    import transformers

    names = dict.fromkeys(["AutoTokenizer", *([declared] if declared else []), *_CLASSES[file.name]])
    for name in names:
        made = getattr(transformers, name, None)
        if made is None:
            continue
        with _silent():
            try:
                tokenizer = made.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
            except Exception:  # of a class for another kind of model, in many types; the next one is tried
                continue
        yield name, tokenizer


def _same_pieces(tokenizer: Any, model: Any, text: str) -> bool:
    """Test whether a tokenizer gives the model's pieces for a text; unknown pieces may have other names."""
    wanted = [None if model.is_unknown(one) else model.id_to_piece(one) for one in model.encode(text)]
    given = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    found = [None if piece == tokenizer.unk_token else piece for piece in given]
    return bool(found == wanted)


@contextmanager
def _silent() -> Iterator[None]:
    """Hide transformers' warnings about conversions that are only tried."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
