"""Runs on labelled data: metrics are those of the export in transformers, at any layout; LoRA with a new head."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatron_ds as mds
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.cli.main import _run
from megatron_ds.config import build_run
from megatron_ds.models.label_metrics import spearman
from tests.ranks import preload, run_alone
from tests.training.tiny import MODEL, WORDS, write_tokenizer

PEFT = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
NAMES = ["sea", "land", "sky"]
Rows = list[dict[str, Any]]


def _texts(number: int, seed: int) -> list[list[str]]:
    """Words, mostly of one third of the vocabulary."""
    draw = np.random.default_rng(seed)
    found = []
    for index in range(number):
        own = WORDS[index % 3 :: 3]
        length = int(draw.integers(3, 12))
        found.append([str(draw.choice(own if draw.random() < 0.8 else WORDS)) for _ in range(length)])
    return found


def _rows(kind: str, number: int, seed: int) -> Rows:
    rows: Rows = []
    for index, words in enumerate(_texts(number, seed)):
        text = " ".join(words)
        if kind == "words":
            rows.append({"tokens": words, "tags": [NAMES[WORDS.index(word) % 3] for word in words]})
        elif kind == "scores":
            rows.append({"text": text, "score": len(words) / 4 + index % 3})
        elif kind == "several":
            rows.append({"text": text, "labels": [NAMES[index % 3], *(["sky"] if index % 2 and index % 3 < 2 else [])]})
        else:
            rows.append({"text": text, "label": NAMES[index % 3]})
    return rows


HEADS: dict[str, dict[str, Any]] = {
    "classes": {"labels": NAMES},
    "several": {"labels": NAMES, "problem": "multi_label_classification"},
    "scores": {"labels": 1},
    "words": {"labels": NAMES, "kind": "token"},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "classes": (2, {"tensor": 2, "sequence": True}, 3),
    "several": (1, {}, 1),
    "scores": (4, {"pipeline": 2}, 1),  # two data ranks
    "words": (2, {"tensor": 2, "sequence": True}, 1),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, rows of each kind, and a pretrained base model."""
    folder = tmp_path_factory.mktemp("labelled")
    write_tokenizer(folder / "tokenizer")
    for kind in HEADS:
        for name, number, seed in (("train", 64, 0), ("valid", 11, 1)):  # 11: the last batch is not full
            lines = "".join(json.dumps(row) + "\n" for row in _rows(kind, number, seed))
            (folder / f"{kind}_{name}.jsonl").write_text(lines)
    run_alone(_save_base, folder / "base")
    write_tokenizer(folder / "base")
    return folder


def _save_base(directory: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(AutoConfig.for_model(**MODEL)).save_pretrained(directory)


def mapping(place: Path, output: Path, kind: str, **model: Any) -> dict[str, Any]:
    _, parallel, stage = LAYOUTS[kind]
    return {
        "model": {
            **(model or {"config": MODEL, "tokenizer": str(place / "tokenizer")}),
            "head": {**HEADS[kind], "pad_token_id": 0},
        },
        "parallel": parallel,
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "data": {
            "format": "labelled",
            "train": [str(place / f"{kind}_train.jsonl")],
            "valid": [str(place / f"{kind}_valid.jsonl")],
            "seq_length": 16,
            "cache_dir": str(place / "cache"),
        },
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "eval_every": 2},
        "output": str(output),
    }


