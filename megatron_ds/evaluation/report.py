"""The result of an evaluation, as an object and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ds.hf.weight_files import write_json

if TYPE_CHECKING:
    from megatron_ds.engine import Losses


@dataclass(frozen=True)
class DataResult:
    """The losses of a model on one data set.

    Attributes:
        name: the source, or `data.valid` for a run's own validation data.
        samples: number of samples.
        tokens: number of labels of the first loss term.
        loss: the sum of the loss terms, each a mean over its labels, in nats.
        perplexity: exp of the mean loss of a label; None if labels are not the tokens of a text.
        bits_per_byte: loss of all labels, in bits, by the bytes of the text that they are; None if it is not known.
        terms: the loss terms by name, where there are several.
        metrics: the head's metrics by name.
    """

    name: str
    samples: int
    tokens: int
    loss: float
    perplexity: float | None = None
    bits_per_byte: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, samples: int, losses: Losses, *, predicts_text: bool, num_bytes: int) -> DataResult:
        """Return the result that follows from summed losses.

        Args:
            name, samples: see the attributes.
            losses: of all samples.
            predicts_text: whether labels of the first term are the tokens of a text.
            num_bytes: length of the text of all labels, in UTF-8; 0 = it is not known.
        """
        first = next(iter(losses.sums))
        bits = losses.sums[first] / math.log(2.0)
        return cls(
            name=name,
            samples=samples,
            tokens=losses.counts[first],
            loss=losses.mean,
            perplexity=_exp(losses.terms[first]) if predicts_text else None,
            bits_per_byte=bits / num_bytes if predicts_text and num_bytes else None,
            terms=losses.terms if len(losses.terms) > 1 else {},
            metrics=losses.metrics,
        )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf  # beyond the range of a float


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one model at one layout.

    Attributes:
        path: the run file, output, checkpoint or directory that was named.
        weights: the directory that the weights were read from.
        model_type: of the Hugging Face config.
        precision: of the weights in memory and of the products: fp32, bf16 or fp16.
        tp, cp, pp, dp: numbers of tensor, context, pipeline and data ranks.
        data: results on data sets, in the order in which they were named.
        tasks: what lm-eval returned, plain values; None = no tasks were run.
    """

    path: str
    weights: str
    model_type: str
    precision: str
    tp: int
    cp: int
    pp: int
    dp: int
    data: Sequence[DataResult] = ()
    tasks: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        content = asdict(self)
        return {name: value for name, value in content.items() if name != "tasks" or value is not None}

    def save(self, path: str | Path) -> None:
        """Write the result as JSON."""
        write_json(Path(path), self.to_json())
