"""Harbor, a made-up model in transformers: a Llama with an MLP of its own names.

Import this module, and `AutoModelForCausalLM` loads what the run exports. It does not need megatron_ds.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class HarborConfig(LlamaConfig):
    model_type = "harbor"


class HarborMLP(nn.Module):
    def __init__(self, config: HarborConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class HarborForCausalLM(LlamaForCausalLM):
    config_class = HarborConfig

    def __init__(self, config: HarborConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = HarborMLP(config)
        self.post_init()


AutoConfig.register("harbor", HarborConfig)
AutoModelForCausalLM.register(HarborConfig, HarborForCausalLM)
