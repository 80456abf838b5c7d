"""Mixtures of experts made of dense models: they compute what the dense ones compute, and say what cannot be made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import megatron_ds as mds
from megatron_ds.cli.main import _run
from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import HFModel, read_model
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.upcycle import TARGETS, UpcycledWeights, Upcycling, mixture_of
from megatron_ds.models.gpt import DecoderConfig
from tests.hf.models import LLAMA3, build, opened
from tests.ranks import run_alone

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
MADE: dict[str, tuple[dict[str, Any], Upcycling]] = {
    "llama": ({"head_dim": 16, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, Upcycling(12)),
    "mistral": ({"sliding_window": 5, "tie_word_embeddings": True}, Upcycling(4, top_k=3)),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, Upcycling(4)),
    "qwen3": (
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
        },
        Upcycling(4, every=2),
    ),
    "granite": ({**MULTIPLIERS, "attention_bias": True}, Upcycling(4)),
}
"""Options that only the right field of the mixture's config keeps, and the mixture."""

ROUNDING = 2e-6  # of the largest logit; seen 4e-7. A weight of 0.999 instead of 1 gives 1e-3


def dense(directory: Path, model_type: str, dtype: str = "float32", **fields: Any) -> Path:
    """`directory`, with a dense model in it."""
    run_alone(_save, {**SIZES, "model_type": model_type, **fields}, dtype, directory)
    return directory


def _save(config: dict[str, Any], dtype: str, directory: Path) -> None:
    model = build(config, dtype)
    for parameter in model.parameters():
        parameter.data *= 0.3  # attention of larger weights is a choice of one position
    model.save_pretrained(directory)


def logits(directory: Path, options: dict[str, Any]) -> torch.Tensor:
    """(2, 24, V), by transformers, which must find every tensor that it needs and no other."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(found.values()), found
    ids = torch.randint(0, SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def imported(source: Path, target: Path, upcycling: Upcycling) -> HFModel:
    return mds.import_hf(source, target, upcycling=upcycling)


@pytest.mark.parametrize("model_type", MADE)
def test_logits_are_those_of_the_dense_model(model_type: str, tmp_path: Path) -> None:
    fields, upcycling = MADE[model_type]
    source = dense(tmp_path / "dense", model_type, **fields)
    core = imported(source, tmp_path / "mixture", upcycling).core
    assert isinstance(core, DecoderConfig) and core.moe is not None
    router = core.moe.router
    assert (router.num_experts, router.top_k) == (upcycling.num_experts, upcycling.top_k)
    assert core.moe.layers == tuple(range(upcycling.every - 1, 3, upcycling.every))
    wanted = run_alone(logits, source, {})
    found = run_alone(logits, tmp_path / "mixture", {"experts_implementation": "eager"})
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    print(f"{model_type}: largest difference {error:.1e} of the largest logit")
    assert error < ROUNDING


def test_every_target_is_tried() -> None:
    assert MADE.keys() == TARGETS.keys()
    assert {target.model_type for target in TARGETS.values()} <= set(FAMILIES)


def test_a_window_that_no_layer_has_is_left_out() -> None:
    """In a Qwen3 the window begins at a layer that this one lacks; in a Qwen3-MoE it is in all layers or in none."""
    config = {**SIZES, "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
    mixture = mixture_of(read_model(config), Upcycling(4))
    assert not mixture.config.use_sliding_window and not any(mixture.core.stacks["blocks"].windows)


def test_routers_are_random_by_seed(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense", "qwen3", "bfloat16", hidden_size=256, initializer_range=0.01)
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        imported(source, tmp_path / name, Upcycling(8, seed=seed))
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert {name for name, tensor in first.items() if not torch.equal(tensor, other[name])} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)
    }
    routers = torch.stack([first[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(3)]).float()
    assert not torch.equal(routers[0], routers[1])
    assert routers.std().item() == pytest.approx(0.01, rel=0.05) and abs(routers.mean().item()) < 1e-3
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}


def test_copies_take_no_memory(tmp_path: Path) -> None:
    """Of the experts of a layer one is in memory, whatever their number is."""
    weights = UpcycledWeights(opened(dense(tmp_path, "llama")), Upcycling(64))
    found = {name: full for name, full in weights.each() if ".experts." in name}
    assert len(found) == 2 * 3
    for full in found.values():
        assert len(full) == 64 and full.stride(0) == 0


def test_a_mixture_trains_like_any_other_model(tmp_path: Path) -> None:
    """Predictions and gradients equal transformers', although all experts of a layer are equal at first."""
    source = dense(tmp_path / "dense", "qwen2")
    imported(source, tmp_path / "mixture", Upcycling(4, every=2))
    assert mds.verify_hf(tmp_path / "mixture", tp=2).ok


# ---- what cannot be made ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "fields", "options", "words"),
    [
        (
            "olmo2",
            {},
            {},
            "cannot make a mixture of experts of olmo2; supported: llama, mistral, qwen2, qwen3, granite",
        ),
        (
            "llama",
            {"attention_bias": True},
            {},
            "attention_bias=True of this llama is not supported by mixtral; try a model without it",
        ),
        (
            "llama",
            {"mlp_bias": True},
            {},
            "mlp_bias=True of this llama is not supported by mixtral; try a model without it",
        ),
        (
            "granite",
            {"mlp_bias": True},
            {},
            "mlp_bias=True of this granite is not supported by granitemoe; try a model without it",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            {},
            "layer_types=['full_attention', 'sliding_attention', 'sliding_attention'] of this qwen3 is not supported",
        ),
        ("mistral", {}, {"every": 2}, "--moe-every=2 leaves dense layers, which a mixtral made of this mistral "),
        ("qwen3", {}, {"every": 4}, "--moe-every=4 must be at most num_hidden_layers=3; nearest: 3"),
    ],
)
def test_what_no_mixture_computes_is_refused(
    model_type: str, fields: dict[str, Any], options: dict[str, int], words: str, tmp_path: Path
) -> None:
    source = dense(tmp_path / "dense", model_type, **fields)
    with pytest.raises(ConversionError) as caught:
        imported(source, tmp_path / "mixture", Upcycling(4, **options))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "mixture").exists()


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ConversionError, match="cannot make a mixture of experts of t5; supported: llama, "):
        mixture_of(read_model({"model_type": "t5"}), Upcycling(4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts", "1"], "--experts=1 must be at least 2; nearest: 2"),
        (["--experts", "4", "--top-k", "5"], "--top-k=5 must be at most --experts=4; nearest: 4"),
        (["--experts", "4", "--top-k", "0"], "--top-k=0 must be at least 2, because the weight of a single"),
        (["--experts", "4", "--moe-every", "0"], "--moe-every=0 must be at least 1; nearest: 1"),
        (["--top-k", "2"], "--top-k is for mixtures of experts; add --experts N, or remove it"),
        (["--seed", "2"], "--seed is for mixtures of experts; add --experts N, or remove it"),
    ],
)
def test_options_are_checked_before_anything_is_read(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["import", str(tmp_path / "missing"), str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = dense(tmp_path / "dense", "qwen3"), tmp_path / "mixture"
    assert _run(["import", str(source), str(target), "--experts", "4", "--moe-every", "3", "--seed", "0"]) == 0
    assert f"imported {target}: qwen3_moe (Qwen3MoeForCausalLM), " in capsys.readouterr().out
    assert _run(["inspect", str(target)]) == 0
    assert f"import of {source}, as 4 experts" in capsys.readouterr().out
