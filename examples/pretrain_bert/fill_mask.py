"""Fill the gap in a sentence with plain transformers.

The gap is written as [MASK]:

    python examples/pretrain_bert/fill_mask.py [HF_DIR] [SENTENCE]
"""

import sys

import torch
from transformers import AutoTokenizer, BertForPreTraining

DEFAULTS = ["out/bert/hf", "the captain of the [MASK] looked at the sea."]
COUNT = 5


def main() -> None:
    """Print the most likely words for the gap."""
    directory, sentence = [*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = BertForPreTraining.from_pretrained(directory).float().eval()
    batch = tokenizer(sentence, return_tensors="pt")
    gap = int((batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).prediction_logits[0, gap]
    print(f"{sentence}, filled by transformers with {directory}:")
    for share, token in zip(*logits.softmax(dim=-1).topk(COUNT)):
        print(f"  {float(share):6.1%}  {tokenizer.convert_ids_to_tokens(int(token))}")


if __name__ == "__main__":
    main()
