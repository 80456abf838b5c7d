"""Tiny models of text and images with random weights, saved by transformers; their towers are in fp32, text in bf16."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hf.models import hashes

IMAGE_ID, VIDEO_ID = 128, 129
TEXT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
QWEN3_VL: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "text_config": {
        **TEXT,
        "model_type": "qwen3_vl_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "image_token_id": IMAGE_ID,
    "video_token_id": VIDEO_ID,
}
TOWER = "model.visual."


def save_seeing(directory: Path) -> None:
    """A Qwen3-VL as on the hub, but for a buffer of integers and the fp32 of its tower."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**QWEN3_VL))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    kinds = {name: tensor if name.startswith(TOWER) else tensor.bfloat16() for name, tensor in tensors.items()}
    kinds[f"{TOWER}position_ids"] = torch.arange(7)
    save_file(kinds, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "preprocessor_config.json").write_text('{"patch_size":  4}')
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def tower(directory: Path) -> dict[str, str]:
    """Name -> dtype, shape and SHA-256 of each tensor of the tower in a directory."""
    found = {name: one for name, one in hashes(directory).items() if name.startswith(TOWER)}
    assert len(found) > 10 and {one.split()[0] for one in found.values()} == {"F32", "I64"}, found
    return found


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
