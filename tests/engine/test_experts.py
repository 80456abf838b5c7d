"""Experts under DeepSpeed: losses of routers in every layout, experts without tokens, and the traps of both."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.engine import build, data_sum, module, zero
from megatron_ds.engine.experts import FoldedExperts, _Marker
from megatron_ds.engine.router_load import Routers
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.layers.moe import balance
from megatron_ds.layers.moe import layer as moe_layer
from megatron_ds.layers.moe.experts import Experts
from megatron_ds.layers.moe.layer import MoE
from megatron_ds.layers.moe.router import Router, Routing
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.grid import Grid
from megatron_ds.parallel.launch import LaunchError
from megatron_ds.runtime import load_model, setup
from tests.halves import halved, swept
from tests.parity.batches import batch_for, ours, reference_loss
from tests.parity.cases import SEQ, Recipe
from tests.parity.context_cases import GATHER_2, RING_2, ULYSSES_2, with_axes
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, engine_config, session_of
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_grid

CASE = "mixtral-four-experts"
E, K, SIZE = 4, 2, 2  # experts, those of a token, samples of a micro-batch
AUX, Z = 0.3, 0.02
RECIPE = Recipe(steps=2, eps=1e-2)
Trap = Callable[[], None]


# ---- one run of a few steps ----------------------------------------------------------------------------------------


def _train(
    grid: Grid, directory: Path, place: Place, recipe: Recipe, losses: bool, change: Trap | None
) -> dict[str, Any]:
    """Ours, in micro-batches of `SIZE` samples at every layout; `change` is called in each rank first."""
    if change is not None:
        change()
    options = {"moe_aux_loss": AUX, "moe_z_loss": Z} if losses else {}
    config = engine_config(place, recipe, micro_batch_size=SIZE, **options)
    model = load_model(directory, freeze=recipe.frozen)
    engine = session_of(grid).build_engine(model, config).engine
    found: dict[str, Any] = {"losses": [], "norms": [], "metrics": []}
    for step in range(recipe.steps):
        whole = ours("mixtral", batch_for("mixtral", recipe, step))
        own = {name: column.chunk(grid.batch.size)[grid.batch.rank].split(SIZE) for name, column in whole.items()}
        result = engine.train_step([dict(zip(own, parts)) for parts in zip(*own.values())], recipe.lr)
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        found["metrics"].append(dict(result.metrics))
    weights, to_hf = {}, ToHF(model.hf)
    for name, full in engine.full_parameters():
        if full is not None:
            weights.update({theirs: tensor.float().clone() for theirs, tensor in to_hf.add(name, full)})
    return {**found, "weights": weights}


def train(
    directory: Path,
    place: Place,
    recipe: Recipe = RECIPE,
    *,
    losses: bool = True,
    change: Trap | None = None,
    timeout_s: float = 120,
) -> dict[str, Any]:
    return run_grid(_train, place.layout, directory, place, recipe, losses, change, timeout_s=timeout_s)[0]


def _train_theirs(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """transformers' model, with the losses of each layer's router written out for each micro-batch."""
    from safetensors.torch import load_file

    model = make_model(ALL_CONFIGS[CASE], attention="sdpa" if recipe.attention_mask else None)
    model.save_pretrained(directory)
    groups = [{"params": [one for one in model.parameters() if (one.dim() >= 2) == decays]} for decays in (True, False)]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = recipe.weight_decay, 0.0  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    found: dict[str, Any] = {"losses": [], "norms": [], "metrics": []}
    for step in range(recipe.steps):
        batch = batch_for("mixtral", recipe, step)
        loss = reference_loss(model, batch)
        columns = {name: column.split(SIZE) for name, column in batch.items() if name != "labels"}
        parts = [dict(zip(columns, part)) for part in zip(*columns.values())]
        aux, z, counts = _router_losses(model, parts)
        (loss + AUX * aux + Z * z).backward()
        found["losses"].append(float(loss.detach()))
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)))
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"moe_aux_loss": float(aux), "moe_z_loss": float(z)}
        found["metrics"].append(
            {**metrics, "moe_tokens_min": counts.min().item(), "moe_tokens_max": counts.max().item()}
        )
    model.save_pretrained(directory / "trained")
    return {**found, "weights": load_file(directory / "trained" / "model.safetensors")}


def _router_losses(model: Any, parts: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses, summed over layers and averaged over micro-batches, and the tokens of each expert in each layer."""
    aux, z, counts = torch.zeros(()), torch.zeros(()), torch.zeros(len(model.model.layers), E)
    for part in parts:
        real = part.get("attention_mask", torch.ones_like(part["input_ids"])).flatten().bool()
        for layer, logits in enumerate(model(**part, output_router_logits=True).router_logits):
            shares = logits[real].softmax(-1)
            chosen = F.one_hot(shares.topk(K).indices, E).sum(1)
            aux = aux + E * (chosen.float().mean(0) / K * shares.mean(0)).sum() / len(parts)
            z = z + logits[real].logsumexp(-1).square().mean() / len(parts)
            counts[layer] += chosen.sum(0)
    return aux, z, counts


