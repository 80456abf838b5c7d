"""`megatron-ds init`: run files that start as they are, the format of each kind of data, and refusals."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from megatron_ds.cli.main import _run
from megatron_ds.config import load_run
from tests.ranks import preload
from tests.training.tiny import MODEL, write_tokenizer


@pytest.fixture
def place(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model in hf/ and data; the current directory of the test."""
    LlamaConfig(
        **{key: value for key, value in MODEL.items() if key != "model_type"}, architectures=["LlamaForCausalLM"]
    ).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    for name in ("train.txt", "train.jsonl"):
        (tmp_path / name).write_bytes((corpus / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments: str) -> int:
    return _run(["init", "run.yaml", "--model", "hf", "--random", "--overwrite", *arguments])


def test_a_run_file_that_starts_as_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init("--data", "train.txt", "--gpus", "0") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "run.yaml: for one rank on the CPU, tensor 1, ZeRO-1, recompute none"
    assert shown[2].split() == ["start", "megatron-ds", "train", "run.yaml"]
    text = (place / "run.yaml").read_text()
    assert text.startswith("# Pretrain hf on train.txt.") and text.count("# ") > 15
    assert max(map(len, text.splitlines())) <= 120
    preload()
    assert _run(["train", "run.yaml"]) == 0, "as it is: a small corpus gives fewer steps than a usual warm-up"
    assert (place / "out" / "run" / "hf" / "config.json").is_file()


@pytest.mark.parametrize(
    ("row", "format", "column"),
    [
        ({"text": "a b"}, "text", None),
        ({"id": "1", "content": "a longer text"}, "text", "content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "chat", None),
        ({"conversations": [{"from": "human", "value": "a"}]}, "chat", None),
        ({"prompt": "a question", "completion": "b"}, "chat", None),
        ({"instruction": "a question", "input": "", "output": "b"}, "chat", None),
        ({"input_ids": [1, 2]}, "tokenized", None),
        ({"number": 1}, None, None),
    ],
)
def test_the_format_is_told_by_the_first_row(
    place: Path, row: dict[str, object], format: str | None, column: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.jsonl").write_text(json.dumps(row) + "\n")
    if format is None:
        assert init("--data", "data.jsonl") == 2
        assert capsys.readouterr().err == (
            "error: --data=data.jsonl: its first row has the fields number, of which no format reads one; try text, "
            "messages or input_ids\n"
        )
        return
    assert init("--data", "data.jsonl", "--gpus", "0") == 0, capsys.readouterr().err
    data = load_run("run.yaml").data
    assert (data.format, data.train[0].column) == (format, column)


def test_pairs_for_preference_training_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "a long one"}) + "\n")
    assert init("--data", "data.jsonl", "--gpus", "0") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: --data=data.jsonl: its rows are pairs for preference training, chosen and rejected")


def test_gpus_and_adapters(place: Path, capsys: pytest.CaptureFixture[str]) -> None:

    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained("hf")).save_pretrained("hf")
    arguments = ["init", "run.yaml", "--model", "hf", "--data", "train.txt", "--valid", "train.txt", "--lora"]
    assert _run([*arguments, "--gpus", "16", "--gpu-memory", "24GB"]) == 0, capsys.readouterr().err
    assert "start              torchrun --nnodes 2 --nproc-per-node 8 ..." in capsys.readouterr().out
    run = load_run("run.yaml")
    assert run.peft is not None and run.train.global_batch_size == 32 and run.output == "out/run/run"
    assert "bf16: {enabled: true}" in Path("run.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "train.txt", "--lora"], "--lora with --random would train adapters of random weights"),
        (["--data", "none.txt"], "none.txt"),
        (["--data", "train.txt", "--gpus", "2", "--gpu-memory", "80"], "--gpu-memory='80' is not a size"),
        (["--data", "train.txt", "--gpus", "2", "--gpu-memory", "500MB"], "--gpus=2: the model needs about 1.0 GB"),
        (["--data", "train.txt", "--model", "hff"], "--model=hff does not exist"),
    ],
)
def test_refusals(place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1
    assert not Path("run.yaml").exists()


def test_a_file_is_not_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine")
    assert _run(["init", "run.yaml", "--model", "hf", "--data", "train.txt"]) == 2
    assert "RUN.yaml=run.yaml exists; choose another name, or try --overwrite" in capsys.readouterr().err
    assert Path("run.yaml").read_text() == "mine"
