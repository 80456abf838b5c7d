"""Every run file under examples/ trains and exports, every DeepSpeed JSON under ds_configs/ runs: two steps each."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ds import engine
from megatron_ds.config import RunConfig, build_run, load_run
from megatron_ds.errors import ConfigError
from megatron_ds.training.launch import train
from tests.forked_python import run_python

ROOT = Path(__file__).parents[2]
RUN_FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*/run.yaml"))
JSONS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "ds_configs").glob("*.json"))
RANKS = {"pretrain_moby_dick": 2, "continue_pretraining": 2, "parallel_3d": 8, "pretrain_bert": 2, "finetune_t5": 2}
CHAINED = {
    "pretrain_blend": 2,
    "finetune_chat": 2,
    "finetune_lora": 2,
    "pretrain_moe": 2,
    "classify": 2,
    "long_context": 2,
}  # run by `test_chained`
OUTSIDE = {"extend": 2}  # run by `test_extend`
PUNCTUATION = "examples/finetune_t5"
OWN_LOOP = "examples/own_loop/train.py"
SHORT = ["train.steps=2", "schedule.warmup_steps=1", "data.valid=[]"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    engine.preload()


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def shortened(run_file: str, output: Path, *overrides: str) -> RunConfig:
    return load_run(run_file, [*SHORT, f"output={output}", f"export.path={output}/hf", *overrides])


def check_written(output: Path) -> None:
    found = losses(output)
    assert len(found) > 1 and found[-1] < found[0]
    held = {path.name for path in output.iterdir()} | {path.name for path in (output / "hf").iterdir()}
    assert held >= {"config.yaml", "loss.png", "config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture(scope="module")
def moby_dick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the first example, which another one starts from; its own check of the export has passed."""
    output = tmp_path_factory.mktemp("moby_dick")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run = shortened("examples/pretrain_moby_dick/run.yaml", output)
        train(run, RANKS["pretrain_moby_dick"])
    return output


@pytest.fixture(scope="module")
def small_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the T5 example's first run file."""
    output = tmp_path_factory.mktemp("t5")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(shortened(f"{PUNCTUATION}/pretrain.yaml", output), RANKS["finetune_t5"])
    return output


def run_script(script: str, *arguments: str) -> list[str]:
    """Lines that a script prints, which must not import this project."""
    imports = [line.split()[1] for line in Path(script).read_text().splitlines() if line.startswith(("import", "from"))]
    assert "megatron_ds" not in [name.split(".")[0] for name in imports]
    return run_python(script, *arguments, check=True).stdout.splitlines()


def test_every_run_file_is_known() -> None:
    assert [Path(run_file).parent.name for run_file in RUN_FILES] == sorted({**RANKS, **CHAINED, **OUTSIDE})


def test_pretrain_moby_dick(moby_dick: Path) -> None:
    check_written(moby_dick)


def test_generate_continues_with_plain_transformers(moby_dick: Path) -> None:
    script = "examples/pretrain_moby_dick/generate.py"
    continued = run_script(script, str(moby_dick / "hf"), "Call me Ishmael.")[-1]
    assert continued.startswith("Call me Ishmael.") and len(continued) > 40


def test_continue_pretraining_at_another_layout(moby_dick: Path, tmp_path: Path) -> None:
    smaller = [
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "data.seq_length=64",
    ]  # bf16 is slow on some CPUs
    overrides = [f"model.path={moby_dick / 'hf'}", *smaller]
    train(shortened("examples/continue_pretraining/run.yaml", tmp_path, *overrides), RANKS["continue_pretraining"])
    check_written(tmp_path)
    assert losses(tmp_path)[0] < losses(moby_dick)[0]  # it does not begin at random again


