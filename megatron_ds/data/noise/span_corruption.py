"""Span corruption (Raffel et al. 2020, sections 3.1.4 and 3.3.4, figure 2): how long, and where the spans are.

Of L tokens, `mask_rate` are cut out in spans of `mean_span` tokens on average. One sentinel takes the place of each
span; the target is every sentinel followed by its span, and a last sentinel. Both end with the end-of-text token. The
numbers of tokens and of spans are the same for every sample, so that all samples are of one length; where the spans
lie, and how long each is, is random.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from megatron_ds.data.noise.seeded_random import Draws

_SMALLEST_RAW = 2  # one token to keep and one to cut out


@dataclass(frozen=True)
class Lengths:
    """The numbers of a corrupted sample.

    Attributes:
        raw: L, tokens of text.
        noise: tokens that are cut out, 1 .. L - 1.
        spans: in how many pieces; every piece, and every piece of text between them, has a token at least.
    """

    raw: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        """Positions of the input: the text that stays, a sentinel for each span, and the end."""
        return self.raw - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Positions of the target: the spans, each after its sentinel, the last sentinel, and the end."""
        return self.noise + self.spans + 2

    @property
    def sentinels(self) -> int:
        """Different sentinels that a sample takes."""
        return self.spans + 1


def lengths_of(raw: int, mask_rate: float, mean_span: float) -> Lengths:
    """The numbers for L = `raw` tokens of text; none of them goes down when L goes up."""
    assert raw >= _SMALLEST_RAW, f"{raw} tokens"
    noise = min(max(round(raw * mask_rate), 1), raw - 1)
    spans = min(max(round(noise / mean_span), 1), raw - noise)
    return Lengths(raw, noise, spans)


def fit_lengths(seq_length: int, mask_rate: float, mean_span: float) -> Lengths | None:
    """The largest L whose corrupted input has at most `seq_length` positions; None if not even two tokens have."""
    beyond = int(seq_length / (1 - mask_rate)) + _SMALLEST_RAW + 1  # what stays of so many tokens is too long
    raws = range(_SMALLEST_RAW, beyond)
    fitting = bisect.bisect_right(raws, seq_length, key=lambda raw: lengths_of(raw, mask_rate, mean_span).inputs)
    return lengths_of(raws[fitting - 1], mask_rate, mean_span) if fitting else None


def corrupt(
    tokens: np.ndarray, lengths: Lengths, sentinels: np.ndarray, end_id: int, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """Cut spans out of the tokens.

    Args:
        tokens: (lengths.raw,).
        lengths: of the sample.
        sentinels: (lengths.sentinels,) ids, in the order in which they are used.
        end_id: ends both sequences.
        draws: decide where the spans lie.

    Returns:
        (lengths.inputs,) and (lengths.targets,), of the tokens' type.
    """
    kept = _random_parts(lengths.raw - lengths.noise, lengths.spans, draws)
    cut = _random_parts(lengths.noise, lengths.spans, draws)
    bounds = np.cumsum(np.stack([kept, cut], axis=1).ravel())[:-1]
    pieces = np.split(tokens, bounds)  # text, span, text, span, ...
    marks = [np.array([sentinel], dtype=tokens.dtype) for sentinel in [*sentinels, end_id]]
    inputs = [piece for pair in zip(pieces[0::2], marks) for piece in pair]
    targets = [piece for pair in zip(marks, pieces[1::2]) for piece in pair]
    return np.concatenate([*inputs, marks[-1]]), np.concatenate([*targets, marks[-2], marks[-1]])


def _random_parts(total: int, number: int, draws: Draws) -> np.ndarray:
    """`number` sizes of at least 1 that add up to `total`, each such list as likely as any other: (number,) int64."""
    cuts = draws.choice(number - 1, total - 1) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
