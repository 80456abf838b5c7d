"""Train the example's tokenizer: WordPiece with 4096 entries, lower case, on the training texts of the examples.

This script made the `tokenizer/` of the repository:

    python examples/pretrain_bert/make_tokenizer.py [OUTPUT_DIR]
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
VOCAB_SIZE = 4096
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def texts() -> Iterator[str]:
    """Yield the training texts of the example."""
    yield (EXAMPLES / "pretrain_moby_dick" / "data" / "moby_dick.txt").read_text(encoding="utf-8")
    for line in (EXAMPLES / "continue_pretraining" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer of VOCAB_SIZE ids; the first five are BERT's special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
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
    tokenizer = train_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE, f"{len(tokenizer)} entries, expected {VOCAB_SIZE}"
    tokenizer.save_pretrained(output)
    use_class_of_both_versions(output / "tokenizer_config.json")
    print(f"{output}: {len(tokenizer)} entries")


if __name__ == "__main__":
    main()
