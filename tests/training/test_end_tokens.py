"""A model that learns to end its turns with another token than its base: what its run keeps stops by it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ds as mds
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.config import RunConfig, build_run
from megatron_ds.training.datasets import open_split, taught_ends
from megatron_ds.training.resolve import resolve_run
from megatron_ds.training.statement import describe_ends
from tests.ranks import preload, run_alone
from tests.training.tiny import MODEL, WORDS

TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' <end> ' }}{% endfor %}"
EOS, END = 0, 2


def _save_base(directory: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(AutoConfig.for_model(**MODEL)).save_pretrained(directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that stops at <eos>, with a template that ends turns with <end>; and chat.jsonl."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("base")
    run_alone(_save_base, directory)
    words = {"<eos>": EOS, "<unk>": 1, "<end>": END, "user": 3, "assistant": 4}
    backend = Tokenizer(WordLevel({**words, **{word: i + 5 for i, word in enumerate(WORDS[:56])}}, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special: Any = {"eos_token": "<eos>", "unk_token": "<unk>", "additional_special_tokens": ["<end>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(directory))
    row = {"messages": [{"role": role, "content": "w1 w2"} for role in ("user", "assistant")]}
    (directory.parent / "chat.jsonl").write_text((json.dumps(row) + "\n") * 8)
    return directory


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    def make_run(**sections: Any) -> RunConfig:
        mapping: dict[str, Any] = {
            "model": {"path": str(base)},
            "data": {"format": "chat", "train": [str(base.parent / "chat.jsonl")], "seq_length": 16},
            "schedule": {"name": "constant"},
            "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2},
            "checkpoint": {"every": 2},
            "output": str(tmp_path / "run"),
        }
        mapping["data"]["cache_dir"] = str(tmp_path / "cache")
        return build_run({**mapping, **sections})

    return make_run


def stops_at(directory: Path) -> Any:
    return json.loads((directory / "generation_config.json").read_text())["eos_token_id"]


def test_checkpoints_and_exports_stop_by_what_was_learned(make: Any, tmp_path: Path) -> None:
    preload()
    run = make(export={"path": str(tmp_path / "hf")})
    mds.train(run)
    checkpoint = tmp_path / "run" / "checkpoints" / name_of(2)
    mds.export_hf(tmp_path / "run", tmp_path / "by_command")
    for directory in (checkpoint, tmp_path / "hf", tmp_path / "by_command"):
        assert stops_at(directory) == [EOS, END], directory
    text = {"format": "text", "train": [str(tmp_path / "plain.txt")], "seq_length": 16, "restart": True}
    (tmp_path / "plain.txt").write_text("w1 w2 w3 " * 50)
    mds.train(make(data=text, train={"steps": 3, "global_batch_size": 2}))
    assert stops_at(tmp_path / "run" / "checkpoints" / name_of(3)) == [EOS, END], "a resumed run on other data"


def test_token_ids_teach_an_end_too(make: Any, tmp_path: Path) -> None:
    row = {"input_ids": [3, 6, 7, END, 4, 6, 7, END], "labels": [-100] * 5 + [6, 7, END]}
    (tmp_path / "ids.jsonl").write_text((json.dumps(row) + "\n") * 4)
    run = make(data={"format": "tokenized", "train": [str(tmp_path / "ids.jsonl")], "seq_length": 16})
    resolved = resolve_run(run, 1, "cpu")
    assert taught_ends(resolved, open_split(resolved, "train")) == {END: "<end>"}


def test_adapters_carry_them_until_they_are_merged(make: Any, tmp_path: Path) -> None:
    preload()
    peft = {"r": 2, "target_modules": ["q_proj"]}
    mds.train(make(peft=peft, export={"path": str(tmp_path / "hf"), "merge": True}))
    checkpoint = tmp_path / "run" / "checkpoints" / name_of(2)
    assert StateReader(checkpoint).progress.end_ids == (END,)
    assert not (checkpoint / "generation_config.json").exists()
    mds.export_hf(tmp_path / "run", tmp_path / "merged", merge=True)
    assert stops_at(tmp_path / "merged") == stops_at(tmp_path / "hf") == [EOS, END]


@pytest.mark.parametrize(
    ("ends", "known", "sections", "says"),
    [
        ({END: "<end>"}, [EOS], {}, "kept becomes [0, 2]"),
        ({END: "<end>"}, [], {}, "kept becomes [2]"),
        (
            {END: "<end>"},
            [EOS],
            {"peft": {"r": 2}},
            "adapters have no such settings: call generate(eos_token_id=[0, 2])",
        ),
        ({END: "<end>"}, [EOS], {"peft": {"r": 2}, "export": {"path": "hf", "merge": True}}, "kept becomes [0, 2]"),
        ({END: "<end>", EOS: "<eos>"}, [EOS, END], {}, None),
        ({}, [EOS], {}, None),
        ({END: "<end>"}, [EOS], {"checkpoint": {"every": 0}}, None),
    ],
)
def test_a_new_end_is_said(make: Any, ends: Any, known: Any, sections: Any, says: str | None) -> None:
    said = describe_ends(make(**sections), ends, known)
    if says is None:
        assert said is None
        return
    assert said is not None and says in said
    assert said.startswith(
        "the data teach the model to end with <end> (2), at which its generation settings do not stop; "
    )
