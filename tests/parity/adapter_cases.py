"""The same few steps of adapters by peft on transformers, and by ours at a layout."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_ds.hf.to_hf import ToHF
from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.parity.batches import batch_for, reference_loss
from tests.parity.cases import Recipe
from tests.parity.optimizers import REFERENCES
from tests.parity.ours import Place, engine_config, micro_batches, session_of
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_grid


def train_peft(
    case: str, config: dict[str, Any], recipe: Recipe, directory: Path, plus: float | None = None
) -> dict[str, Any]:
    """Save the base to `directory/base` and the initial adapter to `directory/adapter`, and train.

    `plus`: the ratio of learning rates of peft's optimizer for LoRA+; None = one rate.
    """
    from peft import get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    base = make_model(ALL_CONFIGS[case])
    base.save_pretrained(directory / "base")
    torch.manual_seed(11)
    model = get_peft_model(base, random_config(config), autocast_adapter_dtype=False)
    model.save_pretrained(directory / "adapter")
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = list(named.values())
    if plus is None:
        settings = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        groups = [{"name": name, "params": [parameter], **settings} for name, parameter in named.items()]
        optimizer = REFERENCES[recipe.optimizer](groups, recipe)
    else:
        options: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
        options |= {"loraplus_lr_ratio": plus, "loraplus_weight_decay": recipe.weight_decay}
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    losses, norms = [], []
    for step in range(recipe.steps):
        loss = reference_loss(model, batch_for(base.config.model_type, recipe, step))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, recipe.grad_clip or float("inf"))))
        optimizer.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(directory / "trained")
    weights = load_file(directory / "trained" / "adapter_model.safetensors")
    return {"losses": losses, "norms": norms, "weights": weights}


def random_config(config: dict[str, Any]) -> Any:
    """peft's, whose adapters begin at random throughout, unless it says how."""
    from peft import IA3Config, LoraConfig

    if config.get("peft_type") == "IA3":
        given = {name: value for name, value in config.items() if name != "peft_type"}
        return IA3Config(**given, init_ia3_weights=False)
    return LoraConfig(**{"init_lora_weights": False, **config})


def train_ours(directory: Path, place: Place, recipe: Recipe) -> dict[str, Any]:
    """Losses, gradient norms, and the final adapter under peft's names."""
    return run_grid(train_on, place.layout, directory, place, recipe)[0]


def train_on(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> dict[str, Any]:
    model = load_model(directory / "base", peft=str(directory / "adapter"))
    engine = session_of(grid).build_engine(model, engine_config(place, recipe)).engine
    losses, norms = [], []
    for step in range(recipe.steps):
        model_type = model.hf.family.model_type
        result = engine.train_step(micro_batches(grid, place, recipe, step, model_type), recipe.lr)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    assert model.adapters is not None
    found, to_hf = {}, ToHF(model.adapters)
    for name, whole in engine.full_parameters():
        if whole is not None and name in model.adapters.table:
            found.update({theirs: tensor.float().cpu().clone() for theirs, tensor in to_hf.add(name, whole)})
    return {"losses": losses, "norms": norms, "weights": found}
