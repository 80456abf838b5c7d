"""Data formats by name: settings that a format does not heed are refused, and formats from outside work like ours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.columns import COLUMNS, Column, declare
from megatron_ds.config import RunConfig, build_run, load_run
from megatron_ds.config.schema_base import Section
from megatron_ds.data import (
    FORMATS,
    Causal,
    ChatOptions,
    DataFormat,
    DatasetRequest,
    Order,
    Sample,
    blank_sample,
    check_format,
    collate,
    format_options,
    open_dataset,
)
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.training.resolve import resolve_run
from tests.parity.cases import CONFIGS


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a test registers and declares."""
    for registry in (FORMATS, COLUMNS):
        monkeypatch.setattr(registry, "_entries", dict(registry.items()))


def run_with(data: dict[str, Any], **model: Any) -> RunConfig:
    return build_run(
        {
            "model": model or {"path": "hf_dir"},
            "data": {"train": ["corpus.txt"], **data},
            "train": {"steps": 10},
            "output": "out",
        }
    )


def refusal(run: RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_format(run.data, run.model.tokenizer_path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"format": "txt"},
            "data.format=txt is not one of text, chat, tokenized, indexed, labelled; did you mean text?",
        ),
        (
            {"packing": True},
            "data.packing=true does nothing with data.format=text; remove it, or use data.format=chat",
        ),
        (
            {"loss_turns": "last", "format": "indexed"},
            "data.loss_turns=last does nothing with data.format=indexed; remove it, or use data.format=chat",
        ),
        (
            {"split": [9, 1]},
            "data.split=[9.0, 1.0] does nothing with data.format=text; remove it, or use data.format=indexed",
        ),
        (
            {"options": {"column": "text"}},
            'data.options={"column": "text"} does nothing with data.format=text; remove it',
        ),
        (
            {"format": "chat", "options": {"packing": True}},
            'data.options={"packing": true} does nothing with data.format=chat; remove it',
        ),
        ({"columns": {"txt": "content"}}, "data.columns.txt: txt is not one of text; did you mean text?"),
        (
            {"columns": {"tokens": "input_ids"}, "format": "tokenized"},
            "data.columns.tokens=input_ids: our name comes first; try data.columns.input_ids=tokens",
        ),
        (
            {"bad_rows": "skip", "format": "indexed"},
            "data.bad_rows=skip does nothing with data.format=indexed, which has no fields; remove it, or use "
            "data.format=text or chat or tokenized or labelled",
        ),
        (
            {"train": [{"path": "a", "split": "train"}], "format": "indexed"},
            "data.train[0].split=train does nothing with data.format=indexed, which has no fields; remove it, or use "
            "data.format=text or chat or tokenized or labelled",
        ),
    ],
)
def test_what_a_format_does_not_heed_is_refused(data: dict[str, Any], expected: str) -> None:
    assert refusal(run_with(data)) == expected


def test_a_format_without_its_tokenizer_is_refused() -> None:
    assert refusal(run_with({}, config={"model_type": "llama"})) == (
        "model.tokenizer is missing: data.format=text with model.config needs one; "
        "give the directory of a tokenizer, or use data.format=tokenized"
    )
    run = run_with({"format": "tokenized"}, config={"model_type": "llama"})
    check_format(run.data, run.model.tokenizer_path)


def test_a_run_is_refused_before_its_model_is_read() -> None:
    with pytest.raises(ConfigError, match=r"^data\.format=txt is not one of text, chat, tokenized, indexed, labelled"):
        resolve_run(run_with({"format": "txt"}), 1, "cpu")


def test_options_of_chat_are_keys_of_the_section() -> None:
    run = run_with({"format": "chat", "packing": True, "overlong": "cut"})
    assert format_options(run.data) == ChatOptions(loss_turns="all", overlong="cut", packing=True)


class CountOptions(Section):
    start: int
    step: int = 1
    packing: bool = False


class Counting:
    """Sample i: positions count from i + start; scores are in a column of its own."""

    columns = ("input_ids", "targets", "scores")
    target_length = None
    ordered = False

    def __init__(self, request: DatasetRequest) -> None:
        assert isinstance(request.options, CountOptions)
        self.options, self.seq_length = request.options, request.seq_length
        self.size = sum(int(source) for source in request.sources)
        self.fingerprint = f"{request.sources} {self.options}"

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> Sample:
        ids = self.options.start + index % self.size + np.arange(self.seq_length) * self.options.step
        return {"input_ids": ids, "targets": ids + 1, "scores": np.array(index, dtype=np.float32)}

    def blank(self) -> Sample:
        return blank_sample(self.columns, self.seq_length, None)

    def describe(self) -> str:
        return f"{self.size} numbers"


