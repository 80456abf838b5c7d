"""What the data tests share: the shipped example, and small files written for one test."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny_tokenizers import save_byte_level, save_chat, save_sentencepiece, save_wordpiece

TEMPLATES = Path(__file__).with_name("chat_templates")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pretrain_moby_dick"


@pytest.fixture(scope="session")
def book() -> Path:
    return EXAMPLE / "data" / "moby_dick.txt"


@pytest.fixture(scope="session")
def valid_text() -> Path:
    return EXAMPLE / "data" / "valid.txt"


@pytest.fixture(scope="session")
def tokenizer_path() -> str:
    return str(EXAMPLE / "tokenizer")


@pytest.fixture(scope="session")
def wordpiece(valid_text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_wordpiece(valid_text, tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture(scope="session")
def byte_level(valid_text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_byte_level(valid_text, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece(valid_text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_sentencepiece(valid_text, tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def chat_tokenizer(valid_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Name of a template, whether with pieces -> a tokenizer's directory."""
    made: dict[tuple[str, bool], str] = {}

    def get(name: str, pieces: bool = False) -> str:
        if (name, pieces) not in made:
            template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
            made[name, pieces] = save_chat(valid_text, tmp_path_factory.mktemp(name), template, pieces=pieces)
        return made[name, pieces]

    return get


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes objects (or raw lines) to a JSON-lines file under tmp_path and gives its path."""

    def write(lines: Sequence[Any], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(raw) + b"\n")
        return str(path)

    return write
