"""Small models of each family, and batches with uneven labels, for parity with transformers."""

from dataclasses import dataclass, replace
from typing import Any

import torch

VOCAB = 131  # prime: no tensor size divides it
SEQ = 32
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 8,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt2-untied": {"tie_word_embeddings": False, "n_inner": 48},
    "llama": {"model_type": "llama", **_COMMON, "rope_parameters": LLAMA3_ROPE},
    "llama-tied-bias": {
        "model_type": "llama",
        **_COMMON,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", **_COMMON, "sliding_window": 7, "head_dim": 8},
    "qwen2": {
        "model_type": "qwen2",
        **_COMMON,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
    },
    "qwen2-tied": {"model_type": "qwen2", **_COMMON, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_COMMON, "head_dim": 8, "tie_word_embeddings": True},
    "qwen3-untied-bias": {"model_type": "qwen3", **_COMMON, "head_dim": 8, "attention_bias": True},
    "qwen2-2kv": {"model_type": "qwen2", **_COMMON, "num_key_value_heads": 2},
    "llama-1kv": {"model_type": "llama", **_COMMON, "num_key_value_heads": 1, "attention_bias": True},
    # on 4 ranks 3 query heads each, in groups of 2: a rank needs half of a group, and 3 key heads are shared by two
    "llama-uneven": {
        "model_type": "llama",
        **_COMMON,
        "hidden_size": 48,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 4,
    },
}
CONFIGS["gpt2-untied"] = {**CONFIGS["gpt2"], **CONFIGS["gpt2-untied"]}


@dataclass(frozen=True)
class Recipe:
    """One training run of a few steps, the same for reference and ours."""

    steps: int = 5
    global_batch: int = 8
    batches: tuple[int, ...] = ()  # samples of each step, if they differ
    micro_batch: int = 4
    lr: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    optimizer: str = "adamw"
    options: tuple[tuple[str, Any], ...] = ()  # of the optimizer
    eps: float = 1e-6  # a key bias without rotation has gradient 0: Adam must not blow its rounding noise up to lr
    grad_clip: float = 0.5
    precision: str = "fp32"
    attention_mask: bool = False
    packed: bool = False
    frozen: tuple[str, ...] = ()  # patterns of names that are not trained, which fit transformers' in memory too
    groups: tuple[tuple[str, float, float | None], ...] = ()  # pattern of names, factor of lr, weight decay
    length: int = SEQ
    padding_step: int = 1  # tokens of left padding that a row has more than the one before; every fifth has none
    labels_first: bool = True  # behind padding, the last token of it, which sees no token, predicts the first

    def at(self, step: int) -> "Recipe":
        """The recipe with the batch of one step."""
        return replace(self, global_batch=self.batches[step]) if self.batches else self


def global_batch(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """(G, S) ids and labels; some rows have few labels, one has none, so that a mean of means is visibly wrong."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCAB, (recipe.global_batch, recipe.length), generator=generator)
    labels = ids.clone()
    for row in range(recipe.global_batch):
        labels[row, : (row * 7 + step * 3) % (recipe.length - 1)] = -100
    labels[3] = -100
    batch = {"input_ids": ids, "labels": labels}
    if recipe.attention_mask:  # left padding of uneven length: the case that a causal mask alone gets wrong
        mask = torch.ones_like(ids)
        for row in range(recipe.global_batch):
            mask[row, : row % 5 * recipe.padding_step] = 0
        labels[mask == 0] = -100
        if not recipe.labels_first:
            labels[:, 1:][mask[:, :-1] == 0] = -100
        batch["attention_mask"] = mask
    return batch


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Labels aligned with the inputs -> targets of each position."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
