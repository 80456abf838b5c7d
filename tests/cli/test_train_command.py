"""`megatron-ds train` as users start it: what it writes and says, under every launcher, and when it is cut short."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import Fork, Start, processes_of, wait_for_steps, wait_until
from tests.ranks import run_alone


@pytest.fixture(autouse=True)
def no_orphans(fork: Fork, tmp_path: Path) -> Iterator[None]:
    """No process outlives the command that it belongs to."""
    yield
    assert processes_of(tmp_path) == {}


STEP_FIELDS = ["step", "loss", "grad_norm", "lr", "tokens", "step_s", "tokens_per_s", "tflops_per_rank", "data_s"]
STEP_FIELDS += ["peak_memory_bytes"]
SPOKEN = re.compile(
    r"(model|world|deepspeed|device|steps|data|learned|validated|kept|output) {2,}\S.*|step  \d+/\d+  loss .*"
    r"|valid \d+/\d+  loss .*"
    r"|exported a Hugging Face directory: .*|its predictions in transformers equal those in training: .*"
    r"|done: \d+ steps; .*"
)
ENDLESS = ("train.steps=1000000", "train.eval_every=0")


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def finish(process: Any, within_s: float = 120.0) -> tuple[int, str, str]:
    """Status, stdout, stderr."""
    out, err = process.communicate(timeout=within_s)
    err = re.sub(r"^tokenizing \S+\n", "", err, flags=re.MULTILINE)  # our own word, said by the first run of a corpus
    return process.returncode, out, err


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_files(folder: Path) -> None:
    """The files of five steps with validation after the third and the last."""
    lines = read_lines(folder)
    assert [list(line) for line in lines if "loss" in line] == [STEP_FIELDS] * 5
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 5]
    assert [line["step"] for line in lines if "valid_loss" in line] == [3, 5]
    assert all(len(repr(line["loss"])) > 8 for line in lines if "loss" in line), "full precision"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (folder / "config.yaml").is_file()


@pytest.mark.parametrize(
    "overrides",
    [
        # tied over stages, bf16: what DeepSpeed and autograd have most to say about, and imports in a cold start
        ("parallel.pipeline=2", "deepspeed.bf16.enabled=true", "model.config.tie_word_embeddings=true"),
        ("parallel.tensor=2", "parallel.sequence=true", "export.path=hf", "export.check=true"),
        ("deepspeed.zero_optimization.stage=3", "train.recompute=full"),
    ],
    ids=["pp2-tied-bf16", "tp2-sequence-export", "dp2-zero3-recompute"],
)
def test_a_run_writes_its_files_and_says_nothing_else(
    start: Start, fork: Fork, run_file: Path, overrides: tuple[str, ...]
) -> None:
    begin = start if "parallel.pipeline=2" in overrides else fork
    status, out, err = finish(begin("-m", "megatron_ds", "train", run_file, *overrides, "--nproc", 2))
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if not SPOKEN.fullmatch(line)] == []
    assert len(re.findall(r"^step ", out, re.MULTILINE)) == 5 and out.count("model ") == 1
    check_files(run_file.parent / "out")
    if "export.check=true" in overrides:
        assert "relative error" in out
        run_alone(_load_with_transformers, run_file.parent / "hf")


def _load_with_transformers(directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(directory)("w0 w1")["input_ids"] == [2, 3]


def test_a_killed_rank_ends_the_job_and_is_named(fork: Fork, run_file: Path) -> None:
    process = fork("-m", "megatron_ds", "train", run_file, *ENDLESS, "--nproc", 2)
    wait_for_steps(run_file.parent / "out", 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    began = time.monotonic()
    os.kill(int(children[1]), signal.SIGKILL)
    status, _, err = finish(process, 30)
    assert time.monotonic() - began < 30
    assert (status, err) == (1, "error: rank 1 was killed by SIGKILL, as the kernel does when memory runs out\n")


def test_an_interrupt_ends_the_run_cleanly(fork: Fork, run_file: Path) -> None:
    process = fork("-m", "megatron_ds", "train", run_file, *ENDLESS, "parallel.pipeline=2", "--nproc", 2)
    wait_for_steps(run_file.parent / "out", 3, process)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process, 60)
    assert (status, err) == (130, "")
    steps = read_lines(run_file.parent / "out")[-1]["step"]
    assert out.splitlines()[-1] == (
        f"stopped by SIGINT after step {steps} of 1000000; nothing was saved (checkpoint.every=0)"
    )
    assert (run_file.parent / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.sweep
def test_torchrun(start: Start, run_file: Path) -> None:
    """Trains; then one rank is killed, and torchrun and the other rank end. (`make cluster` starts it too.)"""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port())
    process = start(*torchrun, "-m", "megatron_ds", "train", run_file, *ENDLESS)
    wait_for_steps(run_file.parent / "out", 3, process)
    ranks = {environ.get("RANK"): pid for pid, environ in processes_of(run_file.parent).items()}
    assert sorted(ranks, key=str) == ["0", "1", None]
    os.kill(ranks["1"], signal.SIGKILL)
    status, out, err = finish(process, 30)
    assert status == 1 and "Signal 9 (SIGKILL) received by PID" in err
    assert "world       2 = tp 1 x pp 1 x dp 2" in out


def test_a_launcher_and_what_is_left_to_the_planner(fork: Fork, run_file: Path) -> None:
    """Two processes as torchrun starts them: the layout is chosen once, for both, and shown once."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    words = ("-m", "megatron_ds", "train", run_file, "parallel=auto", "train.micro_batch_size=auto")
    begun = [fork(*words, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(2)]
    (status, out, err), other = (finish(process, 100) for process in begun)
    assert (status, err) == (0, "") and other == (0, "", "")
    [chosen] = [line for line in out.splitlines() if line.startswith("parallel=auto and train.micro_batch_size=auto: ")]
    written = yaml.safe_load((run_file.parent / "out" / "config.yaml").read_text())
    assert not written["parallel"]["auto"] and f"micro-batch {written['train']['micro_batch_size']}" in chosen
    assert out.count("done: 5 steps") == 1


@pytest.mark.sweep
def test_a_mistake_under_torchrun_is_told_once(start: Start, run_file: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port())
    status, out, err = finish(start(*torchrun, "-m", "megatron_ds", "train", run_file, "parallel.tensor=3"))
    assert status == 1 and out == ""
    assert err.count("error: parallel.tensor=3 does not divide") == 1
    assert "exitcode  : 2" in err and not (run_file.parent / "out").exists()


@pytest.mark.sweep
def test_the_deepspeed_launcher(start: Start, run_file: Path) -> None:
    launcher = ("-m", "deepspeed.launcher.runner", "--num_accelerators", 2, "--master_port", free_port(), "--module")
    status, out, err = finish(start(*launcher, "megatron_ds", "train", run_file))
    assert (status, err) == (0, "")
    assert "world       2 = tp 1 x pp 1 x dp 2" in out and out.count("done: 5 steps") == 1
    check_files(run_file.parent / "out")


@pytest.mark.sweep
def test_tasks_of_srun_and_an_error_of_one(fork: Fork, run_file: Path) -> None:
    """Two processes with srun's variables; srun ends nobody, so the peer waits, then tells of its lost connection."""
    script = run_file.parent / "fails.py"
    script.write_text(
        "import os\n"
        "from megatron_ds.training import loop\n"
        "collate, calls = loop.collate, []\n"
        "def fail(dataset, indices):\n"
        "    calls.append(indices)\n"
        "    if os.environ['SLURM_PROCID'] == '1' and len(calls) > 8: raise ZeroDivisionError('on purpose')\n"
        "    return collate(dataset, indices)\n"
        "loop.collate = fail\n"
        "from megatron_ds.cli.main import main\n"
        "main()\n"
    )
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = (script, "train", run_file, "parallel.tensor=2")
    tasks = [fork(*command, SLURM_PROCID=str(r), SLURM_LOCALID=str(r), **job, **place) for r in range(2)]
    status, out, err = finish(tasks[1])
    assert (status, out) == (1, "")
    assert err.startswith("rank 1: Traceback") and err.endswith("ZeroDivisionError: on purpose\n")
    assert tasks[0].poll() is None, "the peer must not speak over the cause"
    wait_until(lambda: tasks[0].poll() is not None, 30)
    status, out, err = finish(tasks[0])
    assert status == 1 and "onnection" in err
    assert "world       2 = tp 2 x pp 1 x dp 1" in out
    assert [line["step"] for line in read_lines(run_file.parent / "out")] == [1, 2]
