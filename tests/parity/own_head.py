"""An objective of another package: two loss terms, two metrics and a parameter of its own over the model's LM head.

The losses are the cross entropy of the labels, and the squared log-partition (z-loss; Chowdhery et al. 2022) of all
positions, labelled or not, so that each term has a count of its own. The head scales the hidden states by 1 + `gain`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.engine import Engine, GradientProbe
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.layers.param_spec import ParamSpec, initial_shard, make_parameter
from megatron_ds.models.embedding_and_head import LanguageModelHead
from megatron_ds.models.sequential import HIDDEN, Activations, HeadResult, HeadSpec, with_head
from megatron_ds.parallel.collectives import all_reduce_, reduce_from
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.parallel.axes import ALONE
from tests.parity.cases import CONFIGS, VOCAB, Recipe, global_batch, shifted
from tests.parity.ours import Place, engine_config, micro_batches, session_of
from tests.parity.reference import make_model

Z_WEIGHT = 0.02
TOP = VOCAB // 4  # an untrained model is right about a quarter of the time in the sense of `top_quarter`
GAIN = "head.gain"
SEED = 1234  # the default of an engine


def count(labels: Mapping[str, Tensor]) -> Tensor:
    """Labels of the first term, positions of the second."""
    targets = labels["targets"]
    return torch.tensor([int((targets != -100).sum()), targets.numel()])


HEAD = HeadSpec(("targets",), ("targets", "z"), count, metrics=("top_quarter", "log_partition"))


class ZLossHead(LanguageModelHead):
    """The model's own head, with a gain, z-loss and metrics; logits of all positions exist at once."""

    def __init__(self, vocab_size: int, width: int, *args: Any, **options: Any) -> None:
        super().__init__(vocab_size, width, *args, **options)
        self.gain = make_parameter(ParamSpec((width,), std=0.3, decay=False), self.tp.axes)

    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        shard, axis, targets = self.local(), self.tp.axis, labels["targets"].t()
        hidden = self.enter(activations[HIDDEN]) * (1.0 + self.tp.inside(self.gain))
        logits = F.linear(hidden, shard.weight[: shard.valid]).float()
        peak = all_reduce_(logits.detach().amax(-1), axis, dist.ReduceOp.MAX)
        partition = peak + reduce_from((logits - peak[..., None]).exp().sum(-1), axis).log()
        here = (targets >= shard.start) & (targets < shard.start + shard.valid)
        column = (targets - shard.start).masked_fill(~here, 0)[..., None]
        picked = reduce_from(logits.gather(-1, column).squeeze(-1).masked_fill(~here, 0.0), axis)
        better = all_reduce_((logits.detach() > picked.detach()[..., None]).sum(-1), axis)
        labelled = targets != -100
        return HeadResult(
            {"targets": (partition - picked)[labelled].sum(), "z": Z_WEIGHT * partition.square().sum()},
            {
                "log_partition": (partition.sum(), torch.tensor(float(partition.numel()))),
                "top_quarter": ((better < TOP)[labelled].sum(), labelled.sum()),
            },
        )


def engine_with_head(
    grid: Grid, directory: Path, place: Place, recipe: Recipe, **changes: Any
) -> tuple[Engine, HFModel]:
    """An engine of a model under `ZLossHead`, and the model's meaning; `changes` as in `engine_config`."""
    model = replace(load_model(directory), change_layers=lambda layers, ctx: with_head(layers, ZLossHead, HEAD))
    return session_of(grid).build_engine(model, engine_config(place, recipe, **changes)).engine, model.hf