# ---- losses of routers ---------------------------------------------------------------------------------------------

# The four micro-batches of a step follow one another, or are on several data ranks at once.
PLACES = [
    Place(1, 1, 1, 0),
    Place(1, 1, 1, 1, recompute="full"),
    Place(1, 1, 2, 1, expert=2),
    Place(1, 1, 4, 3, expert=2),
    Place(2, 1, 2, 2, True, "full", expert=4),
    Place(2, 1, 1, 1, expert=2),
    Place(2, 1, 1, 1, expert=1),
    Place(1, 2, 2, 1, expert=2),
    # Context ranks have different tokens of one micro-batch.
    replace(ULYSSES_2, expert=2),
    replace(with_axes(RING_2, 2, 1, 1, 1, True), expert=4, recompute="full"),
    replace(with_axes(GATHER_2, 1, 1, 2, 3), expert=2),
]


def _apart(found: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest relative error of the routers' metrics."""
    pairs = [
        (mine[name], value)
        for mine, theirs in zip(found["metrics"], reference["metrics"])
        for name, value in theirs.items()
    ]
    return max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs)


@pytest.mark.parametrize("place", halved(PLACES), ids=str)
def test_losses_of_routers_give_one_update_at_every_layout(place: Place, once: Any) -> None:
    directory, reference = once(_train_theirs, RECIPE)
    found = train(directory, place)
    assert within_fp32(relative_errors(found, reference)), relative_errors(found, reference)
    assert _apart(found, reference) < 1e-5, (found["metrics"], reference["metrics"])


@pytest.mark.parametrize(
    ("place", "length"),
    [
        (Place(2, 1, 1, 1, True), SEQ),
        (Place(2, 1, 2, 1, expert=4), SEQ),
        (replace(with_axes(GATHER_2, 2, 1, 1, 1), expert=2), 27),  # and so is what makes rows divisible
    ],
    ids=str,
)
def test_losses_of_routers_leave_padding_out(place: Place, length: int, once: Any) -> None:
    recipe = replace(RECIPE, attention_mask=True, length=length)
    directory, reference = once(_train_theirs, recipe)
    found = train(directory, place, recipe)
    assert within_fp32(relative_errors(found, reference)), relative_errors(found, reference)
    assert _apart(found, reference) < 1e-5, (found["metrics"], reference["metrics"])


def losses_not_divided_by_micro_batches() -> None:
    begin = Routers.begin_step

    def unscaled(self: Routers, num_micro_batches: int, loss_scale: float) -> None:
        begin(self, num_micro_batches, loss_scale)
        self._settings.gradient_scale = loss_scale

    Routers.begin_step = unscaled  # type: ignore[method-assign]


def losses_averaged_over_context() -> None:
    """Each context rank has a part of the losses, which DeepSpeed's mean over them makes smaller."""
    begin = Routers.begin_step

    def averaged(self: Routers, num_micro_batches: int, loss_scale: float) -> None:
        begin(self, num_micro_batches, loss_scale)
        self._settings.gradient_scale /= self._grid.context.size

    Routers.begin_step = averaged  # type: ignore[method-assign]


def counts_of_one_context_rank() -> None:
    ExpertParallel.token_axes = property(lambda self: (self.tp.axis,))  # type: ignore[assignment]


def counts_of_one_tensor_rank() -> None:
    balance.all_reduce_ = lambda x, axis: x


def tokens_counted_in_every_replay() -> None:
    moe_layer.is_replaying = lambda: False


