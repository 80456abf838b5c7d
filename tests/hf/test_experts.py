"""Directories of mixtures of experts: forms of their tensors, what a rank reads, what is missing or left out."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_ds.engine.base import weights_of
from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.weight_files import TensorSource
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.parallel.grid import Axis
from megatron_ds.verify import verify_hf
from tests.hf.models import changed, hashes, opened
from tests.made_once import MakeOnce
from tests.parity.family_cases import MOE_CASES
from tests.parity.reference import make_model

FIRST = {config["model_type"]: case for case, config in reversed(MOE_CASES.items())}
PER_EXPERT = [case for kind, case in FIRST.items() if not kind.startswith(("granite", "gpt_oss"))]


SHARDED = ("qwen3_moe-dense-layer-bias", "granitemoe-eight-bias", "gpt_oss-low-limit-no-bias")
BIASED = ("ernie4_5_moe-dense-first-tied", "glm4_moe-dense-first", "minimax_m2-partial")


def save_experts(directory: Path) -> None:
    """For each case `in`, as transformers saves it; `memory`, under its names in memory; `fp32`, for some."""
    for case in {*FIRST.values(), *SHARDED}:
        model = make_model(MOE_CASES[case])
        if case in BIASED:
            model.save_pretrained(directory / case / "fp32")
        model.bfloat16().save_pretrained(directory / case / "in")
        model.save_pretrained(directory / case / "memory", save_original_format=False)


@pytest.fixture(scope="session")
def experts(once: MakeOnce) -> Path:
    return once(save_experts)[0]


def specs(weights: HFWeights) -> dict[str, ParamSpec]:
    with torch.device("meta"):
        return {name: one.spec for name, one in weights_of(SequentialModel(weights.model.core.build_layers()))}


@pytest.mark.parametrize("case", FIRST.values(), ids=list(FIRST))
def test_both_forms_are_read_and_written_as_they_are(case: str, experts: Path, tmp_path: Path) -> None:
    """The documented one, and transformers' form in memory, which it loads too; no bit changes."""
    plain, memory = experts / case / "in", experts / case / "memory"
    for place in (plain, memory):
        rewrite(place, tmp_path / f"{place.name}-again")
        assert hashes(tmp_path / f"{place.name}-again") == hashes(place)
    assert case.startswith("gpt_oss") or hashes(plain).keys() != hashes(memory).keys()
    one, other = opened(plain), opened(memory)
    assert one.model.core == other.model.core and one.model.table.keys() == other.model.table.keys()
    assert all(torch.equal(one.full(name), other.full(name)) for name in one.model.table)


def test_the_form_in_memory_equals_transformers(experts: Path) -> None:
    """Outputs and gradients on two ranks, each with half of the experts."""
    report = verify_hf(experts / "mixtral-four-experts" / "memory", tp=2)
    assert report.ok and report.round_trip.left_out == []


