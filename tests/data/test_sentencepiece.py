"""Tokenizers of a SentencePiece model alone: the ids are SentencePiece's own, and an export keeps them."""

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.data.readers.tokenizer import load_tokenizer
from megatron_ds.errors import DataError
from megatron_ds.hf.export import copy_tokenizer
from megatron_ds.log import get_logger
from tests.ranks import run_alone

TEXTS = ("the quick brown fox, 2023", "jumps  over\n\tlazy dogs", "né 漢")
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
# model of SentencePiece, its file, the model's type, tokenizer_config.json, what its ids differ by
CASES: dict[str, tuple[str, str, str | None, dict[str, Any] | None, int]] = {
    "llama": ("bpe", "tokenizer.model", "llama", LLAMA, 0),
    "llama-without-class": ("bpe", "tokenizer.model", "llama", {"eos_token": "</s>"}, 0),
    "mistral": ("bpe", "tokenizer.model", "mistral", LLAMA, 0),
    "no-config-at-all": ("bpe", "tokenizer.model", None, None, 0),
    "gemma": ("no-prefix", "tokenizer.model", "gemma", {"tokenizer_class": "GemmaTokenizer"}, 0),
    "t5": ("unigram", "spiece.model", "t5", {"tokenizer_class": "T5Tokenizer", "extra_ids": 10}, 0),
    "t5-no-config-at-all": ("unigram", "spiece.model", None, None, 0),
    "xlm-r": ("xlm-r", "sentencepiece.bpe.model", "xlm-roberta", None, 1),
}
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False, "pad_id": -1},
    "no-prefix": {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
    | {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    | {"bos_piece": "<bos>", "eos_piece": "<eos>"},
    "unigram": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "xlm-r": {"model_type": "unigram", "pad_id": -1},
}


def _train(directory: Path) -> dict[str, list[list[int]]]:
    """Train a model of each kind; returns SentencePiece's ids of the texts."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    text = directory / "text.txt"
    words = ["the quick brown fox", "jumps over lazy dogs", "def f(x): return x + 1", "aus München, Grüße 0123456789"]
    text.write_text("\n".join(f"{one} {other}" for one in words for other in words))
    found = {}
    for kind, options in KINDS.items():
        as_it_is = {"normalization_rule_name": "identity"} if options["model_type"] == "bpe" else {}
        SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(directory / kind),
            vocab_size=330 if "byte_fallback" in options else 60,
            num_threads=1,
            minloglevel=2,
            hard_vocab_limit=False,
            **options,
            **as_it_is,
        )
        model = SentencePieceProcessor(model_file=str(directory / f"{kind}.model"))
        found[kind] = [model.encode(one) for one in TEXTS]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[int]]]]:
    directory = tmp_path_factory.mktemp("sentencepiece")
    return directory, run_alone(_train, directory)


def _directory(place: Path, models: Path, case: str) -> Path:
    kind, file, model_type, config, _ = CASES[case]
    directory = place / case
    directory.mkdir()
    shutil.copy(models / f"{kind}.model", directory / file)
    for name, content in (
        ("tokenizer_config.json", config),
        ("config.json", {"model_type": model_type} if model_type else None),
    ):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_sentencepiece_also_after_an_export(case: str, trained: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    models, ids = trained
    directory = _directory(tmp_path, models, case)
    tokenizer = load_tokenizer(str(directory))
    kind, file, model_type, _, offset = CASES[case]
    found = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:2]]
    assert found == [[one + offset for one in of_text] for of_text in ids[kind][:2]]
    assert tokenizer.is_fast and tokenizer.eos_token is not None
    (tmp_path / "export").mkdir()
    if model_type:
        (tmp_path / "export" / "config.json").write_text(json.dumps({"model_type": model_type}))
    copy_tokenizer(directory, tmp_path / "export")
    again = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert (tmp_path / "export" / file).read_bytes() == (directory / file).read_bytes()


def test_other_segmentation_damage_and_a_missing_package_are_named(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models, _ = trained
    wrong = _directory(tmp_path, models, "t5")
    (wrong / "spiece.model").rename(wrong / "sentencepiece.bpe.model")
    shutil.copy(models / "no-prefix.model", wrong / "sentencepiece.bpe.model")
    with pytest.raises(DataError, match=r"XLMRobertaTokenizer of transformers segment text otherwise than sentencep"):
        load_tokenizer(str(wrong))
    damaged = _directory(tmp_path, models, "llama")
    (damaged / "tokenizer.model").write_bytes(b"\0\1\2 not a model")
    with pytest.raises(
        DataError, match=r"tokenizer\.model is damaged, or no SentencePiece model; try to download it again$"
    ) as caught:
        load_tokenizer(str(damaged))
    assert "\n" not in str(caught.value)
    (tmp_path / "export").mkdir()
    monkeypatch.setattr(get_logger(), "propagate", True)  # a test before may have set up the log of a command
    copy_tokenizer(damaged, tmp_path / "export")
    assert not (tmp_path / "export" / "tokenizer.json").exists() and "copied as they are" in caplog.text
    plain = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("sentencepiece"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"sentencepiece is not installed; pip install sentencepiece protobuf"):
        load_tokenizer(str(damaged))
