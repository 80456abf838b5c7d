"""`megatron-ds evaluate` on data: equal to transformers at every layout, and to a run's own validation."""

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import megatron_ds as mds
from megatron_ds.config.yaml_text import format_yaml, parse_yaml
from megatron_ds.errors import ConfigError, TopologyError
from megatron_ds.evaluation import Evaluation
from megatron_ds.evaluation.on_data import count_bytes
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo
from tests.cli.conftest import Fork, fork, start  # noqa: F401
from tests.evaluation.conftest import train_tiny
from tests.ranks import preload, run_alone, run_local_ranks

Trained = tuple[Path, float]
LENGTH = 32
BOUND = 2e-6  # relative, of a mean over hundreds of fp32 losses, added up in another order


def evaluated(path: Path, *arguments: Any, **options: Any) -> Evaluation:
    preload()
    found = mds.evaluate(path, *arguments, **options)
    assert found is not None
    return found


def reference(directory: Path, text: Path) -> tuple[float, int, int]:
    """Loss by transformers in rows of LENGTH tokens, number of labels, and bytes of the text that they are."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    found = tokenizer(text.read_text(), return_offsets_mapping=True)
    ids = torch.tensor([*found["input_ids"], tokenizer.eos_token_id])
    rows = (len(ids) - 1) // LENGTH
    inputs = ids[: rows * LENGTH].view(rows, LENGTH)
    targets = ids[1 : rows * LENGTH + 1]
    with torch.no_grad():
        loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets)
    ends = [end for _, end in found["offset_mapping"]]
    return float(loss), len(targets), ends[min(rows * LENGTH, len(ends) - 1)] - ends[0]


@pytest.mark.parametrize(
    ("options", "overrides"),
    [
        ({}, []),
        ({"tp": 2, "pp": 2}, ["parallel.sequence=true"]),
        ({"nproc": 3, "batch_size": 2}, []),
        pytest.param({"tp": 4}, [], marks=pytest.mark.sweep),
        pytest.param({"pp": 2, "nproc": 4}, [], marks=pytest.mark.sweep),
        pytest.param({"nproc": 2}, ["parallel.context=2"], marks=pytest.mark.sweep),
    ],
)
def test_equal_to_transformers(options: dict[str, int], overrides: list[str], trained: Trained, corpus: Path) -> None:
    checkpoint = trained[0] / "checkpoints" / "step_00000005"
    texts = [corpus / "valid.txt", corpus / "train.txt"]
    keys = [f"data.seq_length={LENGTH}", f"data.cache_dir={corpus / 'cache'}", *overrides]
    found = evaluated(checkpoint, texts, overrides=keys, **options)
    assert found.precision == "fp32" and [one.name for one in found.data] == [str(text) for text in texts]
    for one, text in zip(found.data, texts):
        loss, tokens, num_bytes = run_alone(reference, checkpoint, text)
        assert one.tokens == tokens and one.samples * LENGTH == tokens
        assert one.loss == pytest.approx(loss, rel=BOUND)
        assert one.perplexity == pytest.approx(math.exp(loss), rel=10 * BOUND)
        assert one.bits_per_byte == pytest.approx(loss * tokens / math.log(2) / num_bytes, rel=BOUND)


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """The hash and the time of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def test_a_run_gives_its_last_validation_and_stays_as_it_is(trained: Trained) -> None:
    output, loss = trained
    before = content(output)
    found = evaluated(output)
    assert (found.data[0].name, found.data[0].loss) == ("data.valid", pytest.approx(loss, rel=BOUND))
    assert found.weights == str(output / "checkpoints" / "step_00000005")
    assert evaluated(output / "config.yaml").data == found.data
    assert content(output) == before


