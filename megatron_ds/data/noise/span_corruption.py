"""Span corruption (Raffel et al. 2020, sections 3.1.4 and 3.3.4, figure 2): number, lengths and places of the spans.

A fraction `mask_rate` of L tokens is cut out in spans of `mean_span` tokens on average. One sentinel replaces each
span; the target is every sentinel followed by its span, and a last sentinel. Both end with the end-of-text token. The
numbers of tokens and of spans are the same for every sample, so that all samples have one length; places and lengths of
spans are random.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from megatron_ds.data.noise.seeded_random import SeededRandom

_SMALLEST_RAW = 2  # one token to keep and one to cut out


@dataclass(frozen=True)
class CorruptionLengths:
    """The numbers of tokens and spans of a corrupted sample.

    Attributes:
        raw: L, tokens of text.
        noise: tokens that are cut out, 1 .. L - 1.
        spans: number of spans; each span, and each stretch of text before one, has at least one token.
    """

    raw: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        """Number of input positions: the remaining text, a sentinel for each span, and the end."""
        return self.raw - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Number of target positions: the spans, each after its sentinel, the last sentinel, and the end."""
        return self.noise + self.spans + 2

    @property
    def sentinels(self) -> int:
        """Number of different sentinels of a sample."""
        return self.spans + 1


def corruption_lengths(raw: int, mask_rate: float, mean_span: float) -> CorruptionLengths:
    """Return the numbers for L = `raw` tokens of text; none of them decreases when L increases."""
    assert raw >= _SMALLEST_RAW, f"{raw} tokens"
    noise = min(max(round(raw * mask_rate), 1), raw - 1)
    spans = min(max(round(noise / mean_span), 1), raw - noise)
    return CorruptionLengths(raw, noise, spans)


def fit_lengths(seq_length: int, mask_rate: float, mean_span: float) -> CorruptionLengths | None:
    """Return the largest L whose corrupted input has at most `seq_length` positions, or None."""
    beyond = int(seq_length / (1 - mask_rate)) + _SMALLEST_RAW + 1  # the remaining text of so many is too long
    raws = range(_SMALLEST_RAW, beyond)
    fitting = bisect.bisect_right(
        raws, seq_length, key=lambda raw: corruption_lengths(raw, mask_rate, mean_span).inputs
    )
    return corruption_lengths(raws[fitting - 1], mask_rate, mean_span) if fitting else None


def corrupt(
    tokens: np.ndarray, lengths: CorruptionLengths, sentinels: np.ndarray, end_id: int, random: SeededRandom
) -> tuple[np.ndarray, np.ndarray]:
    """Cut spans out of the tokens.

    Args:
        tokens: (lengths.raw,).
        lengths: of the sample.
        sentinels: (lengths.sentinels,) ids, in order of use.
        end_id: ends both sequences.
        random: decides the places and lengths of the spans.

    Returns:
        Inputs (lengths.inputs,) and targets (lengths.targets,), of the tokens' dtype.
    """
    kept = _random_parts(lengths.raw - lengths.noise, lengths.spans, random)
    cut = _random_parts(lengths.noise, lengths.spans, random)
    bounds = np.cumsum(np.stack([kept, cut], axis=1).ravel())[:-1]
    parts = np.split(tokens, bounds)  # text, span, text, span, ...
    special = [np.array([token], dtype=tokens.dtype) for token in [*sentinels, end_id]]
    inputs = [part for pair in zip(parts[0::2], special) for part in pair]
    targets = [part for pair in zip(special, parts[1::2]) for part in pair]
    return np.concatenate([*inputs, special[-1]]), np.concatenate([*targets, special[-2], special[-1]])


def _random_parts(total: int, number: int, random: SeededRandom) -> np.ndarray:
    """Return `number` sizes of at least 1 that add up to `total`, uniformly over all such lists: (number,) int64."""
    cuts = random.choice(number - 1, total - 1) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
