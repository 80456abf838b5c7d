"""Train the example's tokenizer: Unigram with 2048 entries on lower-case Moby Dick, punctuation split off.

Its special tokens are those of T5: padding, end of text, unknown, and the 100 sentinels that replace removed spans.
It is lower-case so that a small vocabulary covers most words. This script made the `tokenizer/` of the repository:

    python examples/finetune_t5/make_tokenizer.py [OUTPUT_DIR]
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "pretrain_moby_dick" / "data" / "moby_dick.txt"
VOCAB_SIZE = 2048
SENTINELS = [f"<extra_id_{number}>" for number in range(100)]


def train_tokenizer(text_file: Path) -> PreTrainedTokenizerFast:
    """Train a tokenizer of VOCAB_SIZE ids: <pad> 0, </s> 1, <unk> 2, the sentinels, then words and parts of words."""
    special = ["<pad>", "</s>", "<unk>", *SENTINELS]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train([str(text_file)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SENTINELS,
        clean_up_tokenization_spaces=False,
    )


def use_names_of_both_versions(config: Path) -> None:
    """Rewrite the names of the class and the special tokens to those that transformers 4 and 5 both know."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    content["additional_special_tokens"] = content.pop("extra_special_tokens", SENTINELS)
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Train, check the size and write the directory."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tokenizer"
    tokenizer = train_tokenizer(TEXT)
    assert len(tokenizer) == VOCAB_SIZE, f"{len(tokenizer)} entries, expected {VOCAB_SIZE}"
    tokenizer.save_pretrained(output)
    use_names_of_both_versions(output / "tokenizer_config.json")
    print(f"{output}: {len(tokenizer)} entries")


if __name__ == "__main__":
    main()
