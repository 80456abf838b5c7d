"""Throughput: tokens per second, model FLOP/s, and their share of the device's peak.

Model FLOPs count the matrix products of one forward and one backward pass (Chowdhery et al. 2022, "PaLM", appendix B).
Recomputation is not counted, so it lowers the model FLOP/s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


def model_flops_per_token(
    num_params_active: int, num_layers: int, attention_hidden: int, seq_length: int, num_params_frozen: int = 0
) -> float:
    """Return the floating-point operations of one token, forward and backward: 6 N + 12 L d S.

    A parameter costs one multiply and one add forward, and twice that backward: 6 N. In each layer a token's query is
    multiplied with S keys and S values of width d: 4 d S forward, 12 d S with the backward pass. As in the paper,
    attention is counted in full, causal or not.

    Args:
        num_params_active: N, the parameters that a token uses: of a mixture of experts only the chosen experts; without
            the input embedding table (a look-up costs no FLOPs), unless it is also the output head.
        num_layers: L, the number of attention layers; a decoder layer of an encoder-decoder counts as two (self- and
            cross-attention).
        attention_hidden: d, query heads * head size; often, but not always, the hidden size.
        seq_length: S, tokens per sequence.
        num_params_frozen: those of N that get no gradient: they cost 4 each instead of 6.

    Returns:
        FLOPs per token.
    """
    return 6.0 * num_params_active - 2.0 * num_params_frozen + 12.0 * num_layers * attention_hidden * seq_length


class Rates(NamedTuple):
    """The speed of a step.

    Attributes:
        tokens_per_s: tokens per second over all ranks.
        tflops_per_rank: model TFLOP/s (1e12) of one rank.
        mfu: its share of the device's peak, 0 to 1; None = that peak is unknown.
    """

    tokens_per_s: float
    tflops_per_rank: float
    mfu: float | None = None


@dataclass(frozen=True)
class Throughput:
    """Conversion of tokens and seconds into rates.

    Attributes:
        flops_per_token: see `model_flops_per_token`.
        world_size: number of ranks that divide the work.
        peak_flops: FLOP/s of one rank's device, see `peak_flops`; None = unknown.
        flops_of_length: length of rows -> FLOPs of one token in them, for rows that are shorter in the first steps.
    """

    flops_per_token: float
    world_size: int
    peak_flops: float | None = None
    flops_of_length: Mapping[int, float] = field(default_factory=dict)

    def rates(self, tokens: int, seconds: float, length: int | None = None) -> Rates:
        """Return the rates of `tokens` tokens, counted over all ranks, in `seconds` seconds of wall-clock time.

        Args:
            tokens: their number.
            seconds: their time.
            length: of the rows; None, or a length that is not in `flops_of_length` = that of `flops_per_token`.
        """
        assert seconds > 0, f"seconds={seconds}"
        tokens_per_s = tokens / seconds
        flops_per_token = (
            self.flops_per_token if length is None else self.flops_of_length.get(length, self.flops_per_token)
        )
        flops = tokens_per_s * flops_per_token / self.world_size
        return Rates(tokens_per_s, flops / 1e12, flops / self.peak_flops if self.peak_flops is not None else None)
