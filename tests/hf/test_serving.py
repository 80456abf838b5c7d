"""Exports have the tensors that llama.cpp's converter looks for, by the table of its package `gguf`."""

import gguf
import pytest

from megatron_ds.hf.config import read_model
from tests.parity.cases import CONFIGS
from tests.parity.family_cases import FAMILY_CASES

CASES = {**CONFIGS, **FAMILY_CASES}
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "falcon": "falcon",
    "starcoder2": "starcoder2",
    "granite": "granite",
    "cohere": "command-r",
}
"""model_type -> the architecture that llama.cpp runs it as."""


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_tensor_has_a_place_in_gguf(model_type: str) -> None:
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[model_type])
    config = next(config for config in CASES.values() if config["model_type"] == model_type)  # the usual variant
    model = read_model(config)
    places = gguf.get_tensor_name_map(architecture, config.get("num_hidden_layers", 8))
    found = {name: places.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.tensors}
    assert None not in found.values(), [name for name, place in found.items() if place is None]
    assert len(set(found.values())) == len(found) > 20, "two tensors have one place"
