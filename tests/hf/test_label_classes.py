"""Classes with a head for labels: what their configs say, what is written back, and new heads over other models."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_ds.config import DataSection, ModelSection
from megatron_ds.config.run_config import HeadSection
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import HFModel, read_model, with_new_head
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.export import exporting
from megatron_ds.runtime.loaded_model import LoadedModel, load_model
from megatron_ds.runtime.objective import find_objective
from tests.hf.models import changed, opened
from tests.made_once import MakeOnce
from tests.parity.label_head_cases import FIRSTS, labelled_case
from tests.parity.reference import make_model

LLAMA, BERT = "LlamaForSequenceClassification", "BertForSequenceClassification"
SMALL = {**FIRSTS["llama"], "pad_token_id": 3}
QWEN = {**FIRSTS["qwen3"], "tie_word_embeddings": False}
MADE = {
    "llama": SMALL,
    "llama-labels": labelled_case("llama", LLAMA),
    "bert-token": labelled_case("bert", "BertForTokenClassification"),
    "t5-labels": labelled_case("t5", "T5ForSequenceClassification"),
    "bert": FIRSTS["bert"],
    "bert-base": {**FIRSTS["bert"], "architectures": ["BertModel"]},
    "roberta": FIRSTS["roberta"],
    "t5": {**FIRSTS["t5"], "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "qwen3-base": {**QWEN, "architectures": ["Qwen3Model"]},
}


def save_all(directory: Path) -> None:
    for name, config in MADE.items():
        make_model(config).save_pretrained(directory / name)


@pytest.fixture(scope="session")
def saved(once: MakeOnce) -> Path:
    """A directory with a model of each name in `MADE`."""
    return once(save_all)[0]


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


# ---- configs ---------------------------------------------------------------------------------------------------------


def head_of(**fields: Any) -> Any:
    labels = read_model({**SMALL, "architectures": [LLAMA], **fields}).core.labels
    assert labels is not None
    return labels


def test_two_labels_without_names_are_not_in_config_json(saved: Path, tmp_path: Path) -> None:
    """transformers leaves them out, and reads two from nothing."""
    assert head_of().num_labels == 2
    fields = config_of(saved / "llama-labels")
    assert set(fields["id2label"]) == {"0", "1", "2"} and "num_labels" not in fields
    two = changed(
        saved / "llama-labels",
        tmp_path / "two",
        lambda tensors: {**tensors, "score.weight": tensors["score.weight"][:2].clone()},
        id2label=None,
        label2id=None,
    )
    assert opened(two).model.core.labels.num_labels == 2
    rewrite(two, tmp_path / "again")
    assert not {"id2label", "label2id", "num_labels"} & config_of(tmp_path / "again").keys()
    assert opened(tmp_path / "again").model.core == opened(two).model.core


def test_names_and_problem_are_written_back(saved: Path, tmp_path: Path) -> None:
    fields = {"id2label": {"0": "bad", "1": "fair", "2": "good"}, "problem_type": "multi_label_classification"}
    named = changed(saved / "llama-labels", tmp_path / "named", **fields, label2id={"bad": 0, "fair": 1, "good": 2})
    assert opened(named).model.core.labels.loss == "multi_label_classification"
    rewrite(named, tmp_path / "again")
    written = config_of(tmp_path / "again")
    assert {name: written[name] for name in fields} == fields and written["label2id"]["good"] == 2
    assert written["architectures"] == [LLAMA]


def test_a_problem_is_not_written_before_it_is_known(saved: Path, tmp_path: Path) -> None:
    rewrite(saved / "llama-labels", tmp_path / "again")
    assert config_of(tmp_path / "again").get("problem_type") is None


@pytest.mark.parametrize(
    ("fields", "dropout"),
    [({}, 0.1), ({"classifier_dropout": 0.3}, 0.3), ({"classifier_dropout": 0.0}, 0.0)],
)
def test_dropout_of_the_states_of_tokens(fields: dict[str, float], dropout: float) -> None:
    """classifier_dropout, else hidden_dropout where a type has it, else 0.1; the state of a text has none."""
    assert head_of(**fields, architectures=["LlamaForTokenClassification"]).dropout == dropout
    bloom = {**FIRSTS["bloom"], "hidden_dropout": 0.2, **fields, "architectures": ["BloomForTokenClassification"]}
    token = read_model(bloom).core.labels
    assert token is not None and token.dropout == fields.get("classifier_dropout", 0.2)
    assert head_of(**fields).dropout == 0.0


def test_a_number_of_labels_beats_their_names(caplog: pytest.LogCaptureFixture) -> None:
    """As transformers has it, and some published classifiers need it."""
    with caplog.at_level(logging.INFO, logger="megatron_ds"):
        assert head_of(num_labels=7, id2label={"0": "a", "1": "b"}).num_labels == 7
    assert "num_labels=7 contradicts the 2 names of id2label, which do not count" in caplog.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"problem_type": "ranking"}, "problem_type"),
        ({"problem_type": "single_label_classification", "id2label": {"0": "a"}}, "problem_type"),
        ({"id2label": {"0": "a", "2": "b"}}, r"id2label=\{0: 'a', 2: 'b'\} must name the labels 0 to 1"),
        ({"classifier_dropout": 1.5}, r"classifier_dropout=1.5 must be a probability below 1"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, r"architectures=\['LlamaForQuestionAnswering'\] is not"),
    ],
)
def test_fields_that_contradict_a_head_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words) as caught:
        head_of(**fields)
    assert "\n" not in str(caught.value)


def test_a_pooler_that_no_head_uses_is_left_out(saved: Path, tmp_path: Path) -> None:
    """As in most token classifiers on the hub: transformers leaves it out, and says so."""
    source = saved / "bert-token"
    pooler = {f"bert.pooler.dense.{part}": torch.randn((32,) * dims) for part, dims in (("weight", 2), ("bias", 1))}
    old = changed(source, tmp_path / "old", lambda tensors: {**tensors, **pooler})
    rewrite(old, tmp_path / "again")
    before, after = (load_file(place / "model.safetensors") for place in (source, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_buffers_and_copies_of_old_saves_are_left_out(saved: Path, tmp_path: Path) -> None:
    """By the names that they have in the class with the head."""

    def with_old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shared, table = tensors["transformer.shared.weight"], "layer.1.EncDecAttention.relative_attention_bias.weight"
        copies = {f"transformer.{stack}.embed_tokens.weight": shared.clone() for stack in ("encoder", "decoder")}
        return {**tensors, **copies, f"transformer.decoder.block.0.{table}": torch.zeros(32, 8)}

    old = changed(saved / "t5-labels", tmp_path / "old", with_old)
    rewrite(old, tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(saved / "t5-labels" / "model.safetensors").keys()
    )


# ---- the id of padding -----------------------------------------------------------------------------------------------


def objective_of(model: HFModel, head: HeadSection | None = None) -> Any:
    section = ModelSection(path="a", head=head)
    data = DataSection(train=[{"path": "b"}], format="labelled", seq_length=8)
    return find_objective("auto", LoadedModel(model, section), data, 0).data


def test_a_run_without_an_id_of_padding_is_refused_with_the_fix() -> None:
    without = read_model({**SMALL, "architectures": [LLAMA], "pad_token_id": None})
    with pytest.raises(
        ConfigError,
        match=r"^pad_token_id=None is no id .* LlamaForSequenceClassification reads the last "
        r"token .*; set it in config\.json, such as eos_token_id=0$",
    ):
        objective_of(without)
    head = HeadSection(labels=2)
    new = with_new_head(read_model({**SMALL, "pad_token_id": None}), head)
    with pytest.raises(ConfigError, match=r"set model\.head\.pad_token_id, such as eos_token_id=0$"):
        objective_of(new, head)
    given = HeadSection(labels=2, pad_token_id=5)
    found = objective_of(with_new_head(read_model({**SMALL, "pad_token_id": None}), given), given)
    assert (found.label_column.name, found.classes, found.padding_id) == ("label", ("LABEL_0", "LABEL_1"), 5)


def test_an_encoder_needs_no_id_of_padding() -> None:
    assert objective_of(read_model({**FIRSTS["bert"], "architectures": [BERT], "pad_token_id": None})).padding_id == 0


# ---- new heads -------------------------------------------------------------------------------------------------------


def new_head(directory: Path, caplog: pytest.LogCaptureFixture, **head: Any) -> tuple[LoadedModel, str]:
    """A model with a new head, and what is logged of it."""
    with caplog.at_level(logging.INFO):
        model = load_model(directory, head=head)
    return model, next(line for line in caplog.messages if line.startswith("model.head: "))


def new_tensors(model: LoadedModel) -> set[str]:
    assert model.weights is not None
    return {name for native in model.weights.new for name in model.hf.table[native].names}


def test_a_new_head_over_a_language_model(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, line = new_head(saved / "llama", caplog, labels=["bad", "good", "none"])
    assert line == (f"model.head: a {LLAMA} with 3 labels (bad, good, none); new, with random values: score.weight")
    assert model.hf.config.label2id == {"bad": 0, "good": 1, "none": 2}
    assert "head.weight" not in model.hf.table and model.hf.core.labels.std == 0.02
    assert not model.hf.core.generates


@pytest.mark.parametrize(
    ("source", "head", "name", "new"),
    [
        ("llama", {"kind": "token"}, "LlamaForTokenClassification", {"score.weight", "score.bias"}),
        ("llama-labels", {}, LLAMA, {"score.weight"}),
        ("llama-labels", {"labels": 3, "problem": "regression"}, LLAMA, set()),
        (
            "bert",
            {},
            BERT,
            {f"{one}.{part}" for one in ("bert.pooler.dense", "classifier") for part in ("weight", "bias")},
        ),
        ("bert-base", {}, BERT, {"classifier.weight", "classifier.bias"}),
        ("bert-base", {"kind": "token"}, "BertForTokenClassification", {"classifier.weight", "classifier.bias"}),
        (
            "roberta",
            {},
            "RobertaForSequenceClassification",
            {f"classifier.{one}.{part}" for one in ("dense", "out_proj") for part in ("weight", "bias")},
        ),
        (
            "t5",
            {},
            "T5ForSequenceClassification",
            {f"classification_head.{one}.{part}" for one in ("dense", "out_proj") for part in ("weight", "bias")},
        ),
        ("qwen3-base", {"pad_token_id": 5}, "Qwen3ForSequenceClassification", {"score.weight"}),
    ],
)
def test_what_is_new_is_what_transformers_finds_missing(
    source: str, head: dict[str, Any], name: str, new: set[str], saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A head with another number of labels is new too, and what precedes it is read."""
    model, line = new_head(saved / source, caplog, **{"labels": 5, **head})
    assert model.hf.architecture == name and name in line
    assert new_tensors(model) == new
    _, found = getattr(transformers, name).from_pretrained(
        saved / source,
        num_labels=model.hf.core.labels.num_labels,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    missing = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    assert {one for one in missing if "embed_tokens" not in one} == new


def test_what_a_new_head_keeps_is_read_from_the_directory(saved: Path, tmp_path: Path) -> None:
    """And all of it is exported, as transformers' class."""
    model = load_model(saved / "bert-base", head={"labels": ["no", "yes"]})
    assert model.weights is not None
    with exporting(tmp_path / "out", model.hf, None, "5GB") as export:
        for name, row in model.hf.table.items():
            shape = row.op.native_shape(model.hf.axis_sizes)
            export.add(name, torch.ones(shape) if name in model.weights.new else model.weights.full(name))
        export.finish()
    before, after = (load_file(place / "model.safetensors") for place in (saved / "bert-base", tmp_path / "out"))
    assert {f"bert.{name}" for name in before} | {"classifier.weight", "classifier.bias"} == after.keys()
    assert all(torch.equal(one, after[f"bert.{name}"]) for name, one in before.items())
    _, found = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert config_of(tmp_path / "out")["id2label"] == {"0": "no", "1": "yes"}


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"labels": []}, "model.head.labels"),
        ({"labels": 0}, r"^model\.head\.labels=0 is neither names nor a number of at least 1; write \[a, b\], or 2$"),
        ({"labels": "a"}, r"^model\.head\.labels=a is neither names nor a number"),
        ({"labels": ["a", 1]}, r"^model\.head\.labels has 1, which is no name; write a text, in quotes$"),
        ({"labels": 1, "kind": "token"}, r"^model\.head\.labels=1 has nothing to choose with one label"),
        ({"labels": ["a", "b", "a"]}, r"model\.head\.labels has 'a' twice; give each label a name of its own"),
        (
            {"labels": 2, "kind": "token", "problem": "regression"},
            r"model\.head\.problem=regression is for labels of a",
        ),
        ({"labels": 1, "problem": "single_label_classification"}, "has nothing to choose with one label; nearest: reg"),
        ({"labels": 2, "pad_token_id": 131}, r"pad_token_id=131 must be below vocab_size=131; nearest: 130$"),
        ({"labels": 2, "pad_token_id": 5}, r"^model\.head\.pad_token_id=5 contradicts pad_token_id=3 in config\.json"),
    ],
)
def test_heads_that_make_no_sense_are_refused(head: dict[str, Any], words: str, saved: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_model(saved / "llama", head=head)
    assert "\n" not in str(caught.value)


def test_a_class_that_transformers_lacks_is_refused() -> None:
    granite = read_model(FIRSTS["granite"])
    with pytest.raises(
        ConfigError, match=r"^model\.head\.kind=sequence: there is no class ForSequenceClassification of"
    ):
        with_new_head(granite, HeadSection(labels=2))
    with pytest.raises(ConfigError, match=r"nearest: GPTJForSequenceClassification$"):
        with_new_head(read_model(FIRSTS["gptj"]), HeadSection(labels=2, kind="token"))


# ---- base models without a head --------------------------------------------------------------------------------------


def without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}