def padding_counted() -> None:
    MoE._real = lambda self, x, mask: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("trap", "place"),
    [
        (losses_not_divided_by_micro_batches, Place(1, 1, 1, 0)),
        (counts_of_one_tensor_rank, Place(2, 1, 1, 1, True)),
        (losses_averaged_over_context, replace(ULYSSES_2, expert=2)),
        (counts_of_one_context_rank, replace(ULYSSES_2, expert=2)),
        (tokens_counted_in_every_replay, Place(1, 1, 1, 1, recompute="full")),
        (padding_counted, Place(1, 1, 1, 1)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_trap_of_the_losses_turns_them_red(trap: Trap, place: Place, once: Any) -> None:
    recipe = replace(RECIPE, attention_mask=trap is padding_counted)
    directory, reference = once(_train_theirs, recipe)
    found = train(directory, place, recipe, change=trap)
    in_metrics = trap in (tokens_counted_in_every_replay, padding_counted)
    assert _apart(found, reference) > 1e-2 if in_metrics else not within_fp32(relative_errors(found, reference))


# ---- traps of DeepSpeed's engine -----------------------------------------------------------------------------------


def experts_not_set_apart() -> None:
    """Different experts are averaged as if they were replicas."""
    module.fold_experts = lambda grid: None


def _without(*names: str) -> None:
    mark = FoldedExperts.mark

    def partly(self: FoldedExperts, parameter: Any) -> None:
        mark(self, parameter)
        for name in names:
            delattr(parameter, name)

    FoldedExperts.mark = partly  # type: ignore[method-assign]


def no_groups_for_zero_3() -> None:
    """ZeRO-3 divides an expert over ranks that hold others."""
    names = ("placement_family", "partition_group_name", "partition_process_group")
    _without(*(f"ds_zero_{name}" for name in names))


def no_flag_over_tensor_ranks() -> None:
    """The norm counts the experts of the first tensor rank alone."""
    _without("tensor_model_parallel")


def gradients_not_contiguous() -> None:
    """DeepSpeed then reduces experts' gradients over the ranks of all others; our check refuses it."""
    setup.check_experts = lambda *given: None


def gradients_contiguous_by_data_ranks_alone() -> None:
    """With one data rank there are still replicas of experts on tensor ranks."""
    adapt = build.adapt_to_device
    build.adapt_to_device = lambda config, device, size: adapt(config, device, 1)


def no_sum_with_one_data_rank() -> None:
    average = data_sum.average_over_data
    zero.average_over_data = lambda engine, grid, bucket: grid.shard.size > 1 and average(engine, grid, bucket)


def read_by_data_rank_0_alone() -> None:
    """Under ZeRO-3 it broadcasts its experts over ranks that have others."""
    Grid.shard_of = lambda self, parameter: self.shard  # type: ignore[method-assign]


def router_not_summed_over_tensor_ranks() -> None:
    ExpertParallel.enter = lambda self, parameter: parameter  # type: ignore[method-assign]


NOT_CONTIGUOUS = (("zero_optimization", {"stage": 1, "contiguous_gradients": False}),)
TRAPS = [
    (experts_not_set_apart, Place(1, 1, 2, 1, expert=2)),
    (no_groups_for_zero_3, Place(1, 1, 2, 3, expert=2)),
    (no_flag_over_tensor_ranks, Place(2, 1, 2, 1, True, expert=4)),
    (no_flag_over_tensor_ranks, Place(2, 1, 1, 1, True, expert=1)),
    (gradients_not_contiguous, Place(1, 1, 2, 1, expert=2, extra=NOT_CONTIGUOUS)),
    (gradients_contiguous_by_data_ranks_alone, Place(2, 1, 1, 1, True, expert=1)),
    (no_sum_with_one_data_rank, Place(2, 1, 1, 0, True, expert=1)),
    (read_by_data_rank_0_alone, Place(1, 1, 4, 3, expert=2)),
    (router_not_summed_over_tensor_ranks, Place(2, 1, 1, 1, expert=2)),
]


@pytest.mark.parametrize(("trap", "place"), TRAPS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_trap_turns_parity_red(trap: Trap, place: Place, once: Any) -> None:
    directory, reference = once(_train_theirs, RECIPE)
    caught = relative_errors(train(directory, place, change=trap), reference)
    assert not within_fp32(caught), caught


def no_marker() -> None:
    build.declare_experts = lambda module, folded: None


def marker_of_frozen_experts() -> None:
    build.declare_experts = lambda module, folded: module.add_module("expert_marker", _Marker())


@pytest.mark.parametrize(
    ("trap", "frozen", "message"),
    [(no_marker, (), "TypeError"), (marker_of_frozen_experts, ("*.experts.*",), "None of the param groups are marked")],
)
def test_a_trap_that_deepspeed_reports(trap: Trap, frozen: tuple[str, ...], message: str, once: Any) -> None:
    directory, _ = once(_train_theirs, RECIPE)
    with pytest.raises(LaunchError, match=message):
        train(directory, Place(1, 1, 2, 1, expert=2), replace(RECIPE, frozen=frozen), change=trap)


# ---- experts without tokens ----------------------------------------------------------------------------------------


def _route_by_data_rank(rank: int, part: int) -> None:
    """All tokens of the data ranks in the first half choose experts 0 and 1, all others the last two."""
    route = Router.route

    def routed(self: Router, logits: Tensor) -> Routing:
        found, first = route(self, logits), 0 if rank < part else E - K
        weights = logits[:, first : first + K].softmax(-1)
        return Routing(torch.arange(first, first + K).expand_as(found.chosen), weights, found.logits, found.shares)

    Router.route = routed  # type: ignore[method-assign]


def _experts_without_rows_are_skipped() -> None:
    """No product, and so no gradient, where no token has come."""
    forward = Experts.forward
    Experts.forward = lambda self, rows, counts: forward(self, rows, counts) if len(rows) else rows  # type: ignore[method-assign]


def _train_unevenly(grid: Grid, directory: Path, place: Place, part: int, skip: bool) -> dict[str, Any]:
    if skip:
        _experts_without_rows_are_skipped()
    change = partial(_route_by_data_rank, grid.batch.rank, part)
    return _train(grid, directory, place, RECIPE, True, change)


@pytest.fixture(scope="module")
def unevenly(once: Any) -> Callable[..., dict[str, Any]]:
    """(place, how many data ranks choose the first experts) -> a run."""
    directory, _ = once(_train_theirs, RECIPE)

    @cache
    def run(place: Place, part: int, skip: bool = False, timeout_s: float = 60) -> dict[str, Any]:
        return run_grid(_train_unevenly, place.layout, directory, place, part, skip, timeout_s=timeout_s)[0]

    return run


NONE_AT_ALL, NONE_FROM_ONE_REPLICA = 4, 2
UNEVEN = [
    (Place(1, 1, 4, 0, expert=2), NONE_FROM_ONE_REPLICA),
    (Place(1, 1, 4, 1, expert=2), NONE_AT_ALL),
    (Place(1, 1, 4, 2, expert=4), NONE_AT_ALL),
    (Place(1, 1, 4, 3, expert=2, recompute="full"), NONE_FROM_ONE_REPLICA),
]


@pytest.mark.parametrize(("place", "part"), [*UNEVEN, *swept(*((place, 6 - part) for place, part in UNEVEN))], ids=str)
def test_ranks_whose_experts_get_no_token_take_part(place: Place, part: int, unevenly: Any) -> None:
    """Of 4 data ranks; as ordinary data-parallel parameters, all experts are on every rank."""
    found, expected = unevenly(place, part), unevenly(Place(1, 1, 4, 0), part)
    assert within_fp32(relative_errors(found, expected)), relative_errors(found, expected)
    fewest = [one["moe_tokens_min"] for one in found["metrics"]]
    assert fewest == [one["moe_tokens_min"] for one in expected["metrics"]] and (min(fewest) == 0) == (part == 4)


@pytest.mark.sweep
def test_a_rank_that_skips_its_experts_hangs_until_its_time_is_up(unevenly: Any) -> None:
    with pytest.raises(LaunchError, match="timed out"):
        unevenly(Place(1, 1, 2, 3, expert=2), 2, skip=True, timeout_s=12)


# ---- several engines in one process ----------------------------------------------------------------------------------


def _train_in_turn(grid: Grid, directory: Path, places: list[Place]) -> list[list[float]]:
    """Losses and norms of one engine per place, of which each does a step before the first does its second."""
    model = load_model(directory)
    configs = [engine_config(place, RECIPE, micro_batch_size=RECIPE.global_batch // place.dp) for place in places]
    engines = [session_of(grid).build_engine(model, config).engine for config in configs]
    found: list[list[float]] = [[] for _ in places]
    for step in range(RECIPE.steps):
        whole = ours("mixtral", batch_for("mixtral", RECIPE, step))
        own = {name: column.chunk(grid.batch.size)[grid.batch.rank] for name, column in whole.items()}
        for engine, numbers in zip(engines, found):
            result = engine.train_step([own], RECIPE.lr)
            numbers += [result.loss, result.grad_norm]
    return found


def test_engines_of_one_process_reduce_over_their_own_ranks(references: Any) -> None:
    """DeepSpeed looks up groups by name, among those of the engine that was built last."""
    directory, _ = references(CASE, RECIPE)
    places = [Place(1, 1, 4, 3, expert=2), Place(1, 1, 4, 3, expert=4)]
    alone = [run_grid(_train_in_turn, place.layout, directory, [place])[0][0] for place in places]
    assert run_grid(_train_in_turn, places[0].layout, directory, places)[0] == alone
