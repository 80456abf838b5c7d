"""Makes the example's conversations out of the PyPI package chatterbot-corpus 1.3.3, whose English part it must hold.

    pip download --no-deps chatterbot-corpus==1.3.3 && unzip chatterbot_corpus-1.3.3-*.whl -d corpus
    python examples/finetune_chat/make_data.py corpus/chatterbot_corpus/data/english

The shipped `data/` was made so. Every twentieth opening goes to validation with all its replies: no opening is in both.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
EVERY = 20


def conversations(directory: Path) -> Iterator[list[str]]:
    """What is said in turn, the user first; what is not that (a line without a reply, a lone text) is left out."""
    for file in sorted(directory.glob("*.yml")):
        for said in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if not isinstance(said, list):
                continue
            turns = [str(text).strip() for text in said]
            turns = turns[: len(turns) // 2 * 2]
            if turns and all(turns):
                yield turns


def main() -> None:
    """Write train.jsonl and valid.jsonl."""
    openings: dict[str, int] = {}
    parts: dict[str, dict[str, None]] = {"train": {}, "valid": {}}  # many stand there several times
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
