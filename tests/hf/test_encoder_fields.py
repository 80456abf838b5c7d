"""Fields of encoders' configs that have other words on the hub or in transformers 4, or that say the same twice."""

from typing import Any

import pytest

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.models.bert import EncoderConfig
from tests.hf.hub_configs import HUB
from tests.parity.encoder_cases import ENCODER_CASES

MODERNBERT = ENCODER_CASES["modernbert-masked"]
NOMIC = HUB["nomic-ai/nomic-embed-text-v1.5"]
FULL, SLIDING = "full_attention", "sliding_attention"


def encoder(config: dict[str, Any]) -> EncoderConfig:
    core = read_model(config).core
    assert isinstance(core, EncoderConfig)
    return core


def test_sizes_of_nomic_bert_in_the_words_of_the_hub() -> None:
    """transformers reads none of them, and takes the sizes of one model."""
    core = encoder({**NOMIC, "n_embd": 64, "n_head": 4, "n_inner": 96, "n_layer": 3, "rotary_emb_base": 500})
    sizes = core.hidden_size, core.num_heads, core.head_dim, core.ffn_size, core.num_layers
    assert sizes == (64, 4, 16, 96, 3)
    assert [rope and rope.theta for rope in core.rotary] == [500.0] * 3
    with pytest.raises(ConversionError, match=r"n_embd=768 contradicts hidden_size=64$"):
        read_model({**NOMIC, "hidden_size": 64})
    with pytest.raises(ConversionError, match=r"prenorm=True is not supported; supported: False$"):
        read_model({**NOMIC, "prenorm": True})


def test_windows_of_modernbert() -> None:
    """A window of 5 has 4 keys on each side, and the query's own."""
    assert encoder(MODERNBERT).windows == (None, 5, 5, None)
    thetas = [rope and rope.theta for rope in encoder({**MODERNBERT, "global_rope_theta": 7.0}).rotary]
    assert thetas == [7.0, 1e4, 1e4, 7.0]
    with pytest.raises(ConversionError, match=r"global_attn_every_n_layers=3 contradicts layer_types="):
        read_model({**MODERNBERT, "layer_types": [FULL, SLIDING] * 2})


@pytest.mark.parametrize(
    ("layer_types", "every"),
    [([FULL, SLIDING] * 2, 2), ([FULL] * 4, 1), ([FULL, *[SLIDING] * 3], 4), ([SLIDING, FULL] * 2, None)],
)
def test_kinds_of_layers_in_the_words_of_transformers_4(layer_types: list[str], every: int | None) -> None:
    given = {name: value for name, value in MODERNBERT.items() if name != "global_attn_every_n_layers"}
    written = config_json(read_model({**given, "layer_types": layer_types}), "float32")
    assert written["layer_types"] == layer_types
    assert written.get("global_attn_every_n_layers") == every
    assert encoder(written) == encoder({**given, "layer_types": layer_types})
