"""Runs of BERT and T5 by their run files: the same losses at every layout, and what cannot be trained refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import build_run, check_target_length
from megatron_ds.engine import preload
from megatron_ds.errors import ConfigError, DataError, TopologyError
from megatron_ds.monitor.metrics import read_metrics
from megatron_ds.training.resolve import resolve_run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BERT = {
    "model_type": "bert",
    "architectures": ["BertForPreTraining"],
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 2048,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
TOKENIZERS = {"bert": EXAMPLES / "pretrain_bert/tokenizer", "t5": EXAMPLES / "finetune_t5/tokenizer"}


def mapping(config: dict[str, Any], folder: Path, **sections: Any) -> dict[str, Any]:
    """A run of three steps on the messages of the examples."""
    data = {
        "train": [str(EXAMPLES / "continue_pretraining/data/valid.jsonl")],
        "valid": [str(EXAMPLES / "continue_pretraining/data/valid.jsonl")],
        "seq_length": 32,
        "cache_dir": str(folder / "cache"),
        **sections.pop("data", {}),
    }
    return {
        "model": {"config": config, "tokenizer": str(TOKENIZERS[config["model_type"]])},
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "data": data,
        "optimizer": {"lr": 3e-3},
        "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2, "eval_every": 3},
        "output": str(folder / "out"),
        **sections,
    }


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] if "loss" in line else line["valid_loss"] for line in lines]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor": (2, {"tensor": 2, "sequence": True}),
    "pipeline": (2, {"pipeline": 2}),
    "data": (2, {}),
}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        pytest.param(BERT, ("pipeline", "data"), id="bert"),
        pytest.param(T5, ("tensor",), id="t5"),
        pytest.param(BERT, ("pipeline", "tensor"), id="bert-tensor", marks=pytest.mark.sweep),
        pytest.param(T5, ("pipeline", "data"), id="t5-others", marks=pytest.mark.sweep),
    ],
)
def test_a_layout_changes_nothing_but_rounding(config: dict[str, Any], names: tuple[str, ...], tmp_path: Path) -> None:
    preload()
    found = {}
    for name in ("one", *names):
        folder, (ranks, parallel) = tmp_path / name, LAYOUTS[name]
        mds.train(build_run(mapping(config, folder, parallel=parallel)), nproc=ranks)
        found[name] = losses(folder / "out")
    assert len(found["one"]) == 4 and found["one"][-1] < found["one"][0]
    first = read_metrics(tmp_path / names[0] / "out" / "metrics.jsonl")[0][0]
    assert set(first.terms) == ({"targets", "next_sentence_label"} if config is BERT else set())
    assert not first.terms or sum(first.terms.values()) == pytest.approx(first.loss)
    for name, other in found.items():
        assert other == pytest.approx(found["one"], rel=2e-5), name


def pairs(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"format": "tokenized", "train": [str(file)], "valid": []}


def test_pairs_of_inputs_and_labels_are_learned_by_heart(tmp_path: Path) -> None:
    """Uneven ones, whose padding neither side may see."""
    preload()
    rows = [
        {
            "input_ids": [5 + row, *range(9, 11 + row)],
            "labels": [*range(40, 45 + row), 1],
            "attention_mask": [1] * (3 + row),
        }
        for row in range(8)
    ]
    data = {**pairs(tmp_path, rows), "target_length": 16}
    train = {"steps": 80, "global_batch_size": 8, "micro_batch_size": 4}
    run = build_run(mapping(T5, tmp_path, data=data, train=train, optimizer={"lr": 1e-2}))
    mds.train(run)
    found = losses(tmp_path / "out")
    assert found[-1] < 0.5 < 5 < found[0]


def test_a_model_without_a_head_is_not_trained(tmp_path: Path) -> None:
    base = {**BERT, "architectures": ["BertModel"]}
    with pytest.raises(
        ConfigError, match=r"^model\.config is a BertModel, without a head to train; nearest: BertForMaskedLM$"
    ):
        resolve_run(build_run(mapping(base, tmp_path)), 1, "cpu")


@pytest.mark.parametrize(
    ("config", "key"),
    [(BERT, {"mean_span": 4.0}), (BERT, {"target_length": 8}), (T5, {"whole_words": True})],
)
def test_a_key_that_the_model_does_not_heed_is_refused(
    config: dict[str, Any], key: dict[str, Any], tmp_path: Path
) -> None:
    (name,) = key
    with pytest.raises(
        ConfigError, match=rf"^data\.{name}=\S+ has no effect for a {config['model_type']} model; remove it$"
    ):
        resolve_run(build_run(mapping(config, tmp_path, data=key)), 1, "cpu")


@pytest.mark.parametrize("key", [{"mask_rate": 0.3}, {"mean_span": 4.0}])
def test_noise_of_text_is_refused_where_pairs_have_been_made(key: dict[str, float], tmp_path: Path) -> None:
    """Spans are cut out of text alone; a BERT's examples without labels are masked, so there it stays allowed."""
    ((name, value),) = key.items()
    with pytest.raises(ConfigError) as caught:
        resolve_run(build_run(mapping(T5, tmp_path, data={"format": "tokenized", **key})), 1, "cpu")
    assert str(caught.value) == (
        f"data.{name}={value} has no effect for a t5 model with data.format=tokenized; remove it"
    )
    resolve_run(build_run(mapping(T5, tmp_path, data=key)), 1, "cpu")
    if name == "mask_rate":
        resolve_run(build_run(mapping(BERT, tmp_path, data={"format": "tokenized", **key})), 1, "cpu")
    resolve_run(build_run(mapping(T5, tmp_path, data={"format": "tokenized", "target_length": 8})), 1, "cpu")


def test_a_decoders_positions_are_divided_too(tmp_path: Path) -> None:
    run = build_run(mapping(T5, tmp_path, parallel={"tensor": 4, "sequence": True}))
    check_target_length(run.parallel, 16)
    check_target_length(run.parallel, None)
    with pytest.raises(TopologyError) as caught:
        check_target_length(run.parallel, 18)
    assert str(caught.value) == (
        "data.target_length=18 is not divisible by parallel.tensor=4, which parallel.sequence=true needs; nearest: 20"
    )


def test_a_tokenizer_without_sentinels_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    preload()
    sections = mapping({**T5, "vocab_size": 4096}, tmp_path)
    sections["model"]["tokenizer"] = str(TOKENIZERS["bert"])
    with pytest.raises(DataError):
        mds.train(build_run(sections))
    assert not (tmp_path / "out").exists()


def test_more_stages_than_blocks_of_both_stacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"parallel\.pipeline=4 is more than num_layers=2"):
        resolve_run(build_run(mapping(T5, tmp_path, parallel={"pipeline": 4})), 4, "cpu")


def test_partitioned_recomputation_is_not_for_two_stacks(tmp_path: Path) -> None:
    """DeepSpeed takes away from the first decoder layer what the second one is given too."""
    deepspeed = {"zero_optimization": {"stage": 1}, "activation_checkpointing": {"partition_activations": True}}
    sections = mapping(T5, tmp_path, deepspeed=deepspeed, parallel={"tensor": 2})
    with pytest.raises(ConfigError, match=r"partition_activations=true frees the inputs of a layer, .*; try false$"):
        resolve_run(build_run(sections), 2, "cpu")
    resolve_run(build_run({**mapping(BERT, tmp_path, deepspeed=deepspeed), "parallel": {"tensor": 2}}), 2, "cpu")
