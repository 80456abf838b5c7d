"""Training heads for labels: five steps equal transformers' class and AdamW in one process, at layouts.

The loss is transformers' own, on the full global batch: the mean over the labels of all its rows, of which some have
none, so that a mean over micro-batches would be another number.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ds.hf.to_hf import ToHF
from megatron_ds.parallel.grid import Grid
from tests.made_once import MakeOnce
from tests.parity.cases import SEQ, VOCAB, Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.label_head_cases import LABEL_HEAD_CASES, PADDING
from tests.parity.ours import Place, engine_on
from tests.parity.reference import make_model
from tests.ranks import run_grid

RECIPE = Recipe(grad_clip=0.5)
PLACES = (Place(2, 1, 1, 1, True), Place(2, 2, 1, 1), Place(1, 1, 2, 3))
SAMPLE = [("llama-sequence", PLACES[1]), ("bert-token", PLACES[0]), ("bert-multi", PLACES[2])]
CASES = (
    "llama-sequence",
    "llama-token-no-bias",
    "llama-one-label",
    "bert-token",
    "bert-multi",
    "roberta-sequence",
    "t5-sequence",
)


def batch_of(config: dict[str, Any], step: int) -> tuple[dict[str, Tensor], Tensor]:
    """Columns and labels of a global batch: rows of several lengths, with one end each, and labels of some alone."""
    generator, rows = torch.Generator().manual_seed(4000 + step), RECIPE.global_batch
    ids = torch.randint(4, VOCAB, (rows, SEQ), generator=generator)
    lengths = SEQ - torch.arange(rows) * 5 % 17
    mask = torch.arange(SEQ) < lengths[:, None]
    ids[torch.arange(rows), lengths - 1] = config.get("eos_token_id") or 2
    ids.masked_fill_(~mask, config.get("pad_token_id", PADDING))
    labels, problem = config["num_labels"], config.get("problem_type")
    if config["architectures"][0].endswith("ForTokenClassification"):
        classes = torch.randint(0, labels, (rows, SEQ), generator=generator)
        classes[torch.rand(rows, SEQ, generator=generator) < torch.arange(rows)[:, None] / rows] = -100
        return {"input_ids": ids, "attention_mask": mask}, classes.masked_fill(~mask, -100)
    if problem is None and labels > 1:
        classes = torch.randint(0, labels, (rows,), generator=generator)
        classes[[1, 2, 5 + step % 3]] = -100
        return {"input_ids": ids, "attention_mask": mask}, classes
    scores = torch.randn(rows, labels, generator=generator)
    scores = (scores > 0).float() if problem == "multi_label_classification" else scores
    return {"input_ids": ids, "attention_mask": mask}, scores


def train_theirs(case: str, directory: Path) -> dict[str, Any]:
    """Save a model, and train transformers' class of it."""
    config, model = LABEL_HEAD_CASES[case], make_model(LABEL_HEAD_CASES[case], attention="sdpa").eval()
    model.save_pretrained(directory)
    parameters = list(model.parameters())
    decays = {True: [one for one in parameters if one.dim() > 1], False: [one for one in parameters if one.dim() == 1]}
    groups = [{"params": own, "weight_decay": RECIPE.weight_decay * decay} for decay, own in decays.items()]
    optimizer = torch.optim.AdamW(groups, lr=RECIPE.lr, betas=RECIPE.betas, eps=RECIPE.eps)
    losses, norms = [], []
    for step in range(RECIPE.steps):
        columns, labels = batch_of(config, step)
        optimizer.zero_grad()
        loss = model(**{name: one.long() for name, one in columns.items()}, labels=labels).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, RECIPE.grad_clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(directory / "trained")
    return {"losses": losses, "norms": norms, "weights": load_file(directory / "trained" / "model.safetensors")}


def train_ours(grid: Grid, case: str, directory: Path, place: Place) -> dict[str, Any]:
    engine, model = engine_on(grid, directory, place, RECIPE)
    losses, norms = [], []
    for step in range(RECIPE.steps):
        columns, labels = batch_of(LABEL_HEAD_CASES[case], step)
        whole = {**columns, engine.head.label_columns[0]: labels}
        own, size = RECIPE.global_batch // grid.batch.size, place.micro_batch(RECIPE)
        starts = range(grid.batch.rank * own, (grid.batch.rank + 1) * own, size)
        batches = [{name: one[start : start + size] for name, one in whole.items()} for start in starts]
        result = engine.train_step(batches, RECIPE.lr)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights, to_hf = {}, ToHF(model)
    for name, full in engine.full_parameters():
        if full is not None:
            weights.update({theirs: one.float().cpu().clone() for theirs, one in to_hf.add(name, full)})
    return {"losses": losses, "norms": norms, "weights": weights}


def check(case: str, place: Place, once: MakeOnce) -> None:
    directory, reference = once(train_theirs, case)
    errors = relative_errors(run_grid(train_ours, place.layout, case, directory, place)[0], reference)
    assert within_fp32(errors), errors


@pytest.mark.parametrize(("case", "place"), SAMPLE, ids=str)
def test_five_steps_equal_transformers(case: str, place: Place, once: MakeOnce) -> None:
    check(case, place, once)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("case", "place"), [(case, place) for case in CASES for place in PLACES if (case, place) not in SAMPLE], ids=str
)
def test_five_steps_of_every_kind_of_head(case: str, place: Place, once: MakeOnce) -> None:
    check(case, place, once)
