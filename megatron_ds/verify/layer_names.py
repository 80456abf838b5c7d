"""The places at which hidden states are compared: where a stack begins, and after each of its blocks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ds.hf.config import HFModel
from megatron_ds.models.config import ModelConfig

BLOCKS, ENTRY = "blocks", "entry"


def stage_names(core: ModelConfig) -> list[str]:
    """Names of the stages in our model, in its order: "entry", "blocks.0" and so on, the encoder's before the
    decoder's."""
    names = []
    for prefix, stack in core.stacks.items():
        names += [entry_of(prefix), *(f"{prefix}.{layer}" for layer in range(stack.num_layers))]
    return names


def entry_of(prefix: str) -> str:
    """What stands before a stack's blocks: "decoder.blocks" -> "decoder.entry"."""
    assert prefix.endswith(BLOCKS), prefix
    return f"{prefix.removesuffix(BLOCKS)}{ENTRY}"


def stack_of_entry(stage: str) -> str | None:
    """Which stack begins at a stage: "decoder.entry" -> "decoder", "" where there is one stack; None = none does."""
    stack, _, leaf = stage.rpartition(".")
    return stack if leaf == ENTRY else None


def blocks_paths(model: HFModel) -> Iterator[tuple[str, str]]:
    """Prefix of a stack -> where transformers keeps its list of blocks, such as "model.layers": read off the table."""
    for prefix in model.core.stacks:
        name = next(row.names[0] for native, row in model.table.items() if native.startswith(f"{prefix}.0."))
        yield prefix, name[: name.index(".0.")]
