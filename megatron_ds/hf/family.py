"""What a family is: a table of rows, the ledger of its config fields, and a translation of its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ds.hf.fields import FieldRules
from megatron_ds.hf.mapping import Op
from megatron_ds.models.config import DecoderConfig

LAYER = "{n}"
HEAD = "head.weight"
EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Row:
    """One native parameter and the Hugging Face tensors that it is made of; `{n}` stands for the layer.

    Attributes:
        native: name in our model.
        names: names on disk, one a source of `op`.
        op: the bijection between them.
        split: the named axis that tensor parallelism divides; None = replicated.
    """

    native: str
    names: tuple[str, ...]
    op: Op
    split: str | None = None

    def at(self, layer: int) -> Row:
        """The row of one layer."""
        number = str(layer)
        names = tuple(name.replace(LAYER, number) for name in self.names)
        return Row(self.native.replace(LAYER, number), names, self.op, self.split)


@dataclass(frozen=True)
class Family:
    """One Hugging Face `model_type`.

    Attributes:
        model_type, architecture: as in config.json.
        prefix: what base-model saves leave out of tensor names.
        fields: the ledger of its config fields.
        translate: its config (defaults filled in by transformers) -> ours.
        rows: our config -> its table.
        ignored: regular expressions of tensors on disk that are buffers, not weights.
    """

    model_type: str
    architecture: str
    prefix: str
    fields: FieldRules
    translate: Callable[[Any], DecoderConfig]
    rows: Callable[[DecoderConfig], list[Row]]
    ignored: tuple[str, ...] = ()

    def table(self, config: DecoderConfig) -> dict[str, Row]:
        """Native name -> row, one a parameter, layers written out, the head included even where it is tied."""
        table = {}
        for row in self.rows(config):
            for layer in range(config.num_layers if LAYER in row.native else 1):
                one = row.at(layer)
                table[one.native] = one
        return table


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Sizes of the named axes in all tables: v vocabulary, h hidden, f feed-forward, p positions, k key/value heads,
    g query heads a group, d head dim, c the three of Q, K and V."""
    return {
        "v": config.vocab_size,
        "h": config.hidden_size,
        "f": config.ffn_size,
        "p": config.max_positions,
        "k": config.num_kv_heads,
        "g": config.num_heads // config.num_kv_heads,
        "d": config.head_dim,
        "c": 3,
    }
