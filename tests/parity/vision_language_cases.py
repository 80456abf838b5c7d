"""Small configs of models of text and images; their towers are as small as their code allows.

Sequences of 32 go past windows and original lengths. Ids of images are above the vocabulary but where a name says
otherwise, so that random ids are text.
"""

from typing import Any

from tests.parity.case_fields import ALTERNATING, LLAMA, PLAIN_ROPE, SIX_HEADS, YARN_ROPE, cases_of
from tests.parity.cases import LLAMA3_ROPE, VOCAB

IMAGE_ID = VOCAB + 1
WIDE = {**LLAMA, "hidden_size": 64}  # heads of 8 dims: 4 pairs to divide among three axes
HEADS_OF_16 = {**LLAMA, "head_dim": 16}

_VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_PATCHES = {"image_size": 28, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **_VIT, **_PATCHES}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **_VIT, **_PATCHES}
PIXTRAL = {"model_type": "pixtral", "head_dim": 8, **_VIT, **_PATCHES, "image_size": 56}
_QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {**PLAIN_ROPE, "mrope_section": sections, **more}


def _text(common: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"text_config": {**common, **changes}}


def _qwen2_vl(model_type: str, tower: dict[str, Any]) -> dict[str, Any]:
    text = {**WIDE, "model_type": f"{model_type}_text"}
    ids = {"image_token_id": IMAGE_ID, "video_token_id": IMAGE_ID + 1}
    return cases_of(
        model_type,
        {"vision_config": {**_QWEN_TOWER, **tower}, **ids},
        {
            "windows-tied": {
                **_text(
                    text,
                    use_sliding_window=True,
                    sliding_window=7,
                    max_window_layers=2,
                    rope_parameters=_mrope([2, 1, 1], rope_theta=5e3),
                    pad_token_id=5,
                ),
                "tie_word_embeddings": True,
            },
            "flat": {
                **WIDE,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
                "rope_theta": 3e4,
            },
            "yarn": _text(text, rope_parameters={**YARN_ROPE, "mrope_section": [1, 1, 2]}, hidden_act="gelu"),
        },
    )


