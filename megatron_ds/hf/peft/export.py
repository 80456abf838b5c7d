"""Export of adapters: as a directory that peft loads, or merged into the base weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_ds.cache import scratch_directory
from megatron_ds.dtypes import EXPORT_DTYPES
from megatron_ds.hf.end_tokens import add_end_ids
from megatron_ds.hf.export import check_fits, copy_tokenizer, exporting
from megatron_ds.hf.export_target import ExportTarget, removed_on_failure
from megatron_ds.hf.family import Part
from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megatron_ds.hf.peft.initial import InitialValues
from megatron_ds.hf.peft.new_head import head_file
from megatron_ds.hf.peft.rope_file import rope_file
from megatron_ds.hf.to_hf import ToHF
from megatron_ds.hf.weight_files import json_text
from megatron_ds.hf.weights import HFWeights


def adapter_files(adapters: Adapters, tokenizer_path: str | Path | None) -> dict[str, bytes]:
    """Return all files but the weights: path in the directory -> content."""
    with tempfile.TemporaryDirectory(prefix="megatron_ds-", dir=scratch_directory()) as place:
        if tokenizer_path is not None:
            copy_tokenizer(Path(tokenizer_path), Path(place))
        files = sorted(path for path in Path(place).rglob("*") if path.is_file())
        found = {str(path.relative_to(place)): path.read_bytes() for path in files}
    of_base = {**head_file(adapters.model), **rope_file(adapters.model)}
    return {ADAPTER_CONFIG: json_text(adapters.config).encode(), **of_base, **found}


def export_adapters(
    target: str | Path | ExportTarget,
    adapters: Adapters,
    parameters: Iterable[tuple[str, Tensor]],
    dtype: str | None,
    tokenizer_path: str | Path | None,
) -> None:
    """Write adapters in peft's format.

    Args:
        target: the directory, with what it may replace.
        adapters: the adapters, with their table and config.
        parameters: all their full native parameters, by name.
        dtype: of the tensors; None = the dtype of each parameter.
        tokenizer_path: source of the tokenizer and chat templates; None = no tokenizer.

    Raises:
        ConversionError: a value does not fit into the dtype; see also `ExportTarget.put`.
    """
    place = ExportTarget.of(target)
    directory = place.begin()
    with removed_on_failure(directory):
        to_hf, tensors = ToHF(adapters), {}
        for name, full in parameters:
            cast = check_fits(name, full.detach().to("cpu"), EXPORT_DTYPES[dtype] if dtype is not None else full.dtype)
            tensors.update({theirs: tensor.contiguous() for theirs, tensor in to_hf.add(name, cast)})
        save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        for name, content in adapter_files(adapters, tokenizer_path).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        place.put(directory)


def export_merged(
    target: str | Path | ExportTarget,
    base: HFWeights,
    base_path: str | Path,
    adapters: Adapters,
    parameters: Mapping[str, Tensor],
    dtype: str | None,
    max_shard_size: str,
    tokenizer_path: str | Path | None,
    end_ids: Sequence[int] = (),
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> None:
    """Write the base model with merged adapters: W + s B A in fp32, rounded once; and the modules trained in full.

    Args:
        target: the directory, with what it may replace.
        base: reader of the base weights; one parameter at a time is in memory.
        base_path: source of the generation settings.
        adapters: the adapters to merge.
        parameters: full parameters of the adapters, by native name.
        dtype: of all weights; None = each tensor has its own in the base on disk, a new head that of its parameters.
        max_shard_size: such as "5GB".
        tokenizer_path: source of the tokenizer; None = no tokenizer.
        end_ids: ids that were learned as an end; the generation settings list them.
        dtypes: Hugging Face name -> dtype, of tensors that `dtype` is not for.

    Raises:
        ConversionError: a value does not fit into the dtype; see also `ExportTarget.put`.
    """
    own, initial = adapters.saved | adapters.replaced, InitialValues(adapters, base, seed=0)
    reader = base.for_model(adapters.model)
    kept = dtypes if dtype is not None else reader.dtypes
    with exporting(target, adapters.model, dtype, max_shard_size, reader, kept) as export:
        for name, full in chain(reader.each(without=own), ((name, parameters[name]) for name in sorted(own))):
            given = full
            if initial.has(name):
                given = reader.rounded(Part(name), initial.full(name))  # in peft it is rounded too
            export.add(name, adapters.merge(name, given, parameters))
            del full, given
        export.finish(base_path, tokenizer_path, partial(add_end_ids, end_ids=end_ids))
