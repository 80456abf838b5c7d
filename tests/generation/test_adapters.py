"""Generation with adapters of peft: on their base model, and by the directory that they are in."""

from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from megatron_ds.generation import open_generator
from megatron_ds.generation.run import open_source
from megatron_ds.parallel.rank_info import RankInfo
from tests.generation.models import KINDS, NEW_TOKENS, PROMPTS, greedy, save_model
from tests.ranks import rank_device, run_ranks

CASES = {
    "decoder": (KINDS["rope, grouped heads"], {"target_modules": "all-linear"}),
    "encoder-decoder": (KINDS["relative biases, encoder"], {"target_modules": ["q", "k", "v", "o", "wi_0", "wo"]}),
    "directions": (KINDS["rope, grouped heads"], {"target_modules": ["q_proj", "o_proj"], "use_dora": True}),
}


def save_adapters(name: str, directory: Path) -> list[list[int]]:
    """Save a base model and adapters of random values; return what transformers and peft generate."""
    from peft import LoraConfig, get_peft_model

    logging.set_verbosity_error()
    case, fields = CASES[name]
    model = save_model(directory / "base", case)
    model.name_or_path = str(directory / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **fields)).eval()
    adapted.save_pretrained(directory / "adapter")
    return greedy(adapted)


def generate(info: RankInfo, directory: Path, tp: int, pp: int, by_adapter: bool) -> list[list[int]]:
    base, adapter = str(directory / "base"), str(directory / "adapter")
    model = open_source(adapter) if by_adapter else open_source(base, adapter)
    generator = open_generator(model, info.rank, rank_device(), tp=tp, pp=pp)
    return [row.ids for row in generator.generate(PROMPTS, NEW_TOKENS)]


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [("decoder", 2, 1), ("encoder-decoder", 1, 2), pytest.param("directions", 2, 1, marks=pytest.mark.sweep)],
)
def test_equals_peft(name: str, tp: int, pp: int, once: Any) -> None:
    directory, expected = once(save_adapters, name)
    assert len({token for row in expected for token in row}) > 5, "the model repeats itself"
    for found in run_ranks(generate, tp * pp, directory, tp, pp, pp == 2):
        assert found == expected
