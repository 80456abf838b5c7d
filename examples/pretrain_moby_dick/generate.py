"""Loads the exported directory with plain transformers and continues a sentence; nothing of megatron_ds is imported.

python examples/pretrain_moby_dick/generate.py [HF_DIR] [PROMPT]
"""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the directory has all that is needed

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

SEED = 1851


def main() -> None:
    """Print one sampled continuation; the same one each time on the same machine."""
    directory = sys.argv[1] if len(sys.argv) > 1 else "out/moby_dick/hf"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "Call me Ishmael."
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.manual_seed(SEED)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=40, temperature=0.8, pad_token_id=0)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    print(f"transformers continues, from {directory}:\n{' '.join(text.split())}")


if __name__ == "__main__":
    main()
