"""Export the live model from its shards, at any layout, and show that transformers computes the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.config import ExportSection
from megatron_ds.engine import Engine
from megatron_ds.errors import ConversionError
from megatron_ds.hf.export import exporting
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.train.job import Job

CHECK_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}


def export_live(engine: Engine, job: Job, section: ExportSection) -> None:
    """Stream the weights to `section.path` on rank 0. Collective: every rank calls it."""
    if engine.grid.rank != 0:
        for _ in engine.whole_parameters():
            pass
        return
    with exporting(Path(section.path), job.model, section.dtype, section.max_shard_size) as export:
        for name, whole in engine.whole_parameters():
            assert whole is not None
            export.add(name, whole)
        export.finish(job.run.model.path, job.run.model.tokenizer_path)


def check_export(engine: Engine, job: Job, section: ExportSection, input_ids: Tensor) -> float:
    """Largest relative L2 error of transformers' logits on the exported directory against the live model's.

    Collective. The ranks with the last pipeline stage have the live logits; the first of them loads the directory.

    Args:
        input_ids: (B, S) real ids, the same on every rank.

    Raises:
        ConversionError: the error is over the bound of the precision: 1e-5 in fp32, rounding in bf16 and fp16.
    """
    live = engine.logits(input_ids)
    error = torch.zeros((), dtype=torch.float64, device=engine.device)
    if live is not None and engine.grid.tensor.rank == 0 and engine.grid.data.rank == 0:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(section.path)
        with torch.no_grad():
            reference = theirs(input_ids=input_ids.cpu()).logits.float()
        error += float((live - reference).norm() / reference.norm())
    relative = float(all_reduce_(error, engine.grid.world))
    bound = CHECK_TOLERANCE["fp32"]
    if section.dtype or job.facts.precision != "fp32":
        names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        bound = max(CHECK_TOLERANCE[job.facts.precision], CHECK_TOLERANCE[names.get(section.dtype or "", "fp32")])
    if relative > bound:
        raise ConversionError(
            f"export.path={section.path}: transformers' logits differ from the live model's by {relative:.2e} "
            f"(relative L2), more than {bound:g}; the export is wrong, please report it"
        )
    return relative