def test_own_loop(tmp_path: Path) -> None:
    """Under torchrun, as its page says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, OWN_LOOP, "6", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in done.stdout.splitlines()]
    assert len(found) == 6 and found[-1] < found[0]
    assert {path.name for path in (tmp_path / "hf").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000006"
    code = [line for line in Path(OWN_LOOP).read_text().splitlines() if line.strip()]
    assert len(code) <= 30


def test_parallel_3d(tmp_path: Path) -> None:
    train(shortened("examples/parallel_3d/run.yaml", tmp_path), RANKS["parallel_3d"])
    check_written(tmp_path)


def test_pretrain_bert_and_fill_a_gap(tmp_path: Path) -> None:
    longer = ["train.steps=6", "optimizer.lr=3.0e-3"]  # each batch hides other words: two steps tell nothing
    train(shortened("examples/pretrain_bert/run.yaml", tmp_path, *longer, "train.log_every=5"), RANKS["pretrain_bert"])
    check_written(tmp_path)
    lines = run_script("examples/pretrain_bert/fill_mask.py", str(tmp_path / "hf"), "the [MASK] is white.")
    assert len(lines) == 6 and all("%" in line for line in lines[1:])


def test_pretrain_t5(small_t5: Path) -> None:
    check_written(small_t5)


def test_finetune_t5_and_count_exact_matches(small_t5: Path, tmp_path: Path) -> None:
    pairs, output = tmp_path / "pairs", tmp_path / "run"
    told = run_script(f"{PUNCTUATION}/make_pairs.py", str(pairs))
    assert len(told) == 2 and "25,811 examples" in told[0]
    data = [f"data.train={pairs}/train.jsonl", f"data.valid={pairs}/valid.jsonl"]
    train(shortened(f"{PUNCTUATION}/run.yaml", output, f"model.path={small_t5}/hf", *data), RANKS["finetune_t5"])
    check_written(output)
    lines = run_script(f"{PUNCTUATION}/exact_match.py", str(output / "hf"), f"{pairs}/valid.jsonl", "8")
    assert "exact match 0.0% (0 of 8)" in lines[0] and lines[1].startswith("  wanted   ")


def tiny(path: str, output: Path) -> tuple[RunConfig, int]:
    """A tiny Llama at a layout that the JSON is for."""
    layout: dict[str, Any] = {"tensor": 2, "sequence": True}
    if "pipeline" in path:
        layout = {"tensor": 2, "pipeline": 2}
    elif "zero0" in path:
        layout = {}
    elif "partitioned" in path:
        layout = {"tensor": 2}
    ranks = 4 if "pipeline" in path else 2
    mapping = {
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 4096,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
            "tokenizer": "examples/pretrain_moby_dick/tokenizer",
        },
        "parallel": layout,
        "deepspeed": path,
        "data": {"train": "examples/pretrain_moby_dick/data/valid.txt", "seq_length": 32},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "recompute": "full"},
        "export": {"path": f"{output}/hf", "check": True},
        "output": str(output),
    }
    return build_run(mapping), ranks


@pytest.mark.parametrize("path", [path for path in JSONS if "fp16" not in path.replace("bf16", "")])
def test_deepspeed_json_trains(path: str, tmp_path: Path) -> None:
    run, ranks = tiny(path, tmp_path)
    train(run, ranks)
    check_written(tmp_path)


@pytest.mark.parametrize("path", [path for path in JSONS if "fp16" in path.replace("bf16", "")])
def test_fp16_json_is_refused_on_cpu(path: str, tmp_path: Path) -> None:
    if engine.device_type() != "cpu":
        pytest.skip("fp16 runs on this device")
    run, ranks = tiny(path, tmp_path)
    with pytest.raises(ConfigError, match=r"fp16\.enabled=true .* cannot run on cpu.*nearest: bf16"):
        train(run, ranks)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("script", sorted((ROOT / "examples/multi_node").glob("*.s*")), ids=lambda path: path.name)
def test_shell_script_parses_and_runs_the_module(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert 'megatron_ds train "$@"' in script.read_text(encoding="utf-8")
