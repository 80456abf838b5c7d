"""Where a run may write: nothing that it reads, nothing of its own, nothing that is somebody else's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import build_run, dump_run
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.export_mark import MARK
from megatron_ds.hf.export_target import ExportTarget
from megatron_ds.training.resolve import export_target, resolve_run
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


def test_tf32_needs_a_run_in_fp32(tmp_path: Path) -> None:
    sections = {"train": {"steps": 1, "global_batch_size": 1, "tf32": True}}
    resolve_run(run_with(tmp_path, **sections), 1, "cpu")
    problem = refusal(
        run_with(tmp_path, **sections, deepspeed={"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    )
    assert problem.startswith("train.tf32=true rounds products in fp32, and this run computes in bf16; try")


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


def exported_to(target: Path) -> None:
    written = ExportTarget(target)
    new = written.begin()
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"):
        (new / name).touch()
    written.put(new)


def test_an_export_over_other_files_is_refused_and_over_an_export_is_not(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    exported_to(target)
    resolve_run(run_with(tmp_path, export={"path": str(target)}), 1, "cpu")
    (target / "thesis.tex").touch()
    text = refusal(run_with(tmp_path, export={"path": str(target)}))
    assert text == (
        f"export.path={target} would be replaced, and holds thesis.tex, which was added after the export; choose "
        "another directory, or try export.overwrite=true"
    )
    resolve_run(run_with(tmp_path, export={"path": str(target), "overwrite": True}), 1, "cpu")


def test_an_export_over_another_model_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    (target / "config.json").touch()
    told = "hf would be replaced, and has no mark of an export"
    assert told in refusal(run_with(tmp_path, export={"path": str(target)}))
    (target / "thesis.tex").touch()
    told = "holds thesis.tex, which is no file of a model"
    assert told in refusal(run_with(tmp_path, export={"path": str(target)}))


def test_what_a_run_reads_is_never_replaced(tmp_path: Path) -> None:
    """Not on demand, and not by another name."""
    base, adapter, other = (tmp_path / name for name in ("base", "adapter", "other"))
    for place in (base, adapter, other):
        place.mkdir()
        (place / "weights").touch()
    (tmp_path / "link").symlink_to(base)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(other)}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    model = {"path": str(base)}
    text = {"train": [str(tmp_path / "text")], "seq_length": 8}
    for path, field in (
        ("base", "model.path"),
        ("link", "model.path"),
        ("base/../link", "model.path"),
        ("adapter", "peft"),
        ("other", f"{other}, the base of peft"),
        ("text", f"{tmp_path / 'text'}, which holds data"),
    ):
        export = {"path": f"{tmp_path}/{path}", "overwrite": True}
        run = run_with(tmp_path, model=model, peft=str(adapter), export=export, data=text)
        with pytest.raises(ConversionError, match=re.escape(f"export.path={tmp_path}/{path} would replace {field}")):
            export_target(run).check()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("config.json", "holds config.json of a model, and a run would write its own files there;"),
        ("adapter_config.json", "holds adapter_config.json of a model"),
        ("training_state", "holds training_state of a model"),
        (MARK, f"holds {MARK} of a model"),
        ("config.yaml", "holds config.yaml, which is of no run and would be replaced"),
        ("data.json", "holds data.json, which is of no run and would be replaced"),
    ],
)
def test_an_output_among_the_files_of_something_else_is_refused(tmp_path: Path, name: str, told: str) -> None:
    """A run writes config.yaml, loss.png and data.json, and removes an old data.json."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("defaults: [optimizer: adam]\n")
    text = refusal(run_with(tmp_path))
    assert text.startswith(f"output={out} {told}") and text.endswith(f"choose another directory, such as {out}/run")
    (out / "config.yaml").write_text(dump_run(run_with(tmp_path)))
    if name.endswith(("config.yaml", "data.json")):
        resolve_run(run_with(tmp_path), 1, "cpu")  # the output of an earlier run


def test_an_output_in_a_model_is_refused_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    model = {"config": CONFIGS["llama"], "tokenizer": str(tmp_path / "base")}
    text = refusal(run_with(tmp_path, model=model, output=str(tmp_path / "link")))
    assert text.startswith(f"output={tmp_path / 'link'} would replace model.tokenizer={tmp_path / 'base'};")


@pytest.mark.parametrize("key", ["output", "export.path"])
def test_a_place_that_takes_no_directory_is_refused_before_the_first_step(tmp_path: Path, key: str) -> None:
    (tmp_path / "file").touch()
    for place, reason in (("/proc/run", "/proc takes no directory"), (f"{tmp_path}/file/x", "file is not a directory")):
        places = {"output": place} if key == "output" else {"export": {"path": place}}
        text = refusal(run_with(tmp_path, **places))
        assert text.startswith(f"{key}={place} cannot be written (") and reason in text, text
    assert {path.name for path in tmp_path.iterdir()} == {"file", "data.jsonl"}


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
        (
            {
                "train": {"steps": 1, "global_batch_size": 1, "recompute": "full", "offload_activations": True},
                "deepspeed": {"activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}},
            },
            "train.offload_activations=true and deepspeed.activation_checkpointing.cpu_checkpointing both decide how "
            "the inputs of recomputed blocks are kept; remove one of them",
        ),
    ],
)
def test_recomputation_said_twice_or_split_twice_is_refused(
    tmp_path: Path, sections: dict[str, Any], telling: str
) -> None:
    run = run_with(tmp_path, **sections)
    with pytest.raises(ConfigError, match=telling):
        resolve_run(run, run.parallel.tensor, "cpu")
