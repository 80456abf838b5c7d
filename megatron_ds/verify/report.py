"""The report of a verification, as an object and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ds.hf.weight_files import write_json
from megatron_ds.verify.compare import GRADIENT_BOUND, LOGITS_BOUND, LOSS_BOUND, Difference, relative_error


@dataclass(frozen=True)
class InputReport:
    """The differences of one input between our model and transformers.

    Attributes:
        name: name of the probe.
        batch, length: B, S.
        decoder_length: T of an encoder-decoder; None for other models.
        outputs: differences of the outputs, by name such as "logits".
        loss: difference of the loss.
        hidden: differences of hidden states by position: "entry", then "blocks.0" and so on, or "encoder.entry" and so
            on for an encoder-decoder.
        gradients: differences of the gradients by Hugging Face name; empty without a backward pass.
        other_experts: position -> (tokens that chose other experts than in transformers, all tokens), for each layer
            with experts whose choice transformers shows.
    """

    name: str
    batch: int
    length: int
    decoder_length: int | None
    outputs: Mapping[str, Difference]
    loss: Difference
    hidden: Mapping[str, Difference]
    gradients: Mapping[str, Difference] = field(default_factory=dict)
    other_experts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def first_other_choice(self) -> str | None:
        """Name of the first layer in which a token chose other experts; None if there is no such layer."""
        return next((name for name, (others, _) in self.other_experts.items() if others), None)

    @property
    def logits(self) -> Difference | None:
        """The difference of the logits; None for a model without a head."""
        return self.outputs.get("logits")

    @property
    def wrong_outputs(self) -> list[str]:
        return [name for name, found in self.outputs.items() if not found.within(LOGITS_BOUND)]

    @property
    def first_difference(self) -> str | None:
        """Name of the first position whose hidden states exceed the bound; None if there is no such position."""
        return next((name for name, found in self.hidden.items() if not found.within(LOGITS_BOUND)), None)

    @property
    def worst_gradient(self) -> tuple[str, Difference] | None:
        """Name and difference of the gradient with the largest relative error."""
        return max(self.gradients.items(), key=lambda item: relative_error(item[1]), default=None)

    @property
    def wrong_gradients(self) -> list[str]:
        return [name for name, found in self.gradients.items() if not found.within(GRADIENT_BOUND)]

    @property
    def ok(self) -> bool:
        return not self.wrong_outputs and self.loss.within(LOSS_BOUND) and not self.wrong_gradients


@dataclass(frozen=True)
class RoundTrip:
    """Result of reading all tensors through our tables and writing them back.

    Attributes:
        sha256: name -> hash of the tensor in the source.
        changed: names of tensors whose bytes, shape or dtype changed.
        left_out: names in the source that are not weights: buffers, and the copy of a tied embedding.
    """

    sha256: Mapping[str, str]
    changed: Sequence[str]
    left_out: Sequence[str]


@dataclass(frozen=True)
class Report:
    """The verification of a directory at one layout.

    `dp`: data ranks, which expert ranks may need; `cp`: ranks that divide each sequence; `ep`: expert ranks, None = the
    tensor ranks.
    """

    path: str
    model_type: str
    num_params: int
    tp: int
    pp: int
    sequence: bool
    inputs: Sequence[InputReport]
    round_trip: RoundTrip
    not_reached: str | None
    dp: int = 1
    cp: int = 1
    ep: int | None = None

    @property
    def ok(self) -> bool:
        return all(one.ok for one in self.inputs) and not self.round_trip.changed

    def to_json(self) -> dict[str, Any]:
        """Return plain values: all numbers of the report, the bounds and the verdict."""
        content = asdict(self)
        for entry, one in zip(content["inputs"], self.inputs):
            logits = {"logits": entry["outputs"]["logits"]} if one.logits is not None else {}
            entry.update(ok=one.ok, first_apart=one.first_difference, **logits)
        bounds = {"logits": LOGITS_BOUND, "outputs": LOGITS_BOUND, "loss": LOSS_BOUND, "gradients": GRADIENT_BOUND}
        return {"ok": self.ok, "bounds": bounds, **content}

    def save(self, path: str | Path) -> None:
        write_json(Path(path), self.to_json())