VISION_LANGUAGE_CASES: dict[str, dict[str, Any]] = {
    **cases_of(
        "gemma3",
        {"vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": IMAGE_ID},
        {
            "windows": _text(
                HEADS_OF_16,
                model_type="gemma3_text",
                sliding_window=7,
                layer_types=ALTERNATING,
                query_pre_attn_scalar=24,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                },
            ),
            # the head of the larger class bounds no logits, whatever the text model's config says
            "bias-softcap": _text(
                {**HEADS_OF_16, **SIX_HEADS},
                model_type="gemma3_text",
                attention_bias=True,
                final_logit_softcapping=0.5,
                pad_token_id=5,
                sliding_window=5,
                sliding_window_pattern=3,
            ),
            "untied": {
                **_text(HEADS_OF_16, num_key_value_heads=1, sliding_window=9, sliding_window_pattern=2),
                "tie_word_embeddings": False,
            },
        },
    ),
    **_qwen2_vl("qwen2_vl", {"embed_dim": 16, "hidden_size": 64, "mlp_ratio": 2}),
    **_qwen2_vl("qwen2_5_vl", {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 64}),
    **cases_of(
        "qwen3_vl",
        {
            "vision_config": {
                **_QWEN_TOWER,
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": IMAGE_ID,
            "video_token_id": IMAGE_ID + 1,
        },
        {
            "interleaved": _text(
                HEADS_OF_16,
                model_type="qwen3_vl_text",
                rope_parameters=_mrope([4, 2, 2], mrope_interleaved=True),
                pad_token_id=5,
            ),
            "bias-tied": {
                **_text(HEADS_OF_16, attention_bias=True, num_key_value_heads=2, hidden_act="gelu", rope_theta=3e4),
                "tie_word_embeddings": True,
            },
            "six-heads-yarn": {
                **_text(
                    {**LLAMA, **SIX_HEADS},
                    head_dim=12,
                    rope_parameters={**YARN_ROPE, "mrope_section": [2, 2, 2], "mrope_interleaved": True},
                ),
                "vision_config": {
                    **_QWEN_TOWER,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "out_hidden_size": 48,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0],
                },
            },
        },
    ),
    **cases_of(
        "mistral3",
        {"vision_config": PIXTRAL, "image_token_index": IMAGE_ID, "spatial_merge_size": 2},
        {
            "window": _text(HEADS_OF_16, model_type="mistral", sliding_window=7),
            "untied": {
                **_text(HEADS_OF_16, model_type="mistral", sliding_window=None, pad_token_id=5, num_key_value_heads=1),
                "tie_word_embeddings": False,
            },
            "yarn": _text(
                {**LLAMA, **SIX_HEADS},
                head_dim=12,
                model_type="mistral",
                sliding_window=None,
                rope_parameters=YARN_ROPE,
            ),
            "ministral3": _text(
                HEADS_OF_16,
                model_type="ministral3",
                rope_parameters={**YARN_ROPE, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0},
            ),
        },
    ),
    **cases_of(
        "internvl",
        {
            "vision_config": {**_VIT, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": IMAGE_ID,
        },
        {
            "qwen2-windows": _text(
                LLAMA, model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=2
            ),
            "qwen3-untied": {
                **_text(HEADS_OF_16, model_type="qwen3", attention_bias=True, pad_token_id=5),
                "tie_word_embeddings": False,
            },
            "llama": _text(
                {**LLAMA, **SIX_HEADS},
                model_type="llama",
                mlp_bias=True,
                attention_bias=True,
                rope_parameters=LLAMA3_ROPE,
            ),
        },
    ),
    **cases_of(
        "llava",
        {"vision_config": CLIP, "image_token_index": IMAGE_ID, "vision_feature_layer": -1},
        {
            "llama": _text(LLAMA, model_type="llama", attention_bias=True, pad_token_id=5, rope_parameters=LLAMA3_ROPE),
            "mistral": _text(HEADS_OF_16, model_type="mistral", sliding_window=7, num_key_value_heads=2),
            "qwen2-tied": {**_text({**LLAMA, **SIX_HEADS}, model_type="qwen2"), "tie_word_embeddings": True},
        },
    ),
    **cases_of(
        "llava_next",
        {
            "vision_config": CLIP,
            "image_token_index": IMAGE_ID,
            "vision_feature_layer": -1,
            "image_grid_pinpoints": [[28, 56], [56, 28]],
        },
        {
            "mistral": _text(HEADS_OF_16, model_type="mistral", sliding_window=7, pad_token_id=5),
            "llama": _text({**LLAMA, **SIX_HEADS}, model_type="llama", mlp_bias=True, attention_bias=True),
            "qwen2-tied": {**_text(LLAMA, model_type="qwen2", hidden_act="gelu"), "tie_word_embeddings": True},
        },
    ),
    **cases_of(
        "paligemma",
        {"vision_config": SIGLIP, "image_token_index": IMAGE_ID, "projection_dim": 32},
        {
            "gemma": _text(HEADS_OF_16, model_type="gemma", num_key_value_heads=1, pad_token_id=5),
            "gemma2-caps": _text(
                HEADS_OF_16,
                model_type="gemma2",
                sliding_window=7,
                attn_logit_softcapping=0.5,
                final_logit_softcapping=0.5,
                query_pre_attn_scalar=24,
            ),
            "six-heads-untied": {
                **_text({**LLAMA, **SIX_HEADS}, model_type="gemma", head_dim=12, attention_bias=True),
                "projection_dim": 48,
                "tie_word_embeddings": False,
            },
        },
    ),
    **cases_of(
        "glm4v",
        {
            "vision_config": {
                **_QWEN_TOWER,
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 64,
                "image_size": 16,
            },
            "image_token_id": IMAGE_ID,
            "video_token_id": IMAGE_ID + 1,
        },
        {
            "partial": _text(
                WIDE,
                model_type="glm4v_text",
                rope_parameters=_mrope([1, 1, 0], partial_rotary_factor=0.5),
                pad_token_id=5,
            ),
            "all-dims-tied": {
                **_text(WIDE, num_key_value_heads=2, hidden_act="gelu", rope_parameters=_mrope([1, 1, 2])),
                "tie_word_embeddings": True,
            },
            "one-kv-head-yarn": _text(
                WIDE, num_key_value_heads=1, rope_parameters={**YARN_ROPE, "mrope_section": [2, 1, 1]}
            ),
        },
    ),
    **{
        name: case
        for model_type in ("smolvlm", "idefics3")
        for name, case in cases_of(
            model_type,
            {"vision_config": {**_VIT, **_PATCHES}, "image_token_id": IMAGE_ID, "scale_factor": 2},
            {
                "bias": _text(LLAMA, model_type="llama", attention_bias=True, mlp_bias=True, pad_token_id=5),
                "one-kv-head-tied": {
                    **_text(LLAMA, model_type="llama", num_key_value_heads=1, rope_theta=2e4),
                    "tie_word_embeddings": True,
                },
                "six-heads": _text({**LLAMA, **SIX_HEADS}, model_type="llama", rope_parameters=LLAMA3_ROPE),
            },
        ).items()
    },
}
