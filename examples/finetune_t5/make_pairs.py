"""Make training pairs from Moby Dick: words without punctuation as input, the same words with punctuation as target.

The book is cut into pieces of 3 to 5 words with at least one punctuation mark. The training and the validation text
of `pretrain_moby_dick` give the training and the validation pairs.

    python examples/finetune_t5/make_pairs.py [OUTPUT_DIR]
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
TEXTS = HERE.parent / "pretrain_moby_dick" / "data"
MARKS = ",.;:!?"
LONGEST = 16  # tokens; longer pairs, with names that are split into many tokens, are dropped


def pieces(text: str, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (words without punctuation, words with punctuation), in the order of the text."""
    draw = random.Random(seed)
    text = re.sub(r"[’‘']", "", text.lower())
    words = re.sub(rf"[^a-z{re.escape(MARKS)}\s]", " ", text).split()
    words = [word for word in words if word.strip(MARKS)]
    start = 0
    while start < len(words):
        size = draw.randint(3, 5)
        chosen, start = words[start : start + size], start + size
        target, source = " ".join(chosen), " ".join(word.strip(MARKS) for word in chosen)
        if len(chosen) == size and target != source:
            yield source, target


def main() -> None:
    """Write train.jsonl and valid.jsonl: `input_ids` and `labels`."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/punctuation")
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tokenizer")
    for name, text in (("train", "moby_dick.txt"), ("valid", "valid.txt")):
        pairs = list(pieces((TEXTS / text).read_text(encoding="utf-8")))
        count = 0
        with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for source, target in pairs:
                ids, labels = (tokenizer(words)["input_ids"] + [tokenizer.eos_token_id] for words in (source, target))
                if len(labels) <= LONGEST:
                    file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
                    count += 1
        print(f"{output / name}.jsonl: {count:,} examples, such as {pairs[0][0]!r} -> {pairs[0][1]!r}")


if __name__ == "__main__":
    main()
