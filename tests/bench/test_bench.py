"""The bench's plumbing: a tiny case by the command, and what is made of figures."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest

from bench import __main__ as command
from bench import arena
from bench.arena import ContestantError, Samples, compete
from bench.cases import CASES, Target
from bench.combine import main as combine
from bench.contestant import RUNNERS
from bench.files import start_training
from bench.gemm import device_peak
from bench.report import markdown
from bench.result import CaseResult, EntryResult, check_same_work, judge, write_json
from bench.runs import merge, read_json
from bench.work import Spec, Work, write_model
from tests.forked_python import ForkedPython, run_python
from tests.halves import swept
from tests.ranks import run_alone


class ForkedContestant(ForkedPython):
    """A contestant in a fork, which saves its imports, in place of what the arena starts."""

    def __init__(self, command: list[str], stderr: TextIO, env: dict[str, str], **_: Any) -> None:
        (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        streams = read_in, write_out, stderr.fileno()
        super().__init__(command[1:], Path.cwd(), env, streams, parents=(write_in, read_out))
        os.close(read_in)
        os.close(write_out)
        self.stdin, self.stdout = os.fdopen(write_in, "w"), os.fdopen(read_out)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "names", [("pp2",), *swept((("tp2",),), (("small",),), (("context8k", "convert"),))], ids="-".join
)
def test_tiny_cases_by_the_command(names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forking = SimpleNamespace(**{**vars(subprocess), "Popen": ForkedContestant})
    monkeypatch.setattr(arena, "subprocess", forking)
    options = ("--tiny", "--rounds", 2, "--no-alone", "--output", tmp_path)
    done = run_python("-m", "bench", *names, *options, timeout=380)
    assert done.returncode == 0, done.stderr
    assert f"{names[0]}: {CASES[names[0]].title}" in done.stdout and "RESULTS.md" in done.stdout, done.stdout
    assert max(map(len, done.stdout.splitlines()[:-2])) <= 120
    page = (tmp_path / "RESULTS.md").read_text()
    for name, case in zip(names, json.loads((tmp_path / "results.json").read_text())["cases"], strict=True):
        assert f"## {name}" in page
        assert {entry["label"] for entry in case["entries"]} == set(CASES[name].entries)
        if name != "convert":
            for figure in ("loss", "last_loss"):
                losses = [entry[figure] for entry in case["entries"]]
                assert max(losses) - min(losses) < 1e-4 * losses[0], "ranks do not change what is computed"
        for entry in case["entries"]:
            assert len(entry["seconds"]) == 2 and entry["peak_bytes"] > 1e6, entry
        assert name == "convert" or (case["flops"] > 0 and case["limit_flops"]["the limit"] > 0)
        if name == "tp2":
            assert "| DeepSpeed AutoTP | 2 |" in page and "ours / DeepSpeed AutoTP, speed:" in done.stdout
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_an_unknown_case_is_named() -> None:
    command = [sys.executable, "-m", "bench", "twelve"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unknown case twelve; cases: one, tp2" in " ".join(done.stderr.split())


def test_a_contestant_that_fails_tells_why(tmp_path: Path) -> None:
    spec = Spec("transformers", 1, {}, Work(model={"model_type": "llama"}), str(tmp_path / "nowhere"), "cpu")
    with pytest.raises(ContestantError, match=r"(?s)peer ended; the end of .*peer.log:.*nowhere"):
        compete({"peer": spec}, 1, 1, tmp_path)


def test_cases_name_what_is_there() -> None:
    for name, case in CASES.items():
        for target in case.targets:
            assert {target.ours, target.other} <= set(case.entries), name
            assert target.figure in ("speed", "memory"), name
        assert all(entry.runner in RUNNERS for entry in case.entries.values()), name


def result(*entries: EntryResult) -> CaseResult:
    return CaseResult("name", "title", "tokens/s", 100.0, 1e9, {"the limit": 1e10}, entries, ())


def test_ratios_are_those_of_rounds_that_belong_together() -> None:
    """A machine that halves its speed from one round to the next changes no ratio."""
    peer = EntryResult("peer", 1, (1.0, 2.0, 1.0), 1000, 3.0, 2.0)
    ours = EntryResult("ours", 2, (0.5, 1.0, 2.0), 400, 3.0, 2.0)
    speed, memory = Target("ours", "peer", 2.0), Target("ours", "peer", 0.3, "memory")
    judged = judge(result(peer, ours), (speed, memory))
    assert [(one.ratio, one.met) for one in judged] == [(2.0, True), (0.4, False)]
    assert judged[1].summary == "ours / peer, memory: 0.40, target at most 0.3 - MISSED"
    page = markdown([result(peer, ours)], {"device": "a machine"}, None)
    assert "| ours | 2 | 100 | 50 to 200 | 1.00 | 0.00 | 10% |" in page


def test_contestants_of_targets_run_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a group of its own, after all have taken turns; other work alone than in turns is found out."""
    groups = []

    def compete(specs: dict[str, Spec], rounds: int, *_: Any) -> dict[str, Samples]:
        groups.append(list(specs))
        return {label: Samples([1.0 / len(specs)] * rounds, [3.0, last_loss(specs)], 10) for label in specs}

    def last_loss(specs: dict[str, Spec]) -> float:
        return 2.0 if len(specs) > 1 or not differ else 1.0

    monkeypatch.setattr(command, "compete", compete)
    monkeypatch.setattr(command, "write_model", lambda work, folder: 1e9)
    differ = False
    case = command.run_case("one", CASES["one"], 2, "cpu", tiny=True)
    turns, *alone = groups
    assert set(turns) == {*CASES["one"].entries, command.GEMM} and alone == [["transformers"], ["ours"]]
    assert [len(entry.alone_seconds) for entry in case.entries] == [2, 0, 2, 0]
    assert case.targets[0].in_turns == case.targets[0].alone == (1.0,)
    differ = True
    with pytest.raises(ValueError, match="transformers, alone ended with loss 1"):
        command.run_case("one", CASES["one"], 2, "cpu", tiny=True)


