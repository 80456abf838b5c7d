"""Published configs: those that are kept are unchanged, and those that are refused are refused for the right reason."""

import hashlib

import pytest

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.registry import FAMILIES
from tests.hf.hub_configs import HERE, HUB, REFUSED, SOURCES, VERBATIM, Config


def test_files_are_as_their_source_has_them() -> None:
    for source in SOURCES:
        content = (HERE / "hub" / source.file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == source.sha256, source.file
    assert {source.file for source in SOURCES} == {file.name for file in (HERE / "hub").glob("*.json")}
    assert len(VERBATIM) >= 80
    assert {source.outcome for source in SOURCES} == {"read", "refused"}


# Fields of supported classes that are refused, and how.
FIELDS = {
    "quantization_config": "quantization_config.quant_method=",
    "add_cross_attention": "add_cross_attention=True is not supported; supported: False",
}


def reason(config: Config) -> str:
    """Return how the refusal of a config must begin, by its own fields."""
    model_type, supported = config.get("model_type"), f"supported: {', '.join(FAMILIES)}"
    if model_type is None:
        return f"model_type is missing; {supported}"
    if model_type in FAMILIES:
        by_field = (words for name, words in FIELDS.items() if config.get(name))
        return next(by_field, f"architectures={config['architectures']!r} is not supported")
    unsupported = f"model_type={model_type!r} is not supported; "
    if "text_config" in config:
        seeing = ", ".join(name for name, family in FAMILIES.items() if family.passes_through)
        return f"{unsupported}it is more than a text model, and of those only these are: {seeing}"
    if model_type in ("kimi_k2", "nemotron-nas"):  # which transformers does not have
        return f"{unsupported}its code is in the directory (auto_map), and is not run; {supported}"
    parts = {"deepseek_v3": "it needs multi-head latent attention; "}
    parts["deepseek_v32"] = parts["glm_moe_dsa"] = "it needs multi-head latent attention over chosen keys; "
    return f"{unsupported}{parts.get(model_type, '')}{supported}"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_what_it_is(name: str) -> None:
    """No relative is named: gpt_oss is no gpt_neox, qwen3_moe no qwen3, mimo no llama."""
    with pytest.raises(ConversionError) as caught:
        read_model(REFUSED[name])
    assert str(caught.value).startswith(f"model.config: {reason(REFUSED[name])}")
    assert "nearest" not in str(caught.value)


def test_every_family_has_a_published_config() -> None:
    families = {config["model_type"] for config in HUB.values()}
    assert {family.same_as or name for name, family in FAMILIES.items()} <= families
