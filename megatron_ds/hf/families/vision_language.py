"""Models of text and images. Each is its text model's table under another name, and the names of what passes through.

Names on the hub come first, those of transformers' modules in memory last. transformers 5 writes the first ones back,
except `vision_model.` inside the towers of some, which pass through as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope
from megatron_ds.hf.families.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from megatron_ds.hf.families.glm import GLM4
from megatron_ds.hf.families.llama import (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    RMS_FIELDS,
    SLIDING_FIELDS,
    biases,
    decoder,
    rms,
)
from megatron_ds.hf.families.ministral3 import MINISTRAL3
from megatron_ds.hf.family import Family
from megatron_ds.hf.vision_language import TextNames, vision_language
from megatron_ds.models.gpt import DecoderConfig

IN_MEMORY = TextNames("model.language_model")
LLAVA_NAMES = (TextNames("language_model.model", "language_model.lm_head"), IN_MEMORY)
QWEN2_VL_NAMES = (TextNames("model"), IN_MEMORY)
LLAVA_MODULES = ("vision_tower", "multi_modal_projector")

IMAGE = ("image_token_id", "image_token_index")
QWEN_VL_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
QWEN2_VL_IDS = (*QWEN_VL_IDS, "vision_token_id")
PROJECTOR = ("projector_hidden_act", "vision_feature_layer")
LLAVA_FIELDS = (*PROJECTOR, "vision_feature_select_strategy", "image_seq_length", "multimodal_projector_bias")
IDEFICS_FIELDS = ("scale_factor", "pad_token_id", "_pad_token_id")


def _qwen3_vl_text(config: Any) -> DecoderConfig:
    return decoder(config, rms(config), qk_norm=rms(config), **biases(config))


def _glm4v_text(config: Any) -> DecoderConfig:
    ropes = every_rope(config, partial=True, adjacent=True)
    return decoder(config, rms(config), norm_place="both", rotary=ropes, qkv_bias=True)


def _of_paligemma(text: Family) -> Family:
    """Return a text model of PaliGemma: text alone is its suffix, which attends causally, whatever this field says."""
    field = "use_bidirectional_attention"
    equal = {name: values for name, values in text.fields.equal.items() if name != field}
    return replace(text, fields=replace(text.fields, equal=equal, cosmetic=text.fields.cosmetic | {field}))


QWEN2_VL_TEXT, QWEN2_5_VL_TEXT = (
    replace(
        QWEN2,
        model_type=f"{name}_text",
        architecture=architecture,
        fields=FieldRules(RMS_FIELDS - {"head_dim"} | SLIDING_FIELDS | {"max_window_layers"}),
    )
    for name, architecture in (
        ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    )
)
QWEN3_VL_TEXT = replace(
    QWEN3,
    model_type="qwen3_vl_text",
    architecture="Qwen3VLForConditionalGeneration",
    fields=FieldRules(RMS_FIELDS | {"attention_bias"}),
    translate=_qwen3_vl_text,
)
GLM4V_TEXT = replace(
    GLM4,
    model_type="glm4v_text",
    architecture="Glm4vForConditionalGeneration",
    fields=FieldRules(RMS_FIELDS - {"head_dim"}, equal={"attention_bias": (True,)}),
    translate=_glm4v_text,
)

FAMILIES = (
    vision_language(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        [GEMMA3_TEXT],
        LLAVA_NAMES,
        LLAVA_MODULES,
        (*IMAGE, "boi_token_index", "boi_token_id", "eoi_token_index", "eoi_token_id"),
        ("mm_tokens_per_image", "initializer_range"),
    ),
    vision_language(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        [QWEN2_VL_TEXT],
        QWEN2_VL_NAMES,
        ("visual",),
        QWEN2_VL_IDS,
        flat=True,
    ),
    vision_language(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        [QWEN2_5_VL_TEXT],
        QWEN2_VL_NAMES,
        ("visual",),
        QWEN2_VL_IDS,
        flat=True,
    ),
    vision_language(
        "qwen3_vl", "Qwen3VLForConditionalGeneration", [QWEN3_VL_TEXT], (IN_MEMORY,), ("visual",), QWEN_VL_IDS
    ),
    vision_language(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        [MISTRAL, MINISTRAL3],
        LLAVA_NAMES,
        LLAVA_MODULES,
        IMAGE,
        (*PROJECTOR, "multimodal_projector_bias", "spatial_merge_size"),
    ),
    vision_language(
        "internvl",
        "InternVLForConditionalGeneration",
        [QWEN2, QWEN3, LLAMA],
        LLAVA_NAMES,
        LLAVA_MODULES,
        ("image_token_id",),
        (*PROJECTOR, "vision_feature_select_strategy", "image_seq_length", "downsample_ratio"),
    ),
    vision_language(
        "llava",
        "LlavaForConditionalGeneration",
        [LLAMA, MISTRAL, QWEN2],
        LLAVA_NAMES,
        LLAVA_MODULES,
        IMAGE,
        LLAVA_FIELDS,
    ),
    vision_language(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        [LLAMA, MISTRAL, QWEN2],
        LLAVA_NAMES,
        (*LLAVA_MODULES, "image_newline"),
        IMAGE,
        (*LLAVA_FIELDS, "image_grid_pinpoints"),
    ),
    vision_language(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        [_of_paligemma(GEMMA), _of_paligemma(GEMMA2)],
        LLAVA_NAMES,
        LLAVA_MODULES,
        IMAGE,
        ("projection_dim", "hidden_size", "vocab_size"),
        caps_logits=True,
    ),
    vision_language(
        "glm4v",
        "Glm4vForConditionalGeneration",
        [GLM4V_TEXT],
        (IN_MEMORY,),
        ("visual",),
        (
            *("image_token_id", "image_start_token_id", "image_end_token_id"),
            *("video_token_id", "video_start_token_id", "video_end_token_id"),
        ),
    ),
    *(
        vision_language(
            model_type,
            architecture,
            [LLAMA],
            (TextNames("model.text_model"),),
            ("vision_model", "connector"),
            ("image_token_id",),
            IDEFICS_FIELDS,
        )
        for model_type, architecture in (
            ("smolvlm", "SmolVLMForConditionalGeneration"),
            ("idefics3", "Idefics3ForConditionalGeneration"),
        )
    ),
)
