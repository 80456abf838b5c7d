"""BERT, RoBERTa and T5 as written are to transformers what they were: config, types of weights, how it generates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from megatron_ds.errors import ConversionError
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.reference import load_reference, predict
from tests.hf.models import Tensors, changed, hashes, opened
from tests.hf.test_encoder_classes import AUTO
from tests.parity.cases import VOCAB
from tests.parity.encoder_cases import ENCODER_CASES
from tests.ranks import run_alone


def without_pooler(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}


def config_of(directory: Path) -> dict[str, Any]:
    """The config as transformers has it, defaults filled in."""
    fields: dict[str, Any] = AutoConfig.from_pretrained(directory).to_dict()
    fields.pop("_name_or_path", None)
    return fields


@pytest.mark.parametrize("case", ENCODER_CASES)
def test_the_config_that_transformers_reads_is_the_same(case: str, encoders: Path, tmp_path: Path) -> None:
    """Every field, also those that mean nothing to us, and those whose default differs from family to family."""
    rewrite(encoders / case, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(encoders / case)


# ---- half precision --------------------------------------------------------------------------------------------------


def save_rewrite_and_load(encoders: Path, place: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Every case as transformers saves it in a type; source and what we write of it, loaded as they say they are."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ids = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = {}
    for case in ENCODER_CASES:
        source, out = place / case / "source", place / case / "out"
        auto = getattr(transformers, AUTO[opened(encoders / case).model.architecture])
        auto.from_pretrained(encoders / case, dtype=dtype).save_pretrained(source)
        rewrite(source, out)
        pair = [auto.from_pretrained(directory).eval() for directory in (source, out)]
        columns = {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if case.startswith("t5") else {})}
        with torch.no_grad():
            before, after = (predict(theirs, opened(source).model, columns) for theirs in pair)
        seen[case] = {
            "outputs": sorted(name for name in before.keys() | after.keys() if torch.equal(before[name], after[name])),
            "types": [{name: tensor.dtype for name, tensor in theirs.state_dict().items()} for theirs in pair],
        }
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_of_weights_are_those_that_transformers_saved(dtype: torch.dtype, encoders: Path, tmp_path: Path) -> None:
    """In fp16 it leaves a T5's `wo` in fp32; the config's dtype stays that of the rest."""
    seen = run_alone(save_rewrite_and_load, encoders, tmp_path, dtype)
    for case, found in seen.items():
        source, out = tmp_path / case / "source", tmp_path / case / "out"
        assert hashes(out) == hashes(source), case
        kept = {name for name, text in hashes(source).items() if text.startswith("F32 ")}
        fp32 = ".wo." if case.startswith("t5") and dtype == torch.float16 else None
        assert kept == {name for name in hashes(source) if fp32 is not None and fp32 in name}, case
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch."), case
        assert found["types"][0] == found["types"][1], case
        assert found["outputs"], case


# ---- classes ---------------------------------------------------------------------------------------------------------


def class_and_pooler(directory: Path) -> tuple[str, bool]:
    theirs = load_reference(directory, opened(directory).model)
    return type(theirs).__name__, theirs.pooler is not None


@pytest.mark.parametrize(("case", "name"), [("bert-base", "BertModel"), ("roberta-base", "RobertaModel")])
def test_a_base_model_without_a_pooler_stays_one(case: str, name: str, encoders: Path, tmp_path: Path) -> None:
    source = changed(encoders / case, tmp_path / "source", without_pooler)
    rewrite(source, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    assert run_alone(class_and_pooler, tmp_path / "out") == (name, False)


# ---- how it generates ------------------------------------------------------------------------------------------------

SUMMARISING = {"max_length": 200, "num_beams": 4, "length_penalty": 2.0, "early_stopping": True}
SETTINGS: list[dict[str, Any]] = [
    {**SUMMARISING, "no_repeat_ngram_size": 3},
    {"early_stopping": True},  # to no effect without beams, of which transformers warns only
    {"temperature": 0.7, "do_sample": False},
    {"task_specific_params": {"summarization": SUMMARISING}},
    {"eos_token_id": [1, 7], "decoder_start_token_id": 3, "pad_token_id": 5},
]


def settings_of(directories: list[Path]) -> list[dict[str, Any]]:
    """What steers `generate` in transformers' models; what is not set, and what is off, left out."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForSeq2SeqLM
    found = [auto.from_pretrained(directory).generation_config.to_dict() for directory in directories]
    return [{name: value for name, value in one.items() if value not in (None, False)} for one in found]


def test_settings_for_generating_of_an_old_config_are_kept(encoders: Path, tmp_path: Path) -> None:
    """transformers 5 drops them from the config, and its models take them from the file."""
    sources, outs = ([tmp_path / f"{name}{number}" for number in range(len(SETTINGS))] for name in ("source", "out"))
    for source, out, fields in zip(sources, outs, SETTINGS, strict=True):
        rewrite(changed(encoders / "t5-tied-relu", source, **fields), out)
    before, after = run_alone(settings_of, sources), run_alone(settings_of, outs)
    assert after == before
    first = json.loads((outs[0] / "generation_config.json").read_text())
    assert first.items() >= SETTINGS[0].items()


def test_settings_that_transformers_refuses_are_refused_in_one_line(encoders: Path, tmp_path: Path) -> None:
    source = changed(encoders / "t5-tied-relu", tmp_path / "source", early_stopping=3)
    with pytest.raises(ConversionError) as caught:
        rewrite(source, tmp_path / "out")
    assert str(caught.value).startswith(f"{source}: transformers refuses its settings for generating: `early_stopping`")
    assert "\n" not in str(caught.value) and sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]


def test_a_model_that_does_not_generate_has_none(encoders: Path, tmp_path: Path) -> None:
    """As transformers writes it; also where a careless save left a file."""
    source = changed(encoders / "bert-masked", tmp_path / "source", max_length=20)
    (source / "generation_config.json").write_text('{"max_length": 20}')
    rewrite(source, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
