"""The families that we read and write, by `model_type`.

`FAMILIES.register(FAMILY.model_type, FAMILY)` adds one from outside.
"""

from __future__ import annotations

from megatron_ds.hf.families import (
    albert,
    apertus,
    bert,
    bloom,
    cohere,
    distilbert,
    electra,
    eurobert,
    falcon,
    gemma,
    glm,
    glm4_moe,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite_like,
    granitemoe,
    hunyuan,
    llama,
    llama_like,
    ministral3,
    mixtral,
    modernbert,
    nemotron,
    nomic_bert,
    opt,
    phi,
    phi3,
    qwen_moe,
    stablelm,
    starcoder2,
    t5,
    vision_language,
)
from megatron_ds.hf.family import Family
from megatron_ds.registry import Registry

MODULES = (
    # decoders
    gpt2,
    gpt_neox,
    gptj,
    opt,
    bloom,
    falcon,
    llama,
    phi3,
    gemma,
    starcoder2,
    phi,
    stablelm,
    gpt_bigcode,
    gpt_neo,
    cohere,
    nemotron,
    hunyuan,
    apertus,
    ministral3,
    llama_like,
    glm,
    granite_like,
    # mixtures of experts
    mixtral,
    qwen_moe,
    granitemoe,
    glm4_moe,
    gpt_oss,
    # encoders, and encoders with decoders
    bert,
    distilbert,
    electra,
    albert,
    modernbert,
    eurobert,
    nomic_bert,
    t5,
    # models of text and images
    vision_language,
)

FAMILIES: Registry[Family] = Registry("family")
for _family in (family for module in MODULES for family in module.FAMILIES):
    FAMILIES.register(_family.model_type, _family)
