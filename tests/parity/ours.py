"""The same few steps by our engine at a layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ds.config import EngineConfig, OptimizerGroup, OptimizerSection, ParallelSection
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.runtime import Session, load_model
from tests.parity.batches import batch_for, ours
from tests.parity.cases import Recipe
from tests.parity.packed import draw_rows, packed
from tests.ranks import rank_device, run_grid


@dataclass(frozen=True)
class Place:
    """Sizes of the axes, the stage of ZeRO, sequence parallelism and recomputation of a run.

    Attributes:
        cp: ranks that divide a sequence; `method`: how they exchange it; `ulysses`: those of them that exchange heads,
            None = as the method chooses.
        settings: further fields of the config.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1
    sp: bool = False
    recompute: str = "none"
    compiled: bool = False
    shared: bool = False
    extra: tuple[tuple[str, Any], ...] = ()
    expert: int | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    cp: int = 1
    method: str = "auto"
    ulysses: int | None = None

    @property
    def layout(self) -> Layout:
        return Layout(tensor=self.tp, pipeline=self.pp, data=self.dp, context=self.cp)

    @property
    def context(self) -> dict[str, Any]:
        """The section of the run file, without what is left to be chosen."""
        chosen = {"ulysses": self.ulysses} if self.ulysses is not None else {}
        return {"size": self.cp, "method": self.method, **chosen}

    def micro_batch(self, recipe: Recipe) -> int:
        """At least two micro-batches a step wherever the data ranks leave as many samples."""
        return min(recipe.micro_batch, max(1, recipe.global_batch // self.dp // 2))

    def __str__(self) -> str:
        compiled = "-compiled" * self.compiled + "-shared" * self.shared
        expert = f"ep{self.expert}" if self.expert is not None else ""
        context = f"cp{self.cp}{self.method}{self.ulysses or ''}" * (self.cp > 1)
        axes = f"tp{self.tp}{context}{expert}pp{self.pp}dp{self.dp}z{self.zero}sp{int(self.sp)}"
        return f"{axes}-{self.recompute}{compiled}"


def cost_of(run: tuple[Any, Place]) -> float:
    """About what a case at a place costs: the time of its ranks, which is several times as long under ZeRO-3."""
    return run[1].layout.world_size * (4 if run[1].zero == 3 else 1) + 0.5


def engine_config(place: Place, recipe: Recipe, **changes: Any) -> EngineConfig:
    """The engine config of a place and a recipe; `changes` replace fields."""
    deepspeed: dict[str, Any] = {
        "zero_optimization": {"stage": place.zero, "stage3_param_persistence_threshold": 64},
        **({"bf16": {"enabled": True}} if recipe.precision == "bf16" else {}),
        **dict(place.extra),
    }
    fields = {
        "parallel": ParallelSection(
            tensor=place.tp,
            pipeline=place.pp,
            expert=place.expert,
            sequence=place.sp,
            shared_memory=place.shared,
            **({"context": place.context} if place.cp > 1 else {}),
        ),
        "deepspeed": deepspeed,
        "optimizer": OptimizerSection(
            name=recipe.optimizer,
            options=dict(recipe.options),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            grad_clip=recipe.grad_clip,
            groups=[
                OptimizerGroup(match=[pattern], lr_factor=factor, weight_decay=decay)
                for pattern, factor, decay in recipe.groups
            ],
        ),
        "global_batch_size": recipe.global_batch,
        "micro_batch_size": place.micro_batch(recipe),
        "recompute": place.recompute,
        "compile": place.compiled,
        **dict(place.settings),
    }
    return EngineConfig(**{**fields, **changes})


def session_of(grid: Grid) -> Session:
    """The session of a rank that has joined its process group."""
    return Session(RankInfo(grid.rank, grid.layout.world_size, grid.rank), rank_device())


def train_ours(directory: Path, place: Place, recipe: Recipe) -> dict[str, Any]:
    """Losses, gradient norms, and final weights under transformers' names."""
    return run_grid(train_on, place.layout, directory, place, recipe)[0]


def train_on(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> dict[str, Any]:
    engine, model = engine_on(grid, directory, place, recipe)
    losses, norms = [], []
    for step in range(recipe.steps):
        result = engine.train_step(micro_batches(grid, place, recipe, step, model.family.model_type), recipe.lr)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights, to_hf = {}, ToHF(model)
    for name, whole in engine.full_parameters():
        if whole is not None:
            weights.update({theirs: tensor.float().cpu().clone() for theirs, tensor in to_hf.add(name, whole)})
    return {"losses": losses, "norms": norms, "weights": weights}


def engine_on(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> tuple[Any, Any]:
    """An engine filled from an HF directory, and the model's meaning."""
    model = load_model(directory, freeze=recipe.frozen)
    return session_of(grid).build_engine(model, engine_config(place, recipe)).engine, model.hf


def micro_batches(
    grid: Grid, place: Place, recipe: Recipe, step: int, model_type: str = "llama"
) -> list[dict[str, torch.Tensor]]:
    """This data rank's share of a global batch."""
    size, recipe = place.micro_batch(recipe), recipe.at(step)
    if recipe.packed:
        whole = packed(draw_rows(recipe.global_batch, step, recipe.length))
    else:
        whole = ours(model_type, batch_for(model_type, recipe, step))
    per_rank = recipe.global_batch // grid.batch.size
    mine = slice(grid.batch.rank * per_rank, (grid.batch.rank + 1) * per_rank)
    return [
        {name: tensor[mine][begin : begin + size] for name, tensor in whole.items()}
        for begin in range(0, per_rank, size)
    ]
