"""Generation by complete forward passes of an engine: without kept keys and values, and at every layout.

Sequence and context parallelism, ZeRO-3, compiled blocks and DeepSpeed's pipeline compute rows of one length, so that a
few short samples of a model in training can be drawn from it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.engine import Engine
from megatron_ds.generation.generator import Row, decoding_of, end_of
from megatron_ds.generation.sampling import GREEDY, Sampling
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.continuing import predicting


def generate_by_rows(
    engine: Engine,
    core: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    end_ids: Sequence[int] = (),
) -> list[Row]:
    """Continue prompts in one batch, by a forward pass of all positions for each token; return them in order.

    Collective over the world, and all ranks have the same prompts. Positions behind the text are computed too, which
    causal attention does not see. Frequencies of rotations that depend on the length are those of the longest row. Rows
    end earlier where their ranks cannot divide all positions that the model has.

    Args:
        engine: the model under DeepSpeed, which is not changed.
        core: the model.
        prompts: ids that `check_prompts` has accepted.
        max_new_tokens, sampling, end_ids: see `Generator.generate`.
    """
    decoding, tp = decoding_of(core), engine.built.context.tp
    rows = [Row(number, prompt) for number, prompt in enumerate(prompts)]
    streams = sampling.streams([row.number for row in rows])
    divisor = math.lcm(tp.num_parts, tp.padded_to)
    columns, starts = dict[str, Tensor](), [len(prompt) for prompt in prompts]
    if decoding.start_id is not None:
        columns = _source(prompts, divisor, getattr(core, "padding_id", 0))
        starts = [1] * len(rows)
    length = -(-(max(starts) + max_new_tokens) // divisor) * divisor
    limit = core.shape().max_positions
    if limit is not None:
        length = min(length, limit // divisor * divisor)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, line in zip(rows, ids):
        first = row.prompt if decoding.start_id is None else [decoding.start_id]
        line[: len(first)] = torch.tensor(first)
    while not all(row.stopped_by for row in rows):
        ends = torch.tensor([start + len(row.ids) for start, row in zip(starts, rows)]).clamp(max=length)
        with predicting(engine.built.module, (ends - 1).to(engine.device)):
            found = engine.outputs({**columns, decoding.column: ids.clone()})
        chosen = sampling.choose(found["logits"][:, 0].float(), streams) if found is not None else None
        for row, end, token in zip(rows, ends.tolist(), _agreed(engine, chosen, len(rows))):
            if not row.stopped_by:
                row.ids.append(token)
                row.stopped_by = end_of(row, end_ids, None, min(max_new_tokens, length + 1 - starts[row.number]))
                if not row.stopped_by:
                    ids[row.number, end] = token
    return rows


def _source(prompts: Sequence[Sequence[int]], divisor: int, filler: int) -> dict[str, Tensor]:
    """Return the columns of texts that an encoder reads, padded on the right to a length that the ranks can share."""
    length = -(-max(map(len, prompts)) // divisor) * divisor
    ids = torch.tensor([[*prompt, *[filler] * (length - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def _agreed(engine: Engine, chosen: Tensor | None, count: int) -> list[int]:
    """Return the tokens that the first rank of the last stage has chosen. Collective over the world, in host memory."""
    world, host = engine.grid.layout, engine.grid.host
    if world.world_size == 1:
        assert chosen is not None
        return [int(token) for token in chosen.tolist()]
    tokens = torch.zeros(count, dtype=torch.int64) if chosen is None else chosen
    dist.broadcast(tokens, world.rank_of(pipeline=world.pipeline - 1), group=host.group)
    return [int(token) for token in tokens.tolist()]
