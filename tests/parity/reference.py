"""The reference: a plain transformers model and torch.optim.AdamW in one process."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_ds.hf.registry import FAMILIES
from tests.parity.batches import batch_for, reference_loss
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.optimizers import REFERENCES

ALL_CONFIGS = {**CONFIGS, **FAMILY_CASES, **ENCODER_CASES}
# The last parts of names of buffers that are weights: of routers' choices, and the constants of xIELU.
WEIGHTS_AMONG_BUFFERS = ("e_score_correction_bias", "act_fn.beta", "act_fn.eps")
NOT_DECAYED = ("bias", "norm.weight")  # ends of names
assert len(ALL_CONFIGS) == len(CONFIGS) + len(FAMILY_CASES) + len(ENCODER_CASES), "a name stands for two configs"


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
        for name, buffer in model.named_buffers():
            if name.endswith(WEIGHTS_AMONG_BUFFERS):
                buffer.copy_(buffer.round(decimals=1) + 0.08 * torch.randn_like(buffer))
    return model


def _from_config(config: Any, attention: str | None) -> Any:
    import transformers

    family = FAMILIES[config.model_type]
    named = (config.architectures or [family.architecture])[0]
    kind = getattr(transformers, named)
    # "sdpa" where transformers has it: not for biases by distance and bounded scores
    attention = attention if attention and (attention != "sdpa" or kind._supports_sdpa) else family.reference_attention
    config._experts_implementation = "eager"  # others need widths of certain multiples
    model = kind._from_config(config, attn_implementation=attention).float()
    if family.tied_by_bytes and not getattr(config, "scale_decoder_outputs", False) and hasattr(model, "lm_head"):
        # transformers 5 ties every T5 that it makes; those of v1.1 and later have a head of their own
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def train_reference(case: str, recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Save the initial model to `directory`, train it, and return losses, gradient norms and final weights."""
    # Behind padding the first token is predicted from a position that sees nothing. "eager" makes something else of it
    # than transformers' default, which is what we do too.
    model = make_model(ALL_CONFIGS[case], attention="sdpa" if recipe.attention_mask else None)
    model.save_pretrained(directory)
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision])
    passes_through = FAMILIES[model.config.model_type].passes_through
    for name, parameter in model.named_parameters():
        frozen = _any_match(passes_through, name) or any(fnmatch(name, each) for each in recipe.frozen)
        parameter.requires_grad_(parameter.requires_grad and not frozen)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in trained.values()]
    # those of all experts are one tensor, and so are norms of each head: a bias or a norm may have two dims
    decays = [master.dim() >= 2 and not name.endswith(NOT_DECAYED) for name, master in zip(trained, masters)]
    groups = []
    for name, master, decay in zip(trained, masters, decays):
        own = next((one for one in recipe.groups if fnmatch(name, one[0])), ("", 1.0, None))
        of_kind = recipe.weight_decay if decay else 0.0
        decay = of_kind if own[2] is None else own[2]
        groups.append({"name": name, "params": [master], "lr": recipe.lr * own[1], "weight_decay": decay})
    optimizer = REFERENCES[recipe.optimizer](groups, recipe)
    losses, norms = [], []
    for step in range(recipe.steps):
        loss = reference_loss(model, batch_for(model.config.model_type, recipe.at(step), step))
        loss.backward()
        for master, parameter in zip(masters, trained.values()):
            master.grad = parameter.grad.float() if parameter.grad is not None else torch.zeros_like(master)
            parameter.grad = None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, recipe.grad_clip or float("inf"))))
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, trained.values()):
                parameter.copy_(master)
        losses.append(float(loss.detach()))
    model.save_pretrained(directory / "trained")  # under the names on disk
    saved = load_file(directory / "trained" / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in saved.items() if not _any_match(passes_through, name)}
    return {"losses": losses, "norms": norms, "weights": weights}


def _any_match(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
