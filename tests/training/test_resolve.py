"""Where a run may write: nothing that it reads, nothing of its own, nothing that is somebody else's."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import build_run
from megatron_ds.errors import ConfigError
from megatron_ds.training.resolve import resolve_run
from tests.parity.cases import CONFIGS

JSONL = '{"input_ids": [1, 2, 3]}\n'


def run_with(folder: Path, **places: Any) -> Any:
    (folder / "data.jsonl").write_text(JSONL)
    sections: dict[str, Any] = {
        "model": {"config": CONFIGS["llama"]},
        "data": {"format": "tokenized", "train": [str(folder / "data.jsonl")], "seq_length": 8},
        "train": {"steps": 1, "global_batch_size": 1},
        "output": str(folder / "out"),
        **places,
    }
    return build_run(sections)


def refusal(run: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_run(run, 1, "cpu")
    return str(caught.value)


def test_a_plain_run_resolves(tmp_path: Path) -> None:
    resolved = resolve_run(run_with(tmp_path, export={"path": str(tmp_path / "out" / "hf")}), 1, "cpu")
    assert (resolved.plan.layout.world_size, resolved.plan.summary.zero_stage, resolved.model.weights) == (1, 1, None)


@pytest.mark.parametrize("target", ["out", "."])
def test_an_export_over_the_output_is_refused(tmp_path: Path, target: str) -> None:
    text = refusal(run_with(tmp_path, export={"path": str(tmp_path / target)}))
    assert f"would replace output={tmp_path / 'out'}; choose another, such as {tmp_path / 'out'}/hf" in text


def test_an_export_over_its_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = tmp_path / "models" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for target in (tokenizer, tokenizer.parent):
        model = {"config": CONFIGS["llama"], "tokenizer": str(tokenizer)}
        text = refusal(run_with(tmp_path, model=model, export={"path": str(target)}))
        assert text == f"export.path={target} would replace model.tokenizer={tokenizer}; choose another directory"


def test_an_export_over_other_files_is_refused_and_over_an_export_is_not(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"):
        (target / name).touch()
    resolve_run(run_with(tmp_path, export={"path": str(target)}), 1, "cpu")
    (target / "thesis.tex").touch()
    assert "holds thesis.tex, which is not a file of a model" in refusal(
        run_with(tmp_path, export={"path": str(target)})
    )


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert refusal(run_with(tmp_path)) == f"output={tmp_path / 'out'} is a file; choose a directory"


@pytest.mark.parametrize(
    ("sections", "telling"),
    [
        (
            {
                "parallel": {"tensor": 2, "sequence": True},
                "deepspeed": {
                    "zero_optimization": {"stage": 1},
                    "activation_checkpointing": {"partition_activations": True},
                },
            },
            "partition_activations=true splits tensors that all tensor ranks hold",
        ),
        (
            {
                "train": {"steps": 1, "global_batch_size": 1, "recompute": "selective"},
                "deepspeed": {"activation_checkpointing": {"partition_activations": True}},
            },
            "train.recompute=selective keeps each rank's own heads; try train.recompute=full",
        ),
        (
            {"deepspeed": {"activation_checkpointing": {"cpu_checkpointing": True}}},
            "cpu_checkpointing=true works on partitioned activations only; try partition_activations=true",
        ),
        (
            {
                "deepspeed": {
                    "activation_checkpointing": {"partition_activations": True, "contiguous_memory_optimization": True}
                }
            },
            "contiguous_memory_optimization=true needs number_checkpoints",
        ),
        (
            {
                "deepspeed": {
                    "zero_optimization": {"stage": 1},
                    "pipeline": {"activation_checkpoint_interval": 1},
                }
            },
            "activation_checkpoint_interval would recompute a second time",
        ),
    ],
)
def test_recomputation_said_twice_or_split_twice_is_refused(
    tmp_path: Path, sections: dict[str, Any], telling: str
) -> None:
    run = run_with(tmp_path, **sections)
    with pytest.raises(ConfigError, match=telling):
        resolve_run(run, run.parallel.tensor, "cpu")
