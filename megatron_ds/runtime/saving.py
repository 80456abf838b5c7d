"""Make the saver of a live engine, with its options and the origin that its checkpoints record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ds.checkpoint.local_disks import LocalDisk
from megatron_ds.checkpoint.progress import Origin
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.engine import Engine
from megatron_ds.runtime.loaded_model import LoadedModel
from megatron_ds.runtime.setup import EnginePlan
from megatron_ds.version import __version__


def make_saver(
    engine: Engine,
    model: LoadedModel,
    plan: EnginePlan,
    folder: Path,
    *,
    keep: int,
    asynchronous: bool,
    protected: Sequence[Path | None] = (),
    end_ids: Sequence[int] = (),
    disk: LocalDisk | None = None,
) -> Saver:
    """Make the saver of a live engine. Collective over the world.

    Args:
        engine: the engine to save.
        model, plan: the model and plan that it was built from.
        folder: directory of its checkpoints.
        keep: number of checkpoints to keep.
        asynchronous: whether training continues while files are written.
        protected: checkpoints that are never removed, in addition to those that the model was read from.
        end_ids: the ids that the data teach as an end.
        disk: the machine's own disk, where checkpoints are written first; None = they are not.
    """
    options = SaveOptions(
        folder=folder,
        keep=keep,
        asynchronous=asynchronous,
        protected=(*(path for path in protected if path is not None), *model.places.values()),
        model_path=model.section.path,
        tokenizer_path=model.section.tokenizer_path,
        end_ids=tuple(end_ids),
        source=model.source,
        disk=disk,
    )
    layout = plan.layout
    origin = Origin(
        world_size=layout.world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data * layout.context,  # the division of sequences leaves no trace in a checkpoint
        expert=engine.grid.expert.size if model.hf.core.shape().num_experts else None,
        sequence=plan.config.parallel.sequence,
        zero_stage=plan.summary.zero_stage,
        precision=plan.summary.precision,
        source=f"megatron-ds {__version__}",
    )
    return Saver(engine, model.hf, options, origin, model.adapters)
