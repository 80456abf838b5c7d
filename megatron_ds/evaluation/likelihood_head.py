"""A head that returns, for each row, the log-likelihood of its labels and whether greedy decoding would choose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX, TARGETS
from megatron_ds.layers.cross_entropy import VocabShard
from megatron_ds.layers.products import linear
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead
from megatron_ds.models.sequential import HIDDEN, Activations, HeadResult, LayerSpec, head_of, with_head
from megatron_ds.parallel.collectives import all_reduce_

CHUNK_TOKENS = 1024  # labelled tokens whose logits exist at one time


def with_likelihoods(layers: list[LayerSpec], ctx: BuildContext) -> list[LayerSpec]:
    """Return a language model's layers with a `LikelihoodHead` over the parameters of its head."""
    return with_head(layers, LikelihoodHead, replace(head_of(layers), num_kept=2))


class LikelihoodHead(LanguageModelHead):
    """A language-model head that keeps two numbers of each row.

    They are the sum of log p of the row's labels, and the number of labels that are not the most likely id. Of equally
    likely ids the first counts as the most likely one, as in `argmax`.
    """

    @torch.no_grad()
    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        """One term, `targets`: the sum of the labelled positions' losses.

        Collective over tensor, and over context: all-reduces of four numbers per labelled token, and of two per row.
        """
        hidden, targets = self.enter(activations[HIDDEN]), labels[TARGETS.name].t()
        where = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        tokens, ids = hidden.flatten(0, 1)[where], targets.flatten()[where]
        kept = torch.zeros(targets.shape[1], 2, dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(ids), CHUNK_TOKENS):
            part = slice(begin, begin + CHUNK_TOKENS)
            log_p, best = token_likelihoods(tokens[part], ids[part], self.local())
            numbers = torch.stack([log_p, (best != ids[part]).float()], dim=1)
            kept.index_add_(0, where[part] % targets.shape[1], numbers)
        total = -kept[:, 0].sum()
        return HeadResult({TARGETS.name: total}, kept=all_reduce_(kept, self.tp.context.axis))


def token_likelihoods(tokens: Tensor, ids: Tensor, head: VocabShard) -> tuple[Tensor, Tensor]:
    """Return log p of each token's label, and the most likely id. Collective over tensor.

    Args:
        tokens: (N, H) hidden states, equal on all tensor ranks.
        ids: (N,) labels.
        head: this rank's shard of the head.

    Returns:
        fp32 (N,), int64 (N,), equal on all tensor ranks.
    """
    logits = head.finish(linear(tokens, head.weight, head.bias))[:, : head.valid].float()
    top, place = logits.max(dim=1) if head.valid else (logits.new_full((len(ids),), -torch.inf), torch.zeros_like(ids))
    highest = all_reduce_(top.clone(), head.axis, dist.ReduceOp.MAX)
    best = torch.where(top == highest, place + head.start, head.vocab_size)
    best = all_reduce_(best, head.axis, dist.ReduceOp.MIN)
    own = ids - head.start
    is_here = (own >= 0) & (own < head.valid)
    label = torch.zeros_like(top)
    if head.valid:
        label = logits.gather(1, own.clamp(0, head.valid - 1)[:, None]).squeeze(1).sub(highest) * is_here
    sums = torch.stack([(logits - highest[:, None]).exp().sum(dim=1), label])
    total, label = all_reduce_(sums, head.axis)
    return label - total.log(), best
