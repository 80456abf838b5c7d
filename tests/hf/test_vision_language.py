"""Models of text and images: names of the text, what passes through, ties, and refusals; and they see as before."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import generation_config, read_model
from megatron_ds.hf.config_writing import config_json
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.end_tokens import known_end_ids
from megatron_ds.hf.registry import FAMILIES
from tests.hf.images import IMAGES, SEEING, config_of, inputs_with_image
from tests.hf.models import Tensors, changed, hashes, opened
from tests.parity.case_fields import LLAMA
from tests.parity.reference import make_model
from tests.parity.vision_language_cases import VISION_LANGUAGE_CASES
from tests.ranks import run_alone

# Types whose towers have a part `vision_model` on the hub, which transformers 5 leaves out when it saves a new model.
WITH_VISION_MODEL = ("gemma3", "llava", "llava_next", "paligemma")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each type, by its name: names as on the hub, the towers in fp32 and the text in bf16."""
    folder = tmp_path_factory.mktemp("seeing")
    run_alone(_save_all, folder)
    return folder


def _save_all(folder: Path) -> None:
    for model_type in SEEING:
        make_model(config_of(model_type)).save_pretrained(folder / "fp32" / model_type)
        fp32 = folder / "fp32" / model_type
        changed(fp32, folder / model_type, partial(_as_on_the_hub, model_type), dtype="bfloat16")


def _as_on_the_hub(model_type: str, tensors: Tensors) -> Tensors:
    family = FAMILIES[model_type]
    return {
        _hub_name(model_type, name): tensor if _passes(family, name) else tensor.bfloat16()
        for name, tensor in tensors.items()
    }


def _passes(family: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in family.passes_through)


def _hub_name(model_type: str, name: str) -> str:
    to = "vision_tower.vision_model." if model_type in WITH_VISION_MODEL else "vision_tower."
    return re.sub(r"^vision_tower\.", to, name)


# ---- what an image is for a model that was rewritten -----------------------------------------------------------------


@dataclass(frozen=True)
class Sight:
    """Problems of loading, logits with an image, and with another one."""

    problems: dict[str, list[str]]
    logits: torch.Tensor
    of_another: torch.Tensor


def _look(directory: Path, model_type: str) -> Sight:
    loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    model, found = loaded
    inputs = inputs_with_image(model_type)
    inputs = {name: one.to(model.dtype) if one.is_floating_point() else one for name, one in inputs.items()}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    return Sight({name: sorted(map(str, one)) for name, one in found.items() if one}, logits, other)


def _look_before_and_after(saved: Path, folder: Path) -> dict[str, tuple[Sight, Sight]]:
    seen = {}
    for model_type in SEEING:
        rewrite(saved / model_type, folder / model_type)
        seen[model_type] = _look(saved / model_type, model_type), _look(folder / model_type, model_type)
    return seen


def test_an_export_sees_an_image_as_before(saved: Path, tmp_path: Path) -> None:
    """Bit for bit; no key is missing or unexpected, and every tensor has its bytes and its dtype."""
    assert IMAGES.keys() == set(SEEING)
    for model_type, (before, after) in run_alone(_look_before_and_after, saved, tmp_path, timeout_s=200.0).items():
        assert before.problems == after.problems == {}, model_type
        assert torch.equal(before.logits, after.logits), model_type
        assert not torch.allclose(before.logits, before.of_another, atol=0.1), f"{model_type} does not look"
        ours = hashes(tmp_path / model_type)
        assert ours == hashes(saved / model_type), model_type
        assert {one.split()[0] for one in ours.values()} == {"F32", "BF16"}, model_type


@pytest.mark.parametrize("model_type", SEEING)
def test_config_is_kept(model_type: str, saved: Path) -> None:
    """Fields that no code knows too, and the towers' words; only the dtypes of the text and the version change."""
    raw = json.loads((saved / model_type / "config.json").read_text())
    raw["vision_config"] |= {"dtype": "float32", "of_nobody": {"rope_theta": None}}
    raw["text_config" if "text_config" in raw else "vision_config"] |= {"torch_dtype": "bfloat16"}
    raw |= {"of_the_hub": [1], "transformers_version": "4.50.0", "auto_map": {"AutoModel": "code.Model"}}
    written = config_json(read_model(raw), "float16")
    expected = deepcopy(raw) | {"dtype": "float16", "torch_dtype": "float16"}
    for part in (expected.get("text_config", {}),):
        part.update({name: "float16" for name in ("dtype", "torch_dtype") if name in part})
    expected["transformers_version"] = transformers.__version__
    del expected["auto_map"]
    assert written == expected


# ---- names -----------------------------------------------------------------------------------------------------------

# Form of the names -> what becomes of those on the hub, by the name of the text model there.
MEMORY: dict[str, list[tuple[str, str]]] = {
    "language_model.model.": [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
    ],
    "model.": [(r"^model\.", "model.language_model."), (r"^visual", "model.visual")],
}


def _in_memory(name: str, changes: list[tuple[str, str]]) -> str:
    for pattern, new in changes:
        changed_name = re.sub(pattern, new, name)
        if changed_name != name:
            return changed_name
    return name


