"""Our tables of DeepSpeed's names against the installed DeepSpeed, asked in a process of its own (it imports torch)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ds.config import EngineConfig, deepspeed_keys, fill_deepspeed, load_deepspeed

ROOT = Path(__file__).parents[2]

# DeepSpeedConfig is given a dict that writes down which top-level keys it is asked for.
PROBE = """
import json, sys
from deepspeed.runtime.config import (
    DeepSpeedConfig, _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS)
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

asked = {"": set(), "data_types": set()}

class Recorder(dict):
    section = ""
    def get(self, key, default=None):
        asked[self.section].add(key)
        return super().get(key, default)
    def __contains__(self, key):
        asked[self.section].add(key)
        return super().__contains__(key)
    def __getitem__(self, key):
        asked[self.section].add(key)
        return super().__getitem__(key)
    def keys(self):
        return self
    def __copy__(self):
        return self

class DataTypes(Recorder):
    section = "data_types"

DeepSpeedConfig(Recorder(train_batch_size=8, data_types=DataTypes()))

def names(model):
    return sorted({name for n, f in model.model_fields.items() for name in (n, f.alias) if name})

def kinds(model, section):
    found = {}
    for n, f in model.model_fields.items():
        base = [a for a in getattr(f.annotation, "__args__", [f.annotation]) if a is not type(None)]
        kind = base[0] if base[0] in (bool, int) else None
        word = {bool: "switch", int: "count"}.get(kind, "other")
        found.update({f"{section}.{name}": word for name in (n, f.alias) if name})
    return found

filled = json.loads(sys.argv[1])
parsed = {}
for name, mapping in filled.items():
    c = DeepSpeedConfig(mapping)
    precision = "bf16" if c.bfloat16_config.enabled else "fp16" if c.float16_config.enabled else "fp32"
    zero = c.zero_config
    offload = [bool(o and o.device != "none") for o in (zero.offload_optimizer, zero.offload_param)]
    sizes = [c.train_batch_size, c.train_micro_batch_size_per_gpu, c.gradient_accumulation_steps, c.gradient_clipping]
    parsed[name] = [int(zero.stage), precision, *offload, sizes]

print("ANSWER" + json.dumps({
    "top": sorted(asked[""]),
    "removed": sorted(_REMOVED_TOP_LEVEL_CONFIG_KEYS),
    "removed_zero": sorted(_REMOVED_ZERO_CONFIG_KEYS),
    "sections": {
        "activation_checkpointing": sorted(ACT_CHKPT_DEFAULT),
        "bf16": names(DeepSpeedBF16Config),
        "bfloat16": names(DeepSpeedBF16Config),
        "data_types": sorted(asked["data_types"]),
        "fp16": names(DeepSpeedFP16Config),
        "zero_optimization": names(DeepSpeedZeroConfig),
        "zero_optimization.offload_optimizer": names(DeepSpeedZeroOffloadOptimizerConfig),
        "zero_optimization.offload_param": names(DeepSpeedZeroOffloadParamConfig),
    },
    "kinds": {
        **kinds(DeepSpeedBF16Config, "bf16"),
        **kinds(DeepSpeedFP16Config, "fp16"),
        **kinds(DeepSpeedZeroConfig, "zero_optimization"),
        **kinds(DeepSpeedZeroOffloadOptimizerConfig, "zero_optimization.offload_optimizer"),
        **kinds(DeepSpeedZeroOffloadParamConfig, "zero_optimization.offload_param"),
    },
    "parsed": parsed,
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    from megatron_ds.config import build_run

    run = build_run(
        {
            "model": {"path": "x"},
            "data": {"train": "a"},
            "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2},
            "optimizer": {"grad_clip": 0.5},
            "output": "o",
        }
    )
    sources = {"": {}, **{path.stem: str(path) for path in (ROOT / "ds_configs").glob("*.json")}}
    filled = {
        name: fill_deepspeed(load_deepspeed(s), EngineConfig.of_run(run), data_size=1, hidden_size=64)
        for name, s in sources.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(filled)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path_factory.mktemp("probe"),
    )
    answers = [line for line in done.stdout.splitlines() if "ANSWER" in line]
    assert answers, done.stderr[-2000:]
    return json.loads(answers[0].split("ANSWER", 1)[1])


def test_top_level_keys(installed):
    assert sorted(deepspeed_keys.TOP_LEVEL_KEYS) == sorted(set(installed["top"]) - set(installed["removed"]))


def test_removed_keys(installed):
    ours = set(deepspeed_keys.REMOVED_KEYS)
    theirs = set(installed["removed"]) | {f"zero_optimization.{key}" for key in installed["removed_zero"]}
    assert ours == theirs


def test_section_keys(installed):
    ours = {section: sorted(keys) for section, keys in deepspeed_keys.SECTION_KEYS.items()}
    assert ours == installed["sections"]


def test_kinds_of_values(installed):
    for key, kind in installed["kinds"].items():
        assert (key in deepspeed_keys.COUNT_KEYS) == (kind == "count"), key
        assert (key in deepspeed_keys.OTHER_KEYS) == (kind == "other"), key


def test_deepspeed_reads_the_filled_configs_as_our_facts_say(installed):
    from megatron_ds.config import summarize_deepspeed

    assert len(installed["parsed"]) == 12
    for name, (stage, precision, offload_optimizer, offload_param, sizes) in installed["parsed"].items():
        facts = summarize_deepspeed(load_deepspeed(str(ROOT / "ds_configs" / f"{name}.json") if name else {}))
        assert (facts.zero_stage, facts.precision) == (stage, precision), name
        assert (facts.offload_optimizer, facts.offload_param) == (offload_optimizer, offload_param), name
        assert sizes == [8, 2, 4, 0.5], name


def test_tables_are_sorted_and_without_overlap():
    assert list(deepspeed_keys.TOP_LEVEL_KEYS) == sorted(set(deepspeed_keys.TOP_LEVEL_KEYS))
    assert not set(deepspeed_keys.REMOVED_KEYS) & set(deepspeed_keys.TOP_LEVEL_KEYS)
    for section, keys in deepspeed_keys.SECTION_KEYS.items():
        assert list(keys) == sorted(set(keys)), section


def test_config_imports_neither_torch_nor_deepspeed():
    code = "import sys, megatron_ds.config; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
