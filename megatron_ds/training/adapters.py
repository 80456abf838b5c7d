"""The adapters of a run: what its `peft` says, and where they stand."""

from __future__ import annotations

from pathlib import Path

from megatron_ds.config import RunConfig
from megatron_ds.errors import CheckpointError, ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.peft.adapters import Adapters, AdapterWeights, read_adapters
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def open_adapters(run: RunConfig, model: HFModel, checkpoint: Path | None) -> tuple[Adapters, AdapterWeights | None]:
    """What a run trains beside its model, and the values that it begins with, if it does not begin anew.

    Args:
        run: with `peft`: fields of a config, or a directory with one, and with adapters to go on with if it has them.
        model: the base.
        checkpoint: what the run goes on from; None = it begins.

    Raises:
        ConversionError: the config or its weights cannot be used.
        CheckpointError: the checkpoint is of other adapters, or of none.
    """
    assert run.peft is not None and run.model.path is not None
    base = str(Path(run.model.path).resolve())
    adapters = read_adapters(run.peft, model, base)
    if checkpoint is not None:
        _check_same(adapters, checkpoint, model, base)
        return adapters, AdapterWeights(checkpoint, adapters)
    if isinstance(run.peft, str) and (Path(run.peft) / ADAPTER_WEIGHTS).is_file():
        return adapters, AdapterWeights(run.peft, adapters)
    return adapters, None


def refuse_adapters(checkpoint: Path) -> None:
    """A run without `peft` cannot go on from adapters.

    Raises:
        CheckpointError: that is what the checkpoint holds.
    """
    if (checkpoint / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint} holds adapters, and the run has no peft; set peft={checkpoint}, or choose another output"
        )


def _check_same(adapters: Adapters, checkpoint: Path, model: HFModel, base: str) -> None:
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint} holds a whole model, and the run trains adapters; choose another output, or remove peft"
        )
    try:
        saved = read_adapters(checkpoint, model, base)
    except ConversionError as problem:
        raise CheckpointError(f"{checkpoint}: {problem}") from problem
    for module in sorted({*adapters.adapters, *saved.adapters}):
        both = adapters.adapters.get(module), saved.adapters.get(module)
        said = [one.words if one is not None else "none" for one in both]
        if said[0] != said[1]:
            raise CheckpointError(
                f"peft: the adapter of {module} is {said[0]}, and {checkpoint} has {said[1]}; change it back, or "
                "choose another output"
            )
