"""Tokenizers: loading from a directory or the hub, required special tokens, and a hash of their behaviour."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_ds.cache import scratch_directory
from megatron_ds.data.readers.sentencepiece_model import load_sentencepiece, sentencepiece_file
from megatron_ds.errors import DataError, HubError
from megatron_ds.hub import hub_id, local_directory
from megatron_ds.remote import is_url
from megatron_ds.untrusted import read_json, read_record
from megatron_ds.untrusted.limits import TOKENIZER_SETTINGS
from megatron_ds.untrusted.records import Record

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory, or of a model on the hub, without running code found there.

    A SentencePiece model without tokenizer.json is converted; see `load_sentencepiece`.

    Raises:
        DataError: no such directory, or it holds no complete tokenizer.
    """
    directory = Path(path).expanduser()
    remedy = "point model.tokenizer at a directory written by a tokenizer's save_pretrained"
    if not directory.is_dir():
        directory = _download(path, remedy)
    _check_settings(directory / "tokenizer_config.json")
    try:
        file = sentencepiece_file(directory)
        if file is not None:
            return load_sentencepiece(file, _declared_class(directory))
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except DataError:
        raise
    except Exception as error:  # transformers raises ValueError, OSError, KeyError, and tokenizers a bare Exception
        reason = _first_line(error) if _has_vocabulary(directory) else f"there is no {' or '.join(_VOCABULARIES)}"
        raise DataError(f"tokenizer {path}: cannot be loaded ({reason}); {remedy}") from error
    # From a config.json alone, transformers builds some tokenizers that know only their special tokens: they would
    # turn every text into no tokens at all.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + 1:
        raise DataError(f"tokenizer {path}: the directory holds no vocabulary, only special tokens; {remedy}")
    return tokenizer


def _download(path: str, remedy: str) -> Path:
    """Return the directory of a tokenizer on the hub, or at a URL.

    Raises:
        DataError: the hub has no such one, or cannot be read.
        RemoteError: the URL has no such one, or cannot be read.
    """
    if is_url(path):
        return Path(local_directory(path, f"tokenizer={path}", with_state=False))
    missing = f"tokenizer {path}: {_why_no_directory(Path(path).expanduser(), remedy)}"
    if hub_id(path) is None:
        raise DataError(missing)
    try:
        return Path(local_directory(path, "it"))
    except HubError as problem:
        raise DataError(f"{missing}; {problem}") from problem


def _why_no_directory(path: Path, remedy: str) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which does not exist; {remedy}"
    if path.exists():
        is_part = any(path.match(pattern) for pattern in (*_VOCABULARIES, "*.json"))
        return f"is a file, and its directory is needed; {f'try {path.parent}' if is_part else remedy}"
    on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path))
    download = f"; if it is one of the hub, try `hf download {path} --local-dir {path.name}` first" if on_hub else ""
    return f"no such directory; {remedy}{download}"


def _has_vocabulary(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) is not None for pattern in _VOCABULARIES)


def special_id(tokenizer: PreTrainedTokenizerBase, path: str, name: str, use: str) -> int:
    """Return the id of the tokenizer's special token `name` (`eos_token`, `mask_token`, ...).

    Args:
        tokenizer: the tokenizer.
        path: its directory, for the error.
        name: as in tokenizer_config.json.
        use: the reason why the token is needed, for the error; follows "but".

    Raises:
        DataError: the tokenizer has no such token.
    """
    token_id = getattr(tokenizer, f"{name}_id")
    if token_id is None:
        raise DataError(
            f"tokenizer {path}: {name} is not set, but {use}; "
            f'set "{name}" in its tokenizer_config.json to a token of its vocabulary'
        )
    return int(token_id)


def require_ids_below(vocab_size: int, largest_id: int, tokenizer_path: str) -> None:
    """Refuse a tokenizer with ids that the model does not have.

    Raises:
        DataError: `largest_id`, the largest in use, is not below `vocab_size`.
    """
    if largest_id >= vocab_size:
        raise DataError(
            f"data: the tokenizer {tokenizer_path} gives ids up to {largest_id}, but the model's "
            f"vocab_size={vocab_size} ends at {vocab_size - 1}; use the model's own tokenizer, or set vocab_size to at "
            f"least {largest_id + 1} in a model that starts at random"
        )


def largest_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's largest id (ids may have gaps, so this is not its length less one)."""
    return max(tokenizer.get_vocab().values())


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, end_id: int) -> str:
    """Return the SHA-256 of everything that decides the ids of a text: the end-of-document id and the backend.

    The backend is hashed as serialised; for a tokenizer without one, all files that it saves are hashed.
    """
    digest = hashlib.sha256(f"eos={end_id}\n".encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()
    digest.update(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory(dir=scratch_directory()) as directory:
        tokenizer.save_pretrained(directory)
        for file in sorted(Path(directory).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


class _Settings(Record):
    """Fields of tokenizer_config.json of which transformers does not check the types."""

    model_max_length: int | float | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None
    tokenizer_class: str | None = None
    model_input_names: list[str] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    clean_up_tokenization_spaces: bool | None = None


def _check_settings(file: Path) -> None:
    """Refuse settings of a wrong type, which would fail later in the code of transformers."""
    if os.path.lexists(file):
        read_record(file, _Settings, TOKENIZER_SETTINGS, DataError)


def _declared_class(directory: Path) -> str | None:
    """Return `tokenizer_class` of a directory's tokenizer_config.json; None = it has none."""
    file = directory / "tokenizer_config.json"
    content = read_json(file, TOKENIZER_SETTINGS, DataError) if file.is_file() else None
    name = content.get("tokenizer_class") if isinstance(content, dict) else None
    return str(name) if name else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
