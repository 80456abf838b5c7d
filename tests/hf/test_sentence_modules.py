"""Directories of sentence-transformers: what their modules say, what is refused, and which models have no head."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_ds.config import DataSection
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.sentence_modules import read_pooling
from megatron_ds.models.hidden_output import PoolingConfig
from megatron_ds.runtime.loaded_model import load_model
from megatron_ds.runtime.objective import find_objective
from tests.cli.conftest import Fork, fork, start  # noqa: F401
from tests.hf.models import changed, opened
from tests.hf.sentence_models import MODELS, save_sentence_model, write_modules
from tests.made_once import MakeOnce
from tests.parity.label_head_cases import FIRSTS

BERT = {**FIRSTS["bert"], "architectures": ["BertModel"]}
QWEN3 = {**FIRSTS["qwen3"], "architectures": ["Qwen3Model"], "tie_word_embeddings": True}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{MODELS}.Dense"}
FLAGS = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}


@pytest.fixture
def bert(once: MakeOnce, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    made, _ = once(save_sentence_model, BERT, {**FLAGS, "pooling_mode_mean_tokens": True}, True)
    return Path(shutil.copytree(made, tmp_path / "bert"))


@pytest.fixture
def qwen3(once: MakeOnce, tmp_path: Path) -> Path:
    made, _ = once(save_sentence_model, QWEN3, {"pooling_mode_lasttoken": True}, True)
    return Path(shutil.copytree(made, tmp_path / "qwen3"))


def add_module(directory: Path, *modules: dict[str, Any]) -> None:
    path = directory / "modules.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), *modules]))


@pytest.mark.parametrize(
    ("fields", "pick"),
    [
        ({**FLAGS, "pooling_mode_cls_token": True}, "first"),
        ({**FLAGS, "pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({**FLAGS, "pooling_mode_lasttoken": True}, "last"),
        (FLAGS, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, "first"),
        ({"embedding_dimension": 32, "pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, "mean"),
    ],
)
def test_both_spellings_of_a_pooling(fields: dict[str, Any], pick: str, tmp_path: Path) -> None:
    """Without a mode it is the mean, and the new spelling beats the old one: as in sentence-transformers."""
    assert read_pooling(tmp_path) is None
    write_modules(tmp_path, fields)
    assert read_pooling(tmp_path) == PoolingConfig(pick=pick)
    write_modules(tmp_path, fields, normalize=True)
    assert read_pooling(tmp_path) == PoolingConfig(pick=pick, normalize=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pooling_mode_max_tokens": True}, r"pooling_mode_max_tokens=True is not supported; supported: cls, mean, la"),
        ({"pooling_mode_weightedmean_tokens": True}, r"pooling_mode_weightedmean_tokens=True is not supported"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, r"pooling_mode_mean_sqrt_len_tokens=True is not supported"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            r"pooling_mode_cls_token=True and pooling_mode_mean_tokens=True must be one mode, not 2; supported: cls",
        ),
        ({"pooling_mode": "max"}, r"pooling_mode='max' is not supported; supported: cls, mean, lasttoken$"),
        ({"pooling_mode": ["cls", "mean"]}, r"pooling_mode=\['cls', 'mean'\] must be one mode, not 2"),
        ({"pooling_mode": None}, r"pooling_mode=None is not supported"),
        ({"pooling_mode": "mean", "include_prompt": False}, r"include_prompt=False is not supported: .*nearest: true$"),
        ({"pooling_mode_median": True}, r"pooling_mode_median=True is not a known field; remove it$"),
    ],
)
def test_other_poolings_are_refused_by_name(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_modules(tmp_path, fields)
    with pytest.raises(ConversionError, match=rf"1_Pooling/config\.json: {words}") as caught:
        read_pooling(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (
            [*"TPN", "Dense"],
            "a sentence_transformers.models.Dense, which is not supported here; supported: Transformer",
        ),
        ([*"TP", "Dense"], "a sentence_transformers.models.Dense, which is not supported here"),
        ([*"TP", "Dense", "N"], "a sentence_transformers.models.Dense, which is not supported here"),
        (["custom_st.Transformer", "P"], "a custom_st.Transformer, which is not supported here"),
        ([*"TNP"], "a sentence_transformers.models.Normalize, which is not supported here"),
        (["T"], "a Pooling must follow"),
        ({"a": 1}, "expected a list of modules"),
    ],
    ids=str,
)
def test_other_modules_are_refused_by_name(modules: Any, words: str, tmp_path: Path) -> None:
    write_modules(tmp_path, {"pooling_mode": "mean"})
    kinds = {"T": f"{MODELS}.Transformer", "P": f"{MODELS}.Pooling", "N": f"{MODELS}.Normalize", "Dense": DENSE["type"]}
    paths = {"P": "1_Pooling", "Dense": "2_Dense"}
    if isinstance(modules, list):
        modules = [{"path": paths.get(one, ""), "type": kinds.get(one, one)} for one in modules]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConversionError, match=words) as caught:
        read_pooling(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        (
            "sentence_bert_config.json",
            {"transformer_task": "fill-mask"},
            "'fill-mask' is not .*nearest: feature-extrac",
        ),
        ("2_Normalize/config.json", {"module_input_name": "a"}, "module_input_name='a' is not supported; nearest: sen"),
    ],
)
def test_other_inputs_of_a_module_are_refused(file: str, fields: dict[str, str], words: str, tmp_path: Path) -> None:
    write_modules(tmp_path, {"pooling_mode": "mean"}, normalize=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps({"max_seq_length": 8, **fields}))
    with pytest.raises(ConversionError, match=words):
        read_pooling(tmp_path)


def test_the_class_decides_whether_a_decoder_with_a_tied_head_has_one(qwen3: Path, tmp_path: Path) -> None:
    """A class with a head is a language model, as before, such as Qwen3-Embedding-0.6B; so is one without a pooling."""
    assert opened(qwen3).with_pooling().model.core.pooling == PoolingConfig(pick="last", normalize=True)
    assert opened(qwen3).model.architecture == "Qwen3Model" and not read_model(qwen3).core.generates
    named = changed(qwen3, tmp_path / "named", architectures=["Qwen3ForCausalLM"])
    write_modules(named, {"pooling_mode": "lasttoken"})
    for directory in (named, changed(qwen3, tmp_path / "without")):
        model = opened(directory).with_pooling().model
        assert model.architecture == "Qwen3ForCausalLM" and model.core.data_objective == "causal"
        assert model.core.pooling is None


def test_training_a_vector_is_refused(qwen3: Path) -> None:
    data = DataSection(train=[{"path": "b"}], format="text", seq_length=8)
    with pytest.raises(ConfigError, match=r"Qwen3Model, without a head to train; nearest: Qwen3ForCausalLM$"):
        find_objective("auto", load_model(qwen3), data, 0)


def test_exports_have_the_same_tensors_and_modules(qwen3: Path, tmp_path: Path) -> None:
    rewrite(qwen3, tmp_path / "again")
    before, after = (load_file(place / "model.safetensors") for place in (qwen3, tmp_path / "again"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3Model"] and config["tie_word_embeddings"] is True
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (qwen3 / name).read_bytes()
    assert read_pooling(tmp_path / "again") == read_pooling(qwen3)


def test_modules_that_are_not_supported_are_carried_and_give_no_vectors(bert: Path, tmp_path: Path) -> None:
    """A new head does not need them either."""
    add_module(bert, DENSE)
    rewrite(bert, tmp_path / "again")
    assert (tmp_path / "again" / "modules.json").read_bytes() == (bert / "modules.json").read_bytes()
    with pytest.raises(ConversionError, match=r"modules\.json: 2_Dense is a sentence_transformers\.models\.Dense"):
        load_model(bert)
    assert load_model(bert, head={"labels": 2}).hf.core.pooling is None


def test_inspect_shows_the_pooling(bert: Path, fork: Fork) -> None:  # noqa: F811
    out, err = fork("-m", "megatron_ds", "inspect", bert).communicate(timeout=60)
    assert "vectors     mean of the tokens, normalised" in " ".join(out.split("\n")), (out, err)
    add_module(bert, DENSE)
    out, err = fork("-m", "megatron_ds", "inspect", bert).communicate(timeout=60)
    assert "2_Dense is a sentence_transformers.models.Dense" in " ".join(out.split()), (out, err)
