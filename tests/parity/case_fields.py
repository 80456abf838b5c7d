"""Fields that many small configs share, and the names of cases."""

from collections.abc import Mapping
from typing import Any

from tests.parity.cases import VOCAB

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LAYERS = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8}
LLAMA = {**LAYERS, "intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 64}
SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 96}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def cases_of(model_type: str, common: Mapping[str, Any], cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return cases named "type-what" by what they change in a type's common fields."""
    return {f"{model_type}-{name}": {"model_type": model_type, **common, **changes} for name, changes in cases.items()}
