"""The reference: a plain transformers model and torch.optim.AdamW in one process."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ds.hf.registry import FAMILIES
from tests.parity.cases import CONFIGS, Recipe, global_batch
from tests.parity.family_cases import FAMILY_CASES

ALL_CONFIGS = {**CONFIGS, **FAMILY_CASES}
assert len(ALL_CONFIGS) == len(CONFIGS) + len(FAMILY_CASES), "a name stands for two configs"


def make_model(config: dict[str, Any], seed: int = 7, attention: str | None = None) -> Any:
    """A transformers model with non-trivial norms and biases; `attention` as in `Family.reference_attention`."""
    from transformers import AutoConfig

    torch.manual_seed(seed)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = _from_config(AutoConfig.for_model(config["model_type"], **fields), attention)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = parameter.mean().round()  # norms stay around where they begin: 1, or 0 where 1 is added
            parameter.copy_(centre + 0.08 * torch.randn_like(parameter))
    return model


def _from_config(config: Any, attention: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    attention = attention or FAMILIES[config.model_type].reference_attention
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()


def train_reference(case: str, recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Save the initial model to `directory`, train it, and return losses, gradient norms and final weights."""
    # Behind padding the first token is predicted from a position that sees nothing. "eager" makes something else of it
    # than transformers' default, which is what we do too.
    model = make_model(ALL_CONFIGS[case], attention="sdpa" if recipe.attention_mask else None)
    model.save_pretrained(directory)
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision])
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in model.parameters()]
    groups = [
        {"params": [m for m in masters if m.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    losses, norms = [], []
    for step in range(recipe.steps):
        loss = _backward(model, global_batch(recipe, step), recipe)
        for master, parameter in zip(masters, model.parameters()):
            master.grad = parameter.grad.float() if parameter.grad is not None else torch.zeros_like(master)
            parameter.grad = None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, recipe.grad_clip or float("inf"))))
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters()):
                parameter.copy_(master)
        losses.append(loss)
    model.save_pretrained(directory / "trained")  # under the names on disk
    weights = {name: tensor.float() for name, tensor in load_file(directory / "trained" / "model.safetensors").items()}
    return {"losses": losses, "norms": norms, "weights": weights}


def _backward(model: Any, batch: dict[str, Tensor], recipe: Recipe) -> float:
    mask = batch.get("attention_mask")
    # position_ids are left at 0..S-1, as a training loop without generation does
    logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits.float()
    shifted_logits, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(shifted_logits, labels, ignore_index=-100, reduction="sum")
    loss = loss / (labels != -100).sum()
    loss.backward()
    return float(loss.detach())
