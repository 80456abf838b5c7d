"""peft's adapters in our tables: every field of its config, every family, both ways, merged, share by share."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.export_target import ExportTarget
from megatron_ds.hf.peft import config as module
from megatron_ds.hf.peft.adapters import read_adapters
from megatron_ds.hf.peft.config import ADAPTER_WEIGHTS
from megatron_ds.hf.peft.export import export_adapters, export_merged
from megatron_ds.hf.peft.reader import AdapterReader
from megatron_ds.hf.peft.saved_modules import with_vocabulary
from megatron_ds.hf.weights import HFWeights
from megatron_ds.models.adapters import with_adapters
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.parallel.tensor import TensorParallel
from tests.parallel.axes import axes_at
from tests.parity.adapter_cases import random_config
from tests.parity.reference import ALL_CONFIGS, make_model
from tests.ranks import run_alone

# One of each layout of weights: separate, fused in each order, inputs first, gates fused or not, encoders.
CASES = (
    *("llama", "gpt2", "gpt_neox-parallel", "gptj-partial", "opt-before", "bloom-tied", "falcon-7b", "falcon-40b"),
    *("phi3-plain", "qwen2-2kv", "gemma2-caps", "starcoder2-window", "bert-pretraining", "roberta-masked", "t5-gated"),
)
CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "rank_pattern": {"down_proj": 2, "q": 2}}


def test_every_field_of_pefts_config_is_heeded_refused_or_not_about_math() -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    for kind, rules in module.PEFT_FIELDS.items():
        made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
        known = {field.name for field in fields(made)}
        cosmetic = module.COSMETIC & known
        assert known == rules.supported | rules.required.keys() | cosmetic
        assert len(known) == len(rules.supported) + len(rules.required) + len(cosmetic)
        assert {name: getattr(made(), name) for name in rules.required} == dict(rules.required)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Case and kind -> a directory with a base, an adapter of peft's, and what peft merges."""
    known: dict[tuple[str, str], Path] = {}

    def get(case: str, kind: str = "LORA") -> Path:
        if (case, kind) not in known:
            known[case, kind] = tmp_path_factory.mktemp(case)
            run_alone(_save, case, kind, known[case, kind])
        return known[case, kind]

    return get


def _save(case: str, kind: str, directory: Path) -> None:
    from peft import get_peft_model

    base = make_model(ALL_CONFIGS[case])
    base.save_pretrained(directory / "base")
    meaning = read_adapters(CONFIG, read_model(directory / "base"), "")
    config: dict[str, Any] = {**CONFIG, "target_modules": sorted(meaning.modules)}
    if kind == "IA3":
        inner = [name for name, parts in meaning.modules.items() if not parts[0].is_column and "mlp" in parts[0].parent]
        config = {"peft_type": kind, "target_modules": config["target_modules"], "feedforward_modules": inner}
    model = get_peft_model(base, random_config(config))
    model.save_pretrained(directory / "adapter")
    model.merge_and_unload().save_pretrained(directory / "merged")


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_bit_for_bit(case: str, kind: str, made: Any, tmp_path: Path) -> None:
    directory = made(case, kind)
    adapters = read_adapters(directory / "adapter", read_model(directory / "base"), "base")
    weights = AdapterReader(directory / "adapter", adapters)
    parameters = [(name, weights.full(name)) for name in adapters.table]
    export_adapters(ExportTarget(tmp_path / "again"), adapters, parameters, None, None)
    before, after = (load_file(place / ADAPTER_WEIGHTS) for place in (directory / "adapter", tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = read_adapters(tmp_path / "again", read_model(directory / "base"), "base")
    assert again.adapters == adapters.adapters and again.config == adapters.config


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(case: str, kind: str, made: Any, tmp_path: Path) -> None:
    directory = made(case, kind)
    base = HFWeights(directory / "base", read_model(directory / "base"))
    adapters = read_adapters(directory / "adapter", base.model, "base")
    weights = AdapterReader(directory / "adapter", adapters)
    parameters = {name: weights.full(name) for name in adapters.table}
    export_merged(ExportTarget(tmp_path / "hf"), base, directory / "base", adapters, parameters, None, "5GB", None)
    mine, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "hf", directory / "merged"))
    plain = load_file(directory / "base" / "model.safetensors")
    changed = 0
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(mine[name], plain[name])
    biases = sum(name.removesuffix("weight") + "bias" in mine for name in mine) if kind == "IA3" else 0
    assert len(adapters.modules) <= changed <= len(adapters.modules) + biases


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
@pytest.mark.parametrize("case", CASES)
def test_each_rank_reads_its_shard(case: str, kind: str, made: Any) -> None:
    """The shapes are those of the modules that are built; shards of one parameter are parts of the full one."""
    directory = made(case, kind)
    model = HFWeights(directory / "base", read_model(directory / "base")).model
    adapters = read_adapters(directory / "adapter", model, "base")
    weights = AdapterReader(directory / "adapter", adapters)
    size = 2
    for rank in range(size):
        axes = axes_at(tensor=(rank, size))
        at = BuildContext(TensorParallel(axes["tensor"]))
        built = SequentialModel(with_adapters(model.core.build_layers(at), adapters.places))
        found = {name: one for name, one in built.named_parameters() if ".adapters." in name}
        assert found.keys() == adapters.table.keys()
        for name, parameter in found.items():
            spec = parameter.spec  # type: ignore[attr-defined]
            shard = weights.shard(name, spec, axes)
            assert shard.shape == parameter.shape
            cut = weights.full(name)[tuple(slice(*bounds) for bounds in spec.local_ranges(axes))]
            assert torch.equal(shard, cut), name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"drop": "lora_A"}, r"missing base_model\.model\..*lora_A\.weight, by its adapter_config\.json"),
        ({"add": "extra.lora_A.weight"}, r"unexpected extra\.lora_A\.weight"),
        ({"shape": True}, r"has shape \[1, 1\], its adapter_config\.json and this model say"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(changes: dict[str, Any], says: str, made: Any, tmp_path: Path) -> None:
    directory = made("llama")
    tensors = load_file(directory / "adapter" / ADAPTER_WEIGHTS)
    first = next(name for name in tensors if "lora_A" in name)
    if "drop" in changes:
        del tensors[first]
    elif "add" in changes:
        tensors[changes["add"]] = torch.zeros(1)
    else:
        tensors[first] = torch.zeros(1, 1)
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS)
    adapters = read_adapters(directory / "adapter", read_model(directory / "base"), "base")
    with pytest.raises(ConversionError, match=says):
        AdapterReader(tmp_path, adapters)


def test_a_larger_vocabulary_keeps_fields_that_no_model_reads() -> None:
    model = read_model({**ALL_CONFIGS["llama"], "architectures": ["LlamaForCausalLM"], "unknown_to_all": 7})
    content = config_json(with_vocabulary(model, 140), "float32")
    assert (content["vocab_size"], content["unknown_to_all"]) == (140, 7)
