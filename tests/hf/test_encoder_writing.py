"""BERT, RoBERTa and T5 as written: checked against the live model at any depth, and how they generate."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.export_mark import MARK
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.models.sequential import HeadSpec, SequentialModel
from megatron_ds.runtime.export import CHECK_TOLERANCE, check_export
from tests.hf.models import DTYPES, Tensors, changed, opened
from tests.parity.cases import VOCAB
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.reference import make_model
from tests.ranks import run_alone

# ---- export.check ----------------------------------------------------------------------------------------------------

DEEP = {**ENCODER_CASES["t5-gated"], "num_layers": 12}


def check_deep(place: Path, dtype: str, size: float) -> dict[str, float | str]:
    """`export.check` of a T5 of 12 + 12 layers run in bf16: as it is, and with one weight of the export another.

    Args:
        size: of the weights, in units of 0.08.
    """
    model = make_model(DEEP)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else size)
    model.bfloat16().save_pretrained(place / "right")
    weights = opened(place / "right")
    live = SequentialModel(weights.model.core.build_layers()).bfloat16().eval()
    ids = torch.randint(2, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            parameter.copy_(weights.full(name))
        predicted: Any = {name: output.float() for name, output in live(batch).items()}
        model.to(DTYPES[dtype]).save_pretrained(place / "right")
        value = model.decoder.block[6].layer[0].SelfAttention.v.weight
        value.copy_(value.roll(1, 0))
        model.save_pretrained(place / "wrong")
    return {name: outcome(predicted, place / name, batch, dtype) for name in ("right", "wrong")}


def outcome(live: Tensors, directory: Path, batch: Tensors, dtype: str) -> float | str:
    axis = SimpleNamespace(rank=0, size=1, group=None, ranks=(0,))
    grid = SimpleNamespace(rank=0, tensor=axis, replica=axis, world=axis)
    engine: Any = SimpleNamespace(
        grid=grid, device=torch.device("cpu"), head=HeadSpec.per_column(), outputs=lambda columns: live
    )
    section: Any = SimpleNamespace(path=str(directory), dtype=dtype)
    try:
        return check_export(engine, opened(directory).model, section, "bf16", batch)
    except RuntimeError as problem:
        return str(problem)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_deep_model_is_held_against_its_own_rounding(dtype: str, tmp_path: Path) -> None:
    seen = run_alone(check_deep, tmp_path, dtype, 1.8)
    assert isinstance(seen["right"], float), seen["right"]
    assert seen["right"] > CHECK_TOLERANCE["bfloat16"], "not deep enough to tell"
    assert str(seen["wrong"]).endswith("; the export is wrong, please report it")


def test_where_rounding_hides_a_wrong_weight_nothing_passes(tmp_path: Path) -> None:
    for message in run_alone(check_deep, tmp_path, "bfloat16", 3.0).values():
        assert "more than 0.1; the export is wrong" in str(message)


def predict_at(directory: Path, lengths: tuple[int, ...]) -> list[float]:
    """Differences of one model's predictions, length after length, from those of transformers."""
    weights, theirs = opened(directory), load_reference(directory, opened(directory).model)
    live = SequentialModel(weights.model.core.build_layers()).eval()
    found = []
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            parameter.copy_(weights.full(name))
        for length in lengths:
            ids = torch.arange(2, 2 + length).repeat(2, 1)
            batch = {"input_ids": ids, "decoder_input_ids": ids[:, : length // 2]}
            output: Any = live(batch)
            found.append(float((output["logits"] - predict(theirs, weights.model, batch)["logits"]).abs().max()))
    return found


def test_a_t5_is_asked_at_one_length_after_another(encoders: Path) -> None:
    """Its biases are those of the length, though what they are made from is kept."""
    assert max(run_alone(predict_at, encoders / "t5-uneven-few", (10, 30, 10))) < 1e-4


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
    """What steers `generate` in transformers' models, and tasks; what is not set, and what is off, left out."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = []
    for directory in directories:
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)
        tasks = {"tasks": getattr(theirs.config, "task_specific_params", None)}
        settings = {**theirs.generation_config.to_dict(), **tasks}
        found.append({name: value for name, value in settings.items() if value not in (None, False)})
    return found


def test_settings_for_generating_of_an_old_config_are_kept(encoders: Path, tmp_path: Path) -> None:
    """transformers 5 drops them from the config, and its models take them from the file."""
    sources, outs = ([tmp_path / f"{name}{number}" for number in range(len(SETTINGS))] for name in ("source", "out"))
    for source, out, fields in zip(sources, outs, SETTINGS, strict=True):
        rewrite(changed(encoders / "t5-tied-relu", source, **fields), out)
    before, after = run_alone(settings_of, sources), run_alone(settings_of, outs)
    assert after == before
    assert after[0].items() >= SETTINGS[0].items() and after[3]["tasks"] == {"summarization": SUMMARISING}
    rewrite(outs[0], tmp_path / "again")
    assert (tmp_path / "again/generation_config.json").read_bytes() == (outs[0] / "generation_config.json").read_bytes()


def test_settings_that_transformers_refuses_are_refused_when_they_are_read(encoders: Path, tmp_path: Path) -> None:
    """Not when they are written, at the end of a run."""
    source = changed(encoders / "t5-tied-relu", tmp_path / "source", early_stopping=3)
    with pytest.raises(ConversionError) as caught:
        read_model(source)
    message = f"{source}/config.json: transformers refuses its settings for generating: `early_stopping` must be"
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    (source / "generation_config.json").write_text('{"num_beams": 2}')  # goes before them
    rewrite(source, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"num_beams": 2}'


def test_a_model_that_does_not_generate_has_none(encoders: Path, tmp_path: Path) -> None:
    """As transformers writes it; also where a careless save left a file."""
    source = changed(encoders / "bert-masked", tmp_path / "source", max_length=20)
    (source / "generation_config.json").write_text('{"max_length": 20}')
    rewrite(source, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [MARK, "config.json", "model.safetensors"]
