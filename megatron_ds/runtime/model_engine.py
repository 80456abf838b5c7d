"""An engine with its model: steps, evaluation, checkpoints and exports for a user's own training loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.checkpoint.directory import resolve_checkpoint
from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.masters import check_masters
from megatron_ds.checkpoint.progress import Progress
from megatron_ds.checkpoint.reader import StateReader, first_damage
from megatron_ds.checkpoint.saver import Saver
from megatron_ds.config import ExportSection, build_section
from megatron_ds.data import Dataset, GlobalBatches, collate, for_data_rank
from megatron_ds.engine import Engine, Losses, MicroBatch, StepResult
from megatron_ds.errors import CheckpointError, DataError
from megatron_ds.hf.export_target import ExportTarget
from megatron_ds.parallel.grid import Grid
from megatron_ds.paths import expanded
from megatron_ds.runtime.averaged_weights import averaged_weights
from megatron_ds.runtime.export import export_live
from megatron_ds.runtime.loaded_model import LoadedModel
from megatron_ds.runtime.saving import make_saver
from megatron_ds.runtime.setup import EnginePlan


class ModelEngine:
    """A model under DeepSpeed on this rank. All methods are collective: every rank calls them in the same order.

    Attributes:
        engine: the engine underneath, with gradients, parameters and DeepSpeed's own engine.
        model, plan: the model and plan that it was built from.
        progress: number of steps that were done and applied.
    """

    def __init__(self, engine: Engine, model: LoadedModel, plan: EnginePlan) -> None:
        self.engine, self.model, self.plan = engine, model, plan
        self.progress = Progress()
        self._savers: dict[tuple[Path, int], Saver] = {}  # a saver makes a process group, so each folder has one

    @property
    def grid(self) -> Grid:
        """This rank's place on every parallel axis."""
        return self.engine.grid

    @property
    def device(self) -> torch.device:
        """The device of this rank's tensors."""
        return self.engine.device

    # ---- batches -------------------------------------------------------------------------------------------------

    def split(self, batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Cut this rank's micro-batches out of a global batch. Does not communicate.

        Args:
            batch: columns of the global batch, each (G, ...), the same on every rank: `input_ids` and the other columns
                that the model reads, and its labels, such as `targets` (G, S): for each position the token that follows
                it, -100 where there is no loss.

        Returns:
            the micro-batches of this data rank, columns (B, ...) each.

        Raises:
            DataError: the batch has another number of samples than `global_batch_size`.
        """
        samples, micro = self.plan.config.global_batch_size, self.plan.config.micro_batch_size
        for name, column in batch.items():
            if len(column) != samples:
                raise DataError(f"column {name} has {len(column)} samples, and global_batch_size is {samples}")
        axis = self.grid.batch
        local_samples = samples // axis.size
        starts = range(axis.rank * local_samples, (axis.rank + 1) * local_samples, micro)
        return [{name: column[start : start + micro] for name, column in batch.items()} for start in starts]

    def batches(
        self, dataset: Dataset, *, shuffle: bool = True, seed: int = 1234, start: int = 0
    ) -> Iterator[list[dict[str, Tensor]]]:
        """Yield this rank's micro-batches of one global batch after the other, for an unlimited number of epochs.

        The order depends on the seed and the position alone, never on the layout. Does not communicate.

        Args:
            dataset: from `open_dataset`, or any object with its methods.
            shuffle: reshuffle every epoch; False = the order of the dataset.
            seed: seed of the order.
            start: number of samples that an earlier loop has read.
        """
        size = self.plan.config.global_batch_size
        stream = GlobalBatches(len(dataset), size, seed, shuffle and not dataset.ordered)
        axis = self.grid.batch
        while True:
            parts = for_data_rank(stream.indices_from(start), axis.rank, axis.size, self.plan.config.micro_batch_size)
            yield [collate(dataset, part) for part in parts]
            start += size

    # ---- training ------------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[MicroBatch], lr: float | None = None) -> StepResult:
        """Do one optimizer step; see `Engine.train_step`.

        Args:
            batches: this rank's micro-batches of one global batch, from `split` or `batches`.
            lr: the learning rate; None = that of the engine config.
        """
        optimizer = self.plan.config.optimizer
        rate = lr if lr is not None else optimizer.lr if optimizer is not None else 0.0
        result = self.engine.train_step(batches, rate)
        self.progress = replace(
            self.progress, step=self.progress.step + 1, applied=self.progress.applied + result.applied
        )
        return result

    def evaluate(self, batches: Sequence[MicroBatch]) -> Losses:
        """Return the loss of a global batch without gradients; see `Engine.evaluate`."""
        return self.engine.evaluate(batches)

    def outputs(self, batch: MicroBatch) -> dict[str, Tensor] | None:
        """Return the model's predictions for one micro-batch; see `Engine.outputs`."""
        return self.engine.outputs(batch)

    def full_parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor | None]]:
        """Yield unsharded parameters on rank 0, None elsewhere; see `Engine.full_parameters`."""
        return self.engine.full_parameters(names)

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, keep: int = 3) -> Path:
        """Write a checkpoint: weights that transformers loads, and the training state.

        Args:
            folder: the directory of the checkpoints, on a disk that all ranks share; this one is `step_XXXXXXXX` in it,
                and `latest` points to it.
            keep: number of checkpoints that stay in the folder.

        Raises:
            CheckpointError: on every rank, if any rank could not write.
        """
        key = expanded(folder), keep
        if key not in self._savers:
            self._savers[key] = make_saver(self.engine, self.model, self.plan, key[0], keep=keep, asynchronous=False)
        saver = self._savers[key]
        saver.save(self.progress)
        saved = saver.wait()
        assert saved is not None
        return Path(saved.path)

    def load(self, checkpoint: str | Path, *, resets_optimizer: bool = False) -> Progress:
        """Restore masters, optimizer state and step counts of a checkpoint of any layout.

        Weights are read by `load_model`: give it the same checkpoint.

        Args:
            checkpoint: a checkpoint, or a folder of checkpoints, of which the latest is used.
            resets_optimizer: an optimizer that keeps other state than the checkpoint has begins with an empty one.

        Raises:
            CheckpointError: it is damaged, or has a different model, or the state of another optimizer.
        """
        path = resolve_checkpoint(expanded(checkpoint)).resolve()
        problem = first_damage(path, self.grid.world.rank, self.grid.world.size)
        if problem is not None:
            raise CheckpointError(problem)
        reader = StateReader(path)
        check_masters(reader, sampled=True)
        self.progress = load_state(self.engine, reader, resets_optimizer=resets_optimizer)
        return self.progress

    def export_hf(
        self,
        path: str | Path,
        *,
        dtype: str | None = None,
        max_shard_size: str = "5GB",
        ema: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Write a Hugging Face directory from the live weights, gathered one parameter at a time on rank 0.

        Args:
            path: the directory; it replaces an earlier export that was not changed since.
            dtype: "float32", "bfloat16" or "float16"; None = the training dtype, or the source's where that is wider in
                a source of several dtypes.
            max_shard_size: largest size of a weight file, such as "5GB".
            ema: write the average of the weights, which an engine with `EngineConfig.ema` has.
            overwrite: replace any other directory too, except models that were read, checkpoints and outputs of runs.

        Raises:
            ConversionError: on every rank, if `dtype` cannot hold a weight; on rank 0, if `path` must not be replaced,
                and the others exit. The message names the directory that was written all the same.
        """
        fields = {"path": str(path), "dtype": dtype, "max_shard_size": max_shard_size, "overwrite": overwrite}
        target = ExportTarget(expanded(path), overwrite=overwrite, option="overwrite=True", kept=self.model.places)
        section = build_section(ExportSection, fields)
        with averaged_weights(self.engine) if ema else nullcontext():
            export_live(self.engine, self.model, section, self.plan.summary.precision, target)
