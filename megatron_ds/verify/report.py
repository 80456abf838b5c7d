"""The report of a verification, as an object and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_ds.hf.weight_files import write_json
from megatron_ds.verify.compare import (
    GRADIENT_BOUND,
    JUDGEMENTS,
    LOGITS_BOUND,
    LOSS_BOUND,
    MOST_ROUNDING,
    ROUNDING_FACTOR,
    Difference,
    Judgement,
    relative_error,
)
from megatron_ds.verify.layer_names import choice_of
from megatron_ds.verify.rounding import NUM_SAMPLES, Rounding


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
        own_other_experts: position -> the most tokens that choose other experts in transformers after a rounding of its
            weights; empty = not measured.
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
    own_other_experts: Mapping[str, int] = field(default_factory=dict)

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
        return _judged("off", self.outputs, LOGITS_BOUND)

    @property
    def first_difference(self) -> str | None:
        """Name of the first position whose hidden states differ by more than rounding; None if there is no such one."""
        return next((name for name, found in self.hidden.items() if found.judge(LOGITS_BOUND) != "ok"), None)

    @property
    def worst_gradient(self) -> tuple[str, Difference] | None:
        """Name and difference of the gradient with the largest relative error, of those judged worst."""
        return max(self.gradients.items(), key=_badness, default=None)

    @property
    def wrong_gradients(self) -> list[str]:
        return _judged("off", self.gradients, GRADIENT_BOUND)

    @property
    def exceeds(self) -> bool:
        """True if a finite difference exceeds its bound, so that rounding may be the cause."""
        found = [(one, LOGITS_BOUND) for one in (*self.outputs.values(), *self.hidden.values())]
        found += [(self.loss, LOSS_BOUND), *((one, GRADIENT_BOUND) for one in self.gradients.values())]
        return any(isfinite(one.relative) and not one.within(bound) for one, bound in found)

    @property
    def verdict(self) -> Judgement:
        """The worst judgement of an output, the loss or a gradient."""
        judged = {one.judge(LOGITS_BOUND) for one in self.outputs.values()} | {self.loss.judge(LOSS_BOUND)}
        judged |= {one.judge(GRADIENT_BOUND) for one in self.gradients.values()}
        return max(judged, key=JUDGEMENTS.index)

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    def with_rounding(self, rounding: Rounding) -> InputReport:
        """Return the report with the differences of the reference from itself that rounding makes."""
        return replace(
            self,
            outputs=_with_rounding(self.outputs, rounding.tensors),
            loss=replace(self.loss, rounding=rounding.loss),
            hidden=_with_rounding(self.hidden, rounding.tensors),
            gradients=_with_rounding(self.gradients, rounding.gradients),
            own_other_experts={name: rounding.other_experts.get(choice_of(name), 0) for name in self.other_experts},
        )


def _judged(judgement: Judgement, found: Mapping[str, Difference], bound: float) -> list[str]:
    return [name for name, one in found.items() if one.judge(bound) == judgement]


def _badness(item: tuple[str, Difference]) -> tuple[int, float]:
    return JUDGEMENTS.index(item[1].judge(GRADIENT_BOUND)), relative_error(item[1])


def _with_rounding(found: Mapping[str, Difference], rounding: Mapping[str, float]) -> dict[str, Difference]:
    return {name: replace(one, rounding=rounding.get(name)) for name, one in found.items()}


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
    def verdict(self) -> Judgement:
        """The worst judgement of an input and of the round trip."""
        of_round_trip: Judgement = "off" if self.round_trip.changed else "ok"
        return max((of_round_trip, *(one.verdict for one in self.inputs)), key=JUDGEMENTS.index)

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    def to_json(self) -> dict[str, Any]:
        """Return plain values: all numbers of the report, the bounds and the verdict."""
        content = asdict(self)
        for entry, one in zip(content["inputs"], self.inputs):
            logits = {"logits": entry["outputs"]["logits"]} if one.logits is not None else {}
            entry.update(ok=one.ok, verdict=one.verdict, first_apart=one.first_difference, **logits)
        bounds = {"logits": LOGITS_BOUND, "outputs": LOGITS_BOUND, "loss": LOSS_BOUND, "gradients": GRADIENT_BOUND}
        rounding = {"factor": ROUNDING_FACTOR, "most": MOST_ROUNDING, "samples": NUM_SAMPLES}
        return {"ok": self.ok, "verdict": self.verdict, "bounds": bounds, "rounding": rounding, **content}

    def save(self, path: str | Path) -> None:
        write_json(Path(path), self.to_json())
