"""An image for each small model of text and images, as its processor would prepare it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ds.hf.registry import FAMILIES
from tests.parity.vision_language_cases import VISION_LANGUAGE_CASES

IMAGE_ID = 120  # below the vocabulary's size: these embeddings are looked up before those of the image take their place
SEQ = 32
SEEING = [name for name, family in FAMILIES.items() if family.passes_through]


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# Number of positions that the image takes, and the columns with it.
_SQUARE = {"pixel_values": _pixels(1, 3, 28, 28)}
_PATCHES = {"pixel_values": _pixels(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
_IN_A_ROW = {"pixel_values": _pixels(1, 1, 3, 28, 28)}
IMAGES: dict[str, tuple[int, dict[str, Tensor]]] = {
    "gemma3": (4, _SQUARE),
    "qwen2_vl": (4, _PATCHES),
    "qwen2_5_vl": (4, _PATCHES),
    "qwen3_vl": (4, _PATCHES),
    "mistral3": (2, {"pixel_values": _pixels(1, 3, 28, 56), "image_sizes": torch.tensor([[28, 56]])}),
    "internvl": (1, _SQUARE),
    "llava": (4, _SQUARE),
    "paligemma": (4, _SQUARE),
    "glm4v": (4, _PATCHES),
    "llava_next": (14, {"pixel_values": _pixels(1, 3, 3, 28, 28), "image_sizes": torch.tensor([[28, 56]])}),
    "smolvlm": (1, _IN_A_ROW),
    "idefics3": (1, _IN_A_ROW),
}


def config_of(model_type: str) -> dict[str, Any]:
    """The type's first case, with the id of an image among those of text."""
    config = next(config for config in VISION_LANGUAGE_CASES.values() if config["model_type"] == model_type)
    return {name: IMAGE_ID if name in ("image_token_id", "image_token_index") else one for name, one in config.items()}


def inputs_with_image(model_type: str) -> dict[str, Tensor]:
    """Ids with an image after the first two, and the image."""
    count, image = IMAGES[model_type]
    ids = torch.randint(3, IMAGE_ID, (1, SEQ), generator=torch.Generator().manual_seed(1))
    ids[0, 2 : 2 + count] = IMAGE_ID
    kinds = {"mm_token_type_ids": (ids == IMAGE_ID).int()} if "image_grid_thw" in image else {}
    return {"input_ids": ids, **kinds, **image}
