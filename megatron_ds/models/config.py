"""Configs of models in mathematical terms, independent of any framework: what every kind of model answers about itself.

Hugging Face configs are translated into these. The kinds are in files of their own, with their layers: gpt.py, bert.py
and t5.py. Another kind is another subclass of `ModelConfig`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from megatron_ds.config import ModelShape
from megatron_ds.models.context import BuildContext
from megatron_ds.models.hidden_output import PoolingConfig
from megatron_ds.models.label_head import LabelHeadConfig
from megatron_ds.models.probe import Probe
from megatron_ds.models.sequential import LayerSpec
from megatron_ds.models.stack import StackConfig


@dataclass(frozen=True)
class Decoding:
    """The part of a model that runs for each token of a generated text.

    Attributes:
        column: the column of ids that grows.
        first_layer: name of the first layer that these ids run through; the layers before it run once.
        start_id: the first of these ids, where the text that is read is in another column; None = it begins them.
    """

    column: str
    first_layer: str
    start_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """A model, and the answers that depend on its kind. Whoever handles models asks here and never tests for a kind.

    Attributes:
        family: the Hugging Face `model_type` that it was translated from; a label, no code depends on it.
        vocab_size: V.
        tied: the head is the word embedding.
        labels: a head that predicts labels, in place of all others; None = no such head.
        pooling: of the vector of each text that a model without a head returns; None = no such vector.
    """

    family: str
    vocab_size: int
    tied: bool
    labels: LabelHeadConfig | None = None
    pooling: PoolingConfig | None = None

    @property
    def generates(self) -> bool:
        """The model can generate text."""
        return self.labels is None

    @property
    def task_type(self) -> str | None:
        """peft's name of what the model is for; None = peft has no name for it."""
        if self.labels is None:
            return None
        return "TOKEN_CLS" if self.labels.pick == "each" else "SEQ_CLS"

    @property
    def decodes(self) -> bool:
        """A stack is causal, so that transformers' model may keep keys and values of earlier positions."""
        return any(stack.causal for stack in self.stacks.values())

    @property
    def decoding(self) -> Decoding | None:
        """The part of the model that generates text token by token; None = it does not generate text."""
        return None

    @property
    @abstractmethod
    def stacks(self) -> dict[str, StackConfig]:
        """Stacks of blocks in the order in which they run, by the prefix of their blocks' names."""

    @property
    @abstractmethod
    def data_objective(self) -> str | None:
        """Name of the task that the data are prepared for: "causal", "masked", "seq2seq" or "labelled".

        None = no head to train.
        """

    @property
    def data_objective_options(self) -> Mapping[str, Any]:
        """Options of that task that the model fixes, by name; the run file decides the others."""
        return {}

    def label_options(self, padding_id: int | None) -> dict[str, Any]:
        """Return the options of the task "labelled"; `padding_id` of the model, where its head reads none."""
        assert self.labels is not None
        pick, last = self.labels.pick, self.labels.pick == "last"
        own = self.labels.pick_id if last else padding_id
        return {"problem": self.labels.loss, "of_words": pick == "each", "padding_id": own or 0, "reads_last": last}

    @abstractmethod
    def shape(self) -> ModelShape:
        """Return the sizes that a run's checks need."""

    @abstractmethod
    def axis_sizes(self) -> dict[str, int]:
        """Return the global sizes of the axes that tables of Hugging Face tensors name.

        v vocabulary, e embedding, h hidden, i the same on the other side of a projection, f feed-forward, p rows of the
        position table, s segments, n query heads, k key/value heads, g query heads per key head, d head dim, c classes
        of pairs of segments, y labels of the head, b buckets of relative positions, x experts, m inner features of an
        expert, u of the shared experts, j four blocks of query heads, l the heads of each.
        """

    @abstractmethod
    def build_layers(self, ctx: BuildContext | None = None) -> list[LayerSpec]:
        """Return the model's layers in order, not built yet. `ctx`: None = a single process."""

    @property
    @abstractmethod
    def num_idle_params(self) -> int:
        """Number of parameters that cost a position no FLOPs: tables that are only looked up, experts not used."""

    @property
    def num_expert_params_idle(self) -> int:
        """Number of parameters of the experts that a position does not use."""
        return sum(stack.num_expert_params_idle for stack in self.stacks.values())

    @property
    def expert_share(self) -> Fraction:
        """The share of the experts of a layer that a position uses, k / E; 1 without experts."""
        routers = [stack.moe.router for stack in self.stacks.values() if stack.moe is not None]
        return Fraction(routers[0].top_k, routers[0].num_experts) if routers else Fraction(1)

    @abstractmethod
    def flops_per_position(self, seq_length: int, target_length: int, num_params: int, num_frozen: int) -> float:
        """Return the FLOPs per position of a sample, forward and backward, on average over its S + T positions.

        Args:
            seq_length: S, positions of the inputs.
            target_length: T, positions of a decoder with inputs of its own; 0 = there is no such decoder.
            num_params: number of parameters without idle ones, tied ones once.
            num_frozen: number of these that get no gradient.
        """

    @abstractmethod
    def without_dropout(self) -> Self:
        """Return the same model, which computes the same on every run."""

    @abstractmethod
    def probes(self, multiple_of: int) -> tuple[list[Probe], str | None]:
        """Return inputs that exercise the model's options, and a description of what they do not reach.

        Args:
            multiple_of: divisor of every length: the number of tensor ranks under sequence parallelism.
        """

    @property
    def has_dense_layers(self) -> bool:
        """Some feed-forward layers are not mixtures of experts."""
        return any(stack.dense_layers for stack in self.stacks.values())

    @property
    def has_cross_attention(self) -> bool:
        """The hidden states of one stack are an input of all blocks of another."""
        return any(stack.cross_attention for stack in self.stacks.values())
