"""Settings for the memory of activations that would do nothing, or that two files decide, are refused in one line."""

from typing import Any

import pytest

from megatron_ds.config import EngineConfig, check_activations
from megatron_ds.errors import ConfigError

FULL = {"recompute": "full", "offload_activations": True}


@pytest.mark.parametrize(
    ("fields", "section", "dense", "text"),
    [
        (
            {"offload_activations": True},
            {},
            True,
            "train.offload_activations=true moves the inputs of recomputed blocks, and train.recompute=none has none; "
            "try train.recompute=full, or train.offload_activations=false",
        ),
        (
            {"offload_activations": True, "recompute": "selective"},
            {},
            True,
            "train.offload_activations=true moves the inputs of recomputed blocks, and train.recompute=selective has "
            "none; try train.recompute=full, or train.offload_activations=false",
        ),
        (
            FULL,
            {"partition_activations": True, "cpu_checkpointing": True},
            True,
            "train.offload_activations=true and deepspeed.activation_checkpointing.cpu_checkpointing both decide how "
            "the inputs of recomputed blocks are kept; remove one of them",
        ),
        (
            FULL,
            {"partition_activations": True},
            True,
            "train.offload_activations=true and deepspeed.activation_checkpointing.partition_activations both decide "
            "how the inputs of recomputed blocks are kept; remove one of them",
        ),
        (
            {"keep_attention": True},
            {},
            True,
            "train.keep_attention=true spares recomputed blocks their attention, and train.recompute=none has none; "
            "try train.recompute=full, or train.keep_attention=false",
        ),
        (
            {"keep_attention": True, "recompute": "full", "compile": True},
            {},
            True,
            "train.keep_attention=true keeps the results of single operators, which train.compile=true may fuse; try "
            "train.compile=false",
        ),
        (
            {"keep_attention": True, "recompute": "full"},
            {"partition_activations": True},
            True,
            "train.keep_attention=true is of torch's checkpoints, and deepspeed.activation_checkpointing."
            "partition_activations of DeepSpeed's; remove one of them",
        ),
        (
            {"mlp_tile_tokens": 512},
            {},
            False,
            "train.mlp_tile_tokens=512 divides dense feed-forward layers, and all of this model's are mixtures of "
            "experts; remove it",
        ),
    ],
)
def test_refused(fields: dict[str, Any], section: dict[str, Any], dense: bool, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_activations(EngineConfig(**fields), {"activation_checkpointing": section}, has_dense_layers=dense)
    assert str(caught.value) == text


def test_not_refused() -> None:
    both = EngineConfig(**FULL, mlp_tile_tokens=512)
    check_activations(both, {}, has_dense_layers=True)
    section = {"activation_checkpointing": {"partition_activations": True}}
    check_activations(EngineConfig(recompute="full"), section, has_dense_layers=False)


def test_the_run_file_reaches_the_engine(make_run: Any) -> None:
    train = {"steps": 1, "recompute": "full", "offload_activations": True, "mlp_tile_tokens": 512}
    config = EngineConfig.of_run(make_run(train=train))
    assert (config.offload_activations, config.mlp_tile_tokens) == (True, 512)
