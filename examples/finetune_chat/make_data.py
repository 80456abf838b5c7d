"""Make the example's conversations from the English part of the PyPI package chatterbot-corpus 1.3.3.

    pip download --no-deps chatterbot-corpus==1.3.3 && unzip chatterbot_corpus-1.3.3-*.whl -d corpus
    python examples/finetune_chat/make_data.py corpus/chatterbot_corpus/data/english

This script made the `data/` of the repository. Every twentieth first line goes to validation with all its replies,
so that no first line is in both files.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
EVERY = 20


def conversations(directory: Path) -> Iterator[list[str]]:
    """Yield the turns of each conversation, the user's first; lines without a reply and single texts are dropped."""
    for file in sorted(directory.glob("*.yml")):
        for texts in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if not isinstance(texts, list):
                continue
            turns = [str(text).strip() for text in texts]
            turns = turns[: len(turns) // 2 * 2]
            if turns and all(turns):
                yield turns


def main() -> None:
    """Write train.jsonl and valid.jsonl."""
    openings: dict[str, int] = {}
    parts: dict[str, dict[str, None]] = {"train": {}, "valid": {}}  # the corpus contains many of them several times
    for turns in conversations(Path(sys.argv[1])):
        number = openings.setdefault(turns[0].casefold(), len(openings))
        roles = ["user", "assistant"] * (len(turns) // 2)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        part = "valid" if number % EVERY == EVERY - 1 else "train"
        parts[part][json.dumps({"messages": messages}, ensure_ascii=False)] = None
    for name, lines in parts.items():
        (HERE / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines):,} conversations")


if __name__ == "__main__":
    main()
