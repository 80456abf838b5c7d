"""Classes of transformers that are no decoders: what we write, their Auto classes load in silence; what is no model of
ours is refused by the name of a tensor; and a T5's head is tied where theirs is."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config import read_model
from megatron_ds.hf.convert import rewrite
from megatron_ds.hf.export_mark import MARK
from megatron_ds.hf.reference import predict
from tests.hf.models import Tensors, changed, hashes, opened
from tests.parity.cases import VOCAB
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.sampling import sampled
from tests.ranks import run_alone

OTHERS = ("ModernBert", "DistilBert", "Electra", "Albert", "EuroBert", "NomicBert")
AUTO = {
    "BertModel": "AutoModel",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "BertForPreTraining": "AutoModelForPreTraining",
    "RobertaModel": "AutoModel",
    "RobertaForMaskedLM": "AutoModelForMaskedLM",
    "XLMRobertaForMaskedLM": "AutoModelForMaskedLM",
    "CamembertModel": "AutoModel",
    **{f"{name}ForMaskedLM": "AutoModelForMaskedLM" for name in OTHERS},
    **{f"{name}Model": "AutoModel" for name in OTHERS},
    "MT5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}


def load_both(source: Path, target: Path) -> dict[str, Any]:
    """A source by its class, the target as a user loads it; transformers' warnings are kept."""
    said = io.StringIO()
    transformers.utils.logging.add_handler(logging.StreamHandler(said))
    transformers.utils.logging.disable_progress_bar()
    model = opened(source).model
    before = getattr(transformers, model.architecture).from_pretrained(source)
    auto = getattr(transformers, AUTO[model.architecture])
    after, found = auto.from_pretrained(target, output_loading_info=True)
    columns = {"input_ids": torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))}
    if model.core.has_cross_attention:
        columns["decoder_input_ids"] = columns["input_ids"].flip(1)
    with torch.no_grad():
        one, other = (predict(theirs.eval(), model, columns) for theirs in (before, after))
    return {
        "class": type(after).__name__,
        "found": {kind: list(names) for kind, names in found.items()},
        "same": sorted(name for name in one if torch.equal(one[name], other[name])),
        "said": said.getvalue(),
    }


OUTPUTS = {
    "AutoModel": ["hidden", "pooled"],
    "AutoModelForMaskedLM": ["logits"],
    "AutoModelForPreTraining": ["logits", "next_sentence"],
    "AutoModelForSeq2SeqLM": ["logits"],
}


@pytest.mark.parametrize("case", sampled(ENCODER_CASES))
def test_auto_classes_load_it_in_silence(case: str, encoders: Path, tmp_path: Path) -> None:
    source, out = encoders / case, tmp_path / "out"
    rewrite(source, out)
    architecture = json.loads((source / "config.json").read_text())["architectures"]
    assert json.loads((out / "config.json").read_text())["architectures"] == architecture
    generates = case.startswith(("t5", "mt5"))
    files = [MARK, "config.json", *["generation_config.json"] * generates, "model.safetensors"]
    assert sorted(file.name for file in out.iterdir()) == files
    seen = run_alone(load_both, source, out)
    assert [seen["class"]] == architecture
    assert not any(seen["found"].values()), seen["found"]
    without_pooler = AUTO[architecture[0]] == "AutoModel" and not getattr(opened(source).model.core, "pooler", True)
    assert seen["same"] == (["hidden"] if without_pooler else OUTPUTS[AUTO[architecture[0]]])
    # with an untied head it warns of its own T5s too: their config can't say so
    assert seen["said"] == "" or (generates and not opened(source).model.core.tied), seen["said"]


# ---- classes that we do not have -------------------------------------------------------------------------------------


def save_classes(directory: Path, names: list[tuple[str, str]]) -> None:
    for case, name in names:
        config = AutoConfig.for_model(**{**ENCODER_CASES[case], "architectures": [name]})
        getattr(transformers, name)(config).save_pretrained(directory / name)