@pytest.mark.parametrize("case", SHARDED)
def test_shards_of_expert_ranks(case: str, experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they are the full parameter; of tensors that are one an expert, a rank opens its own."""
    weights = opened(experts / case / "in")
    names: list[str] = []
    real = TensorSource.tensor

    def counted(self: TensorSource, name: str, **options: Any) -> torch.Tensor:
        names.append(name)
        return real(self, name, **options)

    monkeypatch.setattr(TensorSource, "tensor", counted)
    checked = 0
    for name, spec in specs(weights).items():
        if not spec.is_of_experts:
            continue
        full, shards = weights.full(name), []
        for rank in range(4):
            names.clear()
            shards.append(weights.shard(name, spec, {"tensor": Axis(2, rank % 2), "expert": Axis(4, rank)}))
            if case.startswith("qwen3_moe"):
                assert {int(one.split(".experts.")[1].split(".")[0]) for one in names} == {2 * rank, 2 * rank + 1}
        assert torch.equal(torch.cat(shards), full), name
        checked += 1
    assert checked >= 6


@pytest.mark.parametrize("case", PER_EXPERT)
def test_the_missing_tensor_of_an_expert_is_named(case: str, experts: Path, tmp_path: Path) -> None:
    """transformers reports a shape of the fused tensor."""
    plain = experts / case / "in"
    lost = sorted(name for name in load_file(plain / "model.safetensors") if ".experts.2." in name)[-1]
    directory = changed(plain, tmp_path / "out", lambda tensors: {n: t for n, t in tensors.items() if n != lost})
    with pytest.raises(ConversionError) as caught:
        opened(directory)
    assert f"missing {lost}, which " in str(caught.value)


def test_experts_missing_in_every_layer_are_named_as_the_others_are(experts: Path, tmp_path: Path) -> None:
    """In the form of fused tensors fewer would be missing, and none is there."""
    plain = experts / "mixtral-four-experts" / "in"
    lost = {f".experts.{expert}." for expert in range(2, 4)}
    directory = changed(
        plain,
        tmp_path / "out",
        lambda tensors: {n: t for n, t in tensors.items() if not any(one in n for one in lost)},
    )
    with pytest.raises(ConversionError, match=r"missing model\.layers\.0\.block_sparse_moe\.experts\.2\.w1\.weight"):
        opened(directory)


def test_an_expert_too_many_is_named(experts: Path, tmp_path: Path) -> None:
    plain, name = experts / "mixtral-four-experts" / "in", "model.layers.0.block_sparse_moe.experts.4.w1.weight"
    directory = changed(plain, tmp_path / "out", lambda tensors: {**tensors, name: torch.zeros(48, 32).bfloat16()})
    with pytest.raises(ConversionError, match=f"unexpected {name}"):
        opened(directory)


def test_layers_that_predict_further_tokens(experts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are left out with one line, and the export has none by its config; a layer beyond them is refused."""
    further = "model.layers.4.eh_proj.weight"
    plain = experts / "glm4_moe-dense-first" / "in"
    before = hashes(plain)
    directory = changed(plain, tmp_path / "mtp", lambda tensors: {**tensors, further: torch.zeros(32, 64)})
    with caplog.at_level(logging.INFO, logger="megatron_ds"):
        rewrite(directory, tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records if further in record.getMessage()]
    assert lines == [
        f"{directory}: 1 tensors that predict further tokens (MTP), such as {further}, are not read; exports lack them "
        "and name no such layer"
    ]
    assert hashes(tmp_path / "out") == before
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    beyond = changed(directory, tmp_path / "beyond", num_nextn_predict_layers=0)
    with pytest.raises(ConversionError, match=f"unexpected {further}"):
        opened(beyond)


@pytest.mark.parametrize("case", BIASED)
def test_the_bias_of_the_choice_keeps_its_type(case: str, experts: Path, tmp_path: Path) -> None:
    """An export in bfloat16 has it in fp32, as published models do."""
    rewrite(experts / case / "fp32", tmp_path / "out", dtype="bfloat16")
    types = {name: tensor.dtype for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    biases = {name for name in types if name.endswith("e_score_correction_bias")}
    assert biases and {types[name] for name in biases} == {torch.float32}
    assert {types[name] for name in types.keys() - biases} == {torch.bfloat16}


@pytest.mark.parametrize("case", [FIRST[kind] for kind in ("mixtral", "qwen3_moe", "olmoe", "minimax_m2")])
def test_both_names_of_the_number_of_experts_are_written(case: str) -> None:
    """Versions of transformers differ in the one that they write; all read both."""
    content = config_json(read_model(MOE_CASES[case]), "bfloat16")
    assert content["num_experts"] == content["num_local_experts"] == 4
    assert AutoConfig.for_model(**content).num_local_experts == 4


def test_the_auxiliary_loss_is_that_of_transformers() -> None:
    """Which adds it only if the config asks for router logits."""
    for fields, expected in (({}, 0.0), ({"output_router_logits": True}, 0.02)):
        moe = read_model({**MOE_CASES["mixtral-four-experts"], "router_aux_loss_coef": 0.02, **fields}).core.moe
        assert moe.aux_loss == expected


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("mixtral-four-experts", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 must be at most num_local_experts"),
        ("mixtral-four-experts", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported; supported"),
        ("mixtral-four-experts", {"num_experts": 8}, "num_experts=8 contradicts num_local_experts=4"),
        ("olmoe-groups", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported; supported: None"),
        ("glm4_moe-dense-first", {"n_group": 3}, "n_group=3 must divide n_routed_experts=8 into groups of at least 2"),
        ("glm4_moe-dense-first", {"n_group": 8}, "n_group=8 must divide n_routed_experts=8 into groups of at least 2"),
        ("glm4_moe-dense-first", {"topk_group": 2}, "topk_group=2 must be at most n_group=1; nearest: 1"),
        (
            "glm4_moe-groups-bias",
            {"topk_group": 1, "num_experts_per_tok": 3},
            "num_experts_per_tok=3 must be at most the 2 experts in topk_group=1 of n_group=4 groups; nearest: 2",
        ),
        ("dots1-not-renormalised", {"n_shared_experts": None}, "n_shared_experts=None is not supported"),
        ("ernie4_5_moe-least-sum", {"use_bias": True}, "use_bias=True is not supported; supported: False"),
        ("minimax_m2-partial", {"partial_rotary_factor": 1.0}, "rotary_dim=4 contradicts the 8 dims that partial_"),
        ("gpt_oss-yarn", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported; supported: 1.702"),
    ],
)
def test_refused_fields(case: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError) as caught:
        read_model({**MOE_CASES[case], **fields})
    assert str(caught.value).startswith(f"model.config: {message}"), str(caught.value)
