"""Tokenizers of the three conventions, trained on a text in a second: like BERT's, RoBERTa's and T5's."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 700
NUM_SENTINELS = 100


def save_wordpiece(text: Path, directory: Path) -> str:
    """As BERT's: lower case, `##` continues a word; [PAD] is 0. Its directory."""
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    specials["mask_token"] = "[MASK]"
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB_SIZE, special_tokens=list(specials.values()))
    return _save(tokenizer, trainer, text, directory, specials)


def save_byte_level(text: Path, directory: Path) -> str:
    """As RoBERTa's: `Ġ` begins a word, <s> and </s> serve as cls and sep; <pad> is 1. Its directory."""
    specials = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    specials["mask_token"] = "<mask>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(specials.values()), initial_alphabet=alphabet, show_progress=False
    )
    return _save(tokenizer, trainer, text, directory, {**specials, "cls_token": "<s>", "sep_token": "</s>"})


def save_sentencepiece(text: Path, directory: Path, num_sentinels: int = NUM_SENTINELS) -> str:
    """As T5's: `▁` begins a word, <pad> is 0, and the sentinels stand at the end, the first last. Its directory."""
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCAB_SIZE - num_sentinels,
        special_tokens=list(specials.values()),
        unk_token="<unk>",
        show_progress=False,
    )
    sentinels = [AddedToken(f"<extra_id_{number}>", special=True) for number in reversed(range(num_sentinels))]
    return _save(tokenizer, trainer, text, directory, specials, sentinels)


CONTROL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header|>", "<|end_header|>", "<|eot|>"]


def save_chat(text: Path, directory: Path, template: str, *, pieces: bool = False) -> str:
    """Byte-level, offsets without spaces, or `pieces`; with a chat template and its tokens. Its directory."""
    path = (save_sentencepiece if pieces else save_byte_level)(text, directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if not pieces:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL_TOKENS, "bos_token": "<s>"})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


FRAMED_VOCABULARY = {"<eos>": 0, "<unk>": 1, "<bos>": 2, "<gmask>": 3, "a": 4, "b": 5}


def save_framed(directory: Path, single: str, **special: str | None) -> str:
    """Of the words a and b, with a post-processor such as `<bos> $A` (empty: none). Its directory."""
    backend = Tokenizer(models.WordLevel(FRAMED_VOCABULARY, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = [(word, FRAMED_VOCABULARY[word]) for word in single.split() if word != "$A"]
    if single:
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    names = {"eos_token": "<eos>", "unk_token": "<unk>", "bos_token": "<bos>", **special}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(directory)
    return str(directory)


def _save(
    tokenizer: Tokenizer,
    trainer: object,
    text: Path,
    directory: Path,
    specials: dict[str, str],
    sentinels: list[AddedToken] | None = None,
) -> str:
    tokenizer.train_from_iterator(text.read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(sentinels or [])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(directory)
    return str(directory)
