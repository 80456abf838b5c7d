"""Ranks of a launcher that were started with different arguments, files, environments or numbers of ranks."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.conftest import Fork
from tests.parallel.test_rendezvous import free_port
from tests.training.tiny import MODEL

Rank = tuple[Sequence[object], dict[str, str]]


def launch(fork: Fork, *ranks: Rank) -> list[tuple[int, str]]:
    """The exit status and the errors of two ranks, each with arguments and environment variables of its own."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(ranks))}
    begun = [
        fork("-m", "megatron_ds", *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common, **environ)
        for rank, (arguments, environ) in enumerate(ranks)
    ]
    return [(process.returncode or 0, err) for process in begun for _, err in [process.communicate(60)]]


@pytest.mark.parametrize(
    ("override", "environ", "line"),
    [
        (
            ["optimizer.lr=0.5"],
            {},
            "optimizer.lr is 0.003 on rank 0 and 0.5 on rank 1; start every rank with the same run file and overrides",
        ),
        (
            [],
            {"NVIDIA_TF32_OVERRIDE": "0"},
            "NVIDIA_TF32_OVERRIDE is not set on rank 0 and 0 on rank 1; set it to the same value on every machine",
        ),
    ],
)
def test_another_override_or_environment_on_one_rank(
    override: list[str], environ: dict[str, str], line: str, fork: Fork, run_file: Path
) -> None:
    before = sorted(run_file.parent.rglob("*"))
    zero, one = launch(fork, (["train", run_file], {}), (["train", run_file, *override], environ))
    assert zero == (2, f"error: {line}\n") and one == (2, "")
    assert sorted(run_file.parent.rglob("*")) == before, "nothing is written"


def test_a_run_file_that_one_machine_lacks(fork: Fork, run_file: Path) -> None:
    zero, one = launch(fork, (["train", run_file], {}), (["train", "none.yaml"], {}))
    assert zero[0] == one[0] == 2
    assert zero[1].startswith("error: rank 1 on ") and ": run file none.yaml does not exist" in zero[1]
    assert one[1].startswith("rank 1: error: run file none.yaml does not exist")


def test_another_prompt_on_one_rank(fork: Fork, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    command = ["generate", "model", "--tp", "2", "--prompt"]
    zero, one = launch(fork, ([*command, "a"], {}), ([*command, "b"], {}))
    line = "prompts[0].text is a on rank 0 and b on rank 1; start every rank with the same command"
    assert zero == (2, f"error: {line}\n") and one == (2, "")
