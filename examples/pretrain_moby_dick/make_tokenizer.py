"""Train the example's tokenizer: byte-level BPE with 4096 entries on the training part of Moby Dick.

Byte-level (as in GPT-2), so that any text round-trips exactly; small, so that the example's embedding stays small.
The validation part is not read. This script made the `tokenizer/` of the repository:

    python examples/pretrain_moby_dick/make_tokenizer.py [OUTPUT_DIR]
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(text_file: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly VOCAB_SIZE ids; END_OF_TEXT (id 0) is the only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(text_file)], trainer)
    # Padding reuses the end-of-text id: padded positions carry no target, so their content is never learned.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def use_class_of_both_versions(config: Path) -> None:
    """Set the class that transformers 4 and 5 both know; 5 writes a name of its own."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Train, check the size and write the directory."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tokenizer"
    tokenizer = train_tokenizer(HERE / "data" / "moby_dick.txt")
    assert len(tokenizer) == VOCAB_SIZE, f"{len(tokenizer)} entries, expected {VOCAB_SIZE}"
    tokenizer.save_pretrained(output)
    use_class_of_both_versions(output / "tokenizer_config.json")
    print(f"{output}: {len(tokenizer)} entries")


if __name__ == "__main__":
    main()
