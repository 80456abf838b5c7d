"""Fields that transformers' code of a model does not read: noted, kept word for word, and without effect."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_ds.errors import ConversionError
from megatron_ds.hf import fields_read as search
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.fields_read import fields_read
from megatron_ds.hf.registry import FAMILIES
from tests.hf.models import SMALL, changed, hashes
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES

CASES = {**FAMILY_CASES, **ENCODER_CASES, "llama": SMALL}
# Case -> fields of published configs that its code does not read.
UNREAD: dict[str, dict[str, Any]] = {
    "bert-masked": {
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
    },
    "roberta-masked": {"embedding_dropout": 0.5, "adapters": {"attn": [1]}, "gradient_norm": float("inf")},
    "gpt_neox-parallel": {
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0,
        "gpt_j_residual": True,
        "init_method": "small_init",
        "norm": "layernorm",
        "pos_emb": "rotary",
    },
    "phi3-plain": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
    "bloom-tied": {"unembed": [1, {"a": None}], "skip_softmax": True, "activation_dropout": 0.3},
    "opt-before": {"activation_dropout": 0.0, "fp32_residual": True, "max_target_positions": 7},
    "gpt2-plain": {
        "rotary": True,
        "alibi": True,
        "language": ["en"],
        "gradient_clip": 1.0,
        "position_embedding_type": "x",
    },
    "t5-gated": {"scalable_attention": True, "max_source_length": 9},
    "llama": {
        "internal_version": "7b-alpha-v2.33.0.30",
        "sequence_parallel_enabled": False,
        "selective_checkpoint_enabled": False,
        "move_model_to_device": True,
        "max_sequence_length": 2048,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.5,
        "save_step": None,
        "norm": "rmsnorm",
        "layers": [],
        "embed_tokens": 0,
    },
}


@pytest.mark.parametrize("case", UNREAD)
def test_they_are_kept_and_change_nothing(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, fields = CASES[case], UNREAD[case]
    with caplog.at_level(logging.INFO, logger="megatron_ds"):
        model = read_model({**config, **fields})
        read_model({**config, **fields})
    assert model.core == read_model(config).core
    assert model.unread == fields
    content = config_json(model, "float32")
    assert {name: content[name] for name in fields} == fields
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_model(tmp_path).unread == fields and read_model(tmp_path).core == model.core
    if case == "llama":
        assert [record.message for record in caplog.records] == [
            f"config.json: LlamaForCausalLM does not read {', '.join(sorted(fields))}; exports keep the values"
        ]


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("llama", {"layer_types": ["sliding_attention"] * 4}),  # read by caches and masks
        ("llama", {"is_causal": False}),
        ("llama", {"attention_chunk_size": 8}),
        ("llama", {"unpadded_vocab_size": 100}),
        ("bert-masked", {"embedding_size": 16}),
        ("gpt2-plain", {"sliding_window": 4}),
        ("phi3-plain", {"mtp_layer_types": ["full_attention"]}),
        ("t5-gated", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ],
)
def test_what_may_be_read_stays_refused(case: str, fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConversionError, match=f"model.config: {name}[.=].*(is not a known field|not supported)"):
        read_model({**CASES[case], **fields})


def test_a_misspelling_stays_refused() -> None:
    with pytest.raises(ConversionError, match=r"rms_norm_esp=0\.1 is not a known field; nearest: rms_norm_eps"):
        read_model({**SMALL, "rms_norm_esp": 0.1})


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_a_configuration_has_counts_as_read(family: str) -> None:
    """Evidence that the search sees what it must: the fields of the class, and those that the ledger calls mapped."""
    names = fields_read(family, "transformers", FAMILIES[family].architecture)
    assert names is not None
    config = AutoConfig.for_model(family)
    own = set(config.to_dict()) - {"_name_or_path", "transformers_version"}
    assert own - names == set()
    assert FAMILIES[family].fields.mapped - names <= set()


CONFIGURATION = """
class XConfig:
    attribute_map = {"alias": "target"}
    declared: int = 3

    def __post_init__(self, **kwargs):
        self.own = kwargs.pop("popped", kwargs.get("taken"))
"""
MODELING = """
class Head:
    def forward(self, config, module):
        a = config.plain
        b = getattr(self.config, "named", 1)
        c = self.config.decoder.deep
        d = getattr(module, "any", 0)
        e = config["item"]
        given = self.config.get_text_config()
        f = given.renamed
        config.pop().get(module.getattr())  # no names

class Other:
    def forward(self, model):
        for name in ("looped", "not a name"):
            getattr(model.config, name)

class XForSequenceClassification:
    def forward(self, config):
        return config.elsewhere
"""


def test_the_search_sees_every_form_of_access(tmp_path: Path) -> None:
    for name, text in {"configuration_x": CONFIGURATION, "modeling_x": MODELING}.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = search._names_in(tmp_path / "configuration_x.py", is_model=False, is_configuration=True)
    assert found >= {"alias", "target", "declared", "own", "popped", "taken"}
    found = search._names_in(tmp_path / "modeling_x.py", is_model=True, is_configuration=False)
    assert found >= {"plain", "named", "decoder", "any", "item", "looped", "renamed"}
    assert not found & {"elsewhere", "not a name"}


def test_without_source_everything_counts_as_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_file_of", lambda kind: None)
    assert search.fields_read.__wrapped__("llama", "transformers", "LlamaForCausalLM") is None


def test_auto_map_is_no_reason_to_refuse_but_a_class_that_is_code_alone_is() -> None:
    there = {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}, "own_scale": 2.0}
    assert read_model({**SMALL, **there, "architectures": ["LlamaForCausalLM"]}).unread == {"own_scale": 2.0}
    with pytest.raises(ConversionError, match=r"architectures=\['XForCausalLM'\] is not supported; supported of llama"):
        read_model({**SMALL, **there, "architectures": ["XForCausalLM"]})
    with pytest.raises(ConversionError, match=r"its code is in the directory \(auto_map\), and is not run; supported"):
        read_model({**SMALL, **there, "model_type": "lllama"})


@pytest.mark.parametrize("dtype", ["fp16", "torch.bfloat16", "auto", 7, ["float32"], None])
def test_the_weights_have_the_dtype_whatever_the_config_calls_it(dtype: Any) -> None:
    for name in ("torch_dtype", "dtype"):
        assert read_model({**SMALL, name: dtype}).core == read_model(SMALL).core


def test_an_export_keeps_them(saved: Path, tmp_path: Path) -> None:
    fields = UNREAD["llama"] | {"torch_dtype": "fp16", "save_step": 7}
    source = changed(saved / "llama" / "float32", tmp_path / "in", **fields)
    rewrite(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = {name: value for name, value in fields.items() if name != "torch_dtype"}
    assert {name: written[name] for name in kept} == kept
    assert written["torch_dtype"] == "float32"  # of the weights
    assert hashes(tmp_path / "out") == hashes(source)
