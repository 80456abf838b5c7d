"""What encoders and encoder-decoders are run on reaches what they can get wrong, at lengths that a layout divides."""

from typing import Any

import pytest
import torch

from megatron_ds.hf.config import read_model
from megatron_ds.models.bert import EncoderConfig
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.probe import MOST_TOKENS, Probe
from megatron_ds.models.t5 import EncoderDecoderConfig
from tests.parity.encoder_cases import ENCODER_CASES

ENCODER_DECODERS = [case for case in ENCODER_CASES if case.startswith(("t5", "mt5"))]
ENCODERS = [case for case in ENCODER_CASES if case not in ENCODER_DECODERS]


def core_of(case: str, **changes: Any) -> ModelConfig:
    return read_model({**ENCODER_CASES[case], **changes}).core


def labelled(probe: Probe) -> list[int]:
    return (probe.labels["targets"] != -100).sum(dim=1).tolist()


@pytest.mark.parametrize("multiple_of", [1, 4, 6])
@pytest.mark.parametrize("case", ENCODER_CASES)
def test_lengths_divide_and_one_input_has_gradients(case: str, multiple_of: int) -> None:
    inputs, missed = core_of(case).probes(multiple_of)
    assert missed is None
    assert [probe.with_gradients for probe in inputs] == [True, *[False] * (len(inputs) - 1)]
    for probe in inputs:
        for name, column in probe.columns.items():
            assert column.shape[0] == len(probe.input_ids) and column.shape[1] % multiple_of == 0, name
            assert column.dtype == (torch.bool if name.endswith("mask") else torch.int64), name


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_sees_padding_segments_and_bare_ids(case: str) -> None:
    core = core_of(case)
    assert isinstance(core, EncoderConfig)
    padded, bare = core.probes(1)[0]
    lengths = padded.columns["attention_mask"].sum(dim=1).tolist()
    narrowest = min((window for window in core.windows if window is not None), default=None)
    assert lengths[0] == padded.input_ids.shape[1] and len(lengths) == 3
    if narrowest is None:
        assert len(set(lengths)) == 3
    else:  # every padding sees a token
        assert lengths[1:] == [lengths[0] - narrowest + 1] * 2
    hidden = padded.input_ids[~padded.columns["attention_mask"]]
    assert core.padding_id is None or set(hidden.tolist()) == {core.padding_id}
    assert ("token_type_ids" in padded.columns) == (core.num_token_types > 1)
    if core.num_token_types > 1:
        assert padded.columns["token_type_ids"].unique().tolist() == list(range(core.num_token_types))
    assert bare.columns.keys() == {"input_ids"}
    for probe in (padded, bare):
        assert ("hidden_direction" in probe.labels) != ("targets" in probe.labels)
        assert not core.next_sentence or -100 in probe.labels["next_sentence_label"]


@pytest.mark.parametrize("case", ["bert-masked", "roberta-masked", "t5-tied-relu"])
def test_labels_are_uneven_and_none_is_of_padding(case: str) -> None:
    for probe in core_of(case).probes(1)[0]:
        assert len(set(labelled(probe))) == len(probe.input_ids)
        mask = probe.columns.get("decoder_attention_mask", probe.columns.get("attention_mask"))
        if mask is not None and mask.shape == probe.labels["targets"].shape:
            assert (probe.labels["targets"][~mask] == -100).all()


def test_a_base_encoder_gets_directions() -> None:
    core = core_of("bert-base", architectures=["BertModel"])
    assert isinstance(core, EncoderConfig) and not core.masked_lm
    for probe in core.probes(1)[0]:
        assert probe.labels["hidden_direction"].shape == (*probe.input_ids.shape, core.hidden_size)
        assert 0.9 < float(probe.labels["hidden_direction"].std()) < 1.1


def test_an_encoders_inputs_stay_within_its_table() -> None:
    core = core_of("roberta-masked", max_position_embeddings=35)
    assert {probe.input_ids.shape[1] for probe in core.probes(1)[0]} == {33}
    assert {probe.input_ids.shape[1] for probe in core.probes(4)[0]} == {32}


@pytest.mark.parametrize("case", ENCODER_DECODERS)
def test_an_encoder_decoder_goes_past_the_last_distance(case: str) -> None:
    core = core_of(case)
    assert isinstance(core, EncoderDecoderConfig) and core.encoder.relative is not None
    inputs, _ = core.probes(2)
    for probe in inputs:
        assert probe.input_ids.shape[1] != probe.columns["decoder_input_ids"].shape[1]
        assert (probe.columns["decoder_input_ids"][:, 0] == core.decoder_start_id).all()
    shortest = min(inputs[-1].input_ids.shape[1], inputs[-1].columns["decoder_input_ids"].shape[1])
    assert shortest > core.encoder.relative.max_distance
    assert "decoder_attention_mask" in inputs[0].columns


def test_distances_that_no_input_reaches_are_told() -> None:
    far = core_of("t5-tied-relu", relative_attention_max_distance=2 * MOST_TOKENS)
    inputs, missed = far.probes(1)
    assert len(inputs) == 1 and missed == "distances of 16,384 tokens are longer than any input"
