"""A Llama that fp32 computes badly: weights drawn from N(0, 1) make rounding errors grow from layer to layer."""

from pathlib import Path

import torch

from tests.hf.models import SMALL


def save_badly_conditioned(seed: int, fields: dict[str, object], directory: Path) -> None:
    """Save a model of four layers with biases; `fields` of its config are replaced."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**SMALL, "num_hidden_layers": 4, "attention_bias": True, **fields}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data)
    model.save_pretrained(directory)
