"""The reference of Muon: torch.optim.Muon on each matrix of a transformers model, torch.optim.AdamW on the rest."""

import re
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.parity.cases import Recipe

# Tensors of several dims that are no linear maps inside of a model: tables, output layers, and numbers of each head.
NO_MATRICES = (
    r"embed_tokens|embed_in|embed_positions|embeddings?\.|wte|wpe|shared\.weight|relative_attention_bias"
    r"|lm_head(?!\.dense)|embed_out|output_projection|decoder\.weight|classifier|score|seq_relationship|bias|norm"
)


def matrices_of(name: str, tensor: Tensor) -> list[Tensor]:
    """Views (out, in) of the matrices in a parameter of transformers; none if it is AdamW's."""
    if tensor.dim() < 2 or re.search(NO_MATRICES, name) or min(tensor.shape) == 1:
        return []
    if name.endswith("c_attn.weight"):  # GPT-2 stores (in, out), and queries, keys and values in one tensor
        return [one.t() for one in tensor.chunk(3, dim=1)]
    if re.search(r"\.h\.\d+\..*\.(c_proj|c_fc)\.weight$", name):
        return [tensor.t()]
    if name.endswith("gate_up_proj"):  # (E, 2M, H)
        return [half for expert in tensor.unbind() for half in expert.chunk(2)]
    return list(tensor.unbind()) if tensor.dim() == 3 else [tensor]


class MuonAndAdamW:
    """torch's optimizers, each for its parameters.

    With the option `ns_dtype` "fp32" torch's Muon orthogonalises in fp32 instead of bf16: the rounding of bf16 turns
    differences of 1e-7 between gradients into 1e-2 of an update.
    """

    def __init__(self, groups: list[dict[str, Any]], recipe: Recipe) -> None:
        options = {"adjust_lr": "match_rms_adamw", "ns_dtype": "bf16", "adamw_lr": None, **dict(recipe.options)}
        self.in_fp32, adamw_lr = options.pop("ns_dtype") == "fp32", options.pop("adamw_lr")
        options["adjust_lr_fn"] = options.pop("adjust_lr")
        self.named: list[tuple[str, Tensor, list[Tensor]]] = []
        of_muon, of_adamw = [], []
        for group in groups:
            name, (master,) = group["name"], group["params"]
            parts: list[Tensor] = [torch.nn.Parameter(part) for part in matrices_of(name, master.detach())]
            self.named.append((name, master, parts))
            settings = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            if parts:
                of_muon.append({"params": parts, **settings})
            else:
                of_adamw.append({"params": [master], **settings, **({} if adamw_lr is None else {"lr": adamw_lr})})
        self.optimizers: list[Any] = [torch.optim.Muon(of_muon, **options)] if of_muon else []
        if of_adamw:
            self.optimizers.append(torch.optim.AdamW(of_adamw, betas=recipe.betas, eps=recipe.eps))

    def step(self) -> None:
        for name, master, parts in self.named:
            assert master.grad is not None
            for part, gradient in zip(parts, matrices_of(name, master.grad)):
                part.grad = gradient
        in_fp32 = mock.patch.object(Tensor, "bfloat16", Tensor.clone) if self.in_fp32 else nullcontext()
        with in_fp32:
            for optimizer in self.optimizers:
                optimizer.step()
