"""Commands whose standard output or error is lost: a run goes on to its end, and what only shows something ends."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_ds.checkpoint.directory import checkpoints_in, step_of
from megatron_ds.cli import streams
from megatron_ds.cli.streams import LastingOutput, StandardStreams
from tests.cli.conftest import Fork, wait_for_steps

NOTE = "standard output is lost ({}); the command continues without it\n"
BROKEN, FULL, CLOSED = "broken pipe", "no space left on device", "it is closed"


@contextmanager
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe that nobody reads, as `| head` leaves it."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextmanager
def full_disk() -> Iterator[int]:
    with open("/dev/full", "wb") as file:
        yield file.fileno()


@contextmanager
def lost_terminal() -> Iterator[int]:
    """A terminal whose window is closed."""
    window, terminal = os.openpty()
    os.close(window)
    yield terminal
    os.close(terminal)


LOST = pytest.mark.parametrize("lost", [closed_pipe, full_disk, lost_terminal])


@contextmanager
def file_for(path: Path) -> Iterator[int]:
    with open(path, "wb") as file:
        yield file.fileno()


def steps_of(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


# ---- runs ------------------------------------------------------------------------------------------------------------


@LOST
def test_a_run_ends_well_without_its_terminal(lost: object, fork: Fork, run_file: Path) -> None:
    ranks = 2 if lost is closed_pipe else 1
    with lost() as stream:  # type: ignore[operator]
        process = fork("-m", "megatron_ds", "train", run_file, "--nproc", ranks, streams=(0, stream, stream))
        assert process.wait(60) == 0
    assert steps_of(run_file.parent / "out") == [1, 2, 3, 4, 5]
    assert (run_file.parent / "out/loss.png").is_file()


def test_a_run_says_once_why_it_is_silent(fork: Fork, run_file: Path, tmp_path: Path) -> None:
    with closed_pipe() as stream, file_for(tmp_path / "err") as errors:
        launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        process = fork(
            *("-m", "megatron_ds", "train", run_file, "train.eval_every=0"),
            streams=(0, stream, errors),
            **launched,
            MASTER_PORT=str(29000 + os.getpid() % 900),
        )
        assert process.wait(60) == 0
    said = [line for line in (tmp_path / "err").read_text().splitlines(True) if not line.startswith("tokenizing ")]
    assert said == [NOTE.format(BROKEN)]
    assert steps_of(run_file.parent / "out") == [1, 2, 3, 4, 5]


def test_a_run_ends_well_with_closed_streams(fork: Fork, run_file: Path) -> None:
    """`>&- 2>&-`: the first files that are opened must not become its standard output."""
    script = run_file.parent / "closed.py"
    script.write_text(
        "import os, sys\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        "from megatron_ds.cli.main import main\n"
        "main()\n"
    )
    process = fork(script, "train", run_file)
    assert process.wait(60) == 0
    assert process.communicate() == ("", "")
    assert steps_of(run_file.parent / "out") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("override", "status"), [("parallel.tensor=3", 2), ("imports=[broken]", 1)])
def test_the_status_is_the_runs_own(override: str, status: int, fork: Fork, run_file: Path) -> None:
    (run_file.parent / "broken.py").write_text(
        "from megatron_ds.training import loop\ndef fail(*given):\n    raise ZeroDivisionError\nloop.collate = fail\n"
    )
    with closed_pipe() as stream:
        process = fork("-m", "megatron_ds", "train", run_file, override, streams=(0, stream, stream))
        assert process.wait(60) == status


def test_a_closed_terminal_saves_and_ends(fork: Fork, run_file: Path) -> None:
    """SIGHUP, twice as from the system and a shell, while the terminal fails too."""
    output, (window, terminal) = run_file.parent / "out", os.openpty()
    settings = ("train.steps=1000000", "train.eval_every=0", "checkpoint.every=100000")
    process = fork("-m", "megatron_ds", "train", run_file, *settings, streams=(terminal, terminal, terminal))
    os.close(terminal)
    wait_for_steps(output, 3, process)
    os.close(window)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
    assert step_of(checkpoints_in(output / "checkpoints")[0]) == len(steps_of(output))


def test_under_nohup_a_run_goes_on(fork: Fork, run_file: Path) -> None:
    script, output = run_file.parent / "nohup.py", run_file.parent / "out"
    script.write_text(
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom megatron_ds.cli.main import main\nmain()\n"
    )
    process = fork(script, "train", run_file, "train.steps=1000000", "train.eval_every=0")
    wait_for_steps(output, 3, process)
    process.send_signal(signal.SIGHUP)
    before = len(steps_of(output))
    wait_for_steps(output, before + 20, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(30)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM after step" in out


# ---- other commands --------------------------------------------------------------------------------------------------


def test_work_is_done_without_a_reader(fork: Fork, run_file: Path, tmp_path: Path) -> None:
    with closed_pipe() as stream, file_for(tmp_path / "err") as errors:
        settings = ("checkpoint.every=5", "train.eval_every=0")
        assert fork("-m", "megatron_ds", "train", run_file, *settings).wait(60) == 0
        process = fork("-m", "megatron_ds", "export", tmp_path / "out", tmp_path / "hf", streams=(0, stream, errors))
        assert process.wait(60) == 0
    assert (tmp_path / "hf/config.json").is_file()
    assert (tmp_path / "err").read_text() == NOTE.format(BROKEN)
    with closed_pipe() as stream, file_for(tmp_path / "err") as errors:
        process = fork("-m", "megatron_ds", "inspect", tmp_path / "hf", streams=(0, stream, errors))
        assert process.wait(60) == 0
    assert (tmp_path / "err").read_text() == "", "head had seen enough"
    with full_disk() as stream, file_for(tmp_path / "err") as errors:
        process = fork("-m", "megatron_ds", "inspect", tmp_path / "hf", streams=(0, stream, errors))
        assert process.wait(60) == 2
    assert (tmp_path / "err").read_text() == (
        "error: standard output cannot be written: no space left on device; try another file or disk\n"
    )


@pytest.mark.parametrize(
    ("redirection", "status", "error"),
    [
        ("| true", 0, ""),
        (">/dev/full", 2, f"error: standard output cannot be written: {FULL}; try another file or disk\n"),
        (">&-", 2, f"error: standard output cannot be written: {CLOSED}; try another file or disk\n"),
        (">/dev/null 2>&-", 0, ""),
    ],
    ids=["pipe", "full", "closed", "no-errors"],
)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version(option: str, redirection: str, status: int, error: str) -> None:
    command = f"{sys.executable} -m megatron_ds {option} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, error)


# ---- the streams -----------------------------------------------------------------------------------------------------


@LOST
def test_what_cannot_be_written_is_dropped_and_told_once(lost: object) -> None:
    told: list[OSError] = []
    with lost() as stream:  # type: ignore[operator]
        output = LastingOutput(stream, told.append)
        text = io.TextIOWrapper(io.BufferedWriter(output), line_buffering=True)
        print("one", file=text)
        print("two", file=text, flush=True)
        assert told == [output.problem]
        text.detach()


def test_a_disk_that_has_room_again_is_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failures = [True, False]

    def write(descriptor: int, data: bytes) -> int:
        if failures.pop():
            raise OSError(28, "No space left on device")
        return len(data)

    output = LastingOutput(1)
    monkeypatch.setattr(streams.os, "write", write)
    failures.reverse()
    assert (output.write(b"lost"), output.write(b"kept"), failures) == (4, 4, [])


def test_a_reader_that_is_slow_loses_nothing() -> None:
    """Another program has made the pipe non-blocking."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.2)
        total = 0
        while total < 300_001 and (part := os.read(reading, 65536)):
            total += len(part)
        os._exit(0 if total == 300_001 else 1)
    text = io.TextIOWrapper(io.BufferedWriter(LastingOutput(writing)))
    print("x" * 300_000, file=text, flush=True)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text.detach()
    os.close(reading)
    os.close(writing)


def test_characters_that_an_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    latin = io.TextIOWrapper(os.fdopen(writing, "wb", closefd=False), encoding="latin-1")
    ours = streams._text(LastingOutput(writing), latin)
    print("é ⟦", file=ours, flush=True)
    assert os.read(reading, 100) == b"\xe9 \\u27e6\n"
    ours.detach()
    os.close(reading)
    os.close(writing)


def test_an_unbuffered_output_stays_so() -> None:
    """`python -u`, PYTHONUNBUFFERED: a line is written at once."""
    reading, writing = os.pipe()
    unbuffered = io.TextIOWrapper(os.fdopen(writing, "wb", 0, closefd=False), write_through=True)
    ours = streams._text(LastingOutput(writing), unbuffered)
    print("now", file=ours)
    assert os.read(reading, 100) == b"now\n"
    ours.detach()
    os.close(reading)
    os.close(writing)


def test_other_streams_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a test, or of a program that calls `main`."""
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    monkeypatch.setattr(sys, "stderr", own)
    StandardStreams(announces=True).install()
    assert sys.stdout is own and sys.stderr is own
