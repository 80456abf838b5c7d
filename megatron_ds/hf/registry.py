"""The families that we read and write, by `model_type`.

`FAMILIES.register(FAMILY.model_type, FAMILY)` adds one from outside.
"""

from __future__ import annotations

import difflib
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.families.bert import BERT, ROBERTA
from megatron_ds.hf.families.bloom import BLOOM
from megatron_ds.hf.families.falcon import FALCON
from megatron_ds.hf.families.gemma import GEMMA2, GEMMA3_TEXT
from megatron_ds.hf.families.gpt2 import GPT2
from megatron_ds.hf.families.gpt_neox import GPT_NEOX
from megatron_ds.hf.families.gptj import GPTJ
from megatron_ds.hf.families.llama import GRANITE, LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3, SMOLLM3
from megatron_ds.hf.families.opt import OPT
from megatron_ds.hf.families.phi3 import PHI3
from megatron_ds.hf.families.starcoder2 import STARCODER2
from megatron_ds.hf.families.t5 import T5
from megatron_ds.hf.family import Family
from megatron_ds.registry import Registry

FAMILIES: Registry[Family] = Registry("family")
for _family in (
    *(GPT2, GPT_NEOX, GPTJ, OPT, BLOOM, FALCON),
    *(LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3_TEXT, OLMO2, GRANITE, SMOLLM3, STARCODER2),
    *(BERT, ROBERTA, T5),
):
    FAMILIES.register(_family.model_type, _family)

# The nearest family, where it isn't the one of the most similar name.
RELATIVES = {
    "albert": "bert",
    "camembert": "roberta",
    "codegen": "gptj",
    "distilbert": "bert",
    "electra": "bert",
    "gemma3": "gemma3_text",
    "gpt_bigcode": "starcoder2",
    "refinedweb": "falcon",
    "longt5": "t5",
    "mt5": "t5",
    "refinedwebmodel": "falcon",
    "umt5": "t5",
    "xlm-roberta": "roberta",
}


def family_of(model_type: Any) -> Family:
    """Return the family of a config's `model_type`.

    Raises:
        ConversionError: missing or not supported; names the nearest one.
    """
    supported = f"supported: {', '.join(FAMILIES.names)}"
    if model_type is None:
        raise ConversionError(f"model_type is missing; {supported}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        asked = str(model_type).lower()
        nearest = [RELATIVES[asked]] if asked in RELATIVES else difflib.get_close_matches(asked, FAMILIES.names, n=1)
        hint = f"nearest: {nearest[0]}" if nearest else supported
        raise ConversionError(f"model_type={model_type!r} is not supported; {hint}")
    return FAMILIES[model_type]
