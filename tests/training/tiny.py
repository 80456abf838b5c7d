"""What tiny runs are made of."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = [f"w{index}" for index in range(58)]
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    wrapped.save_pretrained(str(directory))


def write_corpus(folder: Path) -> None:
    """A tokenizer, train.txt, valid.txt, train.jsonl and valid.jsonl; always the same."""
    write_tokenizer(folder / "tokenizer")
    chance = random.Random(0)
    for name, words, rows in (("train", 2500, 64), ("valid", 330, 11)):
        text = " ".join(chance.choice(WORDS) for _ in range(words))
        (folder / f"{name}.txt").write_text(text)
        lines = [{"input_ids": [chance.randrange(60) for _ in range(chance.randrange(5, 33))]} for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_mapping(corpus: Path, output: Path, format: str = "text") -> dict[str, Any]:
    """A run file's content: five steps on the corpus."""
    suffix = "txt" if format == "text" else "jsonl"
    return {
        "model": {"config": MODEL, "tokenizer": str(corpus / "tokenizer")},
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "data": {
            "format": format,
            "train": [str(corpus / f"train.{suffix}")],
            "valid": [str(corpus / f"valid.{suffix}")],
            "seq_length": 32,
            "cache_dir": str(corpus / "cache"),
        },
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2, "min_lr": 3e-4},
        "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "eval_every": 3},
        "output": str(output),
    }
