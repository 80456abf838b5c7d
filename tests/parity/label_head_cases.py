"""Small configs of every class of transformers with a head for labels, of every type that has one.

A name is `model_type-what`. Classes are added to the first case of each type by themselves; a type needs no line here.
"""

from typing import Any

from megatron_ds.hf.label_classes import label_classes
from megatron_ds.hf.registry import FAMILIES
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.sampling import first_cases

PADDING = 3  # an id among those of the batches
BASES = {**FAMILY_CASES, **ENCODER_CASES}
FIRSTS = {model_type: BASES[case] for model_type, case in first_cases(BASES).items()}
OWN_PADDING = ("t5", "mt5", "roberta", "xlm-roberta", "camembert")  # types whose positions or ends depend on it


def labelled_case(model_type: str, name: str, **changes: Any) -> dict[str, Any]:
    """Return the first case of a type with the class `name`, three labels and an id of padding."""
    padding = {} if model_type in OWN_PADDING else {"pad_token_id": PADDING}
    return {**FIRSTS[model_type], **padding, "architectures": [name], "num_labels": 3, **changes}


def _kind(name: str) -> str:
    return "token" if name.endswith("ForTokenClassification") else "sequence"


EVERY_CLASS = {
    f"{model_type}-{_kind(name)}": labelled_case(model_type, name)
    for model_type, family in FAMILIES.items()
    if model_type in FIRSTS
    for name in label_classes(family)
}
_LLAMA, _BERT, _ROBERTA, _T5 = (f"{one}ForSequenceClassification" for one in ("Llama", "Bert", "Roberta", "T5"))
OPTIONS = {
    "llama-multi": labelled_case("llama", _LLAMA, problem_type="multi_label_classification"),
    "llama-regression": labelled_case("llama", _LLAMA, problem_type="regression"),
    "llama-one-label": labelled_case("llama", _LLAMA, num_labels=1),
    "llama-two-labels": labelled_case("llama", _LLAMA, num_labels=2),
    "llama-padding-ends": labelled_case("llama", _LLAMA, eos_token_id=PADDING),
    "llama-tied": labelled_case("llama", _LLAMA, tie_word_embeddings=True),
    "llama-token-no-bias": labelled_case(
        "llama", "LlamaForTokenClassification", token_classification_bias=False, classifier_dropout=0.0
    ),
    "opt-projected": labelled_case("opt", "OPTForSequenceClassification", word_embed_proj_dim=16),
    "bert-one-label": labelled_case("bert", _BERT, num_labels=1),
    "bert-multi": labelled_case("bert", _BERT, problem_type="multi_label_classification", num_labels=4),
    "roberta-regression": labelled_case("roberta", _ROBERTA, problem_type="regression", num_labels=2),
    "t5-untied": labelled_case("t5", _T5, tie_word_embeddings=False, decoder_start_token_id=3, num_labels=1),
}
_MODERN, _EURO = "ModernBertForSequenceClassification", "EuroBertForSequenceClassification"
_WIDE = {"classifier_bias": True, "norm_bias": True, "classifier_activation": "relu"}
POOLINGS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("modernbert-mean", "modernbert", _MODERN, {"classifier_pooling": "mean", **_WIDE}),
    ("eurobert-mean", "eurobert", _EURO, {"classifier_pooling": "mean", "num_labels": 1}),
    ("eurobert-bos", "eurobert", _EURO, {"classifier_pooling": "bos"}),
]
OPTIONS |= {case: labelled_case(kind, name, **changes) for case, kind, name, changes in POOLINGS if kind in FIRSTS}
LABEL_HEAD_CASES: dict[str, dict[str, Any]] = {**EVERY_CLASS, **OPTIONS}

# Base models of decoders: their head is not the embedding, and is not there.
BASE_CASES: dict[str, dict[str, Any]] = {
    f"{model_type}-no-head": {**FIRSTS[model_type], "tie_word_embeddings": False, "architectures": [name]}
    for model_type, name in (("qwen3", "Qwen3Model"), ("gpt2", "GPT2Model"), ("gpt_neox", "GPTNeoXModel"))
}

# `make test` has these alone; the sweep has all.
SAMPLE = (
    *OPTIONS,
    *("llama-sequence", "llama-token", "gpt2-sequence", "gpt2-token", "gpt_neox-token", "falcon-sequence"),
    *(f"{kind}-sequence" for kind, family in FAMILIES.items() if family.classes and family.same_as is None),
    *("bert-token", "modernbert-token", "t5-sequence"),
)
