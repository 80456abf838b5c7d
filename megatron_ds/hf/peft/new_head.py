"""A new head for labels over a base model that has none: trained in full with the adapters, and saved with them.

peft saves the head's tensors, but not what they predict: its users pass `num_labels` when they load the base model. So
a file of its own, which peft does not read, holds the section `model.head` of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ds.config.run_config import HeadSection
from megatron_ds.hf.config import HFModel, read_model, with_new_head
from megatron_ds.hf.label_classes import OF_HEAD
from megatron_ds.hf.peft.projections import in_memory
from megatron_ds.hf.peft.rope_file import with_saved_rope
from megatron_ds.hf.peft.run_sections import read_section
from megatron_ds.hf.weight_files import json_text

HEAD_FILE = "label_head.json"


def head_modules(model: HFModel) -> list[str]:
    """Return the names of the modules of a model's head for labels, as `modules_to_save` names them.

    A module next to the base model, such as `classifier`, is saved as a whole, as peft does by itself.
    """
    rows = in_memory(model).table
    names: dict[bool, list[str]] = {True: [], False: []}
    for native, row in rows.items():
        names[native.startswith(OF_HEAD)] += row.names
    of_body = {name.partition(".")[0] for name in names[False]}
    first = ((name.partition(".")[0], name.rpartition(".")[0]) for name in names[True])
    return list(dict.fromkeys(module if top in of_body else top for top, module in first))


def head_file(model: HFModel) -> dict[str, bytes]:
    """Return the file about a model's new head: name -> content; empty where the head is the base model's own."""
    labels, config = model.core.labels, model.config
    if model.replaced is None or labels is None:
        return {}
    content = {
        "labels": [config.id2label[number] for number in range(labels.num_labels)],
        "kind": "token" if labels.pick == "each" else "sequence",
        "problem": config.problem_type,
        "pad_token_id": getattr(config, "pad_token_id", None),
    }
    return {HEAD_FILE: json_text({name: value for name, value in content.items() if value is not None}).encode()}


def read_base(directory: Path, base: str | Path) -> HFModel:
    """Read the base model of adapters, with the rotation and the new head that they were trained with.

    Args:
        directory: of the adapters.
        base: directory of their base model.

    Raises:
        ConversionError: the file about the head or the rotation is damaged; or see `read_model`.
        ConfigError: see `with_rope`.
    """
    model = with_saved_rope(directory, read_model(base))
    head = read_section(directory / HEAD_FILE, HeadSection)
    return model if head is None else with_new_head(model, head)


def new_head_tensors(model: HFModel) -> Sequence[str]:
    """Return the names of the tensors of a new head; empty where the head is the base model's own."""
    if model.replaced is None:
        return ()
    return [name for native, row in model.table.items() if native.startswith(OF_HEAD) for name in row.names]
