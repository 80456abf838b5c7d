"""Layouts that are chosen for models and GPUs, by the estimate of their memory."""

import pytest

from megatron_ds.errors import ConfigError
from megatron_ds.new_run.layout import GB, ChosenLayout, Sizes, choose_layout, estimate

LLAMA_8B = Sizes(8_030_000_000, 32, 4096, 32, 4096, True)
LLAMA_70B = Sizes(70_600_000_000, 64, 8192, 80, 4096, True)


@pytest.mark.parametrize(
    ("sizes", "num_gpus", "memory", "expected"),
    [
        (Sizes(100_000_000, 12, 768, 12, 1024, True), 1, 24 * GB, (1, 1, "none")),
        (LLAMA_8B, 8, 80 * GB, (2, 1, "none")),
        (LLAMA_8B, 8, 40 * GB, (1, 3, "full")),
        (LLAMA_8B, 64, 80 * GB, (2, 1, "none")),
        (Sizes(8_030_000_000, 32, 4096, 32, 4096, False), 1, 24 * GB, (1, 1, "full")),
        (LLAMA_70B, 16, 80 * GB, None),
        (LLAMA_70B, 32, 80 * GB, (1, 3, "full")),
        (Sizes(LLAMA_8B.num_params, 25, 4096, 32, 4096, True), 8, 80 * GB, (1, 3, "none")),  # 25 heads are not divided
    ],
)
def test_the_first_layout_that_fits(
    sizes: Sizes, num_gpus: int, memory: int, expected: tuple[int, int, str] | None
) -> None:
    if expected is None:
        with pytest.raises(
            ConfigError, match=f"--gpus={num_gpus}: the model needs about .* try more GPUs, .*, or --lora"
        ):
            choose_layout(sizes, num_gpus, memory)
        return
    found = choose_layout(sizes, num_gpus, memory)
    assert (found.tensor, found.stage, found.recompute) == expected, found
    assert found.bytes_per_rank <= memory


def test_what_saves_memory_in_the_estimate() -> None:
    def of(*layout: object, num_gpus: int = 8) -> int:
        return estimate(LLAMA_8B, ChosenLayout(*layout), num_gpus)  # type: ignore[arg-type]

    assert of(1, 1, "none") > of(1, 1, "full") > of(2, 1, "full") > of(8, 1, "full")
    assert of(1, 1, "full") > of(1, 3, "full") > of(1, 3, "full", num_gpus=64)
    assert of(1, 1, "full") - of(1, 1, "full", num_gpus=16) == pytest.approx(12 * 8.03e9 / 16, rel=1e-6)
