"""The interface through which a training run reports its progress; the command line prints it."""

from dataclasses import dataclass
from typing import Protocol

from megatron_ds.monitor.metrics import StepMetrics, ValidMetrics


@dataclass(frozen=True)
class RunSummary:
    """A run in a few facts, known before its first step.

    Attributes:
        model_name: Architecture, e.g. `llama`.
        num_params: Parameters of the whole model, over all ranks; tied ones once.
        world_size: Ranks, `tensor * pipeline * data`.
        tensor: Tensor-parallel size.
        pipeline: Pipeline stages.
        data: Data-parallel size.
        sequence: Whether sequence parallelism is on.
        zero_stage: ZeRO stage, 0-3.
        precision: Of the computation, e.g. `bf16`.
        device: In words, e.g. `NVIDIA H100` or `cpu`.
        tokens_per_step: Tokens of a global batch.
        steps: Optimizer steps of the whole run, a resumed run's earlier ones included.
        data_description: Where the tokens come from, in a few words.
        output: Directory the run writes to.
    """

    model_name: str
    num_params: int
    world_size: int
    tensor: int
    pipeline: int
    data: int
    sequence: bool
    zero_stage: int
    precision: str
    device: str
    tokens_per_step: int
    steps: int
    data_description: str
    output: str


class Reporter(Protocol):
    """Listens to a run. Called in the order start, then step, valid and note as they come, then finish."""

    def start(self, summary: RunSummary) -> None:
        """The run is set up; its first step comes next."""

    def step(self, metrics: StepMetrics, total_steps: int) -> None:
        """A logged step is done, out of `total_steps`."""

    def valid(self, metrics: ValidMetrics) -> None:
        """A validation is done."""

    def note(self, text: str) -> None:
        """Something worth a line happened, e.g. a checkpoint was written."""

    def finish(self, text: str) -> None:
        """The run is over; `text` tells how it went."""


class SilentReporter(Reporter):
    """Reports nothing: for all ranks but 0, and for callers who read `metrics.jsonl` instead."""

    def start(self, summary: RunSummary) -> None:
        """Do nothing."""

    def step(self, metrics: StepMetrics, total_steps: int) -> None:
        """Do nothing."""

    def valid(self, metrics: ValidMetrics) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def finish(self, text: str) -> None:
        """Do nothing."""
