"""Names that wrappers and larger models put around those of a family, and tied models of which one name was saved."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from megatron_ds.errors import ConversionError
from megatron_ds.hf.convert import rewrite
from megatron_ds.log import LOGGER_NAME, SHOWN
from tests.hf.models import Tensors, build, changed, hashes, opened
from tests.parity.cases import CONFIGS
from tests.ranks import run_alone

Rename = Callable[[str], str]

NAMES: dict[str, tuple[Rename, str]] = {
    "compiled": (lambda name: f"_orig_mod.{name}", "without '_orig_mod.'"),
    "distributed": (lambda name: f"module.{name}", "without 'module.'"),
    "compiled and distributed": (lambda name: f"module._orig_mod.{name}", "without '_orig_mod.' and 'module.'"),
    "distributed twice": (lambda name: f"module.module.{name}", "without 'module.module.'"),
    "lightning with deepspeed": (lambda name: f"_forward_module.net.{name}", "without '_forward_module.' and 'net.'"),
    "in a module of the user's": (lambda name: f"agent.policy.{name}", "without 'agent.policy.'"),
    "layers compiled": (lambda name: re.sub(r"(\.\d+\.)", r"\1_orig_mod.", name), "without '_orig_mod.'"),
    "fsdp": (
        lambda name: "_fsdp_wrapped_module." + re.sub(r"(\.\d+\.)", r"\1_fsdp_wrapped_module.", name),
        "without '_fsdp_wrapped_module.'",
    ),
    "checkpointed": (
        lambda name: re.sub(r"(\.\d+\.)", r"\1_checkpoint_wrapped_module.", name),
        "without '_checkpoint_wrapped_module.'",
    ),
    "peft, merged": (lambda name: f"base_model.model.{name}", "without 'base_model.model.'"),
    "text model": (lambda name: f"language_model.{name}", "without 'language_model.'"),
    "text model, compiled": (
        lambda name: f"_orig_mod.language_model.{name}",
        "without '_orig_mod.' and 'language_model.'",
    ),
}
# of the families with the prefix "model."
TEXT_NAMES: dict[str, tuple[Rename, str]] = {
    "in memory": (lambda name: name.replace("model.", "model.language_model."), "without 'language_model.'"),
    "text_model": (lambda name: name.replace("model.", "model.text_model."), "without 'text_model.'"),
    "twice": (
        lambda name: name.replace("model.", "model.language_model.model."),
        "without 'language_model.' and 'model.'",
    ),
    "without prefix": (lambda name: "module." + name.removeprefix("model."), "without 'module.'"),
}


def renamed(source: Path, target: Path, rename: Rename) -> Path:
    return changed(source, target, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def is_read_as(directory: Path, source: Path, scratch: Path) -> bool:
    """Whether a directory is written with the names and bytes of another."""
    rewrite(directory, scratch)
    return hashes(scratch) == hashes(source)


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen2-tied"])
@pytest.mark.parametrize("form", NAMES)
def test_names_around_all_tensors_are_left_out(form: str, case: str, saved: Path, tmp_path: Path) -> None:
    rename, text = NAMES[form]
    source = saved / case / "float32"
    directory = renamed(source, tmp_path / "renamed", rename)
    assert opened(directory).source.renaming == text
    assert is_read_as(directory, source, tmp_path / "out")


@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "qwen3"])
@pytest.mark.parametrize("form", TEXT_NAMES)
def test_names_of_a_text_model_in_a_larger_one(form: str, case: str, saved: Path, tmp_path: Path) -> None:
    rename, text = TEXT_NAMES[form]
    source = saved / case / "float32"
    directory = renamed(source, tmp_path / "renamed", rename)
    assert opened(directory).source.renaming == text or case != "llama"  # without a head all names begin alike
    assert is_read_as(directory, source, tmp_path / "out")


@pytest.mark.parametrize("case", ["bert-masked", "roberta-masked", "t5-tied-relu"])
@pytest.mark.parametrize("form", ["distributed", "compiled", "in a module of the user's"])
def test_encoders_too(form: str, case: str, encoders: Path, tmp_path: Path) -> None:
    """Also without the base model's prefix, with buffers, and with the names of old norms."""
    rename, text = NAMES[form]
    clean = tmp_path / "clean"
    rewrite(encoders / case, clean)

    def old(name: str) -> str:
        name = re.sub(r"^(bert|roberta)\.", "", name)
        return rename(name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))

    directory = renamed(encoders / case, tmp_path / "renamed", old)
    assert opened(directory).source.renaming == text
    assert is_read_as(directory, clean, tmp_path / "out")


