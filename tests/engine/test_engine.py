"""What an engine guarantees beside parity: the same start everywhere, padding and ties kept, logits, evaluation."""

import gc
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_ds.engine import build_engine
from megatron_ds.hf.config import read_model
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.parallel.grid import Axes, Grid
from megatron_ds.runtime import load_model
from megatron_ds.runtime.setup import engine_options, plan_engine
from tests.parity.cases import CONFIGS, SEQ, VOCAB, Recipe
from tests.parity.ours import Place, engine_config, engine_on, micro_batches
from tests.parity.reference import ALL_CONFIGS, make_model, train_reference
from tests.ranks import rank_device, run_alone, run_grid

RECIPE = Recipe()
PLACES = [Place(1, 1, 1, 1), Place(2, 1, 1, 1, True), Place(2, 1, 2, 3), Place(2, 2, 1, 1), Place(4, 1, 1, 1)]


def _random_engine(grid: Grid, case: str, place: Place, read: Any = None) -> Any:
    model = load_model(ALL_CONFIGS[case], seed=99)
    device = rank_device()
    plan = plan_engine(engine_config(place, RECIPE, seed=99), model.hf, grid.layout.world_size, device.type)
    return build_engine(model.layers, grid, device, engine_options(model, plan), read)


def _fingerprints(grid: Grid, case: str, place: Place) -> dict[str, str]:
    engine = _random_engine(grid, case, place)
    found = {}
    for name, whole in engine.full_parameters():
        if whole is not None:
            found[name] = hashlib.sha256(whole.cpu().contiguous().numpy().tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_initial_weights_do_not_depend_on_the_layout(case: str) -> None:
    seen = [run_grid(_fingerprints, place.layout, case, place)[0] for place in PLACES]
    assert len(seen[0]) > 10
    assert len(set(seen[0].values())) > 5
    assert all(list(other.items()) == list(seen[0].items()) for other in seen[1:])


def _whole_model_never_held(grid: Grid, place: Place) -> tuple[int, int, int]:
    """(most parameter elements alive while filling, elements kept after it, elements of the model)."""
    config = read_model(CONFIGS["llama"]).core
    peak = 0
    before = {id(p) for p in gc.get_objects() if isinstance(p, nn.Parameter)}  # of other tests in the parent process

    def read(name: str, spec: Any, axes: Axes) -> torch.Tensor:
        nonlocal peak
        found = (p for p in gc.get_objects() if isinstance(p, nn.Parameter))
        alive = {id(p): p.numel() for p in found if id(p) not in before}
        peak = max(peak, sum(alive.values()))
        return initial_shard(name, spec, 1, axes)

    engine = _random_engine(grid, "llama", place, read)
    parameters = [parameter for _, parameter in engine.local_parameters()]
    kept = sum(p.ds_tensor.numel() for p in parameters)
    total = sum(spec_of(p).numel for p in parameters)
    assert config.num_layers == 4
    return peak, kept, total


def test_zero_3_never_holds_the_whole_model() -> None:
    place = Place(1, 1, 4, 3)
    largest = 2 * 64 * 32  # gate and up of one layer; larger than the embedding
    for peak, kept, total in run_grid(_whole_model_never_held, place.layout, place):
        assert kept < total / 4 * 1.05
        assert peak <= largest + VOCAB * 32, (peak, total)  # one parameter at a time, and small persistent ones
        assert total > 10 * largest


def _after_training(grid: Grid, directory: Path, place: Place) -> dict[str, Any]:
    engine, _ = engine_on(grid, directory, place, RECIPE)
    for step in range(3):
        engine.train_step(micro_batches(grid, place, RECIPE, step), RECIPE.lr)
    return {name: parameter.detach().clone() for name, parameter in engine.local_parameters()}


def test_padding_stays_zero_and_tied_copies_stay_equal(tmp_path: Path) -> None:
    """Vocabulary 131 at tp 2: one row of padding on the last rank; tied over pipeline stages 0 and 1."""
    run_alone(train_reference, "qwen2-tied", replace(RECIPE, steps=0), tmp_path)
    place = Place(2, 2, 1, 1, True)
    ranks = run_grid(_after_training, place.layout, tmp_path, place)
    embeddings = [rank["embedding.weight"] for rank in ranks]
    assert embeddings[0].shape == (66, 32)
    assert torch.equal(embeddings[0], embeddings[2]) and torch.equal(embeddings[1], embeddings[3])
    assert not embeddings[1][65].any() and not embeddings[3][65].any()
    assert embeddings[1][:65].abs().sum(dim=1).min() > 0
    names = {name for rank in ranks for name in rank}
    assert "head.weight" not in names and {"blocks.0.mlp.up.weight", "blocks.3.mlp.up.weight"} <= names


def _tied_over_stages(grid: Grid, place: Place) -> tuple[int, int]:
    """(parameters that this rank's stage shares with another one, process groups for them)."""
    tied = _random_engine(grid, "albert-masked", place).deepspeed.module.get_tied_weights_and_groups()
    return len(tied), len({id(group) for _, group in tied})


def test_parameters_of_the_same_stages_share_a_process_group() -> None:
    """On a GPU each group of NCCL takes memory."""
    place = Place(1, 2, 1, 1)
    seen = run_grid(_tied_over_stages, place.layout, place)
    assert [groups for _, groups in seen] == [1, 1]
    assert seen[0] == seen[1] and seen[0][0] > 10


def _logits(grid: Grid, directory: Path, place: Place) -> Any:
    engine, _ = engine_on(grid, directory, place, RECIPE)
    ids = torch.randint(0, VOCAB, (3, SEQ - 4), generator=torch.Generator().manual_seed(3))
    before = engine.outputs({"input_ids": ids})
    engine.train_step(micro_batches(grid, place, RECIPE, 0), lr=0.0)
    after = engine.outputs({"input_ids": ids})
    if before is None or after is None:
        assert before is after, "a rank predicts always or never"
        return None
    torch.testing.assert_close(before["logits"], after["logits"], rtol=1e-6, atol=1e-6)
    return before["logits"]


def _reference_logits(case: str) -> Any:
    ids = torch.randint(0, VOCAB, (3, SEQ - 4), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return make_model(CONFIGS[case])(input_ids=ids).logits


def test_live_logits_equal_transformers_between_steps(tmp_path: Path) -> None:
    """Of another shape than the training batches, on the ranks of the last stage, at each kind of engine."""
    run_alone(train_reference, "llama", replace(RECIPE, steps=0), tmp_path)
    expected = run_alone(_reference_logits, "llama")
    for place in (Place(1, 1, 1, 1), Place(2, 1, 2, 3), Place(2, 2, 1, 1, True)):
        ranks = run_grid(_logits, place.layout, tmp_path, place)
        for rank, logits in enumerate(ranks):
            last = place.layout.coords(rank).pipeline == place.pp - 1
            assert (logits is not None) == last
            if logits is not None:
                assert float((logits - expected).norm() / expected.norm()) < 1e-6


def _steps_with_evaluation(grid: Grid, directory: Path, place: Place, evaluate: bool) -> Any:
    engine, _ = engine_on(grid, directory, place, RECIPE)
    seen = []
    for step in range(3):
        result = engine.train_step(micro_batches(grid, place, RECIPE, step), RECIPE.lr)
        if evaluate:
            seen.append((result.loss, engine.evaluate(micro_batches(grid, place, RECIPE, 7)).mean))
        else:
            seen.append((result.loss, 0.0))
    return seen


def test_evaluation_is_exact_and_leaves_training_alone(tmp_path: Path) -> None:
    run_alone(train_reference, "llama", replace(RECIPE, steps=0), tmp_path)
    places = [Place(1, 1, 1, 1), Place(2, 1, 2, 3), Place(2, 2, 1, 1, True), Place(1, 2, 2, 1)]
    runs = {str(p): run_grid(_steps_with_evaluation, p.layout, tmp_path, p, True)[0] for p in places}
    alone = run_grid(_steps_with_evaluation, places[0].layout, tmp_path, places[0], False)[0]
    first = runs[str(places[0])]
    assert [loss for loss, _ in first] == [loss for loss, _ in alone]
    for other in runs.values():
        for (loss_a, valid_a), (loss_b, valid_b) in zip(first, other):
            assert abs(loss_a / loss_b - 1) < 2e-5 and abs(valid_a / valid_b - 1) < 2e-5


def _nothing_labelled(grid: Grid, directory: Path, place: Place) -> Any:
    engine, _ = engine_on(grid, directory, place, RECIPE)
    batches = micro_batches(grid, place, RECIPE, 0)
    one_empty = [{**batches[0], "targets": torch.full_like(batches[0]["targets"], -100)}, *batches[1:]]
    all_empty = [{**batch, "targets": torch.full_like(batch["targets"], -100)} for batch in batches]
    return [engine.train_step(group, RECIPE.lr) for group in (one_empty, all_empty)]


@pytest.mark.parametrize("place", [Place(1, 1, 2, 1), Place(1, 2, 1, 1)], ids=str)
def test_batches_without_labels_give_no_nan(place: Place, tmp_path: Path) -> None:
    run_alone(train_reference, "llama", replace(RECIPE, steps=0), tmp_path)
    for one, nothing in run_grid(_nothing_labelled, place.layout, tmp_path, place):
        assert 0 < one.loss < 10 and one.grad_norm > 0
        assert (nothing.loss, nothing.grad_norm, nothing.tokens) == (0.0, 0.0, 0)


def _other_columns(grid: Grid, directory: Path, place: Place, first: bool) -> list[float]:
    """Training batches with a mask and validation without, or the reverse; then validation of another length."""
    engine, _ = engine_on(grid, directory, place, RECIPE)
    with_mask = micro_batches(grid, place, RECIPE, 0, "bert")
    without = [{name: column for name, column in one.items() if name != "attention_mask"} for one in with_mask]
    shorter = [
        {name: column[:, :16] if column.dim() > 1 else column for name, column in one.items()} for one in without
    ]
    train, valid = (with_mask, without) if first else (without, with_mask)
    seen = []
    for _ in range(2):
        seen.append(engine.train_step(train, RECIPE.lr).loss)
        seen += [engine.evaluate(batches).mean for batches in (valid, shorter)]
    return seen


@pytest.mark.parametrize("first", [True, False], ids=["masked training", "masked validation"])
def test_validation_may_have_other_columns_and_lengths(first: bool, tmp_path: Path) -> None:
    run_alone(train_reference, "bert-pretraining", replace(RECIPE, steps=0), tmp_path)
    places = (Place(1, 1, 1, 1), Place(1, 2, 1, 1), Place(2, 2, 1, 1, True))
    alone, *others = (run_grid(_other_columns, p.layout, tmp_path, p, first)[0] for p in places)
    for other in others:
        assert other == pytest.approx(alone, rel=2e-5)


def _flat_copies(grid: Grid, directory: Path, place: Place) -> tuple[list[int], int]:
    """Elements of each flat copy of gradients that DeepSpeed makes in a step, and of the largest gradient."""
    engine, _ = engine_on(grid, directory, place, RECIPE)
    copied: list[int] = []
    make = engine.deepspeed.allreduce_and_copy

    def counted(bucket: list[torch.Tensor], *args: Any) -> None:
        copied.append(sum(one.numel() for one in bucket))
        make(bucket, *args)

    engine.deepspeed.allreduce_and_copy = counted
    engine.train_step(micro_batches(grid, place, RECIPE, 0), RECIPE.lr)
    return copied, max(parameter.numel() for _, parameter in engine.local_parameters())


@pytest.mark.parametrize(
    "place",
    [
        Place(1, 1, 1, 0),
        Place(2, 1, 1, 0, True),
        Place(1, 1, 2, 0),
        *(Place(1, pp, dp, 1, extra=(("bf16", {"enabled": True}),)) for pp, dp in ((1, 1), (1, 2), (2, 1), (2, 2))),
    ],
    ids=lambda place: f"{place}{'-bf16' * bool(place.extra)}",
)
def test_gradients_are_copied_in_buckets_or_not_at_all(place: Place, references: Any) -> None:
    directory, _ = references("llama", RECIPE)
    bucket = 4096
    zero = ("zero_optimization", {"stage": place.zero, "reduce_bucket_size": bucket})
    place = replace(place, extra=(zero, *place.extra))
    for copied, largest in run_grid(_flat_copies, place.layout, directory, place):
        if place.dp == 1:
            assert not copied
        else:
            assert len(copied) > 1 and max(copied) <= bucket + largest
