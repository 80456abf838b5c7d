"""Seeded damage of files, and the entries of caches that it is done to."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_ds.data import Causal, ChatOptions, Labelled, Order, open_dataset
from megatron_ds.data.indexed.files import index_path, tokens_path, write_index

VOCAB_SIZE = 4096
CAUSAL = Causal()
YES_OR_NO = Labelled("single_label_classification", ("no", "yes"))
WORDS = "call me ishmael some years ago never mind how long precisely having little or no".split()  # noqa: SIM905


class CacheCase(NamedTuple):
    """Data whose samples go through a cache.

    Attributes:
        name: the case.
        open: cache directory -> dataset.
    """

    name: str
    open: Callable[[Path], Any]

    def samples(self, cache: Path) -> list[Any]:
        """Return the fingerprint and the content of all samples."""
        dataset = self.open(cache)
        return [
            dataset.fingerprint,
            *({key: value.tolist() for key, value in dataset.sample(index).items()} for index in range(len(dataset))),
        ]


def cache_cases(folder: Path, tokenizer: str, chat_tokenizer: str) -> list[CacheCase]:
    """Write data for every kind of cache.

    Args:
        folder: takes the data.
        tokenizer: a directory.
        chat_tokenizer: a directory with a chat template.
    """
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=12)) for _ in range(24)]
    rows = {
        "a.txt": " ".join(texts),
        "b.txt": " ".join(texts[::-1]),
        "chats.jsonl": "\n".join(
            f'{{"messages": [{{"role": "user", "content": "{one}"}}, {{"role": "assistant", "content": "{one}"}}]}}'
            for one in texts
        ),
        "rows.json": "[" + ", ".join(f'{{"input_ids": [{len(one)}, 7, {len(one) % 9}]}}' for one in texts) + "]",
        "labelled.jsonl": "\n".join(f'{{"text": "{one}", "label": {len(one) % 2}}}' for one in texts),
    }
    for name, content in rows.items():
        (folder / name).write_text(content)
    sizes = np.random.default_rng(0).integers(1, 20, size=40)
    prefix = str(folder / "corpus")
    np.arange(sizes.sum()).astype("<u2").tofile(tokens_path(prefix))
    write_index(index_path(prefix), np.dtype("<u2"), sizes, np.arange(len(sizes) + 1))
    two = [str(folder / "a.txt"), str(folder / "b.txt")]

    def case(
        name: str, format: str, *sources: str, objective: Any = CAUSAL, path: str = "", length: int = 16, **more: Any
    ) -> CacheCase:
        paths = [str(folder / source) for source in sources]
        given = None if format == "indexed" else path or tokenizer
        return CacheCase(
            name,
            lambda cache: open_dataset(format, objective, paths, length, VOCAB_SIZE, given, str(cache), **more),
        )

    order = Order(30, 1, True)
    return [
        case("text", "text", two[0]),
        case("blend", "text", *two, weights=[0.7, 0.3], order=order),
        case("chat", "chat", "chats.jsonl", path=chat_tokenizer, options=ChatOptions(packing=False), length=128),
        case("rows", "tokenized", "rows.json"),
        case("labelled", "labelled", "labelled.jsonl", objective=YES_OR_NO),
        case("indexed", "indexed", prefix, order=order),
    ]


def entry_files(cache: Path) -> list[Path]:
    """Return the files of all entries of a cache, without those of locks, in the order of their names."""
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return other bytes: some changed, zeroed, left out, added, or all replaced."""
    place = chance.randrange(len(content) + 1)
    length = chance.choice((1, 2, 8, 64, 4096))
    drawn = chance.randbytes(length)
    found = chance.choice(
        (
            content[:place] + drawn + content[place + length :],
            content[:place] + bytes(min(length, len(content) - place)) + content[place + length :],
            content[:place],
            content[:place] + content[place + length :],
            content[:place] + drawn + content[place:],
            drawn,
            b"",
        )
    )
    return found if found != content else content + b"\0"
