"""Train the tokenizer of three examples: byte-level BPE with 4096 entries, including the chat tokens.

It is trained on the training parts of the book, the speeches and the conversations. This script made the `tokenizer/`
of the repository:

    python examples/pretrain_blend/make_tokenizer.py [OUTPUT_DIR]
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def texts() -> Iterator[str]:
    """Yield the training texts."""
    yield (HERE.parent / "pretrain_moby_dick" / "data" / "moby_dick.txt").read_text(encoding="utf-8")
    for line in (
        (HERE.parent / "continue_pretraining" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ):
        yield json.loads(line)["text"]
    for line in (HERE.parent / "finetune_chat" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        yield from (message["content"] for message in json.loads(line)["messages"])


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of exactly VOCAB_SIZE ids: END_OF_TEXT is 0, TURN 1, END_OF_TURN 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    # Padding reuses the end-of-text id: padded positions carry no target, so their content is never learned.
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def use_class_of_both_versions(config: Path) -> None:
    """Set the class that transformers 4 and 5 both know; 5 writes a name of its own."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Train, check the size and write the directory."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tokenizer"
    tokenizer = train_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE, f"{len(tokenizer)} entries, expected {VOCAB_SIZE}"
    tokenizer.save_pretrained(output)
    use_class_of_both_versions(output / "tokenizer_config.json")
    print(f"{output}: {len(tokenizer)} entries")


if __name__ == "__main__":
    main()
