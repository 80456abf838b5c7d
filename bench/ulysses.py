"""DeepSpeed's sequence parallelism as a contestant: `UlyssesSPAttentionHF` in a transformers model.

It is Arctic Long Sequence Training (Bekman et al. 2025): an all-to-all between sequence and heads around attention. The
option `tiled` adds its tiles of the MLP and of the loss, which save memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contestant import Step
from bench.peers import deepspeed_engine, load
from bench.work import Spec, Work

LOGITS_BYTES = 2**30  # size of a tile of logits in fp32, as ArcticTraining chooses it


def train(spec: Spec) -> Step:
    """Train transformers' decoder with its sequence divided over all ranks, and ZeRO over the same ranks.

    Options: `zero`, the stage; `tiled`, tiles of the MLP and of the loss.
    """
    import torch.distributed as dist
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    work = spec.work
    model = load(spec, attn_implementation="sdpa")
    if spec.options.get("tiled", False):
        _tile_mlps(model)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", spec.world, work.batch, seq_length=work.seq_length, seq_length_is_variable=False
    )
    engine = deepspeed_engine(model, spec, spec.options.get("zero", 1), micro_batch=work.batch, mpu=mpu)
    batch = {name: column.to(spec.device) for name, column in local_columns(work, dist.get_rank(), spec.world).items()}
    loss_of = _tiled_loss if spec.options.get("tiled", False) else _loss
    group = mpu.get_sequence_parallel_group()

    def step() -> float:
        loss = loss_of(engine, batch, group)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def local_columns(work: Work, rank: int, world: int) -> dict[str, Tensor]:
    """Return a rank's (B, S/world) tokens, their global positions, and their labels, shifted before they are cut."""
    given = work.batches()
    columns = {
        "input_ids": given["input_ids"],
        "position_ids": torch.arange(work.seq_length).expand_as(given["input_ids"]),
        "shift_labels": F.pad(given["labels"][:, 1:], (0, 1), value=-100),
    }
    return {name: column.chunk(world, dim=1)[rank].contiguous() for name, column in columns.items()}


def _loss(engine: Any, batch: dict[str, Tensor], group: Any) -> Tensor:
    """Return the mean loss over all ranks, weighted by their counts of labels, as transformers' trainer does."""
    from torch.distributed.nn.functional import all_gather

    labels = batch["shift_labels"]
    loss = engine(**batch, labels=labels, use_cache=False).loss
    counts = torch.stack(all_gather((labels != -100).sum(), group=group))
    return (torch.stack(all_gather(loss, group=group)) * counts).sum() / counts.sum()


def _tiled_loss(engine: Any, batch: dict[str, Tensor], group: Any) -> Tensor:
    """Return the same from tiles of the logits, which are never in memory at once.

    `TiledFusedLogitsLoss` differentiates in its forward pass with respect to its own output, so each tile is divided by
    the mean count of labels of a rank already: the mean over ranks then has gradient 1 for each of them.
    """
    import torch.distributed as dist
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
    from torch.distributed.nn.functional import all_gather

    model, labels = engine.module, batch["shift_labels"]
    count = (labels != -100).sum()
    dist.all_reduce(count, group=group)
    mean_count = count / dist.get_world_size(group)
    hidden = model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    tiles = math.ceil(labels.numel() * model.config.vocab_size * 4 / LOGITS_BYTES)

    def of_tile(head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), y, reduction="sum") / mean_count

    head = model.lm_head
    loss = TiledFusedLogitsLoss.apply(of_tile, head, hidden, labels, None, tiles, [head.weight], "sum")
    return torch.stack(all_gather(loss, group=group)).mean()


def _tile_mlps(model: nn.Module) -> None:
    """Compute the MLPs in tiles of as many tokens as the hidden size, and again in the backward pass."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    def tiled(mlp: nn.Module, whole: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        weights = list(mlp.parameters())

        def forward(x: Tensor) -> Tensor:
            tiles = math.ceil(x.shape[1] / x.shape[2])
            return TiledMLP.apply(lambda _, tile: whole(tile), mlp, x, tiles, weights)

        return forward

    for module in model.modules():
        if isinstance(module, LlamaMLP):
            module.forward = tiled(module, module.forward)  # type: ignore[method-assign]
