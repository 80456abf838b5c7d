"""Opening and writing of sources, for the tests of all readers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.data import Causal, ChatOptions, open_dataset
from megatron_ds.data.prepare import chunks
from megatron_ds.data.readers.source import Source
from tests.data.readers.rows import VOCAB_SIZE


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    def write_(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    return write_


@pytest.fixture
def open_(tmp_path: Path, tokenizer_path: str, chat_tokenizer: Any) -> Callable[..., Any]:
    """Open a source in a format, as a run does."""

    def open_format(format: str, *sources: str | Source, seq_length: int = 64, **more: Any) -> Any:
        tokenizer = chat_tokenizer("header") if format == "chat" else tokenizer_path
        options = ChatOptions() if format == "chat" else None
        cache = str(tmp_path / "cache")
        return open_dataset(
            format, Causal(), sources, seq_length, VOCAB_SIZE, tokenizer, cache, options=options, **more
        )

    return open_format


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 50)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 2)
