"""Make passages with the kind of text that they are from: a novel, a speech, or a conversation.

The texts of `pretrain_moby_dick`, `continue_pretraining` and `finetune_chat` are cut into passages of 12 words; of
conversations, whose lines are short, up to 12. There are equally many of each kind; every eighth is for validation.

    python examples/classify/prepare.py [OUTPUT_DIR]
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent
WORDS, FEWEST, PASSAGES = 12, 5, 800


def passages(text: str) -> list[str]:
    """Return the passages of a text, in order; the remainder at the end is left out."""
    words = text.split()
    return [" ".join(words[start : start + WORDS]) for start in range(0, len(words) - WORDS + 1, WORDS)]


def rows_of(file: Path) -> Iterator[dict]:
    """Yield the objects in a file of JSON lines."""
    yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def by_kind() -> dict[str, list[str]]:
    """Return kind of text -> all of its passages."""
    novel = (EXAMPLES / "pretrain_moby_dick" / "data" / "moby_dick.txt").read_text(encoding="utf-8")
    speeches = rows_of(EXAMPLES / "continue_pretraining" / "data" / "train.jsonl")
    chats = rows_of(EXAMPLES / "finetune_chat" / "data" / "train.jsonl")
    lines = {message["content"]: None for chat in chats for message in chat["messages"]}
    return {
        "novel": passages(novel),
        "speech": [passage for speech in speeches for passage in passages(speech["text"])],
        "conversation": [" ".join(line.split()[:WORDS]) for line in lines if len(line.split()) >= FEWEST],
    }


def main() -> None:
    """Write train.jsonl and valid.jsonl: `text` and `label`."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/classify/data")
    output.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    chosen = {kind: draw.sample(texts, min(PASSAGES, len(texts))) for kind, texts in by_kind().items()}
    for name, is_valid in (("train", False), ("valid", True)):
        rows = [
            {"text": text, "label": kind}
            for kind, texts in chosen.items()
            for number, text in enumerate(texts)
            if (number % 8 == 7) == is_valid
        ]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (output / f"{name}.jsonl").write_text(content, encoding="utf-8")
        counts = Counter(row["label"] for row in rows)
        print(f"{output / name}.jsonl: {', '.join(f'{kind} {count:,}' for kind, count in counts.items())}")


if __name__ == "__main__":
    main()
