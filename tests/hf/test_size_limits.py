"""Sizes of config.json out of all bounds: refused by name, at once, and before anything is computed from them."""

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.config_fields import SIZES
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.size_limits import LIMITS
from megatron_ds.hf.weights import HFWeights
from tests.training.tiny import MODEL

LLAMA = {name: value for name, value in MODEL.items() if name != "model_type"}
NEO = {"model_type": "gpt_neo", "vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
MIXTRAL = {**MODEL, "model_type": "mixtral", "num_local_experts": 4}
GEMMA = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
UNLIMITED = {
    "decoder_sparse_step",
    "first_k_dense_replace",
    "global_attn_every_n_layers",
    "local_attention",
    "max_position_embeddings",
    "moe_layer_interval",
    "moe_layer_start_index",
    "n_positions",
    "no_rope_layer_interval",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "relative_attention_max_distance",
    "sliding_window",
    "sliding_window_pattern",
    "window_size",
}
"""Sizes that are numbers to compare with, or a table of positions, whose parameters are counted."""


@pytest.fixture
def little_memory() -> Iterator[None]:
    """500 MB of address space beyond what this process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**MODEL, "num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 10,000; nearest: 10000"),
        ({**MODEL, "num_hidden_layers": 10**400}, "num_hidden_layers=10000"),
        ({**MODEL, "num_hidden_layers": 1e9}, "num_hidden_layers=1000000000.0 must be at most 10,000"),
        ({**MODEL, "vocab_size": 10**9}, "vocab_size=1000000000 must be at most 33,554,432"),
        ({**MODEL, "hidden_size": 10**7}, "hidden_size=10000000 must be at most 1,048,576"),
        ({**MODEL, "vocab_size": 2**25, "hidden_size": 2**20}, "parameters, most of them in embedding.weight of shape"),
        ({**MODEL, "num_labels": 10**9}, "num_labels=1000000000 must be at most 1,048,576"),
        ({**MODEL, "model_type": "exaone4", "num_hidden_layers": 10**9, "sliding_window": None}, "at most 10,000"),
        ({"model_type": "t5", "num_layers": 10**9}, "num_layers=1000000000 must be at most 10,000"),
        ({"model_type": "gpt2", "n_positions": 10**13}, r"in entry.positions.weight of shape \[10000000000000, 768\]"),
        ({**NEO, "attention_types": [[["global", "local"], 10**9]]}, "stands for more than 10,000 layers"),
        (
            {**MIXTRAL, "num_hidden_layers": 1000, "num_local_experts": 16384},
            "num_local_experts=16384 in num_hidden_layers=1000 are 16,384,000 experts, .* nearest: 262",
        ),
        ({**GEMMA, "text_config": {"num_hidden_layers": 10**9}}, r"text_config\.num_hidden_layers=1000000000 must be"),
        ({**GEMMA, "vision_config": {"hidden_size": 10**9}}, r"vision_config\.hidden_size=1000000000 must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be at most 10,000"),
    ],
)
def test_a_size_out_of_all_bounds_is_refused_at_once(config: dict[str, Any], says: str, little_memory: None) -> None:
    start = time.process_time()
    with pytest.raises(ConversionError, match=says):
        read_model(config)
    assert time.process_time() - start < 5


def test_every_size_has_a_limit_or_needs_none() -> None:
    assert SIZES - LIMITS.keys() == UNLIMITED
    mapped = frozenset[str]().union(*(family.fields.mapped for family in FAMILIES.values()))
    assert {name for name in mapped if name.startswith(("num_", "n_"))} - LIMITS.keys() - UNLIMITED == {
        "num_ln_in_parallel_attn"  # 1 or 2, which transformers checks
    }


def test_weights_that_cannot_be_those_of_so_many_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10_000}))
    model = read_model(tmp_path)
    no_table: Callable[[Any], Any] = lambda *_: pytest.fail("made a table")  # noqa: E731
    monkeypatch.setattr("megatron_ds.hf.family.Family.table", no_table)
    with pytest.raises(ConversionError, match=r"21 tensors cannot be those of the 10,000 layers that config\.json has"):
        HFWeights(tmp_path, model)
