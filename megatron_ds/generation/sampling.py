"""The choice of the next token: greedy, or a draw from the most probable ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token, by the words of transformers.

    Attributes:
        temperature: divisor of the logits; 0 = the most probable token is chosen (greedy).
        top_k: only the k most probable tokens are drawn from; None = all.
        top_p: only the fewest tokens whose probabilities sum to p are drawn from (Holtzman et al. 2020); None = all.
        seed: of the draws. Each row draws from a stream of its own, which does not depend on the other rows.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: a value is out of its range, or has no effect because the choice is greedy.
        """
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature:g} is negative or not finite; nearest: 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token; nearest: 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"top_p={self.top_p:g} is not a probability above 0; nearest: {1 if self.top_p > 1 else 0.1:g}"
            )
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            name = "top_k" if self.top_k is not None else "top_p"
            raise ConfigError(
                f"{name}={getattr(self, name)} has no effect at temperature=0, which is greedy; try temperature=1"
            )

    def streams(self, rows: Sequence[int]) -> list[random.Random]:
        """Return the stream of each row, given its number among all rows."""
        return [random.Random(f"{self.seed}:{row}") for row in rows]

    def choose(self, logits: Tensor, streams: Sequence[random.Random]) -> Tensor:
        """Return the next token of each row: logits (B, V) fp32 -> (B,) int64."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        ordered, ids = (logits / self.temperature).sort(dim=-1, descending=True)
        if self.top_k is not None and self.top_k < ordered.shape[-1]:
            # as transformers: all that are as probable as the k-th stay
            ordered = ordered.masked_fill(ordered < ordered[:, self.top_k - 1, None], -torch.inf)
        probabilities = ordered.softmax(-1)
        reached = probabilities.cumsum(-1)
        if self.top_p is not None and self.top_p < 1.0:
            probabilities = probabilities.masked_fill(reached - probabilities >= self.top_p, 0.0)
            reached = probabilities.cumsum(-1)
        draws = torch.tensor([stream.random() for stream in streams], device=logits.device)[:, None]
        place = torch.searchsorted(reached, draws * reached[:, -1:], right=True)
        last = (probabilities > 0.0).sum(-1, keepdim=True) - 1
        return ids.gather(-1, torch.minimum(place, last))[:, 0]


GREEDY = Sampling()
