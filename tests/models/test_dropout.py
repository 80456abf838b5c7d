"""Dropout stands where transformers has it: with a pattern in the place of chance, both sides still compute the same.

The pattern scales each feature, or each key of a probability, by another factor that goes by the probability of the
dropout: a dropout too many, too few, with another probability, or on the other side of a matrix, moves the result.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.hf.config import read_model
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.mlp import ACTIVATIONS, MLP
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.models.block import Block
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.verify.compare import difference
from tests.parallel.axes import ALONE
from tests.parity.alone_batches import make_batch
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.reference import make_model
from tests.ranks import run_alone

BERT_RATES = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
MODERNBERT_RATES = {"attention_dropout": 0.2, "embedding_dropout": 0.1, "mlp_dropout": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "modernbert-masked": {**ENCODER_CASES["modernbert-masked"], **MODERNBERT_RATES},
    "distilbert-masked": {**ENCODER_CASES["distilbert-masked"], "dropout": 0.3, "attention_dropout": 0.2},
    **{name: {**ENCODER_CASES[name], **BERT_RATES} for name in ("albert-masked", "nomic_bert-masked")},
    **{
        name: {**ENCODER_CASES[name], **({"dropout_rate": 0.3} if name.startswith("t5") else BERT_RATES)}
        for name in ("bert-masked", "bert-pretraining", "bert-base", "roberta-masked", "t5-tied-relu", "t5-gated")
    },
}
# After the embedding, and three or two a block; in a T5 at both ends of a stack, and four or six a block.
NUM_DROPOUTS = {
    **dict.fromkeys(("bert", "roberta", "modernbert", "nomic_bert"), 1 + 4 * 3),
    **dict.fromkeys(("distilbert", "albert"), 1 + 4 * 2),
    "t5": 2 + 2 * 4 + 2 + 2 * 6,
}
Calls = list[tuple[float, int]]
"""Of each dropout: its probability, and how many elements it sees."""


def patterned(x: Tensor, p: float) -> Tensor:
    """A factor for each place of the last dim, the same whatever the dims before it."""
    return x * (1.0 + p * torch.cos(3.0 * torch.arange(x.shape[-1])))


def put_in_the_place_of_chance(calls: Calls) -> None:
    """torch's two ways to drop, for the rest of this process."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        calls.append((p, x.numel()))
        return patterned(x, p)

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert scale is not None and not enable_gqa
        scores = q @ k.transpose(-1, -2) * scale
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return dropout(scores.softmax(-1), p) @ v

    F.dropout = dropout
    F.scaled_dot_product_attention = attention


def measure(config: dict[str, Any], directory: Path, change: Callable[[], None]) -> tuple[float, Calls, Calls]:
    """Relative error of the worst output, in training mode, and the dropouts of theirs and of ours."""
    make_model(config).save_pretrained(directory)
    weights = HFWeights(directory, read_model(directory))
    batch = make_batch(weights.model.core, padded=True)
    columns, seen = batch.columns, slice(None) if batch.compared is None else batch.compared
    theirs = load_reference(directory, weights.model, torch.float32).train()
    change()
    ours = SequentialModel(weights.model.core.build_layers()).train()
    calls: dict[str, Calls] = {"theirs": [], "ours": []}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights.shard(name, spec_of(parameter), ALONE))
        put_in_the_place_of_chance(calls["theirs"])
        expected = predict(theirs, weights.model, columns)
        put_in_the_place_of_chance(calls["ours"])
        found = ours(columns)
    worst = max(difference(found[name][seen], output[seen]).relative for name, output in expected.items())
    return worst, calls["theirs"], calls["ours"]


def nothing() -> None: ...


@pytest.mark.parametrize("case", CASES)
def test_dropout_stands_where_transformers_has_it(case: str, tmp_path: Path) -> None:
    apart, theirs, ours = run_alone(measure, CASES[case], tmp_path, nothing)
    assert ours == theirs
    assert len(ours) == NUM_DROPOUTS[CASES[case]["model_type"]]
    assert apart < 1e-5


# ---- what it would look like if it stood elsewhere ---------------------------------------------------------------


def none_on_the_embedding() -> None:
    """The first that is made of each model is the embedding's."""
    _each_made(HiddenDropout, lambda part, number: setattr(part, "p", 0.0 if number == 0 else part.p))


def none_on_probabilities() -> None:
    init = Attention.__init__

    def without(self: Attention, shape: Any, *arguments: Any, **options: Any) -> None:
        init(self, shape, *arguments, **options)
        object.__setattr__(self.shape, "dropout", 0.0)

    Attention.__init__ = without  # type: ignore[method-assign]


def none_inside_the_mlp() -> None:
    _each_made(MLP, lambda part, number: setattr(part.dropout, "p", 0.0))


def after_the_down_projection() -> None:
    """The MLP's moves behind its last matrix: as many, as likely."""

    def forward(self: MLP, x: Tensor, mask: Tensor | None = None) -> Tensor:
        up = self.up(x)
        gate, rest = up.chunk(2, dim=-1) if self.shape.gated else (up, None)
        act = ACTIVATIONS[self.shape.activation]
        hidden = act(gate) if rest is None else act(gate) * rest
        return self.dropout(self.down(hidden))

    MLP.forward = forward  # type: ignore[method-assign]


def after_the_sum() -> None:
    add = Block._add

    def moved(self: Block, x: Tensor, change: Tensor, *norms: Any) -> tuple[Tensor, Tensor]:
        output_norm, next_norm, dropout = norms
        total = dropout(add(self, x, change, output_norm, None, torch.nn.Identity())[1])  # type: ignore[arg-type]
        return (next_norm(total) if next_norm is not None else total), total

    Block._add = moved  # type: ignore[method-assign]


def _each_made(kind: type, change: Callable[[Any, int], None]) -> None:
    init: Any = kind.__init__
    made: list[Any] = []

    def changed(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        change(self, len(made))
        made.append(self)

    kind.__init__ = changed  # type: ignore[misc]


MOVED: list[tuple[Callable[[], None], str]] = [
    (none_on_the_embedding, "bert-masked"),
    (none_on_the_embedding, "t5-gated"),
    (none_on_probabilities, "bert-masked"),
    (none_on_probabilities, "t5-gated"),
    (none_inside_the_mlp, "t5-tied-relu"),
    (after_the_down_projection, "t5-gated"),
    (after_the_sum, "bert-masked"),
    (after_the_sum, "t5-tied-relu"),
]


@pytest.mark.parametrize(("change", "case"), MOVED, ids=lambda value: getattr(value, "__name__", value))
def test_one_that_stands_elsewhere_is_seen(change: Callable[[], None], case: str, tmp_path: Path) -> None:
    apart, _, _ = run_alone(measure, CASES[case], tmp_path, change)
    assert apart > 1e-3
