"""The page on adding a family: its module and its commands, on a model of that family that transformers made."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from megatron_ds.hf.registry import FAMILIES
from tests.forked_python import run_python
from tests.ranks import run_alone

PAGE = Path(__file__).parents[2] / "docs" / "add_a_family.md"
CONFIG = {
    "model_type": "olmo",
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the page's module and path/to/olmo."""
    place, text = tmp_path_factory.mktemp("family"), PAGE.read_text(encoding="utf-8")
    module = re.findall(r"^```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)[0]
    (place / "olmo_family.py").write_text(module, encoding="utf-8")
    run_alone(_save, place / "path" / "to" / "olmo")
    return place


def _save(directory: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG))
    for parameter in model.parameters():  # biases too, which transformers makes 0
        torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(directory)


def test_every_command_of_the_page(place: Path) -> None:
    assert "olmo" not in FAMILIES, "the page adds a family that is already here"
    (block,) = re.findall(r"^```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    said = []
    for command in block.splitlines():
        program, *words = shlex.split(command)
        assert program == "megatron-ds"
        done = run_python("-m", "megatron_ds", *words, cwd=place, timeout=240, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert all("verdict     equal to transformers: path/to/olmo" in one for one in said[:2])
    assert re.search(r"^olmo +OlmoForCausalLM +texts +nothing: the family is from outside$", said[2], re.MULTILINE)


def test_an_option_without_a_block_is_refused(place: Path) -> None:
    config = (place / "path" / "to" / "olmo" / "config.json").read_text(encoding="utf-8")
    clipped = place / "clipped"
    clipped.mkdir()
    (clipped / "config.json").write_text(config.replace('"clip_qkv": null', '"clip_qkv": 8.0'), encoding="utf-8")
    words = ("verify", "clipped", "--import", "olmo_family")
    done = run_python("-m", "megatron_ds", *words, cwd=place, timeout=240, OMP_NUM_THREADS="1")
    assert done.returncode == 2
    assert "clip_qkv=8.0 is not supported; supported: None" in done.stderr