@pytest.fixture
def counting() -> DataFormat:
    declare(Column("scores", "sample", "float32"))
    return FORMATS.register("counting", DataFormat(Counting, keys=("packing",), options=CountOptions))


def test_a_format_from_outside_is_checked_with_its_options(counting: DataFormat, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: hf_dir}\ndata: {train: [9]}\ntrain: {steps: 10}\noutput: out\n")
    plain = ["data.train=['9']", "data.format=counting"]
    run = load_run(path, [*plain, "data.options={start: 3}", "data.packing=true"])
    check_format(run.data, None)
    assert format_options(run.data) == CountOptions(start=3, packing=True)
    for options, expected in (
        ("{}", "data.options.start is missing"),
        ("{start: 1, stp: 2}", "data.options.stp: unknown key; did you mean step?"),
        ("{start: one}", "data.options.start=one is not an integer"),
        ("{start: 1, packing: true}", "data.options.packing: unknown key; did you mean data.packing?"),
    ):
        assert refusal(load_run(path, [*plain, f"data.options={options}"])) == expected
    assert refusal(load_run(path, [*plain, "data.options={start: 1}", "data.loss_turns=last"])) == (
        "data.loss_turns=last does nothing with data.format=counting; remove it, or use data.format=chat"
    )


def test_a_format_from_outside_is_blended_and_ordered(counting: DataFormat, tmp_path: Path) -> None:
    options = CountOptions(start=3)

    def open_(**given: Any) -> Any:
        return open_dataset("counting", Causal(), ["5", "7"], 4, 100, cache_dir=str(tmp_path), options=options, **given)

    def firsts(shuffle: bool) -> list[int]:
        blend = open_(weights=[1, 3], order=Order(40, 3, shuffle))
        return [int(blend.sample(index)["input_ids"][0]) for index in range(40)]

    batch = collate(open_(weights=[1, 3], order=Order(40, 3, True)), [0, 1, -1])
    assert batch["scores"].dtype.is_floating_point and batch["scores"].shape == (3,)
    assert batch["targets"][2].tolist() == [-100] * 4
    assert set(firsts(True)) == set(range(3, 10)), "every number of both sources"
    assert firsts(True) == firsts(True) != firsts(False)
    concatenated = open_()
    assert len(concatenated) == 12 and concatenated.sample(13)["input_ids"].tolist() == [4, 5, 6, 7]


def test_a_column_that_is_not_as_declared_is_refused(counting: DataFormat) -> None:
    dataset = open_dataset("counting", Causal(), ["5"], 4, 100, options=CountOptions(start=3))
    narrow = {**dataset.sample(0), "targets": np.zeros(4, dtype=np.int32)}
    dataset.sample = lambda index: narrow  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"^data: column targets of a sample is int32 \(4,\), but is declared as int64"):
        collate(dataset, [0])


def test_sources_of_a_blend_are_looked_for_before_the_first_is_opened() -> None:
    opened: list[str] = []

    def find(source: str) -> None:
        if source == "none":
            raise DataError(f"data: {source}: no such file")

    def open_one(request: DatasetRequest) -> Any:
        opened.extend(request.sources)

    FORMATS.register("lost", DataFormat(open_one, check_source=find))
    with pytest.raises(DataError, match="none: no such file"):
        open_dataset("lost", Causal(), ["here", "none"], 4, 9, weights=[1, 1], order=Order(4, 0, False))
    assert opened == []


def test_a_key_that_the_section_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^DataFormat\.keys: data\.pack is not one of .*; did you mean packing\?$"):
        DataFormat(Counting, keys=("pack",))


def test_a_run_opens_a_format_from_outside(counting: DataFormat) -> None:
    from megatron_ds.training.datasets import open_split

    data = {"format": "counting", "train": ["5", "7"], "seq_length": 4, "options": {"start": 3, "step": 2}}
    resolved = resolve_run(run_with(data, config=CONFIGS["llama"]), 1, "cpu")
    dataset = open_split(resolved, "train")
    assert dataset.sample(0)["input_ids"].tolist() == [3, 5, 7, 9]
