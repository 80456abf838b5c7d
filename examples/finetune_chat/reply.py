"""Generate replies with plain transformers (or peft, for an adapter), without importing megatron_ds.

python examples/finetune_chat/reply.py DIRECTORY [QUESTION ...]
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the directories are complete

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

GREEDY = {"max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.3}
QUESTIONS = ["What is AI?", "Tell me a joke", "Who are you?"]


def load(directory: str) -> torch.nn.Module:
    """Load a model, or a model with its adapter."""
    if (Path(directory) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(directory).eval()
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def main() -> None:
    """Print the greedily decoded reply to each question."""
    directory, *questions = sys.argv[1:]
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = load(directory)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    print(f"replies of {directory}:")
    for question in questions or QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(**inputs, **GREEDY, eos_token_id=end, pad_token_id=0)
        reply = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"  {question:<16} {' '.join(reply.split())}")


if __name__ == "__main__":
    main()
