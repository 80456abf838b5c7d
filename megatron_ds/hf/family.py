"""What a family is: a table of rows, the ledger of its config fields, and a translation of its sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_ds.hf.fields import FieldRules
from megatron_ds.hf.mapping import Op, Part
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
    """Sizes of the named axes in all tables: v vocabulary, e embedding, h hidden, f feed-forward, p rows of the position
    table, n query heads, k key/value heads, g query heads a key head, d head dim."""
    return {
        "v": config.vocab_size,
        "e": config.embedding_size,
        "h": config.hidden_size,
        "f": config.ffn_size,
        "p": config.positions.rows if config.positions is not None else 0,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "g": config.num_heads // config.num_kv_heads,
        "d": config.head_dim,
    }


def fused_qkv(native: str, theirs: str, part: str, pattern: str, *, q: str, kv: str) -> list[Row]:
    """The two rows of a fused projection: queries, and keys beside values.

    Args:
        native, theirs: names without `.weight` or `.bias`.
        part: "weight" or "bias".
        pattern: of the fused tensor, its pieces queries, keys, values.
        q, kv: native patterns; their slowest axis is divided over the tensor axis.
    """
    name = f"{theirs}.{part}"
    q_op, kv_op = Op((Part(pattern, 0),), q), Op((Part(pattern, 1), Part(pattern, 2)), kv)
    return [
        Row(f"{native}.q_{part}", (name,), q_op, q_op.native_axes[0]),
        Row(f"{native}.kv_{part}", (name, name), kv_op, kv_op.native_axes[0]),
    ]