def test_a_decoder_without_a_head_is_a_base_model(saved: Path, tmp_path: Path) -> None:
    """As Qwen3-Embedding-8B: the class of a language model is named, no tensor has its prefix, and no head is there."""
    directory = changed(saved / "qwen3-base", tmp_path / "source", architectures=["Qwen3ForCausalLM"])
    weights = opened(directory)
    assert weights.model.architecture == "Qwen3Model" and not weights.model.core.generates
    with pytest.raises(ConfigError, match=r"Qwen3Model, without a head to train; nearest: Qwen3ForCausalLM$"):
        objective_of(weights.model)
    rewrite(directory, tmp_path / "again")
    before, after = (load_file(place / "model.safetensors") for place in (directory, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    _, found = transformers.Qwen3Model.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


def test_a_language_model_that_lacks_its_head_is_refused(saved: Path, tmp_path: Path) -> None:
    directory = changed(saved / "llama", tmp_path / "source", without_head, tie_word_embeddings=False)
    with pytest.raises(ConversionError, match=r"missing lm_head\.weight"):
        opened(directory)


def test_a_base_class_with_the_prefix_and_without_a_head(saved: Path, tmp_path: Path) -> None:
    directory = changed(
        saved / "llama", tmp_path / "source", without_head, tie_word_embeddings=False, architectures=["LlamaModel"]
    )
    assert opened(directory).model.architecture == "LlamaModel"
