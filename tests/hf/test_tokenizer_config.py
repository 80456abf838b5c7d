"""Tokenizer files that both transformers 4 and 5 read: compared with version 4.57 by hand, and with 5 here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.hf.export import copy_tokenizer
from megatron_ds.hf.tokenizer_config import for_both_versions
from tests.ranks import run_alone

TEXT = "ab <x>cd <y> e<img> <z>f <s>g</s> <unk>"
BACKEND: dict[str, Any] = {
    "added_tokens": [{"id": 1, "content": "<x>"}, {"id": 2, "content": "<y>"}],
    "model": {"vocab": {"a": 0, "<v>": 3}},
    "post_processor": None,
}


def added(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, "lstrip": True, "special": True}


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"extra_special_tokens": ["<x>"]}, {"additional_special_tokens": ["<x>"]}),
        (
            {"extra_special_tokens": ["<x>"], "additional_special_tokens": ["<x>", "<y>"]},
            {"additional_special_tokens": ["<x>", "<y>"]},
        ),
        # version 5 reads no second list, so a token that is not in the vocabulary would get a new id
        (
            {"extra_special_tokens": ["<x>"], "additional_special_tokens": ["<z>", "<v>"]},
            {"additional_special_tokens": ["<x>", "<v>"]},
        ),
        (
            {"extra_special_tokens": [], "additional_special_tokens": ["<z>"]},
            {"additional_special_tokens": ["<z>"]},
        ),
        ({"extra_special_tokens": ["<x>"], "additional_special_tokens": None}, {"additional_special_tokens": ["<x>"]}),
        ({"extra_special_tokens": None, "additional_special_tokens": ["<x>"]}, {"additional_special_tokens": ["<x>"]}),
        ({"extra_special_tokens": None}, {}),
        ({"extra_special_tokens": []}, {}),
        # version 5 takes how a token is cut from tokenizer.json, version 4 from here
        (
            {"extra_special_tokens": [added("<x>"), added("<z>")]},
            {"additional_special_tokens": ["<x>", added("<z>")]},
        ),
        ({"extra_special_tokens": {"image_token": "<x>"}}, {"extra_special_tokens": {"image_token": "<x>"}}),
        (
            {"extra_special_tokens": {"image_token": "<x>"}, "additional_special_tokens": ["<y>"]},
            {"extra_special_tokens": {"image_token": "<x>"}, "additional_special_tokens": ["<y>"]},
        ),
        (
            {"backend": "tokenizers", "image_token": "<x>", "bos_token": "<s>", "extra_special_tokens": ["<y>"]},
            {
                "backend": "tokenizers",
                "image_token": "<x>",
                "bos_token": "<s>",
                "extra_special_tokens": {"image_token": "<x>"},
                "additional_special_tokens": ["<y>"],
            },
        ),
        ({"image_token": "<x>"}, {"image_token": "<x>"}),
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"tokenizer_class": "Qwen3_5Tokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}),
        ({"tokenizer_class": "GPTNeoXTokenizer"}, {"tokenizer_class": "GPTNeoXTokenizer"}),
    ],
)
def test_fields(given: dict[str, Any], written: dict[str, Any]) -> None:
    assert for_both_versions(given, BACKEND) == written
    extra = written.get("extra_special_tokens", {})
    assert isinstance(extra, dict), "version 4 takes its keys"
    assert for_both_versions(written, BACKEND) == written


def frame(*parts: str) -> dict[str, Any]:
    single = [{"Sequence": {"id": "A"}} if part == "A" else {"SpecialToken": {"id": part}} for part in parts]
    return {"type": "TemplateProcessing", "single": single}


@pytest.mark.parametrize(
    ("processor", "flags"),
    [
        (None, {"add_bos_token": False}),
        ({"type": "ByteLevel"}, {"add_bos_token": False}),
        (frame("A"), {"add_bos_token": False}),
        (frame("<s>", "A"), {}),
        (frame("<s>", "A", "</s>"), {"add_eos_token": True}),
        (frame("A", "</s>"), {"add_bos_token": False, "add_eos_token": True}),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, frame("A")]}, {"add_bos_token": False}),
        (frame("[gMASK]", "<s>", "A"), {}),
        ({"type": "BertProcessing"}, {}),
    ],
)
def test_what_frames_a_text_is_told_to_classes_of_version_4(processor: Any, flags: dict[str, bool]) -> None:
    for name in ("LlamaTokenizer", "GemmaTokenizerFast"):
        given = {"tokenizer_class": name}
        assert for_both_versions(given, {**BACKEND, "post_processor": processor}) == {**given, **flags}
    contrary = {"tokenizer_class": "LlamaTokenizer", **{flag: not value for flag, value in flags.items()}}
    assert for_both_versions(contrary, {**BACKEND, "post_processor": processor}) == {**contrary, **flags}


def _make(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "▁"]
    vocab = {word: index for index, word in enumerate(words)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = {
        "fast": PreTrainedTokenizerFast(tokenizer_object=fast, image_token="<img>", **names),
        "llama": LlamaTokenizer(vocab=vocab, merges=[], add_bos_token=True),
        "llama-bare": LlamaTokenizer(vocab=vocab, merges=[], add_bos_token=False),
    }
    for name, tokenizer in made.items():
        tokenizer.add_special_tokens({"extra_special_tokens": ["<x>", "<y>"]})
        tokenizer.save_pretrained(directory / name)
    shutil.copytree(directory / "fast", directory / "both")
    file = directory / "both" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "additional_special_tokens": ["<y>", "<z>"]}))


def _ids(directory: Path) -> tuple[list[int], list[str], int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer(TEXT)["input_ids"], sorted(map(str, tokenizer.all_special_tokens)), len(tokenizer)


def _make_and_compare(folder: Path) -> dict[str, Any]:
    _make(folder / "given")
    found = {}
    for given in sorted((folder / "given").iterdir()):
        out = folder / "out" / given.name
        out.mkdir(parents=True)
        copy_tokenizer(given, out)
        assert _ids(out) == _ids(given), given.name
        found[given.name] = json.loads((out / "tokenizer_config.json").read_text())
    return found


def test_version_5_reads_the_same_ids_as_before(tmp_path: Path) -> None:
    written = run_alone(_make_and_compare, tmp_path)
    assert {name: config.get("add_bos_token") for name, config in written.items()} == {
        "both": None,
        "fast": None,
        "llama": None,
        "llama-bare": False,
    }
    assert written["both"] == written["fast"]
    for config in written.values():
        assert config["additional_special_tokens"] == ["<x>", "<y>"]
        assert isinstance(config.get("extra_special_tokens", {}), dict)
