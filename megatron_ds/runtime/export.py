"""Export the live model from its shards, at any layout, and show that transformers computes the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.config import ExportSection
from megatron_ds.dtypes import EXPORT_DTYPES, NAME_OF_PRECISION
from megatron_ds.engine import Engine, MicroBatch
from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.export import exporting
from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.hf.peft.export import export_adapters, export_merged
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.runtime.loaded_model import LoadedModel

CHECK_TOLERANCE = {
    "float32": 1e-5,  # sums in another order
    "float16": 2e-3,  # 10 bits of mantissa, a few layers
    "bfloat16": 2e-2,  # 7 bits
}
# What rounding makes of a deeper model goes by its depth and by its weights: 0.6 to 3.5 % with 2 to 24 layers of Llama
# in bf16. So it is measured, on transformers itself. Right exports were seen at 0.5 to 1.3 times that; partial sums of
# tensor ranks and a GPU's kernels round in other places still.
NOISE_FACTOR = 3.0
MOST_NOISE = 0.1  # where rounding alone makes more, a wrong weight would not be seen


def export_live(engine: Engine, model: LoadedModel, section: ExportSection, precision: str) -> None:
    """Stream the weights to `section.path` on rank 0. Collective: every rank calls it.

    Raises:
        ConversionError: on every rank, if `section.dtype` cannot hold a weight. The run is not lost: the directory was
            written in the run's own dtype.
    """
    if model.adapters is not None:
        _export_adapters(engine, model, model.adapters, section, precision)
        return
    fits = fits_in(engine, section.dtype)
    if engine.grid.rank != 0:
        for _ in engine.full_parameters():
            pass
    else:
        with exporting(section.path, model.hf, section.dtype if fits else None, section.max_shard_size) as export:
            for name, whole in engine.full_parameters():
                assert whole is not None, name
                export.add(name, whole)
            export.finish(model.section.path, model.section.tokenizer_path)
    _refuse_unfit(section, fits)


def _refuse_unfit(section: ExportSection, fits: bool) -> None:
    if not fits:
        raise ConversionError(
            f"export.dtype={section.dtype} cannot hold the largest weight; {section.path} was written in the run's own "
            f"dtype instead; nearest: bfloat16"
        )


def _export_adapters(
    engine: Engine, model: LoadedModel, adapters: Adapters, section: ExportSection, precision: str
) -> None:
    """What was trained, for peft; or in the weights of the base, which are read where they are on disk."""
    fits = fits_in(engine, section.dtype)
    dtype = section.dtype if fits else None
    gathered = engine.full_parameters(adapters.table)
    parameters = {name: whole.detach().to("cpu").clone() for name, whole in gathered if whole is not None}
    if engine.grid.rank == 0:
        tokenizer, base = model.section.tokenizer_path, model.section.path
        if section.merge:
            assert model.weights is not None and base is not None
            of_run = dtype or NAME_OF_PRECISION[precision]
            size = section.max_shard_size
            export_merged(section.path, model.weights, base, adapters, parameters, of_run, size, tokenizer)
        else:
            export_adapters(section.path, adapters, parameters.items(), dtype, tokenizer)
    _refuse_unfit(section, fits)


def fits_in(engine: Engine, dtype: str | None) -> bool:
    """Whether every weight is finite in a dtype, or was not finite before. Collective."""
    if dtype != "float16":
        return True
    largest = torch.zeros((), dtype=torch.float32, device=engine.device)
    for _, parameter in engine.local_parameters():
        with engine.gathered(parameter):
            values = parameter.detach().float().abs()
            largest = torch.maximum(largest, values.masked_fill(~values.isfinite(), 0.0).max())
    return float(all_reduce_(largest, engine.grid.world, dist.ReduceOp.MAX)) <= torch.finfo(torch.float16).max


def check_export(engine: Engine, model: HFModel, section: ExportSection, precision: str, batch: MicroBatch) -> float:
    """Largest relative L2 error of what transformers predicts from the exported directory against the live model.

    Collective. The ranks with the last pipeline stage have the live model's predictions; the first of them loads the
    directory. In half precision an error above what a few layers make is held against what rounding makes of this
    model: for that the directory is loaded twice more, in fp32 at last.

    Args:
        batch: a real one, the same on every rank; its labels are not looked at.

    Raises:
        RuntimeError: the error is over the bound of the coarser of the run's precision and the export's dtype: no
            mistake of the user's.
    """
    columns = {name: column for name, column in batch.items() if name not in engine.head.label_columns}
    live = engine.outputs(columns)
    if engine.grid.tensor.rank != 0 or engine.grid.replica.rank != 0:
        live = None
    error = 0.0 if live is None else relative_error(live, reference_outputs(section.path, model, columns))
    relative = _from_first(engine, error)
    trained_in = NAME_OF_PRECISION[precision]
    coarser = max(trained_in, section.dtype or trained_in, key=CHECK_TOLERANCE.__getitem__)
    bound = CHECK_TOLERANCE[coarser]
    if relative > bound and coarser != "float32":
        noise = 0.0 if live is None else rounding_error(section.path, model, columns, coarser)
        bound = max(bound, min(MOST_NOISE, NOISE_FACTOR * _from_first(engine, noise)))
    if not relative <= bound:  # NaN is wrong too
        raise RuntimeError(
            f"export.path={section.path}: transformers' predictions differ from the live model's by {relative:.2e} "
            f"(relative L2), more than {bound:.3g}; the export is wrong, please report it"
        )
    return relative


def relative_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest of the outputs' relative L2 errors; NaN if any is."""
    return float(torch.stack([(ours[name] - output).norm() / output.norm() for name, output in theirs.items()]).max())


def rounding_error(directory: str, model: HFModel, columns: Mapping[str, Tensor], dtype: str) -> float:
    """How far transformers itself, computing in a dtype, is from what it computes in fp32 with the same weights.

    Raises:
        ConversionError: as `reference_outputs`.
    """
    rounded = reference_outputs(directory, model, columns, EXPORT_DTYPES[dtype])
    return relative_error(rounded, reference_outputs(directory, model, columns, torch.float32))


def _from_first(engine: Engine, value: float) -> float:
    """What one rank found, on all of them; 0 on the others. Collective."""
    return float(all_reduce_(torch.tensor(value, dtype=torch.float64, device=engine.device), engine.grid.world))


def reference_outputs(
    directory: str, model: HFModel, columns: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """What transformers predicts from a directory, on CPU, by our names, fp32 (B, ...).

    Args:
        directory: the export.
        model: what was exported.
        columns: of a batch, without labels.
        dtype: in which it computes; None = that of the directory.

    Raises:
        ConversionError: transformers cannot load it, or finds tensors missing or misshapen.
    """
    theirs = load_reference(directory, model, dtype or "auto")
    with torch.no_grad():
        return predict(theirs, model, {name: one.cpu() for name, one in columns.items()})
