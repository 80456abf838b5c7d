"""A tokenizer from a local directory, the id that ends a document, and a hash of what the tokenizer does."""

import hashlib
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_ds.errors import DataError


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved in the directory `path`, without network access and without running code that lies there.

    Raises:
        DataError: no such directory, or it holds no complete tokenizer.
    """
    directory = Path(path).expanduser()
    remedy = "point model.tokenizer at a directory written by a tokenizer's save_pretrained"
    if not directory.is_dir():
        raise DataError(f"tokenizer {path}: no such directory; {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers lets ValueError, OSError, KeyError and tokenizers' bare Exception through
        raise DataError(f"tokenizer {path}: cannot be loaded ({_first_line(error)}); {remedy}") from error
    # From a config.json alone, transformers builds some tokenizers that know only their special tokens: with one of
    # those, every text would become no tokens at all.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + 1:
        raise DataError(f"tokenizer {path}: the directory holds no vocabulary, only special tokens; {remedy}")
    return tokenizer


def end_of_text_id(tokenizer: PreTrainedTokenizerBase, path: str) -> int:
    """The id that stands after each document: the tokenizer's `eos_token_id`.

    Raises:
        DataError: the tokenizer has no such token, so documents would run into one another.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {path}: eos_token is not set, but data.format=text ends each document with it; "
            'set "eos_token" in its tokenizer_config.json to a token of its vocabulary'
        )
    return int(tokenizer.eos_token_id)


def largest_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that the tokenizer can give (its ids may have gaps, so this is not its length less one)."""
    return max(tokenizer.get_vocab().values())


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the ids of a text: the serialised backend, or all saved files where there is none."""
    digest = hashlib.sha256(f"eos={tokenizer.eos_token_id}\n".encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()
    digest.update(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for file in sorted(Path(directory).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
