"""AdamW with 8-bit state on a CPU, with a stand-in of bitsandbytes' kernel that takes the same arguments."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.config import OptimizerSection, build_run
from megatron_ds.engine.optimizers.adamw8bit import QUANTISED, GuardedAdamW8bit
from megatron_ds.errors import ConfigError
from megatron_ds.layers.param_spec import Matrices, ParamSpec
from megatron_ds.training.resolve import resolve_run
from tests.training.tiny import run_mapping

BLOCK = 256
SECTION = OptimizerSection(name="adamw8bit", lr=0.01)


def create_dynamic_map(signed: bool = True) -> Tensor:
    """(256,) values: here at equal distances of the fourth root, so that small ones are told apart."""
    roots = torch.linspace(-1.0 if signed else 0.0, 1.0, 256)
    return roots.pow(4) * roots.sign()


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """The signature is that of bitsandbytes 0.50."""
    assert optimizer_name == "adam" and type(step) is int and (beta3, alpha, skip_zeros) == (0.0, 0.0, False)
    assert state1.dtype == state2.dtype == torch.uint8 and state1.shape == p.shape
    assert len(absmax1) == len(absmax2) == -(-p.numel() // BLOCK)
    first = read(state1, qmap1, absmax1).lerp(g.view(-1), 1 - beta1)
    second = read(state2, qmap2, absmax2).lerp(g.view(-1).square(), 1 - beta2)
    update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
    p.mul_(1 - lr * weight_decay).sub_(lr * update.view(p.shape))
    write(first, state1, qmap1, absmax1)
    write(second, state2, qmap2, absmax2)


def blocks(values: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
    return padded.view(-1, BLOCK)


def read(codes: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    flat = codes.view(-1)
    return (blocks(values[flat.long()]) * scales[:, None]).view(-1)[: len(flat)]


def write(values: Tensor, codes: Tensor, qmap: Tensor, scales: Tensor) -> None:
    scales.copy_(blocks(values).abs().amax(1))
    relative = (blocks(values) / scales[:, None].clamp(min=1e-30)).view(-1)[: len(values)]
    codes.view(-1).copy_((relative[:, None] - qmap).abs().argmin(1))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    package, functional = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.functional")
    for one in (create_dynamic_map, optimizer_update_8bit_blockwise):
        setattr(functional, one.__name__, one)
    package.functional = functional  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)


def trained(make: Any, quantised: bool) -> tuple[Tensor, Any]:
    """Weights after ten steps towards zero, with a vector whose state stays in fp32."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 200), (700,))]
    groups = [{"params": [one], "weight_decay": 0.1} for one in weights]
    groups[0] |= {QUANTISED: True} if quantised else {}
    optimizer = make(groups)
    for group in optimizer.param_groups if quantised else ():
        optimizer.create_state(group["params"][0], group)
    for _ in range(10):
        for one in weights:
            one.grad = one.detach() + 0.1 * torch.randn(one.shape, generator=generator)
        optimizer.step()
    return torch.cat([one.detach().view(-1) for one in weights]), optimizer


def test_its_steps_are_adamws_but_for_the_rounding(kernel: None) -> None:
    options: dict[str, Any] = {"lr": SECTION.lr, "betas": SECTION.betas, "eps": SECTION.eps, "fused": True}
    ours, optimizer = trained(lambda groups: GuardedAdamW8bit.from_section(groups, SECTION, torch.device("cpu")), True)
    plain, _ = trained(lambda groups: torch.optim.AdamW(groups, **options), False)
    assert torch.equal(ours[600:], plain[600:]), "in fp32"
    apart = float((ours - plain).abs().max())
    assert 0 < apart < 0.01, "a tenth of the way of ten steps"
    quantised, whole = (optimizer.state[group["params"][0]] for group in optimizer.param_groups)
    bytes_of = [sum(one.nbytes for name, one in state.items() if name != "step") for state in (quantised, whole)]
    assert bytes_of == [2 * 600 + 2 * 4 * 3, 8 * 700]


def test_state_of_matrices_alone_is_quantised() -> None:
    matrix, embedding = ParamSpec((8, 4), matrices=Matrices()), ParamSpec((8, 4))
    found = [GuardedAdamW8bit.group_options(spec, SECTION) for spec in (matrix, embedding, ParamSpec((8,)))]
    assert found == [{QUANTISED: True}, {}, {}]


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "cpu", "optimizer.name=adamw8bit runs on cuda alone, not on cpu; nearest: adamw"),
    ({}, "cuda", "optimizer.name=adamw8bit needs bitsandbytes; try pip install bitsandbytes, or optimizer.name=adamw"),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
        "cuda",
        "optimizer.name=adamw8bit runs on cuda alone, not on cpu, to which zero_optimization.offload_optimizer moves",
    ),
    (
        {"checkpoint": {"every": 2}},
        "cuda",
        "optimizer.name=adamw8bit can be neither saved nor resumed: its blocks of 256 elements lie across parameters; "
        "try checkpoint.every=0",
    ),
]


@pytest.mark.parametrize(("top", "device", "message"), REFUSALS, ids=["cpu", "package", "offload", "saved"])
def test_refused_in_one_line(
    corpus: Path, tmp_path: Path, top: dict[str, Any], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ds.runtime.setup.find_spec", lambda name: None)
    run = build_run({**run_mapping(corpus, tmp_path / "out"), "optimizer": {"name": "adamw8bit"}, **top})
    with pytest.raises(ConfigError) as caught:
        resolve_run(run, 1, device)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
