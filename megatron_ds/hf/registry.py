"""The families that we read and write, by `model_type`.

`FAMILIES.register(FAMILY.model_type, FAMILY)` adds one from outside.
"""

from __future__ import annotations

from megatron_ds.hf.families.bert import BERT, CAMEMBERT, ROBERTA, XLM_ROBERTA
from megatron_ds.hf.families.bloom import BLOOM
from megatron_ds.hf.families.falcon import FALCON
from megatron_ds.hf.families.gemma import GEMMA2, GEMMA3_TEXT
from megatron_ds.hf.families.glm4_moe import DOTS1, ERNIE4_5_MOE, GLM4_MOE
from megatron_ds.hf.families.gpt2 import GPT2
from megatron_ds.hf.families.gpt_neox import GPT_NEOX
from megatron_ds.hf.families.gpt_oss import GPT_OSS
from megatron_ds.hf.families.gptj import GPTJ
from megatron_ds.hf.families.granitemoe import GRANITEMOE, GRANITEMOESHARED
from megatron_ds.hf.families.llama import GRANITE, LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3, SMOLLM3
from megatron_ds.hf.families.mixtral import MINIMAX_M2, MIXTRAL
from megatron_ds.hf.families.opt import OPT
from megatron_ds.hf.families.phi3 import PHI3
from megatron_ds.hf.families.qwen_moe import OLMOE, QWEN2_MOE, QWEN3_MOE
from megatron_ds.hf.families.starcoder2 import STARCODER2
from megatron_ds.hf.families.t5 import MT5, T5
from megatron_ds.hf.family import Family
from megatron_ds.registry import Registry

FAMILIES: Registry[Family] = Registry("family")
for _family in (
    *(GPT2, GPT_NEOX, GPTJ, OPT, BLOOM, FALCON),
    *(LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3_TEXT, OLMO2, GRANITE, SMOLLM3, STARCODER2),
    *(
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        OLMOE,
        GRANITEMOE,
        GRANITEMOESHARED,
        ERNIE4_5_MOE,
        GLM4_MOE,
        DOTS1,
        MINIMAX_M2,
        GPT_OSS,
    ),
    *(BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, T5, MT5),
):
    FAMILIES.register(_family.model_type, _family)
