"""Write a commented run file, checked as `train` checks it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ds.atomic import replacing
from megatron_ds.config import build_run, load_run
from megatron_ds.config.yaml_text import parse_yaml
from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hub import local_directory
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.new_run.data_format import FoundFormat, find_format
from megatron_ds.new_run.layout import GB, ChosenLayout, choose_layout
from megatron_ds.planner.plan import plan_stages
from megatron_ds.planner.plan_input import Machines
from megatron_ds.training.planning import plan_input
from megatron_ds.training.resolve import resolve_run

LONGEST_SEQUENCE = 4096
"""Of a first run; `data.seq_length` may be larger."""
SAMPLES_PER_STEP = 32
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class NewRun:
    """The answers that a run file is written from.

    Attributes:
        model: a Hugging Face directory, the id of a model on the hub, or a checkpoint.
        data: training data.
        valid: validation data; None = 1 % of the training data.
        output: the run's directory; metrics, checkpoints and the export are written there.
        num_gpus: all GPUs of the run; 0 = one rank on the CPU.
        gpu_bytes: memory of each.
        lora: train LoRA adapters instead of all weights.
        random: start from random weights instead of the directory's.
    """

    model: str
    data: str
    output: str
    valid: str | None = None
    num_gpus: int = 0
    gpu_bytes: int = 80 * GB
    lora: bool = False
    random: bool = False


def write_run(new: NewRun, path: Path, *, overwrite: bool = False) -> ChosenLayout:
    """Write a run file, and check it against the model, the data's format and the number of ranks.

    Args:
        new: the answers.
        path: the file.
        overwrite: replace a file that exists.

    Returns:
        the layout in it.

    Raises:
        MegatronDSError: the model or the data cannot be read, the model does not fit, or the file exists.
    """
    if path.exists() and not overwrite:
        raise ConfigError(f"RUN.yaml={path} exists; choose another name, or try --overwrite")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"RUN.yaml={path} is not in a directory that exists; try mkdir -p {path.absolute().parent}")
    hf = read_model(local_directory(new.model, f"--model={new.model}", with_state=False), "--model")
    found = find_format(new.data, has_label_head=hf.core.labels is not None)
    num_params = _count_params(hf)

    def text(layout: ChosenLayout) -> str:
        return _text(new, hf, found, layout, num_params)

    def plan_bytes(layout: ChosenLayout) -> int:
        run = build_run(parse_yaml(text(layout), "the run file"))
        given = plan_input(run, Machines(*_nodes(new.num_gpus), "cuda"))
        return max(stage.peak_bytes for stage in plan_stages(given))

    layout = ChosenLayout(1, 1, "none")
    if new.num_gpus:
        layout = choose_layout(plan_bytes, new.num_gpus, new.gpu_bytes, trains_all=not new.lora)
    with replacing(path) as temporary:
        temporary.write_text(text(layout), encoding="utf-8")
        resolve_run(load_run(temporary), max(1, new.num_gpus), "cuda" if new.num_gpus else "cpu")
    return layout


def _nodes(num_gpus: int) -> tuple[int, int]:
    """Return nodes and GPUs of each: nodes of 8, if they are full."""
    return (num_gpus // GPUS_PER_NODE, GPUS_PER_NODE) if num_gpus % GPUS_PER_NODE == 0 else (1, num_gpus)


def _count_params(hf: HFModel) -> int:
    with torch.device("meta"):
        model = SequentialModel(hf.core.build_layers(BuildContext()))
    return sum(spec_of(parameter).numel for parameter in model.parameters())


def _sequence(hf: HFModel) -> int:
    """Return the length of a sample: the model's, if it is not longer than a first run's."""
    longest = getattr(hf.config, "max_position_embeddings", None) or hf.core.shape().max_positions
    return min(longest or LONGEST_SEQUENCE, LONGEST_SEQUENCE)


def _text(new: NewRun, hf: HFModel, found: FoundFormat, layout: ChosenLayout, num_params: int) -> str:
    """Return the run file's text."""
    num_data = max(1, new.num_gpus) // layout.tensor
    batch = -(-SAMPLES_PER_STEP // num_data) * num_data
    lr = 2.0e-4 if new.lora else 3.0e-4 if new.random else 1.0e-5
    precision = "bf16: {enabled: true}, " if new.num_gpus else ""
    valid = f"[{_yaml(new.valid)}]" if new.valid else "{share: 0.01}"
    train = _yaml(new.data) if found.column is None else f"{{path: {_yaml(new.data)}, column: {_yaml(found.column)}}}"
    lines = [
        f"# {_verb(new)} {new.model} on {new.data}. docs/run_file.md has all keys.",
        "model:",
        *_row(f"  path: {_yaml(new.model)}", f"{hf.family.model_type}, {num_params:,} parameters"),
        *_row(
            f"  init: {'random' if new.random else 'pretrained'}", "pretrained, or random: config.json alone is used"
        ),
    ]
    if new.lora:
        lines += _row(
            "peft: {r: 16, lora_alpha: 32, target_modules: all-linear}", "adapters; all other weights are frozen"
        )
    lines += [
        "parallel:                             # data ranks = all ranks / (tensor * pipeline * context)",
        *_row(f"  tensor: {layout.tensor}", _why(layout, new)),
        *_row("  pipeline: 1", "stages; more if the model does not fit on the GPUs of a node"),
        *_row(f"  sequence: {_yaml(layout.tensor > 1)}", "activations divided over tensor ranks too"),
        *_row(
            f"deepspeed: {{{precision}zero_optimization: {{stage: {layout.stage}}}}}",
            "or the path of a DeepSpeed JSON",
        ),
        "data:",
        *_row(f"  format: {found.name}", f"by {found.reason}"),
        f"  train: [{train}]",
        *_row(f"  valid: {valid}", "files, or a share of the training samples"),
        *_row(f"  seq_length: {_sequence(hf)}", "tokens of a sample"),
    ]
    if found.name == "chat":
        lines += _row("  overlong: cut", "conversations longer than seq_length: refuse, drop or cut")
        lines += _row("  packing: true", "several conversations in a sample; they do not attend to each other")
    lines += [
        *_row(f"optimizer: {{lr: {lr:.1e}, weight_decay: {0.0 if new.lora else 0.1}, grad_clip: 1.0}}", "AdamW"),
        *_row(
            f"schedule: {{name: cosine, warmup_steps: 0, min_lr: {lr / 10:.1e}}}",
            "a long run warms up, such as 100 steps",
        ),
        "train:",
        *_row("  epochs: 1", "passes over the data; or steps: N"),
        *_row(f"  global_batch_size: {batch}", f"samples of a step, over {num_data} data rank{'s' * (num_data > 1)}"),
        *_row("  micro_batch_size: 1", "samples that a rank computes at a time; larger is faster until memory is full"),
        *_row(f"  recompute: {layout.recompute}", "none, selective or full: activations recomputed to save memory"),
        *_row("  eval_every: 100", "steps between validations"),
        *_row("checkpoint: {every: 100, keep: 2}", "the same command resumes from the newest one"),
        *_row(f"export: {{path: {_yaml(new.output + '/hf')}}}", "a directory that transformers loads, at the end"),
        f"output: {_yaml(new.output + '/run')}",
    ]
    return "\n".join(lines) + "\n"


def _verb(new: NewRun) -> str:
    return "Train LoRA adapters of" if new.lora else "Pretrain" if new.random else "Fine-tune"


def _why(layout: ChosenLayout, new: NewRun) -> str:
    if not new.num_gpus:
        return "ranks that divide each layer"
    needs = f"{layout.bytes_per_rank / GB:.0f} of {new.gpu_bytes / GB:.0f} GB a GPU"
    return f"ranks that divide each layer; planned {needs}: megatron-ds plan"


def _row(text: str, comment: str) -> list[str]:
    """Return a line of the file with its comment."""
    return [f"{text:<36}  # {comment}"]


def _yaml(value: Any) -> str:
    """Return a value as YAML writes it in a line: text in quotes where they are needed."""
    if isinstance(value, bool):
        return "true" if value else "false"
    plain = (value and all(one.isalnum() or one in "_./-@" for one in value) and value[0].isalpha()) or value[0] in "./"
    return value if plain and not value.replace(".", "").isdigit() else json.dumps(value)
