"""The input of a plan against what a run has: its rows are those of its data, and nothing but the config is read."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import build_run
from megatron_ds.planner.plan_input import Machines
from megatron_ds.training.datasets import open_data
from megatron_ds.training.planning import plan_input
from megatron_ds.training.resolve import resolve_run
from tests.training.tiny import MODEL, run_mapping

T5 = {
    "model_type": "t5",
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "architectures": ["BertForMaskedLM"],
}


@pytest.mark.parametrize("format", ["text", "tokenized"])
def test_rows_are_those_of_the_data(corpus: Path, tmp_path: Path, format: str) -> None:
    run = build_run(run_mapping(corpus, tmp_path / "out", format))
    rows = plan_input(run, Machines(1, 2, "cpu")).rows
    _, data, _ = open_data(resolve_run(run, 2, "cpu"))
    assert (rows.seq_length, rows.target_length) == (data.seq_length, data.target_length)
    assert set(rows.columns) <= set(data.columns)


@pytest.mark.parametrize(
    ("config", "target_length", "columns"),
    [
        (MODEL, None, ("input_ids", "targets")),
        (BERT, None, ("input_ids", "targets", "token_type_ids")),
        (T5, 16, ("input_ids", "decoder_input_ids", "targets")),
    ],
    ids=["llama", "bert", "t5"],
)
def test_families(config: dict[str, Any], target_length: int | None, columns: tuple[str, ...]) -> None:
    data: dict[str, Any] = {"format": "tokenized", "train": ["nowhere.jsonl"], "seq_length": 32}
    if target_length is not None:
        data["target_length"] = target_length
    mapping = {
        "model": {"config": config},
        "data": data,
        "train": {"steps": 2, "global_batch_size": 64, "micro_batch_size": 2},
        "parallel": {"tensor": 2, "pipeline": 2},
        "output": "/nowhere/out",
    }
    given = plan_input(build_run(mapping), Machines(2, 8, "cpu"))
    assert given.rows.target_length == target_length and given.rows.columns == columns
    assert given.layout.data == 4 and given.num_micro_batches == 8
    assert given.tokens_per_step == 64 * (32 + (target_length or 0))
    assert given.stage_bounds[0] == 0 and len(given.stage_bounds) == 3
    assert given.rows.labelled == (0.15 if config is BERT else 1.0)
