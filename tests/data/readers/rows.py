"""Rows of each format, and what is read of them."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.prepare import PrepareOptions, prepare
from megatron_ds.data.readers.source import Source

TEXTS = ['Call me "Ishmael".\r\nSome years ago—', "NA", "never mind, how; long\tprecisely \u2028", "whale 🐋", "0012"]
TEXT_ROWS = [{"text": text, "id": number, "meta": {"n": str(number)}} for number, text in enumerate(TEXTS)]
ID_ROWS = [{"input_ids": [n + 1, n + 2, n + 3], "labels": [-100, n + 2, n + 3]} for n in range(5)]
CHAT_ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": text}], "id": n}
    for n, text in enumerate(("call me", "ishmael", "some years", "ago", "never mind"))
]
VOCAB_SIZE = 4096


def prepared(tokenizer_path: str, tmp_path: Path, *sources: str | Source, **options: Any) -> list[str]:
    """Return the documents that `prepare` writes."""
    prefix, tokenizer = str(tmp_path / "out/corpus"), AutoTokenizer.from_pretrained(tokenizer_path)
    prepare(PrepareOptions(sources, tokenizer_path, prefix, 2, bos=False, overwrite=True, **options))
    file = IndexedFile(prefix)
    return [tokenizer.decode(file.read(index)[:-1]) for index in range(len(file))]


def ids_of(dataset: Any) -> list[list[int]]:
    return [dataset.sample(index)["input_ids"][:3].tolist() for index in range(len(dataset))]
