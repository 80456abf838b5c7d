"""Rows padded to a length that context ranks can share: each kind of column, and what cannot be padded."""

import pytest
import torch

from megatron_ds.errors import DataError
from megatron_ds.layers.embedding import LearnedPositions, PositionTable
from megatron_ds.models.context import BuildContext
from megatron_ds.models.label_head import LabelHeadConfig, label_layer
from megatron_ds.models.row_padding import RowPadding
from megatron_ds.models.sequential import HeadSpec, LayerSpec, head_of
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.tensor import TensorParallel

HEAD = HeadSpec.per_column("targets")
IDS = torch.arange(10).view(2, 5)


def label_head(**options: object) -> HeadSpec:
    config = LabelHeadConfig(num_labels=3, **options)  # type: ignore[arg-type]
    return head_of([label_layer(config, 8, BuildContext(), LayerSpec("blocks", torch.nn.Identity))])


def test_every_kind_of_column() -> None:
    columns = {
        "input_ids": IDS,
        "targets": IDS + 1,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
        "attention_mask": torch.ones(2, 5, dtype=torch.bool),
        "token_type_ids": torch.ones_like(IDS),
        "next_sentence_label": torch.tensor([0, 1]),
        "hidden_direction": torch.ones(2, 5, 3),
        "pooled_direction": torch.ones(2, 5),
    }
    found = RowPadding(4, HEAD).pad(columns)
    assert found["input_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], [5, 6, 7, 8, 9, 0, 0, 0]]
    assert found["targets"][0].tolist() == [1, 2, 3, 4, 5, -100, -100, -100]
    assert found["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2], "a document of its own"
    assert found["attention_mask"].dtype == torch.bool and found["attention_mask"].sum(1).tolist() == [5, 5]
    assert found["token_type_ids"][1].tolist() == [1] * 5 + [0] * 3
    assert found["hidden_direction"].shape == (2, 8, 3) and found["hidden_direction"].sum() == 30
    for name in ("next_sentence_label", "pooled_direction"):
        assert found[name] is columns[name]


def test_a_mask_is_added_where_rows_are_padded_alone() -> None:
    found = RowPadding(3, HEAD).pad({"input_ids": IDS, "targets": IDS})
    assert found["attention_mask"].tolist() == [[True] * 5 + [False]] * 2
    fitting = {"input_ids": IDS, "targets": IDS}
    assert RowPadding(5, HEAD).pad(fitting) is fitting
    decoder = RowPadding(5, HEAD).pad({"input_ids": IDS, "decoder_input_ids": IDS[:, :4], "targets": IDS[:, :4]})
    assert decoder.keys() == {"input_ids", "decoder_input_ids", "targets"}
    assert {name: column.shape[1] for name, column in decoder.items()} == dict.fromkeys(decoder, 5)


def test_outputs_are_cut_to_the_rows_as_they_were() -> None:
    outputs = {"logits": torch.zeros(2, 8, 7), "pooled": torch.zeros(2, 8), "scores": torch.zeros(2, 3)}
    found = RowPadding(4, HEAD).cut(outputs, {"input_ids": IDS})
    assert {name: tuple(one.shape) for name, one in found.items()} == {
        "logits": (2, 5, 7),
        "pooled": (2, 8),
        "scores": (2, 3),
    }
    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    assert RowPadding(8, HEAD).cut({"logits": torch.zeros(2, 8, 7)}, both)["logits"].shape == (2, 3, 7)


@pytest.mark.parametrize(
    ("options", "padding"),
    [({"pick": "last", "pick_id": 7}, 7), ({"pick": "last_eos", "pick_id": 0}, 1), ({"pick": "mean"}, 0)],
)
def test_a_head_reads_no_padding(options: dict[str, object], padding: int) -> None:
    found = RowPadding(4, label_head(**options)).pad({"input_ids": IDS, "label": torch.tensor([0, 1])})
    assert found["input_ids"][0, 5:].tolist() == [padding] * 3


@pytest.mark.parametrize(
    ("padding", "column", "message"),
    [
        (
            RowPadding(4, label_head(pick="last")),
            "input_ids",
            r"^input_ids have 5 .*; try pad_token_id in config.json, or",
        ),
        (
            RowPadding(4, HeadSpec.per_column("mine")),
            "mine",
            r"^labels mine have 5 .*; try megatron_ds.columns.declare",
        ),
        (RowPadding(4, HEAD, rope="dynamic"), "targets", r"^input_ids has 5 .* rope type dynamic .*; try 8 positions$"),
    ],
)
def test_rows_that_cannot_be_padded(padding: RowPadding, column: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        padding.pad({"input_ids": IDS, column: IDS})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("counted", [True, False])
def test_padding_may_reach_beyond_a_table_of_positions(rank: int, counted: bool) -> None:
    """Seven positions, padded to eight: the last token of the second of two ranks is padding."""
    axis = Axis(2, rank, (0, 1))
    tp = TensorParallel(context=ContextParallel(axis, axis))
    table = PositionTable(7, offset=2, skipped_id=1 if counted else None)
    layer = LearnedPositions(table, 3, tp, std=1.0)
    torch.nn.init.normal_(layer.weight)
    seen = torch.ones(1, 8) if counted else None
    found = layer(torch.zeros(4, 1, 3), seen)[:, 0]
    rows = range(4 * rank, 4 * rank + 4)
    assert torch.equal(found, layer.weight[[min(row, 6) + 2 for row in rows]])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sequence_longer_than_a_table_is_refused(ranks: int) -> None:
    axis = Axis(ranks, 0, tuple(range(ranks)))
    layer = LearnedPositions(PositionTable(7), 3, TensorParallel(context=ContextParallel(axis, axis)), std=1.0)
    with pytest.raises(DataError, match=r"^a sequence has 10 positions, .* 7; try shorter sequences$"):
        layer(torch.zeros(10 // ranks, 1, 3))
