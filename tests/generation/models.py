"""Tiny models of each kind of family, and transformers' greedy continuation of prompts one by one."""

from pathlib import Path
from typing import Any

import torch

from tests.data.tiny_tokenizers import save_chat
from tests.parity.reference import ALL_CONFIGS, make_model

PROMPTS = [
    [3, 5, 7, 11, 13, 17, 19],
    [23, 29, 31],
    [4, 8, 15, 16, 23, 42, 1, 2, 3, 5, 9],
    [77],
]
NEW_TOKENS = 16
KINDS = {
    "rope, grouped heads": "llama-six-heads",
    "learned positions": "gpt2-scales",
    "positions of tokens alone": "opt-after-narrow",
    "ALiBi": "bloom-six-heads",
    "ALiBi in bf16, parallel blocks": "falcon-40b-alibi-one-group",
    "partial rotation, parallel blocks": "gptj-partial",
    "windows, caps": "gemma2-caps",
    "windows, two ropes": "gemma3_text-two-ropes",
    "sinks, experts": "gpt_oss-yarn",
    "experts": "mixtral-four-experts",
    "relative biases, encoder": "t5-gated",
    "query temperature": "ministral3-yarn",
    "rope by length": "llama-dynamic-beyond",
    "rope of two lengths": "phi3-longrope-beyond",
    "local attention": "gpt_neo-every-second",
}


def save_model(directory: Path, case: str) -> Any:
    """Save a model whose text depends on all of its prompt: larger weights than the parity tests'."""
    model = make_model(ALL_CONFIGS[case]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
    model.save_pretrained(directory)
    return model


def continue_by_transformers(case: str, directory: Path) -> list[list[int]]:
    """Save a model; return what transformers generates with it."""
    return greedy(save_model(directory, case))


def greedy(model: Any) -> list[list[int]]:
    """The new ids of each prompt, by greedy search without an end, one prompt after the other."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **settings
            )
        found.append(whole[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist())
    return found


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
TEXTS = ["It was the best of times, it was the worst of times", "In", "whale"]
NEW_OF_TEXTS = 12


def save_speaking_model(text: Path, directory: Path) -> list[str]:
    """Save a model with a tokenizer and a chat template; return transformers' continuations of `TEXTS`, one by one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_chat(text, directory, TEMPLATE))
    ALL_CONFIGS["speaking"] = {**ALL_CONFIGS["llama"], "vocab_size": len(tokenizer), "eos_token_id": 3}
    model = save_model(directory, "speaking")
    found = []
    for one in TEXTS:
        given = tokenizer(one, return_tensors="pt")
        with torch.no_grad():
            whole = model.generate(**given, max_new_tokens=NEW_OF_TEXTS, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(whole[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return found