def lines(output: Path | str, field: str) -> list[dict[str, Any]]:
    found = map(json.loads, (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in found if field in line]


def _logits(directory: Path, kind: str, rows: Rows) -> list[Any]:
    """transformers' logits of each row by itself, (L,) or (words, L), and what its pipeline says."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    loader = transformers.AutoModelForTokenClassification if kind == "words" else None
    model = (loader or transformers.AutoModelForSequenceClassification).from_pretrained(directory).eval()
    found = []
    for row in rows:
        inputs = tokenizer(row.get("text") or " ".join(row["tokens"]), return_tensors="pt")
        with torch.no_grad():
            found.append(model(input_ids=inputs["input_ids"]).logits[0])
    if kind == "classes":
        pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
        said = [pipe(row["text"])[0]["label"] for row in rows]
        assert said == [NAMES[int(one.argmax())] for one in found]
    return found


def _expected(kind: str, logits: list[Any], rows: Rows) -> dict[str, float]:
    """The metrics by their definitions."""
    if kind == "scores":
        predicted = np.array([float(one) for one in logits])
        return {"spearman": spearman(predicted, np.array([row["score"] for row in rows]))}
    if kind == "several":
        predicted = np.array([[bool(score > 0) for score in one] for one in logits])
        actual = np.array([[name in row["labels"] for name in NAMES] for row in rows])
        accuracy = float((predicted == actual).all(1).mean())
    else:
        numbers = torch.cat([one.reshape(-1, 3).argmax(1) for one in logits]).numpy()
        names = [name for row in rows for name in (row["tags"] if kind == "words" else [row["label"]])]
        predicted = numbers[:, None] == np.arange(3)
        actual = np.array([NAMES.index(name) for name in names])[:, None] == np.arange(3)
        accuracy = float((predicted == actual).all(1).mean())
    hits, both = (predicted & actual).sum(0), predicted.sum(0) + actual.sum(0)
    return {"accuracy": accuracy, "macro_f1": float((2 * hits[both > 0] / both[both > 0]).mean())}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.sweep if kind == "several" else ()) for kind in HEADS]
)
def test_metrics_are_those_of_the_export_in_transformers(kind: str, place: Path, tmp_path: Path) -> None:
    """With two micro-batches on each data rank and a last batch that is not full, at a layout with every axis."""
    preload()
    content = mapping(place, tmp_path / "run", kind)
    content["export"] = {"path": str(tmp_path / "hf"), "check": True}
    result = mds.train(build_run(content), LAYOUTS[kind][0])
    rows = _rows(kind, 11, 1)
    logits = run_alone(_logits, tmp_path / "hf", kind, rows)
    first, last = lines(tmp_path / "run", "valid_loss")
    assert last["metrics"] == pytest.approx(_expected(kind, logits, rows), abs=1e-6)
    assert result.last_valid_metrics == last["metrics"]
    assert last["valid_loss"] < first["valid_loss"]
    steps = lines(tmp_path / "run", "loss")
    assert all(("metrics" in step) == (kind != "scores") for step in steps)
    assert kind == "words" or [step["tokens"] for step in steps] == [24 if kind == "several" else 8] * 4
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    if kind != "scores":
        assert config["id2label"] == {str(number): name for number, name in enumerate(NAMES)}


# ---- adapters --------------------------------------------------------------------------------------------------------


def _check_adapters(adapter: Path, merged: Path, by_command: Path, base: Path, rows: Rows) -> None:
    """peft's two ways to load, and transformers' of the merged directories: the same logits."""
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options: Any = {"num_labels": 3, "pad_token_id": 0}
    models = [
        AutoPeftModelForSequenceClassification.from_pretrained(adapter, **options),
        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, **options), adapter),
        AutoModelForSequenceClassification.from_pretrained(merged),
        AutoModelForSequenceClassification.from_pretrained(by_command),
    ]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    found = []
    for model in models:
        ids = [tokenizer(row["text"], return_tensors="pt")["input_ids"] for row in rows]
        with torch.no_grad():
            found.append(torch.cat([model.eval()(input_ids=one).logits for one in ids]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    assert models[2].config.id2label == models[3].config.id2label == dict(enumerate(NAMES))


def test_adapters_with_a_new_head(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head is trained in full and saved as peft does; resumed at another layout, exported and merged."""
    preload()
    content = mapping(place, tmp_path / "run", "classes", path=str(place / "base"))
    content |= {"peft": PEFT, "checkpoint": {"every": 2}, "schedule": {"name": "constant"}}
    whole = {**content, "output": str(tmp_path / "whole"), "checkpoint": {"every": 0}}
    mds.train(build_run({**whole, "export": {"path": str(tmp_path / "merged"), "merge": True}}), 2)
    mds.train(build_run({**content, "train": {**content["train"], "steps": 2}}), 2)
    other: dict[str, Any] = {"parallel": {"pipeline": 2}, "deepspeed": {"zero_optimization": {"stage": 1}}}
    mds.train(build_run({**content, **other, "export": {"path": str(tmp_path / "adapter"), "check": True}}), 2)
    straight, resumed = ([line["loss"] for line in lines(tmp_path / one, "loss")] for one in ("whole", "run"))
    assert resumed == pytest.approx(straight, rel=2e-5) and straight[-1] < straight[0]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    head = json.loads((tmp_path / "adapter" / "label_head.json").read_text())
    assert head == {"labels": NAMES, "kind": "sequence", "pad_token_id": 0}
    assert not list((tmp_path / "run" / "checkpoints" / name_of(4)).glob("model*"))
    assert _run(["export", str(tmp_path / "run"), str(tmp_path / "by_command"), "--merge"]) == 0
    names = ("adapter", "merged", "by_command")
    run_alone(_check_adapters, *(tmp_path / name for name in names), place / "base", _rows("classes", 11, 1))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"data.format": "tokenized"},
            "data.format=tokenized has no labels, and the model has a label head; try data.",
        ),
        ({"model.head": None}, "data.format=labelled is for models with a label head, and this one has none; try"),
        ({"data.mask_rate": 0.2}, "data.mask_rate=0.2 has no effect for a llama model; remove it"),
    ],
)
def test_what_runs_are_refused_for(
    change: dict[str, Any], says: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = mapping(place, tmp_path / "run", "several")
    for key, value in change.items():
        section, name = key.split(".")
        content[section][name] = value
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content))
    assert _run(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {says}") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
