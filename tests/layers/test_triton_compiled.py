"""The kernels compile for A100 and H100 at the sizes of real models, within the registers of a thread."""

from dataclasses import replace

import pytest

from tests.layers.ahead_of_time import Compiled, compile_for

HALF, FULL, SIZE = "*bf16", "*fp32", "i32"


def norm(size: int, *, adds: bool = True, fp32_weight: bool = False) -> list[Compiled]:
    from megatron_ds.layers.kernels.triton.launch import row_tile

    tile = row_tile(size)
    tiles = {
        "ADDS": adds,
        "FP32_WEIGHT": fp32_weight,
        "OFFSET": float(fp32_weight),
        "ROWS": tile.rows,
        "BLOCK": tile.block,
    }
    forward = {
        **dict.fromkeys(("x", "change", "weight", "y"), HALF),
        "total": HALF if adds else None,
        "inverse_rms": FULL,
        **dict.fromkeys(("num_rows", "size", "x_stride", "change_stride"), SIZE),
        "eps": "fp32",
    }
    backward = {
        **dict.fromkeys(("x", "weight", "grad_y", "grad_total", "grad_x"), HALF),
        **dict.fromkeys(("inverse_rms", "grad_weight"), FULL),
        **dict.fromkeys(("num_rows", "size", "x_stride", "grad_y_stride", "grad_total_stride"), SIZE),
    }
    return [
        Compiled("norm:_forward", forward, tiles, tile.num_warps),
        Compiled("norm:_backward", backward, {**tiles, "WANTS_WEIGHT": True}, tile.num_warps),
    ]


def gated(activation: str) -> list[Compiled]:
    constants = {"ACTIVATION": activation, "BLOCK": 1024}
    forward = {"wide": HALF, "y": HALF, "size": SIZE, "stride": SIZE}
    backward = {"wide": HALF, "grad_y": HALF, "grad_wide": HALF, "size": SIZE, "stride": SIZE, "grad_stride": SIZE}
    return [Compiled("gated:_forward", forward, constants), Compiled("gated:_backward", backward, constants)]


def rotary(pairs: int, unrotated: int, *, adjacent: bool, packed: bool) -> Compiled:
    strides = [f"{tensor}_stride_{dim}" for tensor in ("q", "k", "q_out", "k_out") for dim in "sbn"]
    signature = {
        **dict.fromkeys(("q", "k", "q_out", "k_out", "cos", "sin"), HALF),
        "positions": "*i64" if packed else None,
        **dict.fromkeys(("batch", "q_heads", "k_heads", *strides, "positions_stride_b", "positions_stride_s"), SIZE),
    }
    sizes = {
        "NUM_PAIRS": pairs,
        "PAIRS": pairs,
        "NUM_UNROTATED": unrotated,
        "UNROTATED": unrotated,
        "HEADS": 1024 // pairs,
    }
    return Compiled("rotary:_rotate", signature, {"SIGN": -1.0, "ADJACENT": adjacent, **sizes})


def ones(kernel: Compiled, *sizes: str) -> Compiled:
    """The same with sizes of 1, which Triton compiles as constants."""
    return replace(kernel, constants={**kernel.constants, **dict.fromkeys(sizes, 1)})


KERNELS = [
    *norm(128),
    *norm(4096),
    *norm(8192),
    *norm(256, adds=False, fp32_weight=True)[1:],
    *gated("silu"),
    *gated("gelu_tanh")[1:],
    rotary(64, 0, adjacent=False, packed=True),
    rotary(32, 64, adjacent=True, packed=False),
    ones(rotary(64, 0, adjacent=False, packed=True), "batch", "k_heads"),
]
LONGEST = norm(14336)
"""Longer than any hidden size of a Llama but the largest one, 16,384, of the same tile."""


@pytest.mark.sweep
def test_no_register_is_spilled() -> None:
    found = compile_for((80, 90), [*KERNELS, *LONGEST])
    for one, usages in zip([*KERNELS, *LONGEST], found, strict=True):
        for usage in usages:
            assert usage.registers * one.num_warps * 32 <= 65536, (one, usage)
            assert usage.spilled_bytes <= (32 if one in LONGEST else 0), (one, usage)
