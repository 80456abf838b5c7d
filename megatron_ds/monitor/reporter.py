"""The interface through which a training run reports its progress; the command line prints it."""

from dataclasses import dataclass
from typing import Protocol

from megatron_ds.config import BatchSizes, LengthStage
from megatron_ds.monitor.metrics import StepMetrics, ValidMetrics


@dataclass(frozen=True)
class RunSummary:
    """The facts of a run that are known before its first step.

    Attributes:
        model_name: Architecture, e.g. `llama`.
        num_params: parameters of the full model, over all ranks; tied ones counted once.
        num_active_params: those that one token uses; None = all.
        experts: the experts of a layer, and the ranks that divide them; empty without experts.
        world_size: number of ranks, `tensor * context * pipeline * data`.
        tensor: Tensor-parallel size.
        pipeline: pipeline stages.
        data: Data-parallel size.
        sequence: whether sequence parallelism is on.
        context: number of ranks that divide each sequence.
        context_plan: their division by communication, and why; empty with one rank.
        row_lengths: lengths of the rows that samples are cut into; one = they stay as they are.
        batch_sizes: samples of each step; None = all steps have as many.
        zero_stage: ZeRO stage, 0-3.
        precision: precision of the computation, e.g. `bf16`.
        device: name of the device, e.g. `NVIDIA H100` or `cpu`.
        tokens_per_step: tokens per global batch, at the end of its ramp.
        steps: optimizer steps of the complete run, including those before it was resumed.
        data_description: A short description of the data.
        output: the run's directory.
        learned, validated, kept: how much of the data the run reads, when it validates, and what is left of the model
            at its end; an empty text is not shown.
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
    learned: str = ""
    validated: str = ""
    kept: str = ""
    num_active_params: int | None = None
    experts: str = ""
    context: int = 1
    context_plan: str = ""
    row_lengths: tuple[LengthStage, ...] = ()
    batch_sizes: BatchSizes | None = None

    def full_batches(self, steps: int) -> float:
        """Return the samples of the first steps, in batches of full size; without a ramp it is the number of steps."""
        if self.batch_sizes is None:
            return steps
        return self.batch_sizes.samples_before(steps + 1) / self.batch_sizes.stages[-1].size


class Reporter(Protocol):
    """Receiver of a run's progress: called with start, then step, valid and note as they occur, then finish."""

    def start(self, summary: RunSummary) -> None:
        """Handle the start of the run, after set-up and before the first step."""

    def step(self, metrics: StepMetrics, total_steps: int) -> None:
        """Handle a logged step, out of `total_steps`."""

    def valid(self, metrics: ValidMetrics) -> None:
        """Handle a validation."""

    def note(self, text: str) -> None:
        """Handle an event that deserves a line, e.g. that a checkpoint was written."""

    def finish(self, text: str) -> None:
        """Handle the end of the run; `text` describes the result."""


class SilentReporter(Reporter):
    """A reporter that does nothing: for ranks other than 0, and for callers that read `metrics.jsonl` instead."""

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
