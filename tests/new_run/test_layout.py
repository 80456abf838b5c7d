"""Layouts that are chosen for models and GPUs, by their planned memory."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from megatron_ds.config import load_run
from megatron_ds.errors import ConfigError, TopologyError
from megatron_ds.new_run import NewRun, write_run
from megatron_ds.new_run.layout import CANDIDATES, GB, USABLE, ChosenLayout, choose_layout


def test_the_first_layout_that_fits() -> None:
    sizes = {(1, 1, "none"): 90, (2, 1, "none"): 85, (1, 1, "full"): 70}

    def plan_bytes(layout: ChosenLayout) -> int:
        return sizes.get((layout.tensor, layout.stage, layout.recompute), 100) * GB

    found = choose_layout(plan_bytes, 8, 80 * GB, trains_all=True)
    assert found == ChosenLayout(1, 1, "full", 70 * GB)
    assert choose_layout(plan_bytes, 8, 90 * GB, trains_all=True).tensor == 2, f"{USABLE:.0%} of 90 GB are used"
    assert choose_layout(plan_bytes, 7, 90 * GB, trains_all=True).recompute == "full", "7 GPUs are not divided by 2"


@pytest.mark.parametrize(
    ("trains_all", "end"), [(True, r"\(--gpu-memory\), or --lora$"), (False, r"\(--gpu-memory\)$")]
)
def test_none_fits(trains_all: bool, end: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--gpus=8: the model needs about 100.0 GB on each GPU.*{end}"):
        choose_layout(lambda layout: 100 * GB, 8, 80 * GB, trains_all=trains_all)


def test_a_layout_that_the_run_refuses_is_passed_over() -> None:
    def plan_bytes(layout: ChosenLayout) -> int:
        if layout.tensor == 1:
            raise TopologyError("no")
        return GB

    assert choose_layout(plan_bytes, 8, 80 * GB, trains_all=True).tensor == 2
    with pytest.raises(TopologyError, match="no"):
        choose_layout(plan_bytes, 7, 80 * GB, trains_all=True)
    assert CANDIDATES[0] == ChosenLayout(1, 1, "none")


@pytest.mark.parametrize(
    ("num_gpus", "memory", "expected"),
    [(1, 80, None), (8, 80, (2, 1, "none")), (8, 40, (1, 3, "full"))],
)
def test_an_8b_model(tmp_path: Path, num_gpus: int, memory: int, expected: tuple[int, int, str] | None) -> None:
    """Its fp32 weights, moments and gradients alone need 16 bytes a parameter, 128 GB on one GPU."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "hf")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n' * 100)
    file = tmp_path / "run.yaml"
    new = NewRun(
        str(tmp_path / "hf"),
        str(tmp_path / "ids.jsonl"),
        str(tmp_path / "out"),
        num_gpus=num_gpus,
        gpu_bytes=memory * GB,
        random=True,
    )
    if expected is None:
        with pytest.raises(ConfigError, match=r"^--gpus=1: the model needs about [0-9.]+ GB on each GPU"):
            write_run(new, file)
        return
    found = write_run(new, file)
    assert (found.tensor, found.stage, found.recompute) == expected
    assert 0.3 * memory * GB < found.bytes_per_rank <= USABLE * memory * GB
    assert load_run(file).parallel.tensor == found.tensor
