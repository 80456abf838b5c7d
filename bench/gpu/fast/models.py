"""The models that are measured, as fields of Hugging Face configs, and their work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.gpu.record import TINY, pick
from bench.work import Work

LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The shapes of Llama 3.2 1B: 1.24 B parameters."""

LLAMA_8B = {
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}
"""The shapes of Llama 3 8B, with 4 of its 32 layers."""

QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""The shapes of Qwen3-30B-A3B, with 4 of its 48 layers."""

GEMMA_2: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 8192,
}
"""The shapes of Gemma 2 2B."""

BERT_LARGE: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

SMALL: dict[str, Any] = {
    **LLAMA_1B,
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
"""A model that a CPU trains in fp32 in seconds, as the reference of losses."""

LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def work(model: dict[str, Any], batch: int, seq_length: int, *, recompute: bool = False) -> Work:
    """Return work in bf16, or a small version of it if the commands themselves are tested."""
    full = Work(model=model, batch=batch, seq_length=seq_length, recompute=recompute, dtype="bf16")
    return replace(full.shrunk(), batch=min(batch, 2)) if TINY else full


LLAMA = work(LLAMA_1B, 2, 4096)
BLOCKS = work(LLAMA_8B, 2, 4096)
EXPERTS = work(QWEN3_MOE, 2, 4096)
GEMMA = work(GEMMA_2, 1, 8192)
LONG = work(LLAMA_1B, 1, 32_768, recompute=True)
ADAPTERS = work({**LLAMA_8B, "num_hidden_layers": 8}, 2, 4096)
BERT = work(BERT_LARGE, 32, 512)
LOSSES = replace(Work(model=SMALL, batch=4, seq_length=pick(256, 64), dtype="bf16"), lr=1e-3)
