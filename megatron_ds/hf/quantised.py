"""Quantised weights of published directories, read as bfloat16: FP8 with a scale for each block, and MXFP4.

FP8 (DeepSeek-V3 technical report, 2024): a weight of float8_e4m3fn, (out, in), and `weight_scale_inv`, one factor for
each block of rows and columns; the blocks at the ends may be smaller.

MXFP4 (OCP Microscaling Formats, 2023), as GPT-OSS stores its experts: `_blocks`, (E, out, in / 32, 16) bytes of two
four-bit numbers, the lower four bits first, and `_scales`, (E, out, in / 32) exponents of two with 127 added. The
tensor that they stand for is (E, in, out).

A model is trained and written in bfloat16 or more, so an export is not the quantised directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds.dtypes import BFLOAT16, DTYPE_OF_CODE
from megatron_ds.errors import ConversionError
from megatron_ds.hf.tensor_files import StoredTensor

FIELDS = ("quantization_config", "compression_config")
FP8, MXFP4 = "fp8", "mxfp4"
SCALE = "_scale_inv"
BLOCKS, EXPONENTS = "_blocks", "_scales"
_BYTES_IN_BLOCK = 16
_BIAS = 127
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of three bits; the fourth is the sign

Place = tuple[Path, StoredTensor]
"""A file, and a tensor in it."""


@dataclass(frozen=True)
class Quantisation:
    """The quantisation of a directory's weights.

    Attributes:
        method: `FP8` or `MXFP4`.
        block: rows and columns of a block of FP8 that shares a scale.
    """

    method: str
    block: tuple[int, int] = (128, 128)

    def __str__(self) -> str:
        rows, columns = self.block
        return "MXFP4" if self.method == MXFP4 else f"FP8 in blocks of {rows} x {columns}"


def find_quantisation(raw: Mapping[str, Any]) -> Quantisation | None:
    """Return how a config says that its weights are quantised; None = they are not.

    Raises:
        ConversionError: in a way that is not supported.
    """
    name = next((name for name in FIELDS if raw.get(name)), None)
    if name is None:
        return None
    given = raw[name]
    method = given.get("quant_method", "unknown") if isinstance(given, Mapping) else given
    if name != FIELDS[0] or method not in (FP8, MXFP4) or not isinstance(given, Mapping):
        raise ConversionError(
            f"{name}.quant_method={method!r}: quantised weights are not supported; use the checkpoint that they "
            "were made from"
        )
    if method == MXFP4:
        return Quantisation(MXFP4)
    if given.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ConversionError(f"{name}.fmt={given['fmt']!r} is not supported; supported: 'e4m3'")
    block = given.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise ConversionError(f"{name}.weight_block_size={block!r} is not supported; supported: two numbers above 0")
    return Quantisation(FP8, (block[0], block[1]))


@dataclass(frozen=True)
class BlockScaled:
    """A weight in FP8 and its scales, which is read as bfloat16. It is used like a `StoredTensor`."""

    weight: Place
    scale: Place
    block: tuple[int, int]
    dtype: str = BFLOAT16.code

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.weight[1].shape

    def view(self, file: Path, *, ahead: bool = False, rows: slice = slice(None)) -> Tensor:
        """Multiply each block by its scale, in fp32, and round; `rows` of the first dim."""
        weight, scale = (stored.view(where, ahead=ahead) for where, stored in (self.weight, self.scale))
        factors = scale.float()
        for dim, size in enumerate(self.block):
            factors = factors.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        return (weight[rows].float() * factors[rows]).bfloat16()


@dataclass(frozen=True)
class Packed4:
    """Numbers of four bits and the exponents of their blocks, read as bfloat16. It is used like a `StoredTensor`."""

    blocks: Place
    exponents: Place
    dtype: str = BFLOAT16.code

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, (E, in, out)."""
        experts, out, count, _ = self.blocks[1].shape
        return experts, count * 2 * _BYTES_IN_BLOCK, out

    def view(self, file: Path, *, ahead: bool = False, rows: slice = slice(None)) -> Tensor:
        """Decode the experts in `rows`: an exact product of a number and a power of two."""
        blocks, exponents = (stored.view(where, ahead=ahead)[rows] for where, stored in (self.blocks, self.exponents))
        low = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.bfloat16)
        pairs = torch.stack([low.repeat(16), low.repeat_interleave(16)], dim=1)  # of each byte
        found = torch.empty(*exponents.shape, 2 * _BYTES_IN_BLOCK, dtype=torch.bfloat16)
        for expert, one in enumerate(blocks):  # one at a time, because the indices take four bytes each
            values = pairs.index_select(0, one.flatten().int()).view(found.shape[1:])
            powers = torch.ldexp(torch.ones(exponents.shape[1:]), exponents[expert].int() - _BIAS).bfloat16()
            torch.mul(values, powers.unsqueeze(-1), out=found[expert])
        return found.flatten(2).transpose(1, 2)


Stored = StoredTensor | BlockScaled | Packed4


def dequantised(found: Mapping[str, tuple[Path, Stored]], how: Quantisation) -> dict[str, tuple[Path, Stored]]:
    """Return the tensors of a directory with those that are quantised as what they stand for.

    Raises:
        ConversionError: a weight and its scales have shapes that do not fit each other.
    """
    parts = {name: (where, stored) for name, (where, stored) in found.items() if isinstance(stored, StoredTensor)}
    made, used = dict[str, tuple[Path, Stored]](), set[str]()
    for name, place in parts.items():
        scales = name + SCALE if how.method == FP8 else name.removesuffix(BLOCKS) + EXPONENTS
        if how.method == FP8 and place[1].dtype == "F8_E4M3" and _is_scale(parts.get(scales)):
            _check(scales, parts[scales], tuple(-(-size // step) for size, step in zip(place[1].shape, how.block)))
            made[name] = place[0], BlockScaled(place, parts[scales], how.block)
            used |= {name, scales}
        elif how.method == MXFP4 and name.endswith(BLOCKS) and scales in parts:
            _check(scales, parts[scales], place[1].shape[:-1])
            _check(name, place, (*parts[scales][1].shape, _BYTES_IN_BLOCK))
            made[name.removesuffix(BLOCKS)] = place[0], Packed4(place, parts[scales])
            used |= {name, scales}
    return {**{name: place for name, place in found.items() if name not in used}, **made}


def _is_scale(place: Place | None) -> bool:
    return place is not None and place[1].dtype in DTYPE_OF_CODE


def _check(name: str, place: Place, shape: tuple[int, ...]) -> None:
    if place[1].shape != shape:
        raise ConversionError(
            f"{place[0]}: {name} has shape {list(place[1].shape)}; its weight and the config need {list(shape)}"
        )
