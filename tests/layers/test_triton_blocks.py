"""Whole models compute the same with our Triton kernels as with PyTorch's formulas, up to rounding.

In bf16 both are compared with the model in fp32; neither is closer by more than chance.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.config import read_model
from megatron_ds.layers.kernels import REFERENCE, Kernels
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.layers.recompute import Recompute
from megatron_ds.models.block import BlockInputs, block_layers
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import HIDDEN, LayerSpec, SequentialModel
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.kernel_errors import device, kernel
from tests.parallel.axes import ALONE
from tests.parity.reference import ALL_CONFIGS
from tests.ranks import run_alone, run_grid

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0]])
OPERATIONS = ("rms_norm", "add_rms_norm", "fp32_rms_norm", "swiglu", "geglu", "rotary")
CASES = ["llama", "qwen3", "gemma2-caps", "olmo2-all-heads", "gptj-partial"]
PACKED, RECOMPUTED = ("llama", "gptj-partial"), {"llama": "selective", "qwen3": "full"}


def ours() -> Kernels:
    return Kernels(**{name: kernel(name) for name in OPERATIONS})


def shallow(case: str) -> dict[str, Any]:
    """A model of one block; the interpreter takes seconds for more."""
    layers = "n_layer" if case.startswith("gptj") else "num_hidden_layers"
    return {**ALL_CONFIGS[case], layers: 1}


def trained(
    case: str, at: BuildContext, dtype: torch.dtype, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and all gradients."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = SequentialModel(read_model(shallow(case)).core.build_layers(at))
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_shard(name, spec_of(parameter), 5, ALONE))
    model.to(device())
    batch = {name: column.to(device()) for name, column in batch.items()}
    loss = model(batch, {"targets": batch["input_ids"]}).sum()
    loss.backward()
    grads = {name: one.grad.float() for name, one in model.named_parameters() if one.grad is not None}
    return loss.detach().float(), grads


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the norm of all gradients."""
    assert found.keys() == expected.keys()
    squares = sum(float((found[name] - one).square().sum()) for name, one in expected.items())
    return (squares / sum(float(one.square().sum()) for one in expected.values())) ** 0.5


def _compare(case: str, batch: dict[str, Tensor], recompute: str) -> None:
    with_kernels = BuildContext(kernels=ours(), recompute=Recompute(recompute))
    exact, exact_grads = trained(case, BuildContext(), torch.float32, batch)
    loss, grads = trained(case, with_kernels, torch.float32, batch)
    assert abs(float(loss - exact)) <= 1e-5 * float(exact)
    assert distance(grads, exact_grads) <= 1e-5
    half, half_grads = trained(case, BuildContext(), torch.bfloat16, batch)
    loss, grads = trained(case, with_kernels, torch.bfloat16, batch)
    assert abs(float(loss - exact)) <= max(2 * abs(float(half - exact)), 2e-3 * float(exact))
    assert distance(grads, exact_grads) <= 1.2 * distance(half_grads, exact_grads)


@pytest.mark.parametrize("case", CASES)
def test_models_train_the_same(case: str) -> None:
    batch = {"input_ids": torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))}
    if case in PACKED:
        batch["position_ids"] = POSITIONS
    run_alone(_compare, case, batch, RECOMPUTED.get(case, "none"))


def _on_ranks(grid: Grid, case: str) -> None:
    """Output and gradients of a block with sequence parallelism, with kernels and without, on each rank."""
    config = read_model(shallow(case)).core
    found = []
    for kernels in (REFERENCE, ours()):
        at = BuildContext(TensorParallel(grid.tensor, sequence=True), kernels=kernels)
        block = block_layers("blocks", config, at, LayerSpec("", torch.nn.Identity), BlockInputs())[0].build()
        for name, parameter in block.named_parameters():
            parameter.data.copy_(initial_shard(name, spec_of(parameter), 1, grid.model_axes))
        block.to(device())
        generator = torch.Generator().manual_seed(grid.tensor.rank)
        x = torch.randn(4, 2, config.hidden_size, generator=generator).to(device()).requires_grad_()
        y = block({HIDDEN: x, "position_ids": POSITIONS.to(device())})[HIDDEN]
        grads = torch.autograd.grad(y.square().sum(), (x, *block.parameters()))
        found.append([y.detach(), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("case", ["qwen3"])
def test_blocks_of_tensor_ranks_compute_the_same(case: str) -> None:
    run_grid(_on_ranks, Layout(tensor=2), case)


def _compiled() -> None:
    def refused(*arguments: object) -> Tensor:
        raise AssertionError("a kernel was called while a compiler was to fuse the formula")

    config = read_model(shallow("llama")).core
    at = BuildContext(kernels=Kernels(**dict.fromkeys(OPERATIONS, refused)))
    block = block_layers("blocks", config, at, LayerSpec("", torch.nn.Identity), BlockInputs())[0].build()
    x = torch.randn(8, 2, config.hidden_size, requires_grad=True)
    compiled = torch.compile(block._block, dynamic=False, backend="eager")
    compiled([], block._angles(x, every=True), x).sum().backward()
    with pytest.raises(AssertionError, match="a kernel was called"):
        block({HIDDEN: x})


def test_a_compiler_fuses_the_formulas_instead() -> None:
    run_alone(_compiled)
