"""`model.rope`: the config that it makes is the one that it should be, and transformers computes the same from it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.config.rope_section import NEEDED, RopeSection
from megatron_ds.engine.base import weights_of
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.peft.new_head import read_base
from megatron_ds.hf.peft.rope_file import ROPE_FILE, check_same_rope, rope_file
from megatron_ds.hf.rope import with_rope
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.models.sequential import SequentialModel
from tests.hf.models import export
from tests.parallel.axes import ALONE
from tests.parity.case_fields import LAYERS, LLAMA, PLAIN_ROPE
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.reference import make_model
from tests.parity.sampling import first_cases
from tests.ranks import run_alone

SHORT = {**LLAMA, "model_type": "llama", "hidden_size": 64, "max_position_embeddings": 16}  # heads of 8
BASE = {"rope_theta": 1e4}
SHORT_FACTOR, LONG_FACTOR = [1.0, 1.1, 1.2, 1.3], [1.0, 1.9, 3.1, 4.0]
# Type -> the section, the `rope_parameters` that transformers shall have, and its `max_position_embeddings`.
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "default": ({"rope_theta": 5e5, "max_position_embeddings": 64}, {"rope_theta": 5e5}, 64),
    "linear": ({"factor": 4}, {**BASE, "factor": 4.0}, 64),
    "dynamic": ({"factor": 4}, {**BASE, "factor": 4.0}, 16),
    "yarn": (
        {"factor": 4, "beta_fast": 16, "truncate": False},
        {**BASE, "factor": 4.0, "beta_fast": 16.0, "truncate": False, "original_max_position_embeddings": 16},
        64,
    ),
    "llama3": (
        {"factor": 4, "rope_theta": 2e4},
        {
            "rope_theta": 2e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        64,
    ),
    "longrope": (
        {"short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR, "max_position_embeddings": 48},
        {
            **BASE,
            "short_factor": SHORT_FACTOR,
            "long_factor": LONG_FACTOR,
            "original_max_position_embeddings": 16,
        },
        48,
    ),
}


def section(kind: str, **more: Any) -> RopeSection:
    return RopeSection(**{"type": kind, **TYPES[kind][0], **more})


def read(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def _ours(weights: HFWeights, ids: torch.Tensor) -> torch.Tensor:
    model = SequentialModel(weights.model.core.build_layers()).eval()
    with torch.no_grad():
        for name, weight in weights_of(model):
            weight.copy_(weights.shard(name, spec_of(weight), ALONE))
        return model({"input_ids": ids})["logits"]


def _theirs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids.long(), use_cache=False).logits


def _compare(kind: str, place: Path) -> tuple[float, float, bool]:
    """Errors of ours against transformers' model of the config as it should be, at 40 positions, and of the same
    without `model.rope`; and whether transformers' logits from the export are those of that model."""
    from transformers import AutoModelForCausalLM

    _, parameters, longest = TYPES[kind]
    base = make_model(SHORT)
    base.save_pretrained(place / "base")
    fields = {"rope_parameters": {"rope_type": kind, **parameters}, "max_position_embeddings": longest}
    wanted = make_model({**SHORT, **fields})
    wanted.load_state_dict(base.state_dict())
    ids = torch.randint(0, SHORT["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    own = read_model(place / "base")
    weights = HFWeights(place / "base", with_rope(own, section(kind)))
    export(weights, place / "out")
    logits, plain = _theirs(wanted, ids), HFWeights(place / "base", own)
    errors = [float((_ours(one, ids) - logits).norm() / logits.norm()) for one in (weights, plain)]
    exported = AutoModelForCausalLM.from_pretrained(place / "out", attn_implementation="eager")
    return errors[0], errors[1], torch.equal(_theirs(exported, ids), logits)


@pytest.mark.parametrize("kind", TYPES)
def test_transformers_computes_the_same(kind: str, tmp_path: Path) -> None:
    error, without, same = run_alone(_compare, kind, tmp_path)
    print(f"{kind}: {error:.1e}; without model.rope {without:.1e}")
    assert error < 1e-5 and without > 1e-3 and same  # fp32, other order of summation
    _, parameters, longest = TYPES[kind]
    written = read(tmp_path / "out")
    assert written["rope_parameters"] == {"rope_type": kind, **parameters}
    assert written["max_position_embeddings"] == longest
    # what transformers 4 reads
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    assert written["rope_scaling"] == ({"rope_type": kind, **scaling} if kind != "default" else None)
    assert written["rope_theta"] == parameters["rope_theta"]


def test_every_type_is_tried() -> None:
    assert TYPES.keys() == NEEDED.keys()


FIRSTS = {
    model_type: ({**FAMILY_CASES, **ENCODER_CASES}[case])
    for model_type, case in first_cases({**FAMILY_CASES, **ENCODER_CASES}).items()
}
REFUSED = {
    "no rotation": r"has no rotation of positions that config\.json can change; remove it",
    "of transformers": r"model\.rope: transformers refuses it: ",  # phi3, whose class takes longrope alone
    "other fields": r"model\.rope cannot keep rope_parameters\.\w+=",
    "sees": r"is not supported in a \w+, which is more than a text model",
}


def _outcome(model: HFModel, rope: RopeSection, place: Path) -> str:
    """ "ok", or the refusal. A config that is written is read as the model that was trained."""
    try:
        changed = with_rope(model, rope)
    except ConfigError as problem:
        return str(problem)
    (place / "config.json").write_text(json.dumps(config_json(changed, "float32")))
    again = read_model(place)
    assert again.core == changed.core != model.core
    assert with_rope(again, rope).core == changed.core, "a directory that has the rotation is left as it is"
    return "ok"


def test_every_family_is_stretched_or_refused_by_name(tmp_path: Path) -> None:
    seen: dict[str, set[str]] = {}
    for model_type, config in FIRSTS.items():
        model = read_model(config)
        rope = RopeSection(type="yarn", factor=4, original_max_position_embeddings=24)
        found = _outcome(model, rope, tmp_path)
        kinds = [kind for kind, text in REFUSED.items() if re.search(text, found)]
        assert found == "ok" or len(kinds) == 1, f"{model_type}: {found}"
        seen.setdefault(kinds[0] if kinds else "ok", set()).add(model_type)
    assert {"gpt2", "gptj", "bloom", "bert", "t5"} <= seen["no rotation"]
    assert {"llama", "qwen3", "gemma2", "gemma3_text", "olmo3", "gpt_neox", "falcon", "modernbert"} <= seen["ok"]
    assert seen["of transformers"] == {"phi3"} and "ministral3" in seen["other fields"]
    assert {"gemma3", "qwen2_vl"} <= seen["sees"]
    assert len(seen["ok"]) > 40


def test_layers_with_windows_keep_the_rotation_of_their_kind() -> None:
    model = read_model(FIRSTS["gemma3_text"])
    rope = RopeSection(type="linear", factor=8, original_max_position_embeddings=64)
    changed = with_rope(model, rope)
    assert changed.config.rope_parameters["sliding_attention"] == model.config.rope_parameters["sliding_attention"]
    pairs: Mapping[str, Any] = dict(zip(model.config.layer_types, zip(model.core.rotary, changed.core.rotary)))
    before, after = pairs["full_attention"]
    assert (after.scaling, after.factor, after.theta) == ("linear", 8.0, before.theta)
    assert pairs["sliding_attention"][0] == pairs["sliding_attention"][1]
    with pytest.raises(ConfigError, match="is for layers with full attention, and this gemma3_text has none"):
        with_rope(read_model({**FIRSTS["gemma3_text"], "layer_types": ["sliding_attention"] * 4}), rope)


def test_a_stretched_model_is_not_stretched_again_in_silence() -> None:
    stretched = with_rope(read_model(SHORT), section("yarn"))
    assert with_rope(stretched, section("yarn")).core == stretched.core
    said = {**stretched.config.rope_parameters, "type": "yarn", "mscale": None}
    also = read_model({**SHORT, "max_position_embeddings": 64, "rope_parameters": said})
    assert with_rope(also, section("yarn")).core == also.core == stretched.core
    with pytest.raises(
        ConfigError,
        match=r"^model\.rope\.type=linear would take the place of the model's own rope_type=yarn, factor=4\.0; if so, "
        r"give the length that is stretched; nearest: model\.rope\.original_max_position_embeddings=16$",
    ):
        with_rope(stretched, section("linear"))
    with pytest.raises(ConfigError, match="would take the place"):
        with_rope(stretched, section("yarn", factor=8))
    again = with_rope(stretched, section("yarn", factor=8, original_max_position_embeddings=16))
    assert again.core == with_rope(read_model(SHORT), section("yarn", factor=8)).core
    assert again.config.max_position_embeddings == 128


def test_the_original_length_of_phi_3_is_the_one_that_transformers_reads() -> None:
    """Its config class has a field of its own, which wins."""
    sizes = {**LAYERS, "intermediate_size": 64, "num_key_value_heads": 4, "hidden_size": 64}
    model = read_model({**sizes, "model_type": "phi3", "max_position_embeddings": 16, "rope_parameters": PLAIN_ROPE})
    changed = with_rope(model, section("longrope"))
    assert changed.core.rotary[0].original_max_positions == 16 and changed.core.rotary[0].factor == 3.0
    assert changed.config.original_max_position_embeddings == 16


def test_values_that_do_not_fit_the_model() -> None:
    with pytest.raises(ConfigError, match=r"^model\.rope\.short_factor has 3 numbers; it must have 4$"):
        with_rope(read_model(SHORT), section("longrope", short_factor=[1.0, 1.0, 1.0]))
    with pytest.raises(ConfigError, match=r"^model\.rope\.high_freq_factor=1\.0 must be above low_freq_factor=4\.0$"):
        with_rope(read_model(FIRSTS["gemma3_text"]), section("llama3", low_freq_factor=4, high_freq_factor=1))
    with pytest.raises(ConfigError, match=r"^model\.rope\.max_position_embeddings=8 is less than the 16 positions of"):
        with_rope(read_model(SHORT), section("yarn", max_position_embeddings=8))


def test_adapters_keep_the_rotation_that_they_were_trained_with(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({**SHORT, "architectures": ["LlamaForCausalLM"]}))
    own, changed = read_model(base), with_rope(read_model(base), section("yarn"))
    assert rope_file(own) == {} and read_base(base, base).core == own.core
    (content,) = rope_file(changed).values()
    (tmp_path / ROPE_FILE).write_bytes(content)
    again = read_base(tmp_path, base)
    assert again.core == changed.core and again.config.to_dict() == changed.config.to_dict()
    check_same_rope(tmp_path, changed)
    for other in (own, with_rope(own, section("linear"))):
        with pytest.raises(ConversionError, match=r"rope\.json is another rotation than the run's; set model\.rope to"):
            check_same_rope(tmp_path, other)
    (tmp_path / ROPE_FILE).write_text('{"type": "yarn"}')
    with pytest.raises(ConversionError, match=r"rope\.json: is damaged: .*factor is missing.*; try to export it again"):
        read_base(tmp_path, base)
