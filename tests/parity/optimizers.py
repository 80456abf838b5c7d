"""Optimizers of the reference: torch's and transformers', and a Lion that is written from its paper."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tests.parity.cases import Recipe
from tests.parity.muon import MuonAndAdamW

Groups = list[dict[str, Any]]


class PlainLion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023, line by line."""

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})
        self.momentum: dict[Any, Any] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for theta in group["params"]:
                m = self.momentum.setdefault(theta, torch.zeros_like(theta))
                c = beta1 * m + (1 - beta1) * theta.grad
                theta -= group["lr"] * (torch.sign(c) + group["weight_decay"] * theta)
                self.momentum[theta] = beta2 * m + (1 - beta2) * theta.grad


def _adafactor(groups: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=recipe.lr, relative_step=False, **dict(recipe.options))


REFERENCES: Mapping[str, Callable[[Groups, Recipe], Any]] = {
    "adamw": lambda groups, recipe: torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps),
    "lion": lambda groups, recipe: PlainLion(groups, recipe.lr, recipe.betas),
    "muon": MuonAndAdamW,
    "adafactor": _adafactor,
    "sgd": lambda groups, recipe: torch.optim.SGD(groups, lr=recipe.lr, **dict(recipe.options)),
}