def train_with_head(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> dict[str, Any]:
    """Losses, terms, metrics and norms of each step, a validation at the end, and final weights."""
    engine, model = engine_with_head(grid, directory, place, recipe)
    results = [engine.train_step(micro_batches(grid, place, recipe, step), recipe.lr) for step in range(recipe.steps)]
    halves = [engine.evaluate(micro_batches(grid, place, recipe, step)) for step in (7, 8)]
    valid = halves[0] + halves[1]
    weights, to_hf = {}, ToHF(model)
    for name, full in engine.full_parameters():
        if full is not None:
            found = to_hf.add(name, full) if name in model.table else [(name, full)]
            weights.update({theirs: tensor.float().clone() for theirs, tensor in found})
    return {
        "losses": [*(result.loss for result in results), valid.mean],
        "norms": [result.grad_norm for result in results],
        "terms": [*(result.terms for result in results), valid.terms],
        "metrics": [*(result.metrics for result in results), valid.metrics],
        "tokens": [result.tokens for result in results],
        "weights": weights,
    }


def gradients_with_head(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> dict[str, Tensor]:
    """Every parameter's gradient of one step, on rank 0."""
    engine, model = engine_with_head(grid, directory, place, recipe, optimizer=None)
    engine.train_step(micro_batches(grid, place, recipe, 0), recipe.lr)
    assert isinstance(engine.optimizer, GradientProbe)
    gradients, to_hf = {}, ToHF(model)
    for name, full in engine.full_tensors(engine.optimizer.gradient):
        if full is not None:
            found = to_hf.add(name, full) if name in model.table else [(name, full)]
            gradients.update({theirs: tensor.clone() for theirs, tensor in found})
    return gradients


# ---- the reference -------------------------------------------------------------------------------------------------


def _measure(model: Any, gain: Tensor, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Terms and metrics over all of the batches, each a sum over all of them divided by the number of all of them."""
    found = []
    for batch in batches:
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state * (1.0 + gain)
        logits = hidden @ model.get_output_embeddings().weight.t()
        partition, targets = logits.logsumexp(-1), shifted(batch["labels"])
        labelled = targets != -100
        picked = logits.gather(-1, targets.clamp(min=0)[..., None])
        top = (logits > picked).sum(-1) < TOP
        losses = F.cross_entropy(logits[labelled], targets[labelled], reduction="none")
        found.append((losses, partition, top[labelled]))
    losses, partitions, top = (torch.cat([part.flatten() for part in parts]) for parts in zip(*found))
    terms = {"targets": losses.mean(), "z": Z_WEIGHT * partitions.square().mean()}
    return terms, {"top_quarter": float(top.float().mean()), "log_partition": float(partitions.detach().mean())}


def train_reference_with_head(case: str, recipe: Recipe, directory: Path) -> dict[str, Any]:
    """The same by transformers and torch in one process; the initial model is saved to `directory`."""
    model = make_model(CONFIGS[case])
    model.save_pretrained(directory)
    spec = ParamSpec((model.config.hidden_size,), std=0.3, decay=False)
    gain = initial_shard(GAIN, spec, SEED, ALONE).clone().requires_grad_()
    parameters = [*model.parameters(), gain]
    groups = [
        {"params": [one for one in parameters if one.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [one for one in parameters if one.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    found: dict[str, Any] = {"losses": [], "norms": [], "terms": [], "metrics": [], "tokens": [], "gradients": {}}
    for step in range(recipe.steps):
        batch = global_batch(recipe, step)
        terms, metrics = _measure(model, gain, [batch])
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found["gradients"] = {name: one.grad.clone() for name, one in model.named_parameters()}
            found["gradients"][GAIN] = gain.grad.clone()
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(parameters, recipe.grad_clip)))
        optimizer.step()
        _note(found, terms, metrics)
        found["tokens"].append(int((shifted(batch["labels"]) != -100).sum()))
    with torch.no_grad():
        _note(found, *_measure(model, gain, [global_batch(recipe, step) for step in (7, 8)]))
    tied = model.config.tie_word_embeddings
    weights = {
        name: one.detach() for name, one in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    found["weights"] = {**weights, GAIN: gain.detach()}
    return found


def _note(found: dict[str, Any], terms: dict[str, Tensor], metrics: dict[str, float]) -> None:
    values = {name: float(term.detach()) for name, term in terms.items()}
    found["losses"].append(sum(values.values()))
    found["terms"].append(values)
    found["metrics"].append(metrics)
