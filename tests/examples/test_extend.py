"""The package outside, `examples/extend`: every command of its page, in processes of their own.

What it registers stays in a process, so none of it is imported here.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ds.config import load_run
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.training.launch import train
from tests.forked_python import run_python
from tests.ranks import run_alone, run_local_ranks

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "extend"
SHORT = ["train.steps=6", "schedule.warmup_steps=1", "train.eval_every=2"]


def run_program(place: Path, *words: str, status: int = 0, cold: bool = False) -> str:
    """Run `megatron-ds` on words whose `out/` is elsewhere, in a fork unless `cold`; return what it prints."""
    moved = [word.replace("out/", f"{place}/out/") if word.startswith("out/") else word for word in words]
    environ = {"XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    done: subprocess.CompletedProcess[str]
    if cold:
        program, full = Path(sys.executable).with_name("megatron-ds"), {**os.environ, **environ}
        done = subprocess.run(
            [str(program), *moved], cwd=ROOT, env=full, capture_output=True, text=True, timeout=240, check=False
        )
    else:
        done = run_python("-m", "megatron_ds", *moved, cwd=ROOT, timeout=240, **environ)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extend")


def run_file(place: Path) -> str:
    text = (EXAMPLE / "run.yaml").read_text(encoding="utf-8").replace("out/extend", f"{place}/out/extend")
    (place / "run.yaml").write_text(text, encoding="utf-8")
    return str(place / "run.yaml")


def test_every_command_of_the_page(place: Path) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[:2] for words in commands] == [["megatron-ds", name] for name in ("train", "verify", "inspect")]
    train, verify, inspect = (
        [run_file(place) if word == "examples/extend/run.yaml" else word for word in words[1:]] for words in commands
    )
    shown = run_program(place, *train, *SHORT, cold=True)
    assert "its predictions in transformers equal those in training: relative error" in shown
    lines = lines_of(place / "out" / "extend")
    steps, valid = ([line for line in lines if key in line] for key in ("loss", "valid_loss"))
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"]
    assert all(0.0 < line["metrics"]["labelled"] < 0.9 for line in lines), "of the objective"
    lowest = [line["metrics"].get("best_valid_loss") for line in steps]
    assert lowest == [None, None, valid[0]["valid_loss"], None, valid[1]["valid_loss"], None], "of the callback"
    assert "verdict     equal to transformers" in run_program(place, *verify)
    assert "paragraphs of up to 64 tokens" in run_program(place, *inspect)


def test_the_callback_stops_a_run_that_learns_nothing(place: Path) -> None:
    still = ["optimizer.lr=0.0", "schedule.min_lr=0.0", f"output={place}/still", "export=", "train.eval_every=1"]
    shown = run_program(place, "train", run_file(place), "--nproc", "2", *SHORT, *still)
    assert "stopped by callback stop_when_flat after step 3 of 6" in shown


def test_the_objective_is_the_same_at_another_layout(place: Path) -> None:
    losses = {}
    for name, ranks, layout in (
        ("alone", 1, ["parallel.tensor=1", "parallel.sequence=false"]),
        ("pp2", 2, ["parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=2"]),
        ("tp2", 2, []),
    ):
        output = place / name
        options = [*layout, f"output={output}", "export=", "train.steps=3", "train.global_batch_size=16"]
        run_program(place, "train", run_file(place), "--nproc", str(ranks), *SHORT[1:], *options)
        losses[name] = [line.get("loss", line.get("valid_loss")) for line in lines_of(output)]
    assert len(losses["alone"]) == 5
    for name in ("pp2", "tp2"):
        assert losses[name] == pytest.approx(losses["alone"], rel=2e-5), name


def test_ranks_of_a_launcher_import_the_package_themselves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = [*SHORT, "train.steps=2", "export=", f"output={place}/launched"]
    file = run_file(place)

    def rank(info: RankInfo) -> int:
        assert "harbor" not in FAMILIES
        return train(load_run(file, options)).steps

    assert run_local_ranks(rank, 2) == [2, 2]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "train.objective=completions",
            r"train\.objective=completions is not one of auto, .*did you mean completion\?",
        ),
        ("data.format=paragraph", r"data\.format=paragraph is not one of text, .*; did you mean paragraphs\?"),
        ("data.options={min_token: 3}", r"data\.options\.min_token: unknown key; did you mean .*min_tokens\?"),
        ("callbacks=[stop_when_fat]", r"callbacks\[0\]=stop_when_fat is not one of stop_when_flat; did you mean .*\?"),
        ("imports=[]", r"data\.format=paragraphs is not one of text, chat, tokenized, indexed, labelled"),
    ],
)
def test_wrong_names_are_refused_in_one_line(place: Path, override: str, line: str) -> None:
    shown = run_program(place, "train", run_file(place), "--nproc", "2", override, status=2)
    assert re.fullmatch(f"error: {line}\n", shown), shown


def _kept_labels() -> tuple[list[int], list[int], int]:
    """Labels with loss in rows of 32 positions: whole, on two context ranks that hold two chunks each, and counted."""
    from examples.extend.my_extension.objective import SPEC, completed, own_part

    batch, parts = {"targets": torch.arange(64).view(2, 32)}, []
    for rank in range(2):
        axis = Axis(2, rank, (0, 1))
        context = ContextParallel(axis, Axis(), axis, zigzag=True)
        SPEC.check_parts(batch, batch, context)
        labels = SPEC.labels_in(SPEC.with_own_labels(batch, context))
        parts.append(own_part(completed(labels), context)["targets"])
    found = [kept[kept >= 0].tolist() for kept in (completed(batch)["targets"], torch.cat(parts))]
    return found[0], sorted(found[1]), int(SPEC.count_labels(batch))


def test_the_objective_keeps_the_same_labels_on_context_ranks() -> None:
    whole, over_ranks, count = run_alone(_kept_labels)
    assert over_ranks == whole and count == len(whole) == 2 * (32 - 7)
