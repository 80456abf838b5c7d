"""The same few steps by our engine at a layout."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ds.config import OptimizerSection
from megatron_ds.engine import EngineOptions, build_engine, enable_shared_memory
from megatron_ds.hf.config import read_model
from megatron_ds.hf.weights import HFWeights, ToHF
from megatron_ds.models.build import model_layers
from megatron_ds.parallel.grid import Grid, Layout
from tests.parity.batches import batch_for, ours
from tests.parity.cases import Recipe
from tests.parity.packed import draw_rows, packed
from tests.ranks import run_grid


@dataclass(frozen=True)
class Place:
    """tp, pp, dp, zero, sp and the recomputation, as the issue writes them."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1
    sp: bool = False
    recompute: str = "none"
    compiled: bool = False
    shared: bool = False
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def layout(self) -> Layout:
        return Layout(self.tp, self.pp, self.dp)

    def micro_batch(self, recipe: Recipe) -> int:
        """At least two micro-batches a step wherever the data ranks leave as many samples."""
        return min(recipe.micro_batch, max(1, recipe.global_batch // self.dp // 2))

    def __str__(self) -> str:
        compiled = "-compiled" * self.compiled + "-shared" * self.shared
        return f"tp{self.tp}pp{self.pp}dp{self.dp}z{self.zero}sp{int(self.sp)}-{self.recompute}{compiled}"


def deepspeed_config(place: Place, recipe: Recipe) -> dict[str, Any]:
    """A filled DeepSpeed config."""
    config: dict[str, Any] = {
        "train_batch_size": recipe.global_batch,
        "train_micro_batch_size_per_gpu": place.micro_batch(recipe),
        "gradient_accumulation_steps": recipe.global_batch // place.micro_batch(recipe) // place.dp,
        "gradient_clipping": recipe.grad_clip,
        "zero_optimization": {"stage": place.zero, "stage3_param_persistence_threshold": 64},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if recipe.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    config.update(dict(place.extra))
    return config


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
            weights.update({theirs: tensor.float().clone() for theirs, tensor in to_hf.add(name, whole)})
    return {"losses": losses, "norms": norms, "weights": weights}


def engine_on(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> tuple[Any, Any]:
    """An engine filled from an HF directory, and the model's meaning."""
    weights = HFWeights(directory, read_model(directory))
    model = weights.model
    options = EngineOptions(
        deepspeed=deepspeed_config(place, recipe),
        optimizer=OptimizerSection(lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay),
        sequence=place.sp,
        recompute=place.recompute,
        seed=1234,
        compiled=place.compiled,
    )
    if place.shared:
        grid = enable_shared_memory(grid)
    engine = build_engine(lambda ctx: model_layers(model.core, ctx), grid, torch.device("cpu"), options, weights.share)
    return engine, model


def micro_batches(
    grid: Grid, place: Place, recipe: Recipe, step: int, model_type: str = "llama"
) -> list[dict[str, torch.Tensor]]:
    """This data rank's share of a global batch."""
    if recipe.packed:
        whole = packed(draw_rows(recipe.global_batch, step))
    else:
        whole = ours(model_type, batch_for(model_type, recipe, step))
    per_rank, size = recipe.global_batch // grid.data.size, place.micro_batch(recipe)
    mine = slice(grid.data.rank * per_rank, (grid.data.rank + 1) * per_rank)
    return [
        {name: tensor[mine][begin : begin + size] for name, tensor in whole.items()}
        for begin in range(0, per_rank, size)
    ]


def with_recompute(place: Place, mode: str) -> Place:
    return replace(place, recompute=mode)
