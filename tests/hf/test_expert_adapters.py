"""peft's adapters of experts and routers: the same parameters as in peft, both ways, merged, expert by expert."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.export_target import ExportTarget
from megatron_ds.hf.peft.adapters import Adapters, read_adapters
from megatron_ds.hf.peft.config import ADAPTER_WEIGHTS
from megatron_ds.hf.peft.export import export_adapters, export_merged
from megatron_ds.hf.peft.reader import AdapterReader
from megatron_ds.hf.weights import HFWeights
from megatron_ds.models.adapters import with_adapters
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.tensor import TensorParallel
from tests.parallel.axes import axes_at
from tests.parity.adapter_cases import random_config
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_alone

EXPERTS = ["gate_up_proj", "experts.down_proj"]
# base -> fields of peft's config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "old-names": ("mixtral-four-experts", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "all-linear": ("qwen3_moe-dense-layer-bias", {"target_modules": "all-linear"}),
    "all-linear-shared-gate": ("qwen2_moe-windows-dense-first", {"target_modules": "all-linear"}),
    "regex": ("olmoe-groups", {"target_modules": r".*layers\.1\..*(k_proj|gate_proj|up_proj)"}),
    "one-parameter": (
        "glm4_moe-dense-first",
        {"target_modules": ["o_proj"], "target_parameters": ["experts.down_proj"]},
    ),
    "inputs-first": (
        "gpt_oss-yarn",
        {"target_modules": [], "target_parameters": [*EXPERTS, "router.weight"], "rank_pattern": {".*gate_up_proj": 2}},
    ),
    "fused-on-disk": (
        "granitemoeshared-shared",
        {"target_modules": ["input_linear"], "target_parameters": EXPERTS, "use_rslora": True},
    ),
    "router-in-full": ("dots1-not-renormalised", {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]}),
    "experts-in-full": ("minimax_m2-partial", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
}


def _given(case: str) -> dict[str, Any]:
    return {"r": 3, "lora_alpha": 5, **copy.deepcopy(CASES[case][1])}


def _save(directory: Path) -> None:
    """Save the base, an adapter of peft's with random values, and what peft merges, for each case."""
    from peft import get_peft_model

    for case, (base, _) in CASES.items():
        theirs = make_model(ALL_CONFIGS[base])
        theirs.save_pretrained(directory / case / "base")
        model = get_peft_model(theirs, random_config(_given(case)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(directory / case / "adapter")
        model.merge_and_unload().save_pretrained(directory / case / "merged")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    run_alone(_save, directory)
    return directory


def _read(directory: Path) -> tuple[HFWeights, Adapters, AdapterReader]:
    base = HFWeights(directory / "base", read_model(directory / "base"))
    adapters = read_adapters(directory / "adapter", base.model, "base")
    return base, adapters, AdapterReader(directory / "adapter", adapters)


@pytest.mark.parametrize("case", CASES)
def test_the_fields_of_a_run_file_mean_what_they_mean_in_peft(case: str, made: Path) -> None:
    """The same tensors, and the config that peft saves, in which old names are names of parameters."""
    adapters = read_adapters(_given(case), read_model(made / case / "base"), "base")
    ours = {
        name: row.op.source_shape(source, adapters.axis_sizes)
        for row in adapters.table.values()
        for source, name in enumerate(row.names)
    }
    saved = load_file(made / case / "adapter" / ADAPTER_WEIGHTS)
    assert ours == {name: tuple(tensor.shape) for name, tensor in saved.items()}
    theirs = json.loads((made / case / "adapter" / "adapter_config.json").read_text())
    assert sorted(adapters.config["target_parameters"] or []) == sorted(theirs["target_parameters"] or [])
    assert all(adapters.config[field] == theirs[field] for field in ("rank_pattern", "alpha_pattern"))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_bit_for_bit(case: str, made: Path, tmp_path: Path) -> None:
    _, adapters, weights = _read(made / case)
    parameters = [(name, weights.full(name)) for name in adapters.table]
    export_adapters(ExportTarget(tmp_path / "again"), adapters, parameters, None, None)
    before, after = (load_file(place / ADAPTER_WEIGHTS) for place in (made / case / "adapter", tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = read_adapters(tmp_path / "again", read_model(made / case / "base"), "base")
    assert again.adapters == adapters.adapters and again.config == adapters.config


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(case: str, made: Path, tmp_path: Path) -> None:
    base, adapters, weights = _read(made / case)
    parameters = {name: weights.full(name) for name in adapters.table}
    target = ExportTarget(tmp_path / "hf")
    export_merged(target, base, made / case / "base", adapters, parameters, None, "5GB", None)
    mine, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "hf", made / case / "merged"))
    plain = load_file(made / case / "base" / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(mine[name], plain[name]) for name in mine if "mlp" in name or "moe" in name)


@pytest.mark.parametrize("case", ["all-linear-shared-gate", "inputs-first"])
def test_each_rank_reads_its_experts(case: str, made: Path) -> None:
    """Shapes are those of the modules that are built; shards of one parameter are parts of the full one."""
    base, adapters, weights = _read(made / case)
    for rank in range(2):
        axes = axes_at(tensor=(rank, 2), expert=(rank, 2))
        tp = TensorParallel(axes["tensor"])
        at = BuildContext(tp, experts=ExpertParallel(axes["expert"], tp))
        built = SequentialModel(with_adapters(base.model.core.build_layers(at), adapters.places))
        found = {name: one for name, one in built.named_parameters() if ".adapters." in name}
        assert found.keys() == adapters.table.keys()
        for name, parameter in found.items():
            spec = parameter.spec  # type: ignore[attr-defined]
            assert spec.is_of_experts == (".experts.adapters." in name)
            cut = weights.full(name)[tuple(slice(*bounds) for bounds in spec.local_ranges(axes))]
            assert torch.equal(weights.shard(name, spec, axes), cut) and cut.shape == parameter.shape, name


@pytest.mark.parametrize(
    ("base", "fields", "says"),
    [
        (
            "old-names",
            {"target_modules": "all-linear", "lora_dropout": 0.1},
            r"lora_dropout=0.1 does not work on .*gate",
        ),
        (
            "old-names",
            {"target_modules": ["w2"], "use_dora": True},
            r"use_dora=True does not work on .*down_proj, .*false$",
        ),
        (
            "old-names",
            {"target_modules": ["w2"], "init_lora_weights": "pissa"},
            r"init_lora_weights=pissa does .*true$",
        ),
        ("old-names", {"target_modules": ["w1"]}, r"peft refuses it: Cannot convert PEFT target\(s\) w1 without .*w3"),
        (
            "old-names",
            {"target_modules": ["experts"]},
            r"matches model.layers.0.mlp.experts, which cannot",
        ),
        ("old-names", {"target_parameters": ["q_proj.weight"]}, r"matches .*q_proj.weight, .*supported: gate.weight, "),
        (
            "old-names",
            {"target_parameters": ["up_proj"]},
            r"target_parameters=up_proj matches no .*experts.gate_up_proj",
        ),
        ("inputs-first", {"target_parameters": ["down_proj_bias"]}, r"matches .*experts.down_proj_bias, which cannot"),
        (
            "inputs-first",
            {"target_parameters": "down_proj"},
            r"=down_proj is text, not a list of names",
        ),
        (
            "all-linear-shared-gate",
            {"target_modules": ["shared_expert_gate"], "use_dora": True},
            r"use_dora does not work on .*mlp.shared_expert_gate, .*exclude_modules=\[shared_expert_gate\]",
        ),
        (
            "all-linear-shared-gate",
            {"peft_type": "IA3", "target_modules": ["shared_expert_gate"], "feedforward_modules": []},
            r"peft_type=IA3 does not work on model.layers.1.mlp.shared_expert_gate",
        ),
        (
            "old-names",
            {"peft_type": "IA3", "target_modules": ["w2"], "feedforward_modules": ["w2"]},
            r"target_modules=\['w2'\] matches nothing in a mixtral",
        ),
    ],
)
def test_what_peft_cannot_adapt_is_refused(base: str, fields: dict[str, Any], says: str, made: Path) -> None:
    with pytest.raises(ConversionError, match=says):
        read_adapters(fields, read_model(made / base / "base"), "base")


def test_adapters_of_single_experts_are_refused(made: Path, tmp_path: Path) -> None:
    """transformers before version 5 had a module for each expert; peft converts such files when it loads them."""
    _, adapters, _ = _read(made / "old-names")
    tensors = load_file(made / "old-names" / "adapter" / ADAPTER_WEIGHTS)
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1.lora_A.weight"
    save_file({**tensors, name: torch.zeros(3, 32)}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(ConversionError, match=r"experts.1.w1.lora_A.weight is of a single expert.*; try "):
        AdapterReader(tmp_path, adapters)
