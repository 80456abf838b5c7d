"""The keys that a query of ModernBERT sees in a layer with a window: measured in transformers, and the same in ours."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.config import read_model
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.models.sequential import SequentialModel
from tests.parallel.axes import ALONE
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.reference import make_model
from tests.ranks import run_alone

LENGTH, KEY = 24, 11


def seen_from(outputs: list[Tensor]) -> list[int]:
    """The distances from the token that differs at which the outputs (1, S, V) differ."""
    return [int(query) - KEY for query in (outputs[0] != outputs[1]).any(-1)[0].nonzero()]


def measure(local_attention: int, directory: Path) -> tuple[list[int], list[int]]:
    """Distances at which a token is seen through one layer with a window, in theirs and in ours."""
    one_layer = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "global_attn_every_n_layers": None}
    config = {**ENCODER_CASES["modernbert-masked"], **one_layer, "local_attention": local_attention}
    make_model(config).save_pretrained(directory)
    weights = HFWeights(directory, read_model(directory))
    theirs, ours = (
        load_reference(directory, weights.model, torch.float32),
        SequentialModel(weights.model.core.build_layers()),
    )
    ids = torch.arange(LENGTH)[None] + 10
    changed = ids.clone()
    changed[0, KEY] = 5
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights.shard(name, spec_of(parameter), ALONE))
        found = [
            [predict(theirs, weights.model, {"input_ids": one})["logits"] for one in (ids, changed)],
            [ours({"input_ids": one})["logits"] for one in (ids, changed)],  # type: ignore[index]
        ]
    return seen_from(found[0]), seen_from(found[1])


@pytest.mark.parametrize(("local_attention", "reach"), [(8, 4), (7, 3), (2, 1)])
def test_a_token_is_seen_from_both_sides_up_to_half_the_window(
    local_attention: int, reach: int, tmp_path: Path
) -> None:
    theirs, ours = run_alone(measure, local_attention, tmp_path)
    assert theirs == ours == list(range(-reach, reach + 1))
