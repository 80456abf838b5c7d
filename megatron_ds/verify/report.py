"""What a verification found: one object, one JSON, one verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ds.hf.weight_files import write_json
from megatron_ds.verify.compare import GRADIENT_BOUND, LOGITS_BOUND, LOSS_BOUND, Difference


@dataclass(frozen=True)
class InputReport:
    """One input.

    Attributes:
        name: of the probe.
        batch, length: B, S.
        decoder_length: T of an encoder-decoder; None elsewhere.
        outputs: what the model predicts, by name such as "logits", ours against transformers'.
        loss: likewise.
        hidden: "entry", then "blocks.0" and so on, of an encoder-decoder "encoder.entry" and so on, each against the
            input or output of transformers' block.
        gradients: of every Hugging Face tensor; empty where no backward pass was made.
    """

    name: str
    batch: int
    length: int
    decoder_length: int | None
    outputs: Mapping[str, Difference]
    loss: Difference
    hidden: Mapping[str, Difference]
    gradients: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def logits(self) -> Difference | None:
        """None of a model without a head."""
        return self.outputs.get("logits")

    @property
    def wrong_outputs(self) -> list[str]:
        return [name for name, apart in self.outputs.items() if not apart.within(LOGITS_BOUND)]

    @property
    def first_apart(self) -> str | None:
        """The first stage whose hidden states are off."""
        return next((name for name, apart in self.hidden.items() if not apart.within(LOGITS_BOUND)), None)

    @property
    def worst_gradient(self) -> tuple[str, Difference] | None:
        """The gradient that is furthest off."""
        return max(self.gradients.items(), key=_badness, default=None)

    @property
    def wrong_gradients(self) -> list[str]:
        return [name for name, apart in self.gradients.items() if not apart.within(GRADIENT_BOUND)]

    @property
    def ok(self) -> bool:
        return not self.wrong_outputs and self.loss.within(LOSS_BOUND) and not self.wrong_gradients


@dataclass(frozen=True)
class RoundTrip:
    """Tensors read through our tables and written back.

    Attributes:
        sha256: name -> hash of its bytes in the source.
        changed: names whose bytes, shape or dtype came back otherwise, or not at all.
        left_out: names of the source that are no weights of their own: buffers, and the copy of a tied embedding.
    """

    sha256: Mapping[str, str]
    changed: Sequence[str]
    left_out: Sequence[str]


@dataclass(frozen=True)
class Report:
    """The whole verification of a directory at a layout."""

    path: str
    model_type: str
    num_params: int
    tp: int
    pp: int
    sequence: bool
    inputs: Sequence[InputReport]
    round_trip: RoundTrip
    not_reached: str | None

    @property
    def ok(self) -> bool:
        return all(one.ok for one in self.inputs) and not self.round_trip.changed

    def to_json(self) -> dict[str, Any]:
        """Plain values: every number of the report, the bounds and the verdict."""
        content = asdict(self)
        for entry, one in zip(content["inputs"], self.inputs):
            logits = {"logits": entry["outputs"]["logits"]} if one.logits is not None else {}
            entry.update(ok=one.ok, first_apart=one.first_apart, **logits)
        bounds = {"logits": LOGITS_BOUND, "outputs": LOGITS_BOUND, "loss": LOSS_BOUND, "gradients": GRADIENT_BOUND}
        return {"ok": self.ok, "bounds": bounds, **content}

    def save(self, path: str | Path) -> None:
        write_json(Path(path), self.to_json())


def _badness(item: tuple[str, Difference]) -> float:
    relative = item[1].relative
    return relative if relative == relative else float("inf")
