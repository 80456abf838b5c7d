"""The run file: its keys, their defaults, and the rules that need nothing but the file.

Every section is frozen and refuses unknown keys. Numbers are strict (`true` is not 1, `"5"` is not 5), except that a
float without a fraction, such as `1e3`, is an integer. Rules that need the model or the ranks are in `checks.py`.
"""

import math
import re
from collections import Counter
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from megatron_ds.config.automatic import PARALLEL_SIZES, check_nothing_given, expand_micro_batch, expand_parallel
from megatron_ds.config.batch_ramp import BatchRamp, BatchSizes, batch_sizes, check_batch_ramp
from megatron_ds.config.context_section import ContextSection
from megatron_ds.config.data_section import DataSection
from megatron_ds.config.length_ramp import LengthRamp, check_length_ramp
from megatron_ds.config.optimizer_groups import OptimizerGroup
from megatron_ds.config.rope_section import RopeSection
from megatron_ds.config.samples_section import EVAL, SamplesSection
from megatron_ds.config.schema_base import (
    Beta,
    Count,
    CountOrZero,
    NamedEntries,
    NamedEntry,
    NonNegative,
    PathOrMapping,
    PathText,
    Section,
    Text,
    integral_float_to_int,
)
from megatron_ds.errors import ConfigError, show
from megatron_ds.hub import parse_id
from megatron_ds.remote import as_url, require_client, require_local


def _betas_pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(f"optimizer.betas={show(value)} is not two numbers; write optimizer.betas=[0.9, 0.95]")
    return tuple(value)


def _resume_source(value: Any) -> Any:
    if not isinstance(value, str) or value in ("no", "off"):
        fix = "auto" if value is True else "never"
        raise ConfigError(
            f"checkpoint.resume={show(value)} is neither auto, never nor the path of a checkpoint; nearest: {fix}"
        )
    return value