@pytest.mark.parametrize("model_type", [one for one in SEEING if FAMILIES[one].other_rows])
def test_names_of_modules_in_memory_are_read_and_kept(model_type: str, saved: Path, tmp_path: Path) -> None:
    """As of saves by some versions of transformers 4."""
    hub = opened(saved / model_type)
    lead = hub.model.table["embedding.weight"].names[0].removesuffix("embed_tokens.weight")
    changes = MEMORY[lead]
    there = changed(
        saved / model_type,
        tmp_path / "memory",
        lambda tensors: {_in_memory(name, changes): tensor for name, tensor in tensors.items()},
    )
    found = opened(there)
    assert found.model.table["embedding.weight"].names == ("model.language_model.embed_tokens.weight",)
    assert len(found.model.passed_through) == len(hub.model.passed_through) > 10
    assert all(torch.equal(found.full(name), hub.full(name)) for name in hub.model.table)
    rewrite(there, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(there)


@pytest.mark.parametrize("model_type", SEEING)
def test_tensors_that_are_nobodys_are_refused_by_name(model_type: str, saved: Path, tmp_path: Path) -> None:
    """Inside the text model, and a tower there, as transformers 5.5 saved it: no name is shortened to one that fits."""
    family, names = FAMILIES[model_type], hashes(saved / model_type)
    body = opened(saved / model_type).model.table["embedding.weight"].names[0].removesuffix("embed_tokens.weight")
    tower = next(name for name in names if _passes(family, name))
    inside = f"model.language_model.{tower.removeprefix('model.')}"
    strange = f"{body}layers.0.self_attn.gate.weight"
    for changes, message in (
        ({tower: inside}, f"unexpected {inside}, which {model_type} with this config does not have"),
        ({tower: strange}, f"unexpected {strange}, which {model_type} with this config does not have"),
        (
            {name: None for name in names if _passes(family, name)},
            f"no tensor of the vision tower, which a {model_type}",
        ),
    ):
        there = changed(saved / model_type, tmp_path / "changed", partial(_renamed, changes))
        with pytest.raises(ConversionError, match=re.escape(message)):
            opened(there)


def _renamed(changes: dict[str, str | None], tensors: Tensors) -> Tensors:
    names = {name: changes.get(name, name) for name in tensors}
    return {new: tensors[name] for name, new in names.items() if new is not None}


# ---- configs ---------------------------------------------------------------------------------------------------------


def _ties() -> dict[tuple[str, Any, Any], tuple[bool, bool]]:
    """Type, tie at the top, tie in text_config (None: absent) -> whether transformers' class ties, and whether ours."""
    found = {}
    for model_type in SEEING:
        for top in (None, True, False):
            for text in (None, True, False):
                config = deepcopy(config_of(model_type))
                for part, tie in ((config, top), (config["text_config"], text)):
                    part.pop("tie_word_embeddings", None)
                    part.update({} if tie is None else {"tie_word_embeddings": tie})
                with torch.device("meta"):
                    theirs: Any = transformers.AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
                tied = theirs.get_input_embeddings().weight is theirs.lm_head.weight
                found[model_type, top, text] = tied, read_model(config).core.tied
    return found


def test_tie_is_that_of_the_class() -> None:
    """The field at the top decides, and text_config's only in some types; without either it is a matter of the type."""
    found = run_alone(_ties, timeout_s=200.0)
    assert {key: ours for key, (_, ours) in found.items()} == {key: theirs for key, (theirs, _) in found.items()}
    tied = {name for name, top, text in found if found[name, None, None][1]}
    assert tied == {"gemma3", "mistral3", "internvl", "paligemma"}
    by_text = {name for name, top, text in found if found[name, False, True][1]}
    assert by_text == {"qwen2_vl", "qwen2_5_vl", "llava", "glm4v"}


def test_two_different_tables_are_not_tied(saved: Path, tmp_path: Path) -> None:
    """Whatever the config says, as in transformers; what we write says it too, for versions that would tie them."""

    def with_head(tensors: Tensors) -> Tensors:
        (embedding,) = [tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
        return {**tensors, "language_model.lm_head.weight": -embedding}

    found = opened(changed(saved / "mistral3", tmp_path / "untied", with_head, tie_word_embeddings=None)).model
    assert found.config.tie_word_embeddings and not found.core.tied
    assert config_json(found, "bfloat16")["tie_word_embeddings"] is False


def test_axes_of_a_rotation_make_no_difference_to_text() -> None:
    config = config_of("qwen3_vl")
    other = deepcopy(config)
    other["text_config"]["rope_parameters"] |= {"mrope_section": [2, 4, 2], "mrope_interleaved": False}
    del config["text_config"]["rope_parameters"]["mrope_section"]
    assert read_model(other).core == read_model(config).core


def test_softcap_of_gemma3_is_the_text_models_alone() -> None:
    """The larger class leaves it out, and so do we; in a directory of the text model it counts."""
    text = {**LLAMA, "model_type": "gemma3_text", "final_logit_softcapping": 3.0}
    seeing = read_model(
        {"model_type": "gemma3", "text_config": text, "vision_config": config_of("gemma3")["vision_config"]}
    )
    assert seeing.core.logit_softcap is None and read_model(text).core.logit_softcap == 3.0


def test_defaults_are_those_of_the_larger_models_text() -> None:
    """Not those of the plain family: the base of Qwen3's rotation is 10000, and its windows are another field."""
    sparse = {"text_config": {"vocab_size": 131}, "vision_config": config_of("qwen3_vl")["vision_config"]}
    core = read_model({"model_type": "qwen3_vl", **sparse}).core
    assert core.rotary[0] is not None and core.rotary[0].theta == 5e5 and core.head_dim == 128
    small = read_model({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}).core
    assert small.windows == (4096,) * small.num_layers


def _attends_to_the_future() -> dict[tuple[str, bool], bool]:
    """Implementation of attention, and whether the ids are called a suffix -> whether the first logits see the last."""
    base: Any = make_model(config_of("paligemma"), attention="eager")
    ids = torch.randint(3, 100, (1, 16), generator=torch.Generator().manual_seed(1))
    seen = {}
    for attention in ("eager", "sdpa"):
        base.set_attn_implementation(attention)
        for named, kinds in ((False, {}), (True, {"token_type_ids": torch.ones_like(ids)})):
            logits = []
            for last in (5, 9):
                ids[0, -1] = last
                with torch.no_grad():
                    logits.append(base.eval()(input_ids=ids, use_cache=False, **kinds).logits[:, 0])
            seen[attention, named] = not torch.allclose(*logits, atol=1e-4)
    return seen


def test_text_alone_is_causal_in_paligemma() -> None:
    """By default transformers lets ids see later ones unless they are called a suffix; its eager attention does not."""
    assert run_alone(_attends_to_the_future) == {
        ("eager", False): False,
        ("eager", True): False,
        ("sdpa", False): True,
        ("sdpa", True): False,
    }
    assert read_model(config_of("paligemma")).core.causal


def test_end_of_text_is_in_text_config() -> None:
    """Unless the top has one; `generate` stops at the same ids."""
    config = config_of("gemma3")
    for given, ids in ((config, [0]), ({**config, "eos_token_id": [1, 106]}, [1, 106])):
        model = read_model(given)
        found = generation_config(model.config, model.core, given).eos_token_id
        assert known_end_ids(model, None) == (found if isinstance(found, list) else [found]) == ids


def test_ids_that_stand_for_images() -> None:
    assert read_model(config_of("gemma3")).placeholder_ids == {
        "image_token_index": 120,
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
    }
    flat = {**VISION_LANGUAGE_CASES["qwen2_5_vl-flat"], "vision_token_id": 9}
    assert read_model(flat).placeholder_ids == {
        "image_token_id": 132,
        "video_token_id": 133,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 9,
    }
    assert read_model(config_of("smolvlm")).placeholder_ids == {"image_token_id": 120}
    assert read_model(LLAMA | {"model_type": "llama"}).placeholder_ids == {}


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        (
            "gemma3",
            {"text_config": {"attn_logit_softcapping": 5.0}},
            "text_config.attn_logit_softcapping=5.0 is not supported",
        ),
        (
            "gemma3",
            {"text_config": {"slidng_window": 5}},
            "text_config.slidng_window=5 is not a known field; nearest: sliding_window",
        ),
        ("gemma3", {"text_config": []}, "text_config=[] must be a mapping"),
        (
            "mistral3",
            {"text_config": {"model_type": "phi3"}},
            "text_config.model_type='phi3' is not supported in a mistral3",
        ),
        ("llava", {"text_config": {"hidden_act": "x"}}, "text_config.hidden_act='x' is not supported"),
        ("qwen3_vl", {"num_hidden_layers": 3}, "num_hidden_layers=3 contradicts text_config.num_hidden_layers=4"),
        # of old GLM-4.1V; transformers takes its defaults instead, and rotates all of a head
        (
            "glm4v",
            {"text_config": None, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 is at the top, where transformers does not read it; move it to text_config",
        ),
        (
            "qwen3_vl",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config is not supported in a qwen3_vl",
        ),
        (
            "qwen3_vl",
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            "quantization_config is not supported in a qwen3_vl",
        ),
        ("qwen3_vl", {"architectures": ["Qwen3VLModel"]}, "architectures=['Qwen3VLModel'] is not supported"),
        ("gemma3", {"architectures": ["Gemma3ForSequenceClassification"]}, "is not supported; supported of gemma3: "),
        ("qwen3_vl", {"text_config": {"rope_parameters": {"rope_type": "new"}}}, "rope"),
    ],
)
def test_refusals(model_type: str, change: dict[str, Any], message: str) -> None:
    config = deepcopy(config_of(model_type))
    text = change.get("text_config")
    config |= change if not isinstance(text, dict) else {"text_config": {**config["text_config"], **text}}
    with pytest.raises(ConversionError, match=re.escape(message)):
        read_model(config)
