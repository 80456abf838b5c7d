"""The model card of an export on the hub: what it is, what it was made from, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_ds.hf.config import HFModel
from megatron_ds.hub import HubId
from megatron_ds.version import __version__

PROJECT = "megatron-ds"


_TEXT = """---
{metadata}
---

# {name}

{what}
{table}
Written by {project} {version}. A program made this card: please add what the model is for, what it was trained on, how
well it does, and its license.
"""


def model_card(
    name: str,
    model: HFModel,
    base: HubId | None,
    facts: Mapping[str, object],
    *,
    is_adapter: bool = False,
    datasets: Sequence[str] = (),
) -> str:
    """Return the content of README.md. It has no paths of this machine.

    Args:
        name: title of the model.
        model: the exported model.
        base: the model on the hub that it was trained from, with its commit; None = it was trained from another one.
        facts: rows of the table on its training.
        is_adapter: whether the export holds adapters alone.
        datasets: ids of data sets on the hub that it was trained on.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        base_model=base.repo if base is not None else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if base is not None else None,
        datasets=list(datasets) or None,
        tags=[PROJECT, model.family.model_type],
    )
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return _TEXT.format(
        metadata=metadata.to_yaml(),
        name=name,
        what=_what(model, base, is_adapter),
        table=f"\n| training | |\n| --- | --- |\n{rows}" if rows else "",
        project=PROJECT,
        version=__version__,
    )


def _what(model: HFModel, base: HubId | None, is_adapter: bool) -> str:
    what = f"Adapters for a `{model.architecture}`" if is_adapter else f"A `{model.architecture}`"
    if base is None:
        return f"{what}."
    commit = f" at commit `{base.revision}`" if base.revision else ""
    return f"{what}, trained from [{base.repo}](https://huggingface.co/{base.repo}){commit}."