def test_contestants_that_run_again_find_room_for_their_files(tmp_path: Path) -> None:
    """In turns and alone they get the same folder."""
    (tmp_path / "model").mkdir()
    spec = Spec("start", 1, {"tensor": 2, "zero": 1}, CASES["start"].work, str(tmp_path / "model"), "cpu")
    start_training(spec)
    start_training(spec)
    assert len(list(tmp_path.glob("start-*/run.yaml"))) == 2


def test_the_worse_of_both_ways_over_all_runs_decides() -> None:
    peer = EntryResult("peer", 1, (1.1, 1.1), 1000, 3.0, 2.0, (1.2, 1.2))
    runs = []
    for in_turns_s, alone_s in ((1.0, 1.1), (0.9, 1.2), (1.0, 1.3)):
        ours = EntryResult("ours", 2, (in_turns_s,) * 2, 400, 3.0, 2.0, (alone_s,) * 2)
        case = result(peer, ours)
        runs.append(replace(case, targets=judge(case, (Target("ours", "peer", 1.05), Target("ours", "peer", 0.95)))))
    (together,) = merge([*merge(runs[:2]), runs[2]])
    assert [len(entry.seconds) for entry in together.entries] == [6, 6]
    hard, easy = together.targets
    assert hard.summary == (
        "ours / peer, speed: 1.10 (1.10 to 1.22) in turns, 1.00 (0.92 to 1.09) alone, target at least 1.05 - MISSED"
    )
    assert easy.met and easy.ratio == 1.0
    page = markdown([together], {}, None)
    assert "| name | ours / peer, speed | at least 1.05 | 1.10 (1.10 to 1.22) | 1.00 (0.92 to 1.09) | MISSED |" in page
    assert "| ours | 2 | 100 | 100 to 111 | 1.10 | 0.00 | 10% | 83.33 | 76.92 to 90.91 |" in page


def test_files_of_several_runs_become_one_page(tmp_path: Path) -> None:
    entries = (
        EntryResult("peer", 1, (1.0,), 1000, 3.0, 2.0, (1.0,)),
        EntryResult("ours", 1, (0.5,), 9, 3.0, 2.0, (0.5,)),
    )
    case = replace(result(*entries), targets=judge(result(*entries), (Target("ours", "peer", 1.5),)))
    for number, device in enumerate(("a machine", "another")):
        write_json([case], {"device": device, "system": "Linux", "runs": "2"}, tmp_path / f"{number}.json")
    assert read_json(tmp_path / "0.json") == ([case], {"device": "a machine", "system": "Linux", "runs": "2"})
    combine([tmp_path / "0.json", tmp_path / "1.json"], tmp_path / "made")
    page = (tmp_path / "made" / "RESULTS.md").read_text()
    assert "- device: a machine; another\n- system: Linux\n- runs: 4\n" in page
    assert "2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00) | met |" in page


def test_only_contestants_of_targets_are_left() -> None:
    assert list(CASES["one"].only_targets().entries) == ["transformers", "ours"]


def test_other_work_is_no_contest() -> None:
    first = EntryResult("first", 1, (1.0,), 1, 2.5, 1.5)
    check_same_work([first, EntryResult("near", 1, (1.0,), 1, 2.5001, 1.501)])
    check_same_work([first, EntryResult("rounded", 1, (1.0,), 1, 2.51, 1.51)], "bf16")
    with pytest.raises(ValueError, match=r"other began with loss 2\.501, first with 2\.5"):
        check_same_work([first, EntryResult("other", 1, (1.0,), 1, 2.501, 1.5)])
    with pytest.raises(ValueError, match=r"idle ended with loss 2\.5, first with 1\.5"):
        check_same_work([first, EntryResult("idle", 1, (1.0,), 1, 2.5, 2.5)])


def test_on_gpus_each_rank_has_a_limit_of_its_own_and_who_has_no_device_stays_out() -> None:
    ours = EntryResult("ours", 2, (0.5,), 400, 3.0, 2.0)
    assert result(ours).fractions_of_limits(ours) == [0.2]
    assert replace(result(ours), ranks_share=False).fractions_of_limits(ours) == [0.1]
    assert judge(result(ours), (Target("ours", "peer", 2.0),)) == ()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_peaks_of_devices(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    assert device_peak("cuda") == peak


@pytest.mark.parametrize("name", CASES)
def test_small_work_of_every_case_is_a_model(name: str, tmp_path: Path) -> None:
    work = CASES[name].work.shrunk()
    if not work.size_bytes:
        assert run_alone(write_model, work, tmp_path) > 0
