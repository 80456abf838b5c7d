"""What both sides are run on: random ids, some behind padding, and ids that go past what a model does near by: windows,
stretched positions, distances with a bias of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.models.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig, ModelConfig

RANDOM_LENGTH = 64
DECODER_LENGTH = 48  # of an encoder-decoder: another than the encoder's, so that they cannot stand in for each other
BEYOND = 17  # tokens past a window: an odd number, so that nothing lines up by chance
MOST_TOKENS = 8192  # attention written out makes (heads, S, S) tensors
ROWS = 3  # behind padding: one row has none, the others differ
LABELLED = (0.5, 0.15, 0.3)  # parts of the rows that have labels: uneven, so that a mean of means shows
SEED = 20_240_607


@dataclass(frozen=True)
class Probe:
    """One input.

    Attributes:
        name: "random", "past the window" and so on.
        columns: what the model takes, by name, each (B, S); of an encoder-decoder the decoder's are (B, T).
        labels: what its loss compares with, by name, each (B, ...).
        with_gradients: whether a backward pass is made: once a model, as longer inputs take much memory.
    """

    name: str
    columns: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    with_gradients: bool

    @property
    def input_ids(self) -> Tensor:
        """(B, S)."""
        return self.columns["input_ids"]

    @property
    def batch(self) -> dict[str, Tensor]:
        """Columns and labels, as a data set gives them."""
        return {**self.columns, **self.labels}


def probes(core: ModelConfig, multiple_of: int) -> tuple[list[Probe], str | None]:
    """The inputs of a model, and what they do not reach, if anything.

    Args:
        core: the model.
        multiple_of: what every length must be divisible by: the tensor ranks under sequence parallelism.
    """
    if isinstance(core, DecoderConfig):
        return _decoder_probes(core, multiple_of)
    if isinstance(core, EncoderConfig):
        return _encoder_probes(core, multiple_of), None
    return _encoder_decoder_probes(core, multiple_of)


# ---- decoders ----------------------------------------------------------------------------------------------------


def _decoder_probes(core: DecoderConfig, multiple_of: int) -> tuple[list[Probe], str | None]:
    longest = core.positions.max_positions if core.positions is not None else MOST_TOKENS
    length = _fitting(min(RANDOM_LENGTH, longest), multiple_of, longest)
    found = [_causal("random", _ids(core, 2, length), with_gradients=True)]
    edges = [edge for edge in _edges(core) if edge >= length]
    within = [edge for edge in edges if edge + BEYOND <= longest]
    if within:
        beyond = _fitting(max(within) + BEYOND, multiple_of, longest)
        found.append(_causal("past the window", _ids(core, 1, beyond), with_gradients=False))
    missed = sorted({edge for edge in edges if edge not in within})
    words = " and ".join(f"{edge:,}" for edge in missed)
    return found, f"windows or stretched positions of {words} tokens are longer than any input" if missed else None


def _causal(name: str, ids: Tensor, *, with_gradients: bool) -> Probe:
    """Of each position the next id is the label; of the last, none."""
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], dim=1)
    return Probe(name, {"input_ids": ids}, {"targets": targets}, with_gradients)


def _edges(decoder: DecoderConfig) -> set[int]:
    """Lengths after which a model computes something else."""
    windows = {window for window in decoder.windows if window is not None}
    stretched = {
        rotary.original_max_positions
        for rotary in decoder.rotary
        if rotary is not None and rotary.scaling in ("dynamic", "longrope")
    }
    return windows | stretched


# ---- encoders ----------------------------------------------------------------------------------------------------


def _encoder_probes(core: EncoderConfig, multiple_of: int) -> list[Probe]:
    """Behind padding, with segments where there are several; and bare ids, as many users pass them."""
    longest = core.positions.max_positions
    length = _fitting(min(RANDOM_LENGTH, longest), multiple_of, longest)
    columns = {"input_ids": _ids(core, ROWS, length), "attention_mask": _right_padded(ROWS, length)}
    if core.padding_id is not None:
        columns["input_ids"].masked_fill_(~columns["attention_mask"], core.padding_id)
    if core.num_token_types > 1:
        columns["token_type_ids"] = torch.randint(0, core.num_token_types, (ROWS, length), generator=_seeded(2))
    bare = {"input_ids": _ids(core, 2, length, seed=1)}
    return [
        Probe("padded", columns, _encoder_labels(core, columns["attention_mask"]), with_gradients=True),
        Probe("bare", bare, _encoder_labels(core, torch.ones(2, length, dtype=torch.bool)), with_gradients=False),
    ]


def _encoder_labels(core: EncoderConfig, seen: Tensor) -> dict[str, Tensor]:
    """Labels of some positions that are `seen` (B, S); or directions, of a model that predicts nothing."""
    (batch, length), generator = seen.shape, _seeded(3)
    if not core.masked_lm:
        labels = {"hidden_direction": torch.randn(batch, length, core.hidden_size, generator=generator)}
        if core.pooler:
            labels["pooled_direction"] = torch.randn(batch, core.hidden_size, generator=generator)
        return labels
    labels = {"targets": _some(_ids(core, batch, length, seed=4), seen)}
    if core.next_sentence:
        labels["next_sentence_label"] = torch.tensor([1, IGNORE_INDEX, 0])[:batch]
    return labels


# ---- encoder-decoders --------------------------------------------------------------------------------------------


def _encoder_decoder_probes(core: EncoderDecoderConfig, multiple_of: int) -> tuple[list[Probe], str | None]:
    """Behind padding in both stacks; and past the distance from which on all share one bias."""
    length, decoder_length = (_fitting(whole, multiple_of, MOST_TOKENS) for whole in (RANDOM_LENGTH, DECODER_LENGTH))
    found = [_seq2seq("padded", core, ROWS, length, decoder_length, padded=True)]
    edge = max(stack.relative.max_distance for stack in (core.encoder, core.decoder) if stack.relative is not None)
    if edge < decoder_length - BEYOND:
        return found, None
    if edge + 2 * BEYOND > MOST_TOKENS:
        return found, f"distances of {edge:,} tokens are longer than any input"
    beyond, decoder_beyond = (_fitting(edge + more, multiple_of, MOST_TOKENS) for more in (2 * BEYOND, BEYOND))
    found.append(_seq2seq("past the last distance", core, 1, beyond, decoder_beyond, padded=False))
    return found, None


def _seq2seq(
    name: str, core: EncoderDecoderConfig, batch: int, length: int, decoder_length: int, *, padded: bool
) -> Probe:
    """Random ids in both stacks and random labels; gradients are made where it is padded."""
    columns = {
        "input_ids": _ids(core, batch, length),
        "decoder_input_ids": _ids(core, batch, decoder_length, seed=1),
    }
    columns["decoder_input_ids"][:, 0] = core.decoder_start_id
    seen = torch.ones(batch, decoder_length, dtype=torch.bool)
    if padded:
        seen = _right_padded(batch, decoder_length).flip(0)  # another row is whole than in the encoder
        columns["attention_mask"] = _right_padded(batch, length)
        columns["decoder_attention_mask"] = seen
        columns["input_ids"].masked_fill_(~columns["attention_mask"], core.padding_id)
        columns["decoder_input_ids"].masked_fill_(~seen, core.padding_id)
    labels = {"targets": _some(_ids(core, batch, decoder_length, seed=4), seen)}
    return Probe(name, columns, labels, with_gradients=padded)


# ---- ids, masks, labels ------------------------------------------------------------------------------------------


def _fitting(length: int, multiple_of: int, longest: int) -> int:
    """The nearest possible length: rounded up, or down where that is too long."""
    up = -(-length // multiple_of) * multiple_of
    return up if up <= longest else longest // multiple_of * multiple_of


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + seed)


def _ids(core: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, core.vocab_size, (batch, length), generator=_seeded(length + seed))


def _right_padded(batch: int, length: int) -> Tensor:
    """(B, S) bool: the first row whole, each next one shorter by another quarter and a token."""
    lengths = torch.tensor([max(1, length - row * (length // 4 + 1)) for row in range(batch)])
    return torch.arange(length) < lengths[:, None]


def _some(ids: Tensor, seen: Tensor) -> Tensor:
    """`ids` (B, S) where a position is `seen` and chosen, no label elsewhere; the first position always has one."""
    parts = torch.tensor(LABELLED)[: len(ids), None]
    chosen = (torch.rand(ids.shape, generator=_seeded(5)) < parts) & seen
    chosen[:, 0] = True
    return ids.masked_fill(~chosen, IGNORE_INDEX)
