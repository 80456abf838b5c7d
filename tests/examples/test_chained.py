"""The examples that build on one another: every command of their pages, in order, with fewer steps."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ds import engine
from megatron_ds.cli.main import _run
from megatron_ds.config import load_run
from megatron_ds.training.launch import train
from tests.forked_python import run_python

ROOT = Path(__file__).parents[2]
SHORT = ["train.steps=4", "schedule.warmup_steps=1", "train.eval_every=2"]
SMALLER = [*SHORT, "train.eval_every=4", "train.global_batch_size=4", "train.micro_batch_size=2", "data.seq_length=64"]


def commands(example: str) -> list[list[str]]:
    page = (ROOT / "examples" / example / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `out/` is."""
    return tmp_path_factory.mktemp("place")


def moved(word: str, place: Path) -> str:
    """A word of a command with `out/` elsewhere, in a run file too."""
    if word.endswith(".yaml"):
        copy = place / f"{Path(word).parent.name}.yaml"
        copy.write_text((ROOT / word).read_text(encoding="utf-8").replace("out/", f"{place}/out/"), encoding="utf-8")
        return str(copy)
    return re.sub(r"^([a-z._]+=)?out/", rf"\g<1>{place}/out/", word)


def run_command(words: list[str], place: Path, capsys: pytest.CaptureFixture[str], short: Sequence[str] = SHORT) -> str:
    """What it prints."""
    words = [moved(word, place) for word in words]
    if words[0] == "python":
        return run_python(*words[1:], timeout=240, check=True).stdout
    assert words[0] == "megatron-ds"
    if words[1] == "train":
        overrides = [word for word in words[3:] if "=" in word]
        train(load_run(words[2], [*overrides, *short]), int(words[words.index("--nproc") + 1]))
    else:
        assert _run(words[1:]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def _at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    engine.preload()


def found(output: Path, field: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[field] for line in lines if field in line]


@pytest.mark.usefixtures("_at_the_root")
def test_blend_then_chat_then_lora(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        example: [run_command(words, place, capsys) for words in commands(example)]
        for example in ("pretrain_blend", "finetune_chat", "finetune_lora")
    }
    out = place / "out"
    taken = json.loads((out / "blend" / "run" / "data.json").read_text())
    assert [share["samples"] for share in taken["sources"]] == [18, 6] and taken["samples"] == 24
    for run in ("blend", "chat", "lora"):
        valid = found(out / run / "run", "valid_loss")
        assert len(valid) == 2 and valid[1] < valid[0], run
    assert (out / "chat" / "hf" / "chat_template.jinja").is_file()
    assert {path.name for path in (out / "lora" / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    }
    before, after = told["finetune_chat"][1], told["finetune_chat"][-1]
    assert before.splitlines()[0] == f"replies of {out}/blend/hf:" and len(after.splitlines()) == 4
    of_adapter, of_merged = told["finetune_lora"][1], told["finetune_lora"][-1]
    assert of_adapter.splitlines()[1:] == of_merged.splitlines()[1:]
    assert "⟦" in told["finetune_chat"][0] and "conversations" in told["finetune_chat"][0]


@pytest.mark.usefixtures("_at_the_root")
def test_pretrain_moe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared with a dense model, and made of it: the mixture then begins where the dense model does."""
    told = [run_command(words, place, capsys, SMALLER) for words in commands("pretrain_moe")]
    out = place / "out" / "moe"
    for run in ("run", "dense", "upcycled_run", "continued"):
        loss = found(out / run, "loss")
        assert len(loss) == 4 and loss[-1] < loss[0], run
    table = told[2].splitlines()
    assert [line.partition(":")[0] for line in table if "steps in" in line] == [f"{out}/dense", f"{out}/run"]
    assert "entropy" in table[-2] and len(table) == 6
    assert found(out / "upcycled_run", "loss")[0] == pytest.approx(found(out / "continued", "loss")[0], abs=1e-4)


@pytest.mark.usefixtures("_at_the_root")
def test_classify(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A BERT, a new head over it, and transformers' pipeline on the export."""
    short = [*SMALLER, "train.steps=2", "train.epochs=null"]
    out, told = place / "out" / "classify", []
    for words in commands("classify"):
        told.append(run_command(words, place, capsys, short))
        if len(told) == 2:  # a tenth of the rows to classify, which takes most of the time
            valid = out / "data" / "valid.jsonl"
            lines = valid.read_text(encoding="utf-8").splitlines(keepends=True)
            valid.write_text("".join(lines[::10]), encoding="utf-8")
    rows = len(lines[::10])
    assert "speech 700" in told[1] and rows == 30
    assert "class       novel: 700 (33.3%)\n" in told[2]
    assert re.search(r"tokens, label \w+, \d+ positions", told[2])
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line["metrics"] for line in lines if "valid_loss" in line][-1]
    accuracy, *shown = told[4].splitlines()
    assert accuracy == f"{out}/hf: accuracy {last['accuracy']:.1%} ({round(rows * last['accuracy'])} of {rows})"
    assert len(shown) == 4 and all(f"{kind} " in shown[0] for kind in ("conversation", "novel", "speech"))


@pytest.mark.usefixtures("_at_the_root")
def test_long_context(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first example's model stretched, on texts of 512 tokens of which each rank has a half."""
    short = [*SHORT, "train.eval_every=4", "train.global_batch_size=2", "train.micro_batch_size=1"]
    first, extend, draw = commands("long_context")
    run_command(first, place, capsys, short)
    run_command(extend, place, capsys, [*short, "data.seq_length=512"])
    out = place / "out" / "long_context"
    loss = found(out / "run", "loss")
    assert len(loss) == 4 and loss[-1] < loss[0]
    config = json.loads((out / "hf" / "config.json").read_text())
    assert (config["rope_parameters"]["rope_type"], config["max_position_embeddings"]) == ("yarn", 2048)
    png = f"{out}/drawn.png"
    lines = run_command([*draw, png, "1"], place, capsys).splitlines()
    assert [line[:24].strip() for line in lines[1:-1]] == ["before", "stretched, not trained", "after"]
    assert lines[-1] == f"drawn: {png}" and Path(png).read_bytes().startswith(b"\x89PNG")
    before, stretched, after = ([float(word) for word in line[24:].split()] for line in lines[1:-1])
    assert before != stretched and after[-1] < before[-1]  # four steps teach something
