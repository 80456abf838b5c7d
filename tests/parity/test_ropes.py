"""Every type of rotary positions that a family admits, below the original length and beyond it, equals transformers."""

from importlib import import_module
from inspect import signature
from typing import Any

import pytest
import torch

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.layers.rotary import RotaryTable
from megatron_ds.models.probe import RANDOM_LENGTH
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.sampling import IN_FULL, first_cases
from tests.parity.test_families import Place, layout_of
from tests.parity.verified import Verified, runs_of

ONE_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
ORIGINAL = RANDOM_LENGTH // 2  # the inputs are longer: what depends on the length is beyond it


def rope(kind: str, pairs: int, original: int = ORIGINAL) -> dict[str, Any]:
    """Fields of a type of rope for so many pairs of rotated dims."""
    fields: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 3.0},
        "dynamic": {"factor": 3.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": original},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": original,
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [2.0 + 0.7 * pair for pair in range(pairs)],
        },
    }
    return {"rope_type": kind, "rope_theta": 1e4, **fields[kind]}


GROWTH = "llama_4_scaling_beta"  # of queries beyond the original length
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
CASE_TO_START_FROM = {"gpt_neox": 1, "stablelm": 1}  # the first case rotates one pair, which "dynamic" divides by 0


def rope_cases() -> dict[str, dict[str, Any]]:
    """The first case with rotary positions of each family, with each type in turn. The length is the original one."""
    cases = {}
    for family in FAMILIES:
        configs = [config for config in FAMILY_CASES.values() if config["model_type"] == family]
        if not configs:
            continue  # no decoder
        config = configs[CASE_TO_START_FROM.get(family, 0)]
        model = read_model(config)
        if any(model.core.rotary) and hasattr(model.config, "rope_parameters"):
            cases.update({f"{family}-{kind}": with_rope(config, model, kind) for kind in KINDS})
    return cases


def with_rope(config: dict[str, Any], model: HFModel, kind: str) -> dict[str, Any]:
    """A config with another rope, for the full layers where there are two ropes, and for the same part of a head."""
    pairs = next(one for one in model.core.rotary if one is not None).dim // 2
    before = model.config.rope_parameters
    kept = {name: before[name] for name in ("partial_rotary_factor", GROWTH) if name in before}
    parameters: dict[str, Any] = {**rope(kind, pairs), **kept}
    if GROWTH in kept:
        parameters["original_max_position_embeddings"] = ORIGINAL
    if "full_attention" in before:
        parameters = {"full_attention": parameters, "sliding_attention": dict(before["sliding_attention"])}
    rest = {name: value for name, value in config.items() if name not in ONE_ROPE}
    length = {"max_position_embeddings": ORIGINAL, "original_max_position_embeddings": ORIGINAL}
    return {
        **rest,
        **{name: length[name] for name in length if hasattr(model.config, name)},
        "rope_parameters": parameters,
    }


CASES = rope_cases()
ALONE: Place = (1, 1, False)
ONLY = {
    "phi3": ("default", "longrope"),  # transformers' own config class refuses the others
    "ministral3": ("default", "llama3", "yarn", "longrope"),  # those that may have an original length
}


def admitted(case: str) -> bool:
    family, _, kind = case.rpartition("-")
    return kind in ONLY.get(family, KINDS)


def _sampled() -> list[str]:
    """Of each family tested in full two kinds of rope, other ones than of the family before it."""
    families = [family for family in dict.fromkeys(case.rpartition("-")[0] for case in CASES) if family in IN_FULL]
    chosen = []
    for index, family in enumerate(families):
        cases = [case for case in CASES if case.rpartition("-")[0] == family and admitted(case)]
        chosen += [cases[(2 * index + one) % len(cases)] for one in range(min(2, len(cases)))]
    return chosen


SAMPLED = _sampled()


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Verified:
    alone = [(case, ALONE) for (case,) in runs_of(request, "case") if admitted(case)]
    return Verified(CASES, layout_of, [*alone, *runs_of(request, "case", "place")], tmp_path_factory)


def test_every_kind_of_rope_is_in_the_sample() -> None:
    assert {case.rpartition("-")[2] for case in SAMPLED} == set(KINDS)


@pytest.mark.parametrize("case", SAMPLED)
def test_a_rope_equals_transformers(case: str, verified: Verified) -> None:
    verified.check(case, ALONE)


@pytest.mark.sweep
@pytest.mark.parametrize("case", [case for case in CASES if admitted(case) and case not in SAMPLED])
def test_every_other_rope_equals_transformers(case: str, verified: Verified) -> None:
    verified.check(case, ALONE)


@pytest.mark.sweep
@pytest.mark.parametrize("place", [(2, 1, True), (2, 2, False)], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if admitted(case)])
def test_a_rope_at_every_axis(case: str, place: Place, verified: Verified) -> None:
    verified.check(case, place)


@pytest.mark.parametrize("case", [case for case in CASES if not admitted(case)])
def test_a_rope_that_transformers_refuses_is_refused(case: str) -> None:
    with pytest.raises(ConversionError):
        read_model(CASES[case])


def test_the_families_with_ropes() -> None:
    families = {case.rpartition("-")[0] for case in CASES}
    without = {"gpt2", "gptj", "opt", "bloom", "gpt_bigcode", "gpt_neo", "codegen", "biogpt"}
    no_decoders = {config["model_type"] for config in ENCODER_CASES.values()}
    seeing = {name for name, family in FAMILIES.items() if family.passes_through}
    assert families == set(FAMILIES) - without - no_decoders - seeing


# Types whose code in transformers rotates in fp32, some of them by cos and sin that were rounded before.
IN_FP32 = {
    "ernie4_5": "Ernie4_5",
    "olmo3": "Olmo3",
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "modernbert": "ModernBert",
}


@pytest.mark.parametrize("model_type", IN_FP32)
def test_a_rotation_in_fp32_is_rounded_as_in_transformers(model_type: str) -> None:
    """Bit by bit, on heads in bf16."""
    case = first_cases({**FAMILY_CASES, **ENCODER_CASES})[model_type]
    model = read_model({**FAMILY_CASES, **ENCODER_CASES}[case])
    core: Any = model.core
    layer = next(layer for layer, rope in enumerate(core.rotary) if rope is not None)
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    table = getattr(module, f"{IN_FP32[model_type]}RotaryEmbedding")(model.config)
    heads, places = torch.randn(2, 4, 40, core.head_dim).bfloat16(), torch.arange(40)[None]
    kinds = (model.config.layer_types[layer],) if "layer_type" in signature(table.forward).parameters else ()
    theirs, _ = module.apply_rotary_pos_emb(heads, heads, *table(heads, places, *kinds))
    ours, _ = RotaryTable(core.rotary[layer]).rotate(heads.permute(2, 0, 1, 3), heads.permute(2, 0, 1, 3))
    assert torch.equal(ours.permute(1, 2, 0, 3), theirs)
