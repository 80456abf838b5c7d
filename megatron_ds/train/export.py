"""Export the live model from its shards, at any layout, and show that transformers computes the same."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.config import ExportSection
from megatron_ds.engine import Engine
from megatron_ds.errors import ConversionError
from megatron_ds.hf.export import exporting
from megatron_ds.hf.reference import load_reference
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.train.job import Job

CHECK_TOLERANCE = {
    "float32": 1e-5,  # sums in another order
    "float16": 2e-3,  # 10 bits of mantissa through all layers
    "bfloat16": 2e-2,  # 7 bits
}
DTYPE_OF_PRECISION = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export_live(engine: Engine, job: Job, section: ExportSection) -> None:
    """Stream the weights to `section.path` on rank 0. Collective: every rank calls it.

    Raises:
        ConversionError: on every rank, if `section.dtype` cannot hold a weight. The run is not lost: the directory was
            written in the run's own dtype.
    """
    fits = fits_in(engine, section.dtype)
    if engine.grid.rank != 0:
        for _ in engine.whole_parameters():
            pass
    else:
        with exporting(section.path, job.model, section.dtype if fits else None, section.max_shard_size) as export:
            for name, whole in engine.whole_parameters():
                assert whole is not None, name
                export.add(name, whole)
            export.finish(job.run.model.path, job.run.model.tokenizer_path)
    if not fits:
        raise ConversionError(
            f"export.dtype={section.dtype} cannot hold the largest weight; {section.path} was written in the run's own "
            f"dtype instead; nearest: bfloat16"
        )


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


def check_export(engine: Engine, job: Job, section: ExportSection, input_ids: Tensor) -> float:
    """Largest relative L2 error of transformers' logits on the exported directory against the live model's.

    Collective. The ranks with the last pipeline stage have the live logits; the first of them loads the directory.

    Args:
        input_ids: (B, S) real ids, the same on every rank.

    Raises:
        RuntimeError: the error is over the bound of the coarser of the run's precision and the export's dtype: no
            mistake of the user's.
    """
    live = engine.logits(input_ids)
    error = torch.zeros((), dtype=torch.float64, device=engine.device)
    if live is not None and engine.grid.tensor.rank == 0 and engine.grid.data.rank == 0:
        reference = reference_logits(section.path, job.model.family.reference_attention, input_ids.cpu())
        error += float((live - reference).norm() / reference.norm())
    relative = float(all_reduce_(error, engine.grid.world))
    trained_in = DTYPE_OF_PRECISION[job.facts.precision]
    bound = max(CHECK_TOLERANCE[trained_in], CHECK_TOLERANCE[section.dtype or trained_in])
    if not relative <= bound:  # NaN is wrong too
        raise RuntimeError(
            f"export.path={section.path}: transformers' logits differ from the live model's by {relative:.2e} "
            f"(relative L2), more than {bound:g}; the export is wrong, please report it"
        )
    return relative


def reference_logits(directory: str, attention: str, input_ids: Tensor) -> Tensor:
    """(B, S) ids -> (B, S, V) fp32 logits that transformers computes from a directory, on CPU.

    Args:
        directory: the export.
        attention: see `Family.reference_attention`.
        input_ids: real ids.

    Raises:
        ConversionError: transformers cannot load it, or finds tensors missing or misshapen.
    """
    with torch.no_grad():
        return load_reference(directory, attention)(input_ids=input_ids, use_cache=False).logits.float()