BY_NAME = (  # classes that are read if `architectures` names them, and never taken for another without it
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "RobertaForSequenceClassification",
    "T5ForSequenceClassification",
)
REFUSED = {
    "BertForSequenceClassification": ("bert-base", "unexpected classifier.bias, classifier.weight, which bert"),
    "BertForTokenClassification": ("bert-base", "unexpected classifier.bias, classifier.weight, which bert"),
    "BertForQuestionAnswering": ("bert-base", "unexpected qa_outputs.bias, qa_outputs.weight, which bert"),
    "BertForNextSentencePrediction": ("bert-base", "unexpected cls.seq_relationship.bias, cls.seq_relationship.weight"),
    "RobertaForSequenceClassification": ("roberta-base", "unexpected classifier.dense.bias, classifier.dense.weight"),
    "T5ForQuestionAnswering": ("t5-tied-relu", "unexpected qa_outputs.bias, qa_outputs.weight, which t5"),
    "T5EncoderModel": ("t5-tied-relu", "is_encoder_decoder=False is not supported; supported: True"),
    "T5ForSequenceClassification": ("t5-tied-relu", "missing shared.weight"),
}


def refusal(directory: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        opened(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_classes_are_refused_by_name_and_else_by_the_name_of_a_tensor(tmp_path: Path) -> None:
    run_alone(save_classes, tmp_path, [(case, name) for name, (case, _) in REFUSED.items()])
    for name, (_, words) in REFUSED.items():
        if name in BY_NAME:
            assert opened(tmp_path / name).model.architecture == name
        else:
            assert f"architectures=['{name}'] is not" in refusal(tmp_path / name)
        assert words in refusal(changed(tmp_path / name, tmp_path / "unnamed", architectures=None)), name


@pytest.mark.parametrize(
    ("model_type", "named", "known"),
    [
        ("bert", ["BertForMultipleChoice"], "BertForMaskedLM, BertForPreTraining, BertModel, Bert{both}"),
        ("bert", "BertModel", "BertForMaskedLM, BertForPreTraining, BertModel, Bert{both}"),
        ("roberta", ["RobertaForMaskedLM", "RobertaForCausalLM"], "RobertaForMaskedLM, RobertaModel, Roberta{both}"),
        ("electra", ["ElectraForPreTraining"], "ElectraForMaskedLM, ElectraModel, Electra{both}"),
        ("albert", ["AlbertForPreTraining"], "AlbertForMaskedLM, AlbertModel, Albert{both}"),
        ("t5", ["T5ForTokenClassification"], "T5ForConditionalGeneration, T5Model, T5ForSequenceClassification"),
        ("camembert", ["RobertaForMaskedLM"], "CamembertForMaskedLM, CamembertModel, Camembert{both}"),
        ("mt5", ["MT5EncoderModel"], "MT5ForConditionalGeneration, MT5Model, MT5ForSequenceClassification"),
        ("llama", ["LlamaForQuestionAnswering"], "LlamaForCausalLM, LlamaModel, Llama{both}"),
        ("gpt2", ["GPT2DoubleHeadsModel"], "GPT2LMHeadModel, GPT2Model, GPT2{both}"),
        (
            "gemma3_text",
            ["Gemma3ForConditionalGeneration"],
            "Gemma3ForCausalLM, Gemma3TextModel, Gemma3TextForSequenceClassification",
        ),
    ],
)
def test_a_config_of_another_class_is_no_model_of_ours(model_type: str, named: Any, known: str) -> None:
    """With weights at random nothing else would tell."""
    name = known.rpartition(", ")[2].partition("{")[0]
    known = known.format(both=f"ForSequenceClassification, {name}ForTokenClassification")
    with pytest.raises(ConversionError) as caught:
        read_model({"model_type": model_type, "architectures": named})
    assert str(caught.value) == (
        f"model.config: architectures={named!r} is not supported; supported of {model_type}: {known}"
    )


@pytest.mark.parametrize(
    ("model_type", "named", "read_as"),
    [
        ("llama", ["LLaMAForCausalLM"], "LlamaForCausalLM"),
        ("falcon", ["RWForCausalLM"], "FalconForCausalLM"),
        ("t5", ["T5WithLMHeadModel"], "T5ForConditionalGeneration"),
        ("gpt2", ["GPT2Model"], "GPT2LMHeadModel"),
        ("bert", [], "BertForMaskedLM"),
        ("bert", None, "BertForMaskedLM"),
    ],
)
def test_old_names_base_models_and_none(model_type: str, named: Any, read_as: str) -> None:
    assert read_model({"model_type": model_type, "architectures": named}).architecture == read_as


# ---- T5's head -------------------------------------------------------------------------------------------------------

HEADS = ("absent", "equal", "different")


def with_head(source: Path, target: Path, head: str, word: bool | None) -> Path:
    """A T5 as transformers 4 wrote it: scale_decoder_outputs is a word of transformers 5."""

    def change(tensors: Tensors) -> Tensors:
        own = {"equal": tensors["shared.weight"].clone(), "different": tensors["lm_head.weight"]}
        others = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        return {**others, "lm_head.weight": own[head]} if head in own else others

    return changed(source, target, change, tie_word_embeddings=word, scale_decoder_outputs=None)


def tied_and_scaled(directories: list[Path]) -> list[tuple[bool, bool]]:
    """What transformers makes of them."""
    loaded = [transformers.T5ForConditionalGeneration.from_pretrained(directory) for directory in directories]
    return [(model.lm_head.weight is model.shared.weight, model.config.scale_decoder_outputs) for model in loaded]


@pytest.mark.parametrize("word", [True, False, None])
def test_bytes_say_whether_a_t5_is_tied(word: bool | None, encoders: Path, tmp_path: Path) -> None:
    """tie_word_embeddings says whether the head's input is scaled, as transformers 5 has it."""
    sources = [with_head(encoders / "t5-gated", tmp_path / head, head, word) for head in HEADS]
    theirs = run_alone(tied_and_scaled, sources)
    for source, (tied, scaled) in zip(sources, theirs, strict=True):
        core = opened(source).model.core
        assert (
            (core.tied, core.logit_multiplier != 1.0)
            == (tied, scaled)
            == (source.name != "different", word is not False)
        )
        rewrite(source, tmp_path / "out")
        assert opened(tmp_path / "out").model.core == core
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (written["tie_word_embeddings"], written["scale_decoder_outputs"]) == (scaled, scaled)  # 4's, 5's word
        assert hashes(tmp_path / "out") == hashes(tmp_path / ("absent" if tied else "different"))


def test_a_t5_without_a_head_is_one_that_has_it_tied(encoders: Path, tmp_path: Path) -> None:
    """T5Model is saved with the same tensors as a tied T5ForConditionalGeneration, and read as such by both."""
    run_alone(save_classes, tmp_path, [("t5-tied-relu", "T5Model")])
    model = opened(tmp_path / "T5Model").model
    assert model.core.tied and model.architecture == "T5ForConditionalGeneration"
    assert hashes(tmp_path / "T5Model").keys() == hashes(encoders / "t5-tied-relu").keys()


def test_a_t5_without_its_own_head_is_refused(encoders: Path, tmp_path: Path) -> None:
    """transformers 5 ties it in silence, as it does every T5 without a head; what was trained is another model."""
    run_alone(save_classes, tmp_path, [("t5-gated", "T5Model")])
    directory = tmp_path / "T5Model"
    assert run_alone(tied_and_scaled, [directory]) == [(True, False)]
    expected = (
        f"{directory}/config.json: architectures=['T5Model'] with tie_word_embeddings=False leaves out a head that is "
        "not the embedding; try T5ForConditionalGeneration, with the head among its weights"
    )
    assert refusal(directory) == expected
    assert refusal(changed(directory, directory, tie_word_embeddings=False, scale_decoder_outputs=None)) == expected
