"""Weights that are drawn on the device, the same for each contestant: by the name of a Hugging Face tensor.

Reading 1.2 B parameters from files, or drawing them on a CPU, would take longer than a measurement.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.config import ModelSection, build_section
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.peft.adapters import read_adapters
from megatron_ds.hf.peft.initial import InitialValues
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.parallel.grid import Axes
from megatron_ds.runtime import LoadedModel

STD = 0.02


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw a tensor by its name: ones for the weight of a norm, zeros for a bias, else normal values."""
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, STD, generator=generator)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Fill a transformers model with the weights of its parameters' names."""
    for name, parameter in model.named_parameters():
        for number, of_expert in enumerate(parameter if _has_all_experts(name, parameter) else ()):
            _fill_expert(name, number, of_expert)
        if not _has_all_experts(name, parameter):
            parameter.copy_(draw(name, tuple(parameter.shape), parameter.dtype, parameter.device))


def _has_all_experts(name: str, parameter: Tensor) -> bool:
    """Return whether transformers has the matrices of all experts in a parameter. Files have one tensor for each."""
    return ".experts." in name and parameter.dim() == 3


def _fill_expert(name: str, number: int, matrix: Tensor) -> None:
    """Fill an expert's part of a parameter, which may have two projections, with the weights of their names."""
    prefix, _, last = name.rpartition(".")
    projections = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    for projection, part in zip(projections, matrix.chunk(len(projections))):
        part.copy_(draw(f"{prefix}.{number}.{projection}.weight", tuple(part.shape), part.dtype, part.device))


class DrawnWeights:
    """The weights of a model, drawn when they are read; a reader like `HFWeights`.

    Args:
        model: the model.
        device: where they are drawn; other devices draw other values.
        dtype: their dtype.
    """

    directory = Path("drawn")
    new = frozenset[str]()  # parameters of a new head, which these models do not have
    files: Sequence[Path] = ()

    def __init__(self, model: HFModel, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model, self._device, self._dtype = model, device, dtype

    def shard(self, name: str, spec: ParamSpec, axes: Axes) -> Tensor:
        """Return a full native parameter; no axis divides it.

        Args:
            name: native name.
            spec: the parameter's declaration.
            axes: those over which it could be divided.
        """
        assert all(axis.size == 1 for axis in axes.values()), axes
        full = self.full(name)
        assert full.shape == spec.shape, (name, full.shape, spec.shape)
        return full

    def files_of(self, names: Iterable[str]) -> list[Path]:
        """Return the files that native parameters are read from: an empty list."""
        return []

    def full(self, name: str) -> Tensor:
        """Return a full native parameter."""
        row, sizes = self.model.table[name], self.model.axis_sizes

        def read(source: int) -> Tensor:
            return draw(row.names[source], row.op.source_shape(source, sizes), self._dtype, self._device)

        with self._device:
            return row.op.read(read, sizes)

    def tensor(self, name: str) -> Tensor:
        """Return a Hugging Face tensor of the table."""
        for row in self.model.table.values():
            if name in row.names:
                shape = row.op.source_shape(row.names.index(name), self.model.axis_sizes)
                return draw(name, shape, self._dtype, self._device)
        raise KeyError(name)


def drawn_model(
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    peft: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Return our model with drawn weights, and adapters if `peft` has a config of them."""
    hf = read_model(config)
    weights: Any = DrawnWeights(hf, device, dtype)
    loaded = LoadedModel(hf, build_section(ModelSection, {"config": dict(config)}, "model"), weights)
    if peft is None:
        return loaded
    adapters = read_adapters(dict(peft), hf, str(weights.directory))
    weights.model = adapters.model
    return replace(
        loaded,
        hf=adapters.model,
        frozen=frozenset(adapters.model.table) - adapters.saved,
        adapters=adapters,
        initial=InitialValues(adapters, weights, loaded.seed),
    )
