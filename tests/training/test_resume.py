"""What a run says when it is to go on in data that are not those it was on."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.checkpoint.progress import Origin, Progress, decode, encode
from megatron_ds.config import RunConfig
from megatron_ds.data.indexed.files import write_index
from megatron_ds.errors import CheckpointError
from megatron_ds.training.datasets import open_split
from megatron_ds.training.resolve import resolve_run
from megatron_ds.training.resume import initial_progress

MakeRun = Callable[..., RunConfig]
WHERE = Path("out/checkpoints/step_00000002")


def began(run: RunConfig, saved: Progress | None = None) -> Progress:
    return initial_progress(
        run, saved, open_split(resolve_run(run, 1, "cpu"), "train"), WHERE if saved is not None else None
    )


def after_two_steps(run: RunConfig, tmp_path: Path) -> Progress:
    """As a checkpoint gives it back."""
    first = began(run)
    done = replace(first.with_data(samples=2 * run.train.global_batch_size), step=2, applied=2)
    (tmp_path / "progress.json").write_text(encode(done, Origin()))
    return decode(tmp_path / "progress.json")[0]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """An indexed corpus of 40 documents of 50 tokens, 62 samples of 32."""
    tokens = np.random.default_rng(0).integers(0, 60, 2000).astype("<u2")
    tokens.tofile(tmp_path / "corpus.bin")
    write_index(tmp_path / "corpus.idx", tokens.dtype, [50] * 40, range(41))
    return str(tmp_path / "corpus")


def indexed(prefix: str, **entries: Any) -> dict[str, Any]:
    return {"train": [prefix], "valid": [], **entries}


def test_the_same_data_go_on_where_they_were(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(data={"shuffle": False})
    saved = after_two_steps(run, tmp_path)
    again = began(make_run("other", data={"shuffle": False}, train={"steps": 9, "global_batch_size": 4}), saved)
    assert (again.step, again.data.samples, again.data.fingerprint) == (2, 16, saved.data.fingerprint)
    assert again.data.settings["train.steps"] == 9


def test_moved_data_are_the_same_data(make_run: MakeRun, tmp_path: Path, corpus: Path) -> None:
    moved = tmp_path / "moved.txt"
    moved.write_bytes((corpus / "train.txt").read_bytes())
    saved = after_two_steps(make_run(), tmp_path)
    assert began(make_run("other", data={"train": [str(moved)]}), saved).data.samples == 16


def test_other_files_and_other_content_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("w1 w2 w3 w4 " * 100)
    run = make_run(data={"train": [str(file)]})
    saved = after_two_steps(run, tmp_path)
    other = make_run(data={"train": [str(tmp_path / "other.txt")]})
    (tmp_path / "other.txt").write_text("w5 " * 100)
    with pytest.raises(
        CheckpointError, match=r"^data.train=/.*/other.txt is not what .*step_00000002 was .*/mine.txt; "
    ):
        began(other, saved)
    more = make_run(data={"train": [str(file), str(tmp_path / "other.txt")]})
    with pytest.raises(CheckpointError, match=r"^data.train\[1\]=.*/other.txt is not what .* trained on: nothing; "):
        began(more, saved)
    file.write_text("w1 w2 w3 w5 " * 100)
    with pytest.raises(CheckpointError) as caught:
        began(run, saved)
    assert str(caught.value) == (
        f"data.train (401 tokens, 12 samples of 32) is not what {WHERE} was trained on: other content of the same "
        "size; change it back, or set data.restart=true to resume with the new data from their first sample"
    )
    file.write_text("w1 w2 w3 w4 " * 99)
    with pytest.raises(
        CheckpointError, match=r"^data.train \(397 tokens, 12 .* was trained on: 401 tokens, 12 samples"
    ):
        began(run, saved)


def test_weights_of_a_blend(make_run: MakeRun, tmp_path: Path, corpus: Path) -> None:
    def blend(*weights: float, restart: bool = False) -> RunConfig:
        names = [str(corpus / "train.txt"), str(corpus / "valid.txt")]
        sources = [{"path": name, "weight": weight} for name, weight in zip(names, weights)]
        return make_run(data={"train": sources, "restart": restart})

    saved = after_two_steps(blend(0.7, 0.3), tmp_path)
    assert began(blend(0.7, 0.3), saved).data.samples == 16
    says = rf"^data.train\[\*\].weight=\[0.6, 0.4\] is not what {WHERE} was trained on: \[0.7, 0.3\]; change it back"
    with pytest.raises(CheckpointError, match=says):
        began(blend(0.6, 0.4), saved)
    assert began(blend(0.6, 0.4, restart=True), saved).data.samples == 0


def test_split_of_an_indexed_corpus(make_run: MakeRun, tmp_path: Path, prefix: str) -> None:
    saved = after_two_steps(make_run(format="indexed", data=indexed(prefix, split=[0.9, 0.1])), tmp_path)
    with pytest.raises(CheckpointError, match=r"^data.split=\[0.5, 0.5\] is not what .* was trained on: \[0.9, 0.1\]"):
        began(make_run(format="indexed", data=indexed(prefix, split=[0.5, 0.5])), saved)
    same_part = make_run(format="indexed", data=indexed(prefix, split=[0.9, 0.05, 0.05]))
    assert began(same_part, saved).data.samples == 16, "validation may change"


def test_a_share_that_is_held_out(make_run: MakeRun, tmp_path: Path) -> None:
    def of(share: float | None, **train: Any) -> RunConfig:
        return make_run(data={"valid": [] if share is None else {"share": share}}, train=train)

    saved = after_two_steps(of(0.1), tmp_path)
    assert began(of(0.1, steps=9), saved).data.samples == 16
    with pytest.raises(CheckpointError, match=r"^data.valid_share=0.2 is not what .* was trained on: 0.1; change it"):
        began(of(0.2), saved)
    with pytest.raises(CheckpointError, match=r"^data.valid_share=null is not what .* was trained on: 0.1; change it"):
        began(of(None), saved)


def test_more_steps_may_change_the_order_of_indexed_data(make_run: MakeRun, tmp_path: Path, prefix: str) -> None:
    def of(steps: int) -> RunConfig:
        return make_run(format="indexed", data=indexed(prefix), train={"steps": steps, "global_batch_size": 8})

    saved = after_two_steps(of(5), tmp_path)
    assert began(of(6), saved).data.samples == 16, "still one epoch"
    with pytest.raises(CheckpointError) as caught:
        began(of(20), saved)
    assert str(caught.value).startswith(
        "the order of 2,000 tokens in 40 documents, 187 samples of 32 in 3 epochs, the last shuffled separately, which "
        f"depends on the number of epochs in train.steps=20 x train.global_batch_size=8, is not what {WHERE} was "
        "trained on: 2,000 tokens in 40 documents, 62 samples of 32, with 5 x 8; change it back"
    )


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({}, {"packing": True}, r"^data.packing=true is not what .* was trained on: false; change it back"),
        ({"loss_turns": "last"}, {}, r"^data.loss_turns=all is not what .* was trained on: last; change it back"),
        ({"overlong": "drop"}, {"overlong": "cut"}, r"^data.overlong=cut is not what .* was trained on: drop"),
    ],
)
def test_conversations(make_run: MakeRun, tmp_path: Path, before: Any, after: Any, says: str, corpus: Path) -> None:
    conversation = {"messages": [{"role": role, "content": "w1 w2"} for role in ("user", "assistant") * 2]}
    long = {"messages": [{"role": role, "content": "w1 w2 " * 9} for role in ("user", "assistant")]}
    lines = [conversation] * 6 + [long] * (any("overlong" in one for one in (before, after)))
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    template = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    (tmp_path / "tokenizer").mkdir()
    for file in (corpus / "tokenizer").iterdir():
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    chat = {"train": [str(tmp_path / "chat.jsonl")], "valid": []}
    model = {"tokenizer": str(tmp_path / "tokenizer")}
    saved = after_two_steps(make_run(format="chat", data={**chat, **before}, model=model), tmp_path)
    assert began(make_run(format="chat", data={**chat, **before}, model=model), saved).data.samples == 16
    with pytest.raises(CheckpointError, match=says):
        began(make_run(format="chat", data={**chat, **after}, model=model), saved)


def test_a_checkpoint_of_an_earlier_version_tells_by_its_description(make_run: MakeRun, tmp_path: Path) -> None:
    saved = after_two_steps(make_run(), tmp_path)
    content = json.loads((tmp_path / "progress.json").read_text())
    del content["progress"]["data"]["settings"]
    (tmp_path / "progress.json").write_text(json.dumps(content))
    old, _ = decode(tmp_path / "progress.json")
    assert asdict(old.data) == {**asdict(saved.data), "settings": {}}
    assert began(make_run(), old).data.samples == 16
    other = tmp_path / "other.txt"
    other.write_text("w5 " * 100)
    with pytest.raises(CheckpointError, match=r"^data.train \(101 tokens, .* was trained on: 2,501 tokens, 78 samples"):
        began(make_run(data={"train": [str(other)]}), old)


def test_weights_of_the_past_must_stay_and_those_of_the_future_may_change(
    make_run: MakeRun, tmp_path: Path, corpus: Path
) -> None:
    def run(output: str, *weights: Any) -> RunConfig:
        files = [str(corpus / name) for name in ("train.txt", "valid.txt")]
        sources = [{"path": path, "weight": weight} for path, weight in zip(files, weights)]
        return make_run(output, data={"train": sources, "valid": []})

    saved = after_two_steps(run("out", {0: 0.7, 1: 0.2}, 0.3), tmp_path)
    assert [first for first, _ in saved.data.phases] == [0, 8]
    for later in ({0: 0.7, 1: 0.2, 2: 0.9}, {0: 0.7, 1: 0.2, 100: 0.0}, {0: 0.7, 1: 0.2}):
        assert began(run("other", later, 0.3), saved).data.samples == 16
    for other in (0.7, {0: 0.7, 1: 0.3}, {0: 0.6, 1: 0.2}):
        with pytest.raises(CheckpointError, match=r"^data.train\[\*\].weight=.* is not what .* was trained on: "):
            began(run("other", other, 0.3), saved)
    constant = after_two_steps(run("out", 0.7, 0.3), tmp_path)
    assert began(run("other", {0: 0.7, 2: 0.1}, 0.3), constant).data.samples == 16
    with pytest.raises(CheckpointError, match=r"^data.train\[\*\].weight="):
        began(run("other", {0: 0.7, 1: 0.1}, 0.3), constant)