def test_the_latest_checkpoint_is_evaluated(trained: Trained, tmp_path: Path) -> None:
    run = parse_yaml((trained[0] / "config.yaml").read_text(), "run")
    (tmp_path / "run.yaml").write_text(format_yaml({**run, "output": str(tmp_path / "none")}))
    with pytest.raises(ConfigError, match=r"starts from random weights, and .*none has no checkpoint; try megatron-ds"):
        evaluated(tmp_path / "run.yaml")
    base = {"path": str(trained[0] / "checkpoints" / "step_00000005")}
    (tmp_path / "run.yaml").write_text(format_yaml({**run, "model": base, "output": str(tmp_path / "none")}))
    found = evaluated(tmp_path / "run.yaml")
    assert found.weights == base["path"] and found.data[0].loss == pytest.approx(trained[1], rel=BOUND)


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}},
        pytest.param(
            {"deepspeed": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}}, marks=pytest.mark.sweep
        ),
    ],
    ids=["zero3", "zero1"],
)
def test_precision_and_zero_are_those_of_the_run(changes: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    loss = train_tiny(corpus, tmp_path / "run", **changes)
    found = evaluated(tmp_path / "run", nproc=2)
    assert found.precision == "bf16" and found.dp == 2
    assert found.data[0].loss == pytest.approx(loss, rel=1e-3)  # bf16 products of other shapes are rounded elsewhere
    wide = evaluated(tmp_path / "run", dtype="float32")
    assert wide.precision == "fp32" and 0 < abs(wide.data[0].loss - loss) < 0.05


def test_adapters(trained: Trained, corpus: Path, tmp_path: Path) -> None:
    base = {"path": str(trained[0] / "checkpoints" / "step_00000005")}
    peft = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": "all-linear"}
    loss = train_tiny(corpus, tmp_path / "run", model=base, peft=peft)
    assert abs(loss - trained[1]) > 0.01
    found = evaluated(tmp_path / "run", tp=2)
    assert found.data[0].loss == pytest.approx(loss, rel=BOUND)
    adapters = Path(found.weights)
    keys = [f"data.seq_length={LENGTH}", f"data.cache_dir={corpus / 'cache'}"]
    assert evaluated(adapters, corpus / "valid.txt", overrides=keys).data[0].loss == pytest.approx(loss, rel=BOUND)


def test_the_command(trained: Trained, corpus: Path, tmp_path: Path, fork: Fork) -> None:  # noqa: F811
    words = ["evaluate", trained[0], "--data", corpus / "valid.txt", "--tp", 2, "--json", "found.json"]
    command = fork("-m", "megatron_ds", *words)
    shown, errors = command.communicate()
    assert command.returncode == 0, errors
    written = json.loads((tmp_path / "found.json").read_text())
    (one,) = written["data"]
    assert (written["tp"], written["precision"], one["tokens"]) == (2, "fp32", 320)
    assert one["loss"] == pytest.approx(trained[1], rel=BOUND)
    assert (
        f"loss {one['loss']:.4f}, perplexity {one['perplexity']:.4f}, bits per byte {one['bits_per_byte']:.4f}" in shown
    )


def launched(info: RankInfo, path: Path, port: int) -> float | None:
    """The loss as one of a launcher's ranks."""
    del os.environ[RENDEZVOUS_FILE]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with pytest.raises(TopologyError, match=r"--nproc=2 starts local ranks, but a launcher started rank"):
        mds.evaluate(path, nproc=2)
    found = mds.evaluate(path, tp=2)
    return found.data[0].loss if found is not None else None


def test_ranks_of_a_launcher(trained: Trained) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_local_ranks(launched, 2, trained[0], port) == [pytest.approx(trained[1], rel=BOUND), None]


@pytest.mark.parametrize(
    ("options", "problem", "said"),
    [
        ({}, ConfigError, r"names a model without data; try --data FILE"),
        ({"data": "valid.txt", "tp": 3}, TopologyError, r"parallel.tensor=3 does not divide num_attention_heads=4"),
        ({"data": "valid.txt", "nproc": 3, "tp": 2}, TopologyError, r"3 ranks are not a multiple .* = 2; nearest: 2"),
        ({"data": "valid.txt", "dtype": "fp8"}, ConfigError, r"dtype=fp8 is not one of auto, float32"),
        ({"data": "valid.txt", "dtype": "float16"}, ConfigError, r"dtype=float16 cannot run on cpu"),
        ({"data": "valid.txt", "overrides": ["data.sequence_length=3"]}, ConfigError, r"data.sequence_length.*unknown"),
    ],
)
def test_what_is_refused(
    options: dict[str, Any], problem: type[Exception], said: str, trained: Trained, corpus: Path
) -> None:
    if "data" in options:
        options = {**options, "data": corpus / options["data"]}
    with pytest.raises(problem, match=said):
        evaluated(trained[0] / "checkpoints" / "step_00000005", **options)


def test_deepspeed_is_imported_after_it_is_silenced(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['megatron-ds', 'evaluate', 'nowhere']; from megatron_ds.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: nowhere does not exist")


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist; name a run file, a checkpoint or a Hugging Face"):
        mds.evaluate(tmp_path / "nowhere")


def test_bytes_are_those_of_all_text_but_the_first_token(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "für Ärzte und Übung, 你好世界! " * 20
    ids = torch.tensor(byte_tokenizer(text)["input_ids"] + [byte_tokenizer.eos_token_id])
    length = 7
    rows = (len(ids) - 1) // length
    batch = {
        "input_ids": ids[: rows * length].view(rows, length),
        "targets": ids[1 : rows * length + 1].view(rows, length),
    }
    exact = len(text.encode())
    assert abs(count_bytes(byte_tokenizer, batch) - exact) <= 2 * rows
    whole = {"input_ids": ids[None, :-1], "targets": ids[None, 1:]}
    assert count_bytes(byte_tokenizer, whole) == exact - len(byte_tokenizer.decode(ids[:1]).encode())
    blank = {name: torch.full_like(column, -100) for name, column in whole.items()}
    assert count_bytes(byte_tokenizer, blank) == 0
