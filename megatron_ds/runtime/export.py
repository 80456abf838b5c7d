"""Export the live model from its shards, at any layout, and check that transformers computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.checkpoint.wide_weights import WeightSource, WideWeights, live_dtypes
from megatron_ds.columns import ATTENTION_MASK, DECODER_INPUT_IDS
from megatron_ds.config import ExportSection
from megatron_ds.dtypes import EXPORT_DTYPES, NAME_OF_PRECISION
from megatron_ds.engine import Engine, MicroBatch
from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.end_tokens import add_end_ids
from megatron_ds.hf.export import exporting
from megatron_ds.hf.export_target import ExportKeptError, ExportTarget
from megatron_ds.hf.family import Part
from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.hf.peft.export import export_adapters, export_merged
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.consensus import run_on_all_ranks
from megatron_ds.runtime.loaded_model import LoadedModel

CHECK_TOLERANCE = {
    "float32": 1e-5,  # other order of summation
    "float16": 2e-3,  # 10 bits of mantissa, a few layers
    "bfloat16": 2e-2,  # 7 bits
}
# The rounding error of a deeper model depends on its depth and weights: 0.6 to 3.5 % with 2 to 24 layers of Llama in
# bf16. So it is measured on transformers itself. Correct exports had 0.5 to 1.3 times that error; partial sums of
# tensor ranks and GPU kernels round differently again.
NOISE_FACTOR = 3.0
MAX_NOISE = 0.1  # if rounding alone exceeded this, a wrong weight would not be detected


def export_live(
    engine: Engine,
    model: LoadedModel,
    section: ExportSection,
    precision: str,
    target: ExportTarget | None = None,
    end_ids: Sequence[int] = (),
) -> None:
    """Stream the weights to a directory on rank 0. Collective over the world.

    Args:
        engine: the live engine.
        model: the model that it was built from.
        section: the form of the export.
        precision: the run's precision.
        target: the directory of `section`, with what it may replace; None = an unchanged export.
        end_ids: ids that the data teach as an end; the directory's generation settings list them.

    Raises:
        ConversionError: on every rank, if `section.dtype` cannot hold a weight; the directory was written in the run's
            own dtype. On rank 0, if `target` must not be replaced; the directory was written next to it. The other
            ranks then exit, see `run_on_all_ranks`.
    """
    target = target or ExportTarget.of(section.path)
    by_expert = {name for name, row in model.hf.table.items() if len(row.parts) > 1}
    fits = fits_in(engine, section.dtype)
    dtype = section.dtype if fits else None
    source = model.source if dtype is None and model.adapters is None else WeightSource()
    wide = WideWeights(engine, source, live_dtypes(engine.inventory()))
    kept: ExportKeptError | None = None
    try:
        if model.adapters is not None:
            _export_adapters(engine, model, model.adapters, section, (dtype, precision), target, end_ids)
        elif engine.grid.rank == 0:
            size = section.max_shard_size
            with exporting(target, model.hf, dtype, size, model.weights, wide.dtypes) as export:
                for name, expert, full in engine.full_parts(by_expert, wide.masters):
                    assert full is not None, name
                    exact = wide.from_source(Part(name, expert))
                    export.add(name, full if exact is None else exact, expert)
                add_ends = partial(add_end_ids, end_ids=end_ids)
                export.finish(model.section.path, model.section.tokenizer_path, add_ends)
        else:
            for _ in engine.full_parts(by_expert, wide.masters):
                pass
    except ExportKeptError as problem:
        kept = problem
    run_on_all_ranks(lambda: _raise_if(kept))
    _refuse_unfit(section, fits)


def _raise_if(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def _refuse_unfit(section: ExportSection, fits: bool) -> None:
    if not fits:
        raise ConversionError(
            f"export.dtype={section.dtype} cannot hold the largest weight; {section.path} was written in the run's own "
            f"dtype instead; nearest: bfloat16"
        )


def _export_adapters(
    engine: Engine,
    model: LoadedModel,
    adapters: Adapters,
    section: ExportSection,
    dtypes: tuple[str | None, str],
    target: ExportTarget,
    end_ids: Sequence[int],
) -> None:
    """Write the adapters as a PEFT directory, or merge them into the base weights, which are read from disk."""
    gathered = engine.full_parameters(adapters.table)
    parameters = {name: full.detach().to("cpu").clone() for name, full in gathered if full is not None}
    if engine.grid.rank != 0:
        return
    tokenizer, base, (dtype, precision) = model.section.tokenizer_path, model.section.path, dtypes
    if section.merge:
        assert model.weights is not None and base is not None
        of_run, size = dtype or NAME_OF_PRECISION[precision], section.max_shard_size
        wider = _wider_than(of_run, model.weights.mixed_dtypes) if dtype is None else {}
        export_merged(target, model.weights, base, adapters, parameters, of_run, size, tokenizer, end_ids, wider)
    else:
        export_adapters(target, adapters, parameters.items(), dtype, tokenizer)


def _wider_than(dtype: str, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    return {name: one for name, one in dtypes.items() if one.itemsize > EXPORT_DTYPES[dtype].itemsize}


def fits_in(engine: Engine, dtype: str | None) -> bool:
    """Return True if no finite weight overflows in a dtype. Collective over the world."""
    if dtype != "float16":
        return True
    largest = torch.zeros((), dtype=torch.float32, device=engine.device)
    for _, parameter in engine.local_parameters():
        with engine.gathered(parameter):
            values = parameter.detach().float().abs()
            largest = torch.maximum(largest, values.masked_fill(~values.isfinite(), 0.0).max())
    return float(all_reduce_(largest, engine.grid.world, dist.ReduceOp.MAX)) <= torch.finfo(torch.float16).max


def check_export(engine: Engine, model: HFModel, section: ExportSection, precision: str, batch: MicroBatch) -> float:
    """Return the largest relative L2 error of transformers' predictions from the exported directory.

    Collective over the world. The ranks of the last pipeline stage have the live model's predictions; the first of them
    loads the directory. In half precision an error above that of a few layers is compared with the rounding error of
    this model, for which the directory is loaded twice more, the second time in fp32.

    Args:
        engine: the live model.
        model: the exported Hugging Face model.
        section: the `export` section with the directory and its dtype.
        precision: the run's precision.
        batch: a batch of real data, the same on every rank, columns (B, ...); its labels are not used.

    Raises:
        RuntimeError: the error exceeds the bound of the coarser of the run's precision and the export's dtype: a bug,
            not a mistake of the user.
    """
    columns = {name: column for name, column in batch.items() if name not in engine.head.label_columns}
    live = engine.outputs(columns)
    if engine.grid.tensor.rank != 0 or engine.grid.replica.rank != 0:
        live = None
    error = 0.0 if live is None else relative_error(live, reference_outputs(section.path, model, columns), columns)
    relative = _sum_over_ranks(engine, error)
    trained_in = NAME_OF_PRECISION[precision]
    coarser = max(trained_in, section.dtype or trained_in, key=CHECK_TOLERANCE.__getitem__)
    bound = CHECK_TOLERANCE[coarser]
    if relative > bound and coarser != "float32":
        noise = 0.0 if live is None else rounding_error(section.path, model, columns, coarser)
        bound = max(bound, min(MAX_NOISE, NOISE_FACTOR * _sum_over_ranks(engine, noise)))
    if not relative <= bound:  # NaN fails too
        raise RuntimeError(
            f"export.path={section.path}: transformers' predictions differ from the live model's by {relative:.2e} "
            f"(relative L2), more than {bound:.3g}; the export is wrong, please report it"
        )
    return relative


def relative_error(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> float:
    """Return the largest relative L2 error of the outputs for a batch; NaN if any is NaN.

    Outputs at padding are left out: a window of local attention may hold nothing but padding there, and then ours are
    other than transformers'. No loss reads them.
    """
    of_decoder = DECODER_INPUT_IDS.name in columns  # its outputs have other positions than the mask
    mask = None if of_decoder else columns.get(ATTENTION_MASK.name)

    def kept(output: Tensor) -> Tensor:
        return output if mask is None or output.ndim < 3 else output[mask.bool().to(output.device)]

    errors = [kept(ours[name] - output).norm() / kept(output).norm() for name, output in reference.items()]
    return float(torch.stack(errors).max())


def rounding_error(directory: str, model: HFModel, columns: Mapping[str, Tensor], dtype: str) -> float:
    """Return the relative L2 error of transformers computing in a dtype against fp32, with the same weights.

    Raises:
        ConversionError: see `reference_outputs`.
    """
    rounded = reference_outputs(directory, model, columns, EXPORT_DTYPES[dtype])
    return relative_error(rounded, reference_outputs(directory, model, columns, torch.float32), columns)


def _sum_over_ranks(engine: Engine, value: float) -> float:
    """Return the sum of `value` over all ranks: a value that one rank has and the others pass as 0. Collective over the
    world."""
    return float(all_reduce_(torch.tensor(value, dtype=torch.float64, device=engine.device), engine.grid.world))


def reference_outputs(
    directory: str, model: HFModel, columns: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return transformers' predictions from a directory, on CPU, by our names, fp32 (B, ...) each.

    Args:
        directory: the export.
        model: the exported model.
        columns: columns of a batch, without labels, (B, ...) each.
        dtype: computation dtype; None = that of the directory.

    Raises:
        ConversionError: transformers cannot load the directory, or finds tensors missing or of another shape.
    """
    reference = load_reference(directory, model, dtype or "auto")
    with torch.no_grad():
        return predict(reference, model, {name: one.cpu() for name, one in columns.items()})
