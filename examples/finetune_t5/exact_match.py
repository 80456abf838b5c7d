"""Count the held-out examples that a T5 directory generates exactly, with plain transformers and greedy decoding.

The defaults are the paths of the example's last run:

    python examples/finetune_t5/exact_match.py [HF_DIR] [EXAMPLES.jsonl] [COUNT]
"""

import json
import sys
from itertools import islice

import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

BATCH = 50


def main() -> None:
    """Print the score and a few of the outputs."""
    defaults = ["out/punctuation/hf", "out/punctuation/valid.jsonl", "400"]
    directory, examples, count = [*sys.argv[1:], *defaults[len(sys.argv) - 1 :]]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = T5ForConditionalGeneration.from_pretrained(directory).float().eval()
    with open(examples, encoding="utf-8") as file:
        pairs = [json.loads(line) for line in islice(file, int(count))]
    written = []
    for start in range(0, len(pairs), BATCH):
        batch = tokenizer.pad(
            {"input_ids": [pair["input_ids"] for pair in pairs[start : start + BATCH]]}, return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=16
            )
        written += tokenizer.batch_decode(ids, skip_special_tokens=True)
    wanted = [tokenizer.decode(pair["labels"], skip_special_tokens=True) for pair in pairs]
    right = sum(ours == target for ours, target in zip(written, wanted))
    print(f"{directory}: exact match {right / len(pairs):.1%} ({right} of {len(pairs)})")
    for ours, target in islice(zip(written, wanted), 3):
        print(f"  wanted   {target}\n  written  {' '.join(ours.split())}")


if __name__ == "__main__":
    main()