@pytest.mark.parametrize("form", ["bin", "sharded", "sharded bin"])
def test_in_every_form_of_file(form: str, saved: Path, tmp_path: Path) -> None:
    source = saved / "llama" / "float32"
    directory = renamed(source, tmp_path / "renamed", NAMES["compiled and distributed"][0])
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    save = save_file if form == "sharded" else torch.save
    suffix = "model-{}.safetensors" if form == "sharded" else "pytorch_model-{}.bin"
    if form == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        weight_map = {name: suffix.format(number % 2) for number, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            save({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
        index = "model.safetensors.index.json" if form == "sharded" else "pytorch_model.bin.index.json"
        (directory / index).write_text(json.dumps({"weight_map": weight_map}))
    assert is_read_as(directory, source, tmp_path / "out")


def test_it_is_noted_once(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SHOWN.clear()
    directory = renamed(saved / "llama" / "float32", tmp_path / "renamed", NAMES["compiled"][0])
    logging.getLogger(LOGGER_NAME).propagate = True
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        opened(directory), opened(directory), opened(saved / "llama" / "float32")
    assert caplog.messages == [f"{directory}: tensor names are read without '_orig_mod.'"]


@pytest.mark.parametrize("form", ["compiled", "in a module of the user's", "only the head"])
def test_a_config_without_model_type_next_to_them(form: str, saved: Path, tmp_path: Path) -> None:
    source = saved / "gpt2" / "float32"

    def stored(tensors: Tensors) -> Tensors:
        if form == "only the head":
            tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
            return tensors
        return {NAMES[form][0](name): tensor for name, tensor in tensors.items()}

    directory = changed(source, tmp_path / "old", stored, model_type=None, architectures=None)
    assert opened(directory).model.family.model_type == "gpt2"
    assert is_read_as(directory, source, tmp_path / "out")


# ---- refused ---------------------------------------------------------------------------------------------------------


def refusal(directory: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        opened(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_or_unexpected_is_told_with_the_names_left_out(saved: Path, tmp_path: Path) -> None:
    source = saved / "llama" / "float32"

    def without_norm(tensors: Tensors) -> Tensors:
        return {f"module.{name}": tensor for name, tensor in tensors.items() if name != "model.norm.weight"}

    told = refusal(changed(source, tmp_path / "missing", without_norm))
    assert told.endswith(
        "missing model.norm.weight, which llama with this config needs; names were read without 'module.'"
    )

    def with_images(tensors: Tensors) -> Tensors:
        images = {f"vision_tower.layers.{index}.weight": torch.ones(2) for index in range(40)}
        return {**{f"language_model.{name}": tensor for name, tensor in tensors.items()}, **images}

    told = refusal(changed(source, tmp_path / "images", with_images))
    assert "unexpected vision_tower.layers.0.weight, vision_tower.layers.1.weight" in told
    assert told.endswith(
        "and 37 more, which llama with this config does not have; names were read without 'language_model.'"
    )

    def wider(tensors: Tensors) -> Tensors:
        return {f"_orig_mod.{n}": torch.ones(3) if n == "model.norm.weight" else t for n, t in tensors.items()}

    told = refusal(changed(source, tmp_path / "shape", wider))
    assert told.endswith("model.norm.weight has shape [3], the config says [32]; names were read without '_orig_mod.'")


def test_a_plain_mistake_is_told_as_before(saved: Path, tmp_path: Path) -> None:
    """All names begin with `model.`, and none fits better without it."""

    def cut(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}

    told = refusal(changed(saved / "qwen2-tied" / "float32", tmp_path / "cut", cut))
    assert (
        told.endswith("which qwen2 with this config needs") and "missing model.layers.1.input_layernorm.weight" in told
    )


@pytest.mark.parametrize("same", [True, False])
def test_two_names_of_one_tensor(same: bool, saved: Path, tmp_path: Path) -> None:
    source, name = saved / "llama" / "float32", "model.norm.weight"

    def both(tensors: Tensors) -> Tensors:
        plain = {name: tensors[name].clone() if same else tensors[name] + 1}
        return {**{f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, **plain}

    directory = changed(source, tmp_path / "both", both)
    if same:
        assert is_read_as(directory, source, tmp_path / "out")
    else:
        told = refusal(directory)
        assert name in told and f"_orig_mod.{name}" in told and "are two names of one tensor, and differ" in told


def test_an_adapter_that_is_not_merged(saved: Path, tmp_path: Path) -> None:
    def with_lora(tensors: Tensors) -> Tensors:
        found = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        query = "base_model.model.model.layers.0.self_attn.q_proj"
        found[f"{query}.base_layer.weight"] = found.pop(f"{query}.weight")
        return {**found, f"{query}.lora_A.default.weight": torch.ones(2, 32)}

    told = refusal(changed(saved / "llama" / "float32", tmp_path / "lora", with_lora))
    assert "self_attn.q_proj" in told and "is of an adapter that is not merged into the model" in told


# ---- one of two tied names -------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TIED = {
    **{case: CONFIGS[case] for case in ("gpt2", "qwen2-tied", "llama-tied-bias")},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, "intermediate_size": 64, "max_position_embeddings": 64},
    "opt": {"model_type": "opt", **SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"model_type": "bloom", "vocab_size": 131, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"model_type": "falcon", **SIZES},
}


def save_tied(directory: Path) -> None:
    """As transformers saves them, and as safetensors' `save_model`, which keeps the first name of a shared tensor."""
    for case, config in TIED.items():
        model = build({**config, "tie_word_embeddings": True})
        model.tie_weights()
        model.save_pretrained(directory / "plain" / case)
        save_model(model, str(directory / "head.safetensors"))
        head = load_file(directory / "head.safetensors")
        if case == "gpt_neox":
            head["embed_out.weight"] = head.pop("gpt_neox.embed_in.weight")  # the name that it would not keep
        changed(directory / "plain" / case, directory / "head" / case, lambda _: head)  # noqa: B023
        changed(directory / "plain" / case, directory / "wrapped" / case, lambda _: wrapped(head))  # noqa: B023


def wrapped(tensors: Tensors) -> Tensors:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def test_a_tied_model_that_stores_only_the_head(tmp_path: Path) -> None:
    run_alone(save_tied, tmp_path)
    for case in TIED:
        plain, names = hashes(tmp_path / "plain" / case), hashes(tmp_path / "head" / case)
        (head,) = names.keys() - plain.keys()
        assert head in ("lm_head.weight", "embed_out.weight"), head
        for name in ("head", "wrapped"):
            weights = opened(tmp_path / name / case)
            assert weights.model.core.tied, case
            rewrite(tmp_path / name / case, tmp_path / "out" / name / case)
            assert hashes(tmp_path / "out" / name / case) == plain, case


def test_an_untied_model_needs_both(saved: Path, tmp_path: Path) -> None:
    for name, left_out in (("head", "model.embed_tokens.weight"), ("embedding", "lm_head.weight")):
        directory = changed(
            saved / "llama" / "float32",
            tmp_path / name,
            lambda tensors: {n: t for n, t in tensors.items() if n != left_out},  # noqa: B023
        )
        assert f"missing {left_out}, which llama with this config needs" in refusal(directory)


@pytest.mark.parametrize(
    "names",
    [
        ("lm_head",),
        ("encoder.embed_tokens",),
        ("decoder.embed_tokens",),
        ("decoder.embed_tokens", "lm_head"),
        ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    ],
    ids=" ".join,
)
def test_t5_by_any_name_of_its_embedding(names: tuple[str, ...], encoders: Path, tmp_path: Path) -> None:
    source = encoders / "t5-tied-relu"

    def stored(tensors: Tensors) -> Tensors:
        shared = tensors.pop("shared.weight")
        return {**tensors, **{f"{name}.weight": shared.clone() for name in names}}

    assert is_read_as(changed(source, tmp_path / "stored", stored), source, tmp_path / "out")


def test_roberta_by_its_head(encoders: Path, tmp_path: Path) -> None:
    source = encoders / "roberta-masked"

    def stored(tensors: Tensors) -> Tensors:
        tensors["lm_head.decoder.weight"] = tensors.pop("roberta.embeddings.word_embeddings.weight")
        return tensors

    assert is_read_as(changed(source, tmp_path / "stored", stored), source, tmp_path / "out")
