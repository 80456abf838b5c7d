"""Names of the positions at which hidden states are compared: the input of a stack, and the output of each block."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ds.hf.config import HFModel
from megatron_ds.models.config import ModelConfig

BLOCKS, ENTRY = "blocks", "entry"


def position_names(core: ModelConfig) -> list[str]:
    """Return the names in the order of our model: "entry", "blocks.0" and so on, the encoder's before the decoder's."""
    names = []
    for prefix, stack in core.stacks.items():
        names += [entry_of(prefix), *(f"{prefix}.{layer}" for layer in range(stack.num_layers))]
    return names


def entry_of(prefix: str) -> str:
    """Return the name of a stack's input: "decoder.blocks" -> "decoder.entry"."""
    assert prefix.endswith(BLOCKS), prefix
    return f"{prefix.removesuffix(BLOCKS)}{ENTRY}"


def choice_of(block: str) -> str:
    """Return the name of the experts that tokens choose in a block: "blocks.3" -> "blocks.3.experts"."""
    return f"{block}.experts"


def stack_of_entry(name: str) -> str | None:
    """Return the stack of an input: "decoder.entry" -> "decoder", "entry" -> ""; None for the output of a block."""
    stack, _, leaf = name.rpartition(".")
    return stack if leaf == ENTRY else None


def blocks_paths(model: HFModel) -> Iterator[tuple[str, str]]:
    """Yield (prefix of a stack, path of its list of blocks in transformers, such as "model.layers"), from the table."""
    table = model.in_memory.table
    for prefix in model.core.stacks:
        path = next(row.names[0] for native, row in table.items() if native.startswith(f"{prefix}.0."))
        yield prefix, path[: path.index(".0.")]
