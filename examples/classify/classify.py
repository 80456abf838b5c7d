"""Name the kind of text that passages are from, with the `text-classification` pipeline of plain transformers.

python examples/classify/classify.py [HF_DIR] [ROWS.jsonl]
"""

import json
import sys
from collections import Counter
from pathlib import Path

from transformers import pipeline

DEFAULTS = ["out/classify/hf", "out/classify/data/valid.jsonl"]


def main() -> None:
    """Print the accuracy on the rows, how many of each class are recognized, and the first passages."""
    directory, rows_file = [*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]]
    rows = [json.loads(line) for line in Path(rows_file).read_text(encoding="utf-8").splitlines()]
    classify = pipeline("text-classification", model=directory)
    said = [classify(row["text"], truncation=True)[0] for row in rows]
    total = Counter(row["label"] for row in rows)
    right = Counter(row["label"] for row, one in zip(rows, said) if one["label"] == row["label"])
    count = right.total()
    print(f"{directory}: accuracy {count / len(rows):.1%} ({count} of {len(rows)})")
    print("  " + ", ".join(f"{kind} {right[kind]} of {number}" for kind, number in total.items()))
    for kind in total:
        row, one = next((row, one) for row, one in zip(rows, said) if row["label"] == kind)
        print(f"  {kind}, as {one['label']} ({one['score']:.0%}): {row['text'][:70]}...")


if __name__ == "__main__":
    main()