def path_or_mapping(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ConfigError(f"deepspeed={show(value)} is neither the path of a DeepSpeed JSON nor a mapping")
    return value


def _peft(value: Any) -> Any:
    if value is not None and not isinstance(value, str | dict):
        raise ConfigError(
            f"peft={show(value)} is neither fields of a peft config, such as {{r: 8, target_modules: all-linear}}, nor "
            "the path of one"
        )
    return value


def kernel_choice(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ConfigError(
            f"train.kernels={show(value)} is neither auto, torch nor a mapping, such as {{attention: torch}}"
        )
    return value


def _seconds(value: Any) -> Any:
    """Return Slurm's form of a time, D-HH:MM:SS or a part of it, as seconds."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d{2})(?::(\d{2}))?", value.strip())
    if not match:
        raise ConfigError(f"train.max_time={show(value)} is not a time; write seconds, or HH:MM:SS as 3:50:00")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    hours, minutes, seconds = (first, second, third) if match[1] or match[4] else (0, first, second)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


_MOST_LABELS = 2**20  # the limit of num_labels in a config.json


def _label_names(value: Any) -> Any:
    value = integral_float_to_int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if is_number and value > _MOST_LABELS:
        raise ConfigError(
            f"model.head.labels={show(value)} is more than {_MOST_LABELS:,} labels; nearest: {_MOST_LABELS}"
        )
    if not is_number and not (isinstance(value, list) and value):
        raise ConfigError(
            f"model.head.labels={show(value)} is neither names nor a number of at least 1; write [a, b], or 2"
        )
    for name in value if isinstance(value, list) else ():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"model.head.labels has {show(name)}, which is no name; write a text, in quotes")
    return value


class HeadSection(Section):
    """A new head for labels, in place of the model's own.

    `labels`: their names, or their number. `kind`: labels of the text ("sequence") or of each of its tokens. `problem`:
    one label excludes the others, or does not, or is a number; None: one label is a regression, several exclude one
    another. `pad_token_id`: the id of padding, for a model whose config.json has none.
    """

    labels: Annotated[list[Text] | Count, BeforeValidator(_label_names)]
    kind: Literal["sequence", "token"] = "sequence"
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    pad_token_id: CountOrZero | None = None

    @model_validator(mode="after")
    def _fits(self) -> "HeadSection":
        names = self.names
        twice = next((name for name, times in Counter(names).items() if times > 1), None)
        if twice is not None:
            raise ConfigError(f"model.head.labels has {twice!r} twice; give each label a name of its own")
        if self.kind == "token" and self.problem not in (None, "single_label_classification"):
            raise ConfigError(
                f"model.head.problem={self.problem} is for labels of a text, and model.head.kind=token chooses one for "
                "each token; remove it"
            )
        if self.problem == "single_label_classification" and len(names) == 1:
            raise ConfigError(
                f"model.head.problem={self.problem} has nothing to choose with one label; nearest: regression"
            )
        if self.kind == "token" and len(names) == 1:
            raise ConfigError(
                f"model.head.labels={show(self.labels)} has nothing to choose with one label; model.head.kind=token "
                "chooses one for each token; give at least 2"
            )
        return self

    @property
    def names(self) -> list[str]:
        """Names of the labels; those of a number are LABEL_0 and so on, as transformers names them."""
        return [f"LABEL_{index}" for index in range(self.labels)] if isinstance(self.labels, int) else self.labels


class ModelSection(Section):
    """The model: a directory (`path`), or Hugging Face config fields (`config`, random weights).

    `head`: a new head for labels; None: the model's own. `rope`: another rotation of positions, for longer texts; None:
    the model's own.
    """

    path: PathText | None = None
    config: dict[str, Any] | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    tokenizer: PathText | None = None
    head: HeadSection | None = None
    rope: RopeSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_init(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("config") is not None and data.get("init") is None:
            return {**data, "init": "random"}
        return data

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSection":
        if (self.path is None) == (self.config is None):
            both = "are both given; keep one" if self.path is not None else "are both missing; give one"
            raise ConfigError(f"model.path and model.config {both}")
        if self.config is not None and self.init == "pretrained":
            raise ConfigError(
                "model.init=pretrained needs weights, and model.config has none; use model.path, or model.init=random"
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ConfigError("model.config.model_type is missing; name the Hugging Face model type, for example llama")
        return self

    @property
    def tokenizer_path(self) -> str | None:
        """Directory of the tokenizer: `tokenizer`, else `path`; None with `config` and no `tokenizer`."""
        return self.tokenizer or self.path


class ParallelSection(Section):
    """Degrees of model parallelism; the data degree is world / (tensor * pipeline * context).

    `context`: ranks that divide each sequence. `expert`: number of ranks that divide the experts of a layer,
    consecutive ranks of a pipeline stage; None: the tensor ranks. `shared_memory`: tensor ranks on the CPU of one
    machine all-reduce through shared memory instead of TCP. `auto`: the planner chooses all but `shared_memory` when
    the run starts; the run file may write `parallel: auto`.
    """

    auto: bool = False
    tensor: Count = 1
    pipeline: Count = 1
    context: ContextSection = ContextSection()
    expert: Count | None = None
    sequence: bool = False
    shared_memory: bool = False

    @model_validator(mode="after")
    def _chosen_together(self) -> "ParallelSection":
        if self.auto:
            fields = {name: getattr(self, name) for name in PARALLEL_SIZES}
            defaults = type(self).model_fields
            check_nothing_given({name: one for name, one in fields.items() if one != defaults[name].default})
        return self

    @field_serializer("context")
    def _plain_context(self, context: ContextSection) -> Any:
        return context.plain

    @property
    def model_ranks(self) -> int:
        """Number of ranks that compute a sample: tensor * pipeline * context."""
        return self.tensor * self.pipeline * self.context.size

    @property
    def least_ranks(self) -> int:
        """The smallest number of ranks with these degrees.

        Expert ranks take data ranks if tensor and context ranks are too few.
        """
        expert = self.expert or 1
        return self.model_ranks * (expert // math.gcd(expert, self.tensor * self.context.size))


class OptimizerSection(Section):
    """The optimizer. `grad_clip: 0` turns clipping off; `decay_all` decays biases and norms too.

    `groups`: other learning rates and weight decay by patterns of names; the first match counts. `options`: options of
    an optimizer that another package registers.
    """

    name: Text = "adamw"
    lr: NonNegative = 3.0e-4
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_betas_pair)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    weight_decay: NonNegative = 0.1
    grad_clip: NonNegative = 1.0
    decay_all: bool = False
    groups: list[OptimizerGroup] = []
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _factors_exist(self) -> "OptimizerSection":
        given = next((group for group in self.groups if group.lr is not None and self.lr == 0), None)
        if given is not None:
            raise ConfigError(
                f"optimizer.groups: lr={given.lr:g} of {given.label} follows the schedule in proportion to "
                "optimizer.lr=0; try a positive optimizer.lr, and lr_factor: 0 for all that it is not for"
            )
        return self

    @property
    def group_lrs(self) -> dict[str, float]:
        """Label of each group with a learning rate of its own -> its factor of the run's."""
        factors = {group.label: group.factor(self.lr) for group in self.groups}
        return {label: factor for label, factor in factors.items() if factor != 1.0}


class ScheduleSection(Section):
    """The learning rate over the steps: linear warm-up from 0, then the schedule of this name.

    `options`: options of a schedule that another package registers.
    """

    name: Text = "cosine"
    warmup_steps: CountOrZero = 0
    min_lr: NonNegative = 0.0
    options: dict[str, Any] = {}


def _first_and_last(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(
            f"train.profile.steps={show(value)} is not a first and a last step; write train.profile.steps=[10, 12]"
        )
    return tuple(value)


class ProfileSection(Section):
    """The steps that are profiled: the first and the last one, counted from 1."""

    steps: Annotated[tuple[Count, Count], BeforeValidator(_first_and_last)]


class StragglersSection(Section):
    """The report of slow ranks: `every` this many steps the times of all ranks are compared (0: never).

    A rank is slow if it takes longer than the median by `threshold`, a share of a step; it is named after `windows`
    comparisons in a row.
    """

    every: CountOrZero = 100
    threshold: Annotated[float, Field(gt=0)] = 0.1
    windows: Count = 3

    @model_validator(mode="after")
    def _has_steps_to_measure(self) -> "StragglersSection":
        if self.every == 1:
            raise ConfigError("train.stragglers.every=1 leaves no step to measure before a comparison; nearest: 2")
        return self


class EmaSection(Section):
    """An exponential moving average of the weights, `decay` times itself plus the rest times the weights after a step.

    `start_step`: it begins with the weights after this step; 0: with those of the run's start.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    start_step: CountOrZero = 0


class TrainSection(Section):
    """Length of the run, batch sizes, and how steps are computed.

    `steps` or `epochs`: the length in optimizer steps, or in passes over the training data, from which the steps follow
    when the data are open (`RunConfig.with_steps`).
    `batch_ramp`: smaller batches in the first steps (None: all steps have `global_batch_size` samples). `length_ramp`:
    shorter rows in the first steps (None: all have `data.seq_length` tokens).
    `auto_micro_batch_size`: the planner chooses `micro_batch_size` when the run starts; the run file may write
    `micro_batch_size: auto`.
    `objective`: "auto" follows from the kind of model; otherwise the name of a registered one. `eval_every: 0`
    validates once, after the last step. `max_time`: seconds after which the run saves and ends. `max_bad_steps`: the
    run ends after this many consecutive steps without a finite loss and gradient norm. `step_timeout`: it ends after
    this many seconds without progress (0: never). `start_timeout`: seconds that a launcher's ranks wait for each other
    (0: no limit). `freeze`: patterns of Hugging Face tensor names that are not trained. `offload_activations`: inputs
    of recomputed blocks are kept in host memory. `keep_attention`: so are, on the device, the outputs of their
    attention kernels, which then run once. `mlp_tile_tokens`: tokens of a tile in which dense feed-forward layers are
    computed, and recomputed in the backward pass (None: they are computed whole). `compile`: blocks are fused by
    torch.compile. `kernels`: "auto" uses Triton kernels and installed libraries on CUDA, "torch" PyTorch alone, a
    mapping chooses per operation. `moe_aux_loss`, `moe_z_loss`: coefficients of the losses that balance the routers of
    mixtures of experts (None: the model's). `moe_bias_rate`: step of their biases of the choice. `deterministic`: on
    CUDA the same operations give the same bits again. `tf32`: on CUDA products in fp32 are rounded to TF32. `profile`:
    the steps that are profiled. `ema`: an average of the weights is kept. `samples`:
    prompts that the model continues meanwhile.
    `max_no_progress_restarts`: the run ends after this many restarts in a row without a new step (None: no limit).
    `stragglers`: the report of slow ranks. `check_replicas`: steps between comparisons of what several ranks hold (0:
    none). `check_repeats`: steps between micro-batches that are computed twice (0: none). `device_test`: devices,
    memory and links are tested before the first step.
    """

    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    objective: Text = "auto"
    global_batch_size: Count = 8
    batch_ramp: BatchRamp | None = None
    length_ramp: LengthRamp | None = None
    micro_batch_size: Count = 1
    auto_micro_batch_size: bool = False
    seed: Annotated[int, BeforeValidator(integral_float_to_int), Field(ge=0, lt=2**32)] = 1234
    eval_every: CountOrZero = 0
    log_every: Count = 1
    log_system: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    offload_activations: bool = False
    keep_attention: bool = False
    mlp_tile_tokens: Count | None = None
    compile: bool = False
    kernels: Annotated[str | dict[str, Any], BeforeValidator(kernel_choice)] = "auto"
    moe_aux_loss: NonNegative | None = None
    moe_z_loss: NonNegative = 0.0
    moe_bias_rate: NonNegative = 0.0
    deterministic: bool = False
    tf32: bool = False
    profile: ProfileSection | None = None
    samples: SamplesSection | None = None
    ema: EmaSection | None = None
    max_time: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_seconds)] = None
    max_bad_steps: Count = 10
    step_timeout: NonNegative = 1800.0
    start_timeout: NonNegative = 300.0
    max_no_progress_restarts: Count | None = 3
    stragglers: StragglersSection = StragglersSection()
    check_replicas: CountOrZero = 0
    check_repeats: CountOrZero = 0
    device_test: bool = False
    freeze: list[Text] = []

    @model_validator(mode="before")
    @classmethod
    def _chosen_micro_batch(cls, data: Any) -> Any:
        return expand_micro_batch(data)

    @model_validator(mode="after")
    def _one_micro_batch(self) -> "TrainSection":
        if self.auto_micro_batch_size and self.micro_batch_size != 1:
            raise ConfigError(
                f"train.auto_micro_batch_size=true chooses train.micro_batch_size, which is {self.micro_batch_size}; "
                "keep one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if self.steps is None and self.epochs is None:
            if "steps" in self.model_fields_set:
                raise ConfigError("train.steps is empty; give it an integer, for example train: {steps: 1000}")
            raise ConfigError("train.steps is missing; add it, for example train: {steps: 1000}, or train: {epochs: 1}")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} both set the length of the run; "
                f"try train.steps= train.epochs={self.epochs:g}, or remove one from the file"
            )
        return self

    @model_validator(mode="after")
    def _ramp_fits(self) -> "TrainSection":
        if self.batch_ramp is not None:
            check_batch_ramp(self.global_batch_size, self.batch_ramp)
        return self

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps of a run whose data are open."""
        assert self.steps is not None, f"epochs={self.epochs} are not yet steps"
        return self.steps

    @property
    def batch_sizes(self) -> BatchSizes:
        """The number of samples of every step."""
        return batch_sizes(self.global_batch_size, self.batch_ramp)

    @property
    def num_samples(self) -> int:
        """Number of samples that all steps read, for a run whose data are open."""
        return self.batch_sizes.samples_before(self.num_steps + 1)


def _url(value: Any) -> Any:
    if value is not None and (not isinstance(value, str) or as_url(value) is None):
        raise ConfigError(f"checkpoint.copy_to={show(value)} is no URL; write s3://bucket/name")
    if value is not None:
        require_client(value, f"checkpoint.copy_to={value}", writes=True)
    return value


class CheckpointSection(Section):
    """Checkpoints. `every: 0` never saves; `keep` is the number of checkpoints that are kept.

    `resume`: "auto" resumes from the newest intact checkpoint under `output`, "never" starts a new run, anything else
    is the checkpoint to resume from. `asynchronous`: training continues while files are written. `optimizer`: "reset"
    lets an optimizer that keeps other state than the checkpoint's begin with an empty one; "resume" refuses it.
    `copy_to`: the URL to which each complete checkpoint is copied, and from which "auto" resumes where there is a newer
    one than under `output`. `local`: a directory on each machine's own disk, where checkpoints are written before they
    are copied to `output`. `local_copies`: the number of machines whose disks keep each file.
    """

    every: CountOrZero = 0
    keep: Count = 3
    resume: Annotated[PathText, BeforeValidator(_resume_source)] = "auto"
    asynchronous: bool = True
    optimizer: Literal["resume", "reset"] = "resume"
    copy_to: Annotated[str | None, BeforeValidator(_url)] = None
    local: PathText | None = None
    local_copies: Count = 1


def _repository(value: Any) -> Any:
    if value is not None and (not isinstance(value, str) or (parse_id(value) is None and as_url(value) is None)):
        raise ConfigError(
            f"export.push_to={show(value)} is no repository on the hub, nor a URL; write org/name, "
            "org/name@branch, or s3://bucket/name"
        )
    return value


class ExportSection(Section):
    """A Hugging Face directory written at the end.

    `overwrite`: replace a directory that is not an unchanged export; models that the run reads, checkpoints and outputs
    of runs are never replaced. `merge`: with adapters, write the base model with the adapters merged instead of a peft
    directory. `ema`: write the average of the weights. `dtype: None` keeps the model's dtype. `check` loads the
    directory with transformers on a rank of the last pipeline stage and compares its logits with the live model's; the
    model must fit there, and the rank must see the path. `push_to`: the repository on
    the hub, or the URL, that the complete directory is uploaded to; a repository that is made is `private` or not.
    """

    path: PathText
    overwrite: bool = False
    check: bool = False
    merge: bool = False
    ema: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?\s*([KMGT]i?)?B$")] = "5GB"
    push_to: Annotated[str | None, BeforeValidator(_repository)] = None
    private: bool = True


class RunConfig(Section):
    """A run as the run file describes it. Build it with `load_run` or `build_run`, whose errors are one line.

    `imports`: modules that are imported before the file is checked. `monitor`: metric sinks that get what
    `metrics.jsonl` gets. `callbacks`: called in this order while the run trains.
    """

    model: ModelSection
    parallel: Annotated[ParallelSection, BeforeValidator(expand_parallel)] = ParallelSection()
    peft: Annotated[PathOrMapping | None, BeforeValidator(_peft)] = None
    deepspeed: Annotated[PathOrMapping, BeforeValidator(path_or_mapping)] = {}
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection | None = None
    output: PathText
    monitor: NamedEntries = []
    callbacks: NamedEntries = []
    imports: list[Text] = []

    @field_serializer("monitor", "callbacks")
    def _plain_entries(self, entries: list[NamedEntry]) -> list[Any]:
        return [one.plain for one in entries]

    @model_validator(mode="after")
    def _check_sections(self) -> "RunConfig":
        if self.schedule.min_lr > self.optimizer.lr:
            raise ConfigError(
                f"schedule.min_lr={self.schedule.min_lr} is above optimizer.lr={self.optimizer.lr}; "
                f"nearest: {self.optimizer.lr}"
            )
        _check_local_paths(self)
        if self.train.profile is not None:
            _check_profile_order(*self.train.profile.steps)
        if self.train.steps is not None:
            _check_steps(self, self.train.steps, f"train.steps={self.train.steps}")
        if self.train.epochs is not None:
            _check_epochs(self)
        if self.train.length_ramp is not None:
            check_length_ramp(self.data.seq_length, self.train.length_ramp)
        if self.checkpoint.copy_to is not None and not self.checkpoint.every:
            raise ConfigError(
                f"checkpoint.copy_to={self.checkpoint.copy_to} copies checkpoints, and checkpoint.every=0 writes none; "
                "try checkpoint.every=100"
            )
        if self.checkpoint.local is None and self.checkpoint.local_copies > 1:
            raise ConfigError(
                f"checkpoint.local_copies={self.checkpoint.local_copies} is the number of machines that keep the files "
                "of checkpoint.local, which is not set; set it to a directory on each machine's own disk"
            )
        if self.checkpoint.local is not None and not self.checkpoint.every:
            raise ConfigError(
                f"checkpoint.local={self.checkpoint.local} holds checkpoints, and checkpoint.every=0 writes none; "
                "try checkpoint.every=100"
            )
        _check_samples(self)
        _check_peft(self)
        _check_ema(self)
        return self

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that the run leaves to the planner, such as `parallel=auto`."""
        parallel, micro_batch = self.parallel.auto, self.train.auto_micro_batch_size
        return ("parallel=auto",) * parallel + ("train.micro_batch_size=auto",) * micro_batch

    def without_choices(self) -> "RunConfig":
        """Return the run with the defaults of what it leaves to the planner: one rank computes one sample."""
        parallel = self.parallel.model_copy(update={"auto": False})
        train = self.train.model_copy(update={"auto_micro_batch_size": False})
        return self.model_copy(update={"parallel": parallel, "train": train})

    def with_steps(self, num_samples: int) -> "RunConfig":
        """Return the run with `train.steps` instead of `train.epochs`; itself if it has steps.

        The steps are rounded up: the last one completes the last epoch, and reads the first samples of the next.

        Args:
            num_samples: of one epoch.

        Raises:
            ConfigError: another setting does not fit the number of steps.
        """
        epochs = self.train.epochs
        if epochs is None:
            return self
        samples = Fraction(str(epochs)) * num_samples  # exact: 0.07 * 100 is more than 7 in floats
        steps = self.train.batch_sizes.steps_for(math.ceil(samples))
        _check_steps(self, steps, f"train.steps={steps}, which train.epochs={epochs:g} gives")
        return self.model_copy(update={"train": self.train.model_copy(update={"steps": steps, "epochs": None})})


def _check_local_paths(run: RunConfig) -> None:
    """Check that what is written, and the DeepSpeed JSON, are on a disk."""
    local = {
        "output": (run.output, "checkpoint.copy_to copies checkpoints to a URL"),
        "checkpoint.local": (run.checkpoint.local, "checkpoint.copy_to copies checkpoints to a URL"),
        "data.cache_dir": (run.data.cache_dir, "try one that all machines can read"),
        "export.path": (run.export.path if run.export else None, "export.push_to uploads the export to a URL"),
        "deepspeed": (run.deepspeed if isinstance(run.deepspeed, str) else None, "try a copy of it"),
    }
    for field, (path, fix) in local.items():
        if path is not None:
            require_local(path, field, fix)


def _check_ema(run: RunConfig) -> None:
    if run.export is not None and run.export.ema and run.train.ema is None:
        raise ConfigError(
            "export.ema=true needs an average of the weights, which is not kept; try train.ema.decay=0.999, or "
            "export.ema=false"
        )


def _check_samples(run: RunConfig) -> None:
    samples = run.train.samples
    if samples is not None and samples.every == EVAL and not run.data.valid and run.data.valid_share is None:
        raise ConfigError(
            "train.samples.every=eval draws samples after validations, and data.valid is empty; try "
            "train.samples.every=100"
        )


def _check_epochs(run: RunConfig) -> None:
    if any(source.weight is not None for source in run.data.train):
        raise ConfigError(
            f"train.epochs={run.train.epochs:g} is not defined for a blend: its sources are read at different rates; "
            "set train.steps"
        )
    if run.data.long_context is not None:
        raise ConfigError(
            f"train.epochs={run.train.epochs:g} is not defined with data.long_context: documents of different lengths "
            "are read at different rates; set train.steps"
        )


def _check_steps(run: RunConfig, steps: int, given: str) -> None:
    """Check the settings that name steps against the number of steps."""
    profile, warmup = run.train.profile, run.schedule.warmup_steps
    if profile is not None and profile.steps[1] > steps:
        first, last = profile.steps
        nearest = [min(first, steps), steps]
        raise ConfigError(f"train.profile.steps=[{first}, {last}] goes beyond {given}; nearest: {nearest}")
    if warmup > steps:
        raise ConfigError(f"schedule.warmup_steps={warmup} is more than {given}; nearest: {steps}")


def _check_profile_order(first: int, last: int) -> None:
    if first > last:
        raise ConfigError(f"train.profile.steps=[{first}, {last}] ends before it begins; nearest: [{last}, {first}]")


def _check_peft(run: RunConfig) -> None:
    if run.peft is None:
        if run.export is not None and run.export.merge:
            raise ConfigError("export.merge=true does nothing without peft; remove it")
        return
    if run.model.init == "random":
        raise ConfigError("peft needs a model to adapt, and model.init=random has none; use model.init=pretrained")
    if run.train.freeze:
        raise ConfigError("train.freeze does nothing with peft, which trains adapters alone; remove it")
    if run.train.moe_bias_rate:
        rate = f"{run.train.moe_bias_rate:g}"
        raise ConfigError(f"train.moe_bias_rate={rate} does nothing with peft, which freezes routers; remove it")
