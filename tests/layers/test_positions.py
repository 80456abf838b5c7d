"""Rotary frequencies and ALiBi slopes equal transformers', for every scaling, below and beyond the original length."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ds.hf.config_translation import rotary
from megatron_ds.layers.alibi import Alibi, alibi_slopes
from megatron_ds.layers.rotary import RotaryConfig, RotaryTable
from tests.ranks import run_alone

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.5,
        "mscale_all_dim": 0.5,
    },
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [2.0 + 0.5 * index for index in range(8)],
    },
    {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
        "factor": 3.0,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
    },
]


def _tables(parameters: dict[str, Any], length: int) -> list[list[torch.Tensor]]:
    """cos and sin of ours and of transformers, (S, D) each."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 5e4, **parameters},
    )
    assert config.rope_parameters is not None
    table = RotaryTable(rotary(config.rope_parameters, 16, 128))
    ours = [part[:, 0, 0] for part in table.cos_sin(length, like=torch.empty(0))]
    theirs = LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(length)[None])
    return [ours, [part[0] for part in theirs]]


@pytest.mark.parametrize("length", [20, 32, 33, 150])
@pytest.mark.parametrize("parameters", ROPES, ids=lambda value: value["rope_type"])
def test_angles_equal_transformers(parameters: dict[str, Any], length: int) -> None:
    ours, theirs = run_alone(_tables, parameters, length)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * length / 150)


def _rotated(adjacent: bool) -> list[torch.Tensor]:
    x = torch.randn(5, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    return [x, RotaryTable(RotaryConfig(4, adjacent=adjacent)).rotate(x, x)[0]]


@pytest.mark.parametrize("adjacent", [False, True])
def test_a_part_of_a_head_is_rotated_pair_by_pair(adjacent: bool) -> None:
    before, after = run_alone(_rotated, adjacent)
    assert torch.equal(after[..., 4:], before[..., 4:])
    pairs = [(0, 1), (2, 3)] if adjacent else [(0, 2), (1, 3)]
    for speed, (first, second) in zip((1.0, 0.01), pairs):
        turned = torch.view_as_complex(before[..., [first, second]].contiguous())
        turned = turned * torch.polar(torch.ones(5), speed * torch.arange(5))[:, None, None]
        torch.testing.assert_close(after[..., [first, second]], torch.view_as_real(turned))


def _in_bf16(fp32: bool) -> list[torch.Tensor]:
    """Rotated heads and the gradient of heads, of transformers' Ernie 4.5 and of ours."""
    from transformers.models.ernie4_5_moe.configuration_ernie4_5_moe import Ernie4_5_MoeConfig
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeRotaryEmbedding, apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(400, 2, 3, 16, generator=generator).bfloat16() for _ in range(2))
    x.requires_grad_()
    config = Ernie4_5_MoeConfig(hidden_size=48, num_attention_heads=3)
    cos, sin = Ernie4_5_MoeRotaryEmbedding(config)(x, torch.arange(400)[None])
    rows = x.permute(1, 2, 0, 3)
    theirs = apply_rotary_pos_emb(rows, rows, cos, sin)[0].permute(2, 0, 1, 3)
    assert config.rope_parameters is not None
    rope = replace(rotary(config.rope_parameters, 16, 128), adjacent=True, fp32=fp32)

    def kernel(*arguments: object) -> None:
        raise AssertionError("kernels are not checked for products in fp32")

    ours = RotaryTable(rope).rotate(x, x, kernel=kernel if fp32 else None)[0]  # type: ignore[arg-type]
    return [part for y in (theirs, ours) for part in (y.detach(), *torch.autograd.grad(y, x, direction))]


@pytest.mark.parametrize("fp32", [True, False])
def test_products_in_fp32_round_as_transformers(fp32: bool) -> None:
    """The sum of products may still be rounded once less, so a few results are the next number."""
    theirs, their_gradient, ours, gradient = run_alone(_in_bf16, fp32)
    assert ours.dtype == gradient.dtype == torch.bfloat16
    differ = float((ours != theirs).float().mean())
    assert differ < 1e-3 if fp32 else differ > 0.1
    if fp32:
        torch.testing.assert_close(gradient, their_gradient, rtol=2**-7, atol=2**-7)


def _graph_breaks(packed: bool) -> int:
    table = RotaryTable(RotaryConfig(8))
    q, k = torch.randn(5, 2, 4, 8, requires_grad=True), torch.randn(5, 2, 2, 8, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]) if packed else None
    compiled = torch._dynamo.explain(lambda q, k, *angles: table.rotate(q, k, positions, angles))
    return compiled(q, k, *table.cos_sin(5, like=q)).graph_break_count


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiler_sees_one_graph(packed: bool) -> None:
    assert run_alone(_graph_breaks, packed) == 0


def _slopes(num_heads: int) -> list[torch.Tensor]:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon

    ones = torch.ones(1, 300, dtype=torch.int64)
    padded = ones.clone()
    padded[0, :37] = 0
    theirs = build_alibi_tensor(ones, num_heads, torch.float32)
    rounded = falcon(ones, num_heads, torch.float32)
    every = range(num_heads)
    ours = Alibi().bias(300, every, num_heads, torch.empty(0))
    ours_rounded = Alibi(bf16=True).bias(300, every, num_heads, torch.empty(0))
    behind = Alibi(bf16=True).bias(300, every, num_heads, torch.empty(0), padded.bool())
    return [
        theirs,
        ours[0],
        rounded,
        ours_rounded[0],
        alibi_slopes(num_heads),
        falcon(padded, num_heads, torch.float32),
        behind[0],
    ]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 71])
def test_slopes_equal_transformers(num_heads: int) -> None:
    theirs, ours, rounded, ours_rounded, slopes, padded, behind = run_alone(_slopes, num_heads)
    assert torch.equal(behind, padded)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert torch.equal(ours_rounded, rounded)
    assert not torch.equal(rounded, theirs), "Falcon rounds its biases"
    assert slopes.shape == (num_heads,) and len(set(slopes.tolist())) == num_heads
