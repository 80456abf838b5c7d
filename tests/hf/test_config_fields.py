"""The ledger of config fields is complete and true: what is called mapped is read, and nothing else is."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_fields import COMMON_COSMETIC, COMMON_EQUAL, COMMON_TRAINING
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.models.config import ModelConfig
from tests.hf.hub_configs import HUB
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES

CASES = {**FAMILY_CASES, **ENCODER_CASES}

# Fields that transformers' class turns into others: what to set beside them, and two values that must differ.
FOLDED: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "rope_parameters": ({}, {"rope_theta": 9.0}, {"rope_theta": 99.0}),
    "rope_theta": ({}, 9.0, 99.0),
    "rope_scaling": ({}, None, {"rope_type": "linear", "factor": 2.0}),
    "partial_rotary_factor": ({"rotary_pct": 0.25}, 0.25, 0.5),
    "rotary_emb_base": ({}, 9, 99),
    "rotary_pct": ({}, 0.25, 0.5),
    "rope_local_base_freq": ({}, 9.0, 99.0),
    "global_rope_theta": ({}, 9.0, 99.0),
    "local_rope_theta": ({}, 9.0, 99.0),
    "n_layers": ({"num_hidden_layers": 4}, 4, 5),
    "original_max_position_embeddings": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        16,
        32,
    ),
    "sliding_window_pattern": ({}, 2, 3),
    "use_sliding_window": ({"sliding_window": 5, "max_window_layers": 1}, True, False),
    "max_window_layers": ({"sliding_window": 5, "use_sliding_window": True}, 1, 3),
    "no_rope_layer_interval": ({}, 2, 3),
    "qkv_bias": ({}, True, False),
    "bias": ({}, True, False),
    "layers_block_type": ({}, ["attention"] * 4, ["mamba"] * 4),
    "n_embed": ({"hidden_size": 32}, 32, 64),
    "n_embd": ({"hidden_size": 32}, 32, 64),
    "n_layer": ({"num_hidden_layers": 4}, 4, 5),
    "n_head": ({"num_attention_heads": 8}, 8, 4),
    "n_positions": ({"max_position_embeddings": 64}, 64, 32),
    "num_layers": ({"num_hidden_layers": 4}, 4, 5),
    "hidden_size": ({"n_embd": 32}, 32, 64),
    "num_hidden_layers": ({"n_layer": 4}, 4, 5),
    "num_attention_heads": ({"n_head": 8}, 8, 4),
    "max_position_embeddings": ({"n_positions": 64}, 64, 32),
    "head_dim": ({"d_kv": 4}, 4, 8),
    "tie_word_embeddings": ({}, True, False),
    "num_experts": ({}, 4, 8),
    "num_local_experts": ({}, 4, 8),
    "num_experts_per_tok": ({}, 1, 2),
    "attention_types": ({}, [[["global", "local"], 2]], [[["global"], 4]]),
}

# What the default configs of transformers lack to be models of ours: numbers, a head of which a half can be rotated,
# layers that are all attention.
LACKING = {
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "glm4_moe": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "granitemoehybrid": {"layer_types": ["attention"] * 32, "num_local_experts": 0},
}


def first_case(family: str) -> dict[str, Any]:
    return next(config for config in CASES.values() if config["model_type"] == family)


def cases(family: str) -> Iterator[dict[str, Any]]:
    yield {"model_type": family, **LACKING.get(family, {})}
    yield from (config for config in CASES.values() if config["model_type"] == family)


def upstream(family: str) -> set[str]:
    """All that a config class of transformers knows: its attributes, their other names, and what it takes beside."""
    config = AutoConfig.for_model(family)
    sources = [
        inspect.getsource(kind) for kind in type(config).__mro__ if kind.__module__.startswith("transformers.models")
    ]
    if hasattr(config, "rope_parameters"):
        sources.append(inspect.getsource(RotaryEmbeddingConfigMixin.convert_rope_params_to_dict))
    taken = {name for source in sources for name in re.findall(r"kwargs\.(?:pop|get)\(\s*[\"'](\w+)", source)}
    if "def convert_rope_params_to_dict" in sources[0]:  # its own, so the common one does not run
        taken &= set(re.findall(r"\w+", sources[0])) | {"rope_scaling"}
    return set(config.to_dict()) | set(config.attribute_map) | taken


class Recorder:
    """A config that knows which of its fields were read."""

    def __init__(self, config: Any) -> None:
        self.config, self.read = config, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.config, name)


def read_fields(family: str) -> set[str]:
    read = set()
    for config in cases(family):
        recorder = Recorder(read_model(config).config)
        FAMILIES[family].translate(recorder)
        read |= recorder.read
    return read - {"model_type"}


def outcome(config: dict[str, Any]) -> ModelConfig | str:
    try:
        return read_model(config).core
    except ConversionError as problem:
        return str(problem)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_transformers_is_in_the_ledger(family: str) -> None:
    """A field that a new transformers brings fails here, before it is refused at a user's."""
    parts = {family: FAMILIES[family], **getattr(FAMILIES[family], "texts", {})}
    known = {name: upstream(name) for name in parts}
    assert len(set().union(*known.values())) > 30
    for name, part in parts.items():
        assert sorted(field for field in known[name] if field not in part.fields) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_classified_twice(family: str) -> None:
    """What a family says itself goes before what is said of all; that it says something else is the exception."""
    rules = FAMILIES[family].fields
    own = [rules.mapped, rules.cosmetic, rules.training, set(rules.equal)]
    common = [COMMON_COSMETIC, COMMON_TRAINING, set(COMMON_EQUAL)]
    for classes in (own, common):
        assert sum(map(len, classes)) == len(set().union(*classes))
    of_its_own = {
        "t5": {"is_encoder_decoder", "is_decoder", "decoder_start_token_id"},
        "mt5": {"is_encoder_decoder", "is_decoder", "decoder_start_token_id"},
        **{name: {"is_decoder"} for name in ("bert", "roberta", "xlm-roberta", "camembert", "electra")},
    }
    assert set().union(*own) & set().union(*common) == of_its_own.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_mapped_fields_are_read_and_no_others(family: str) -> None:
    rules, read = FAMILIES[family].fields, read_fields(family)
    assert sorted(read - rules.mapped) == []
    assert sorted(rules.mapped - read - FOLDED.keys()) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_mapped_fields_that_transformers_folds_matter(family: str) -> None:
    for name in FAMILIES[family].fields.mapped - read_fields(family):
        beside, one, other = FOLDED[name]
        base = {
            key: value for key, value in first_case(family).items() if key not in ("rope_parameters", "rope_scaling")
        }
        beside = {key: value for key, value in beside.items() if key in FAMILIES[family].fields.mapped}
        assert outcome({**base, **beside, name: one}) != outcome({**base, **beside, name: other}), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_field_is_on_the_hub_or_in_transformers(family: str) -> None:
    """A classification that no config needs is stale."""
    rules = FAMILIES[family].fields
    types = (family, FAMILIES[family].same_as)
    on_hub = {name for config in HUB.values() if config.get("model_type") in types for name in config}
    on_hub.add("tie_word_embeddings")  # in every config that we write, though not every class of transformers has it
    assert sorted((rules.cosmetic | rules.training | rules.equal.keys()) - on_hub - upstream(family)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_must_equal_are_refused_else(family: str) -> None:
    base = first_case(family)
    for name, supported in {**COMMON_EQUAL, **FAMILIES[family].fields.equal}.items():
        for value in supported:
            assert isinstance(outcome({**base, name: value}), ModelConfig), (name, value)
        message = outcome({**base, name: "something else"})
        assert message == f"model.config: {name}='something else' is not supported; supported: {supported[0]!r}"


@pytest.mark.parametrize("family", FAMILIES)
def test_default_config_of_transformers_is_accepted(family: str) -> None:
    default = {**AutoConfig.for_model(family).to_dict(), **LACKING.get(family, {})}
    assert read_model(default).family is FAMILIES[family]


def test_every_field_of_all_configs_is_common() -> None:
    common = COMMON_COSMETIC | COMMON_TRAINING | COMMON_EQUAL.keys()
    assert sorted(PreTrainedConfig().to_dict().keys() - common) == []
