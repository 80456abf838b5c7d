"""The adapters of a model: their config, and the weights that they start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ds.errors import CheckpointError, ConversionError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.peft.adapters import Adapters, read_adapters
from megatron_ds.hf.peft.config import ADAPTER_CONFIG, find_weights, named_base
from megatron_ds.hf.peft.reader import AdapterReader
from megatron_ds.hf.peft.rope_file import ROPE_FILE, check_same_rope
from megatron_ds.hub import name_of, parse_id


def open_adapters(
    peft: str | dict[str, Any], base_path: str | None, model: HFModel, checkpoint: Path | None
) -> tuple[Adapters, AdapterReader | None]:
    """Read the adapters to train on a model, and open the weights that they start from, if there are any.

    Args:
        peft: fields of a peft config, or a directory with one, which may also hold adapter weights to start from.
        base_path: directory of the base model.
        model: the base model.
        checkpoint: the checkpoint that a run resumes; None = the run starts.

    Raises:
        ConversionError: the config or the weights cannot be used.
        CheckpointError: the checkpoint has different adapters, or none.
    """
    assert base_path is not None, "adapters need a model with weights"
    base = str(Path(base_path).resolve())
    if isinstance(peft, str):
        check_same_rope(Path(peft), model)
    adapters = read_adapters(peft, model, base)
    adapters.check_trainable()
    source: str | Path | None = peft if isinstance(peft, str) and find_weights(peft) is not None else None
    if checkpoint is not None:
        _check_same(adapters, checkpoint, model, base)
        source = checkpoint
    if source is None:
        return adapters, None
    reader = AdapterReader(source, adapters)
    return reader.adapters, reader


def refuse_adapters(checkpoint: Path) -> None:
    """Check that a run without `peft` does not resume a checkpoint of adapters.

    Raises:
        CheckpointError: the checkpoint holds adapters.
    """
    if (checkpoint / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint} holds adapters, and the run has no peft; set peft={checkpoint}, or choose another output"
        )


def _check_same(adapters: Adapters, checkpoint: Path, model: HFModel, base: str) -> None:
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint} holds a full model, and the run trains adapters; choose another output, or remove peft"
        )
    if model.rope is not None and not (checkpoint / ROPE_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} was trained without model.rope; remove it, or choose another output with peft={checkpoint}"
        )
    try:
        check_same_rope(checkpoint, model)
        saved = read_adapters(checkpoint, model, base)
    except ConversionError as problem:
        raise CheckpointError(f"{checkpoint}: {problem}") from problem
    _check_same_base(base, checkpoint)
    for native in sorted(adapters.saved ^ saved.saved):
        has = "trains" if native in adapters.saved else "does not train"
        raise CheckpointError(
            f"peft.modules_to_save {has} {adapters.model.family.table(adapters.model.core)[native].names[0]}, unlike "
            f"{checkpoint}; change it back, or choose another output"
        )
    for module in sorted({*adapters.adapters, *saved.adapters}):
        both = adapters.adapters.get(module), saved.adapters.get(module)
        texts = [one.description if one is not None else "none" for one in both]
        if texts[0] != texts[1]:
            raise CheckpointError(
                f"peft: the adapter of {module} is {texts[0]}, and {checkpoint} has {texts[1]}; change it back, or "
                "choose another output"
            )


def _check_same_base(base: str, checkpoint: Path) -> None:
    """Refuse another commit of the base on the hub than that on which the adapters were trained."""
    now, then = parse_id(name_of(base)), parse_id(str(named_base(checkpoint)))
    if now is None or then is None or now.repo != then.repo or then.revision in (None, now.revision):
        return
    raise CheckpointError(
        f"model.path={now} is another commit than that on which {checkpoint} was trained; try model.path={then}, or "
        "another output"
    )
