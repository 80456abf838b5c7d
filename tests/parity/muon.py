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
        options = dict(recipe.options)
        self.in_fp32 = options.pop("ns_dtype", "bf16") == "fp32"
        rest, own, self.pairs = [], [], list[tuple[Tensor, Tensor, Any]]()
        for group in groups:
            (master,) = group["params"]
            parts = [torch.nn.Parameter(part) for part in matrices_of(group["name"], master.detach())]
            self.pairs += [(part, master, index) for index, part in enumerate(parts)]
            settings = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            if parts:
                own.append({"params": parts, **settings})
            else:
                adamw_lr = options.get("adamw_lr")
                rest.append({"params": [master], **settings, **({} if adamw_lr is None else {"lr": adamw_lr})})
            self._named = getattr(self, "_named", {}) | {id(master): group["name"]}
        options.pop("adamw_lr", None)
        adjust = options.pop("adjust_lr", "match_rms_adamw")
        self.muon = torch.optim.Muon(own, lr=recipe.lr, adjust_lr_fn=adjust, **options)
        self.adamw = torch.optim.AdamW(rest, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)

    def step(self) -> None:
        for part, master, index in self.pairs:
            part.grad = matrices_of(self._named[id(master)], master.grad)[index]
        in_fp32 = mock.patch.object(Tensor, "bfloat16", Tensor.clone) if self.in_fp32 else nullcontext()
        with in_fp32:
            self.muon.step()
        self.adamw.step()
