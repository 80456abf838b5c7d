"""Log-likelihoods and most likely ids over a divided vocabulary, against plain torch."""

import torch
from torch import Tensor

from megatron_ds.evaluation.likelihood_head import token_likelihoods
from megatron_ds.layers.cross_entropy import LogitFinish, VocabShard
from megatron_ds.parallel.grid import Grid, Layout
from tests.ranks import run_grid

TOKENS, WIDTH, VOCAB, PADDED = 12, 8, 18, 24
FINISH = LogitFinish(multiplier=3.0)


def operands() -> tuple[Tensor, Tensor]:
    """Hidden states, and a head of which rows 2 and 17, and 5 and 6, are equal."""
    generator = torch.Generator().manual_seed(0)
    tokens, weight = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(VOCAB, WIDTH, generator=generator)
    weight[17], weight[6] = weight[2], weight[5]
    tokens[0], tokens[1] = 2 * weight[2], 2 * weight[5]
    return tokens, weight


def labels(logits: Tensor) -> Tensor:
    """The most likely ids of some tokens, those equally likely, and others."""
    ids = logits.argmax(1)
    ids[0], ids[1] = 17, 6
    ids[6:] = (ids[6:] + 7) % VOCAB
    return ids


def on_rank(grid: Grid) -> tuple[Tensor, Tensor]:
    tokens, weight = operands()
    padded = torch.cat([weight, torch.full((PADDED - VOCAB, WIDTH), 9.0)])
    rows = PADDED // grid.tensor.size
    own = padded[grid.tensor.rank * rows : (grid.tensor.rank + 1) * rows]
    ids = labels(tokens @ weight.t())
    return token_likelihoods(tokens, ids, VocabShard(own, None, VOCAB, grid.tensor, FINISH))


def test_equal_to_torch_on_any_number_of_ranks() -> None:
    tokens, weight = operands()
    logits = 3.0 * (tokens @ weight.t())
    ids = labels(logits)
    expected = logits.log_softmax(1).gather(1, ids[:, None]).squeeze(1)
    best = logits.argmax(1)
    assert (best[0], best[1]) == (2, 5) and (best == ids).sum() == 4
    for ranks in (1, 4):  # of 4 ranks the last has no row that is not padding
        for log_p, chosen in run_grid(on_rank, Layout(tensor=ranks)):
            torch.testing.assert_close(log_p, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(chosen, best)
