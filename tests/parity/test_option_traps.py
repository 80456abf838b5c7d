"""Each mistake in an option of attention, norms and activations, put in on purpose, turns `verify` red.

Each patch is applied in the forked ranks only; the reference and the inputs are those of `megatron-ds verify`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.config import ParallelSection
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.attention_shape import QueryTemperature
from megatron_ds.layers.norm import EachHeadNorm, Norm
from megatron_ds.layers.xielu import XIELU
from megatron_ds.models.block import Block
from megatron_ds.models.stack import StackConfig
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.tensor import TensorParallel
from megatron_ds.verify.ours import run_rank
from megatron_ds.verify.report import InputReport
from megatron_ds.verify.run import merge
from tests.parity.case_fields import PLAIN_ROPE
from tests.parity.other_decoder_cases import OTHER_DECODER_CASES
from tests.parity.verified import Prepared, prepare
from tests.ranks import run_local_ranks

# Queries grow from a position on that random inputs do not reach: the inputs go past it.
FAR = "ministral3-far"
CASES = {
    **OTHER_DECODER_CASES,
    FAR: {
        **OTHER_DECODER_CASES["ministral3-plain-tied"],
        "max_position_embeddings": 256,
        "rope_parameters": {**PLAIN_ROPE, "llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 70},
    },
}


def _with_attention(**changes: Any) -> None:
    attention = StackConfig.attention
    StackConfig.attention = lambda self, layer: replace(attention(self, layer), **changes)  # type: ignore[method-assign]


def nothing() -> None:
    """No mistake."""


def head_norms_before_the_rotation() -> None:
    _with_attention(qk_norm_after_rotary=False)


def head_norms_after_the_rotation() -> None:
    _with_attention(qk_norm_after_rotary=True)


def no_head_norms() -> None:
    Attention._normed = lambda self, q, k: (q, k)  # type: ignore[method-assign]


def one_norm_for_all_heads() -> None:
    """Every head is multiplied by the weight of the first."""
    forward = EachHeadNorm.forward

    def shared(self: EachHeadNorm, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(self.weight[:1].expand_as(self.weight).clone())
        return forward(self, x)

    EachHeadNorm.forward = shared  # type: ignore[method-assign]


def queries_do_not_grow() -> None:
    QueryTemperature.scale = lambda self, q, positions: q  # type: ignore[method-assign]


def queries_grow_one_position_early() -> None:
    """As Llama 4 counts positions, from 1."""
    scale = QueryTemperature.scale

    def early(self: QueryTemperature, q: Tensor, positions: Tensor | None) -> Tensor:
        assert positions is None
        return scale(self, q, torch.arange(1, q.shape[0] + 1).expand(q.shape[1], -1))

    QueryTemperature.scale = early  # type: ignore[method-assign]


def norms_exchanged() -> None:
    """The norms of attention and of the MLP stand in each other's place."""
    forward = Block.forward

    def exchanged(self: Block, activations: Any) -> Any:
        own = self.attention_norm, self.mlp_norm
        self.mlp_norm, self.attention_norm = own
        try:
            return forward(self, activations)
        finally:
            self.attention_norm, self.mlp_norm = own

    Block.forward = exchanged  # type: ignore[method-assign]


def weight_without_one() -> None:
    """A layer norm multiplies by its weight instead of by 1 + weight."""
    init = Norm.__init__

    def without(self: Norm, size: int, style: Any, *others: Any, **more: Any) -> None:
        init(self, size, style, *others, **more)
        self.style = replace(style, one_plus=False)

    Norm.__init__ = without  # type: ignore[method-assign]


def partial_gradients_of_scalars() -> None:
    """The scalars of an activation learn from this rank's features alone."""
    TensorParallel.inside = lambda self, parameter: parameter  # type: ignore[method-assign]


def another_constant() -> None:
    """The constant of the activation is the usual one instead of that on disk."""
    forward = XIELU.forward

    def usual(self: XIELU, x: Tensor) -> Tensor:
        self.beta.fill_(0.5)
        return forward(self, x)

    XIELU.forward = usual  # type: ignore[method-assign]


TRAPS: list[tuple[Callable[[], None], str, int]] = [
    (head_norms_before_the_rotation, "hunyuan_v1_dense-alpha", 1),
    (one_norm_for_all_heads, "cohere-normed-heads", 1),
    (queries_do_not_grow, FAR, 1),
    (queries_grow_one_position_early, FAR, 1),
    (weight_without_one, "nemotron-bias", 1),
    (partial_gradients_of_scalars, "apertus-bias", 2),
]
MORE = [
    (head_norms_after_the_rotation, "apertus-bias", 1),
    (no_head_norms, "phi-normed-heads", 1),
    (one_norm_for_all_heads, "stablelm-parallel-normed-heads", 2),
    (norms_exchanged, "apertus-bias", 1),
    (another_constant, "apertus-bias", 1),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    return prepare(CASES, tmp_path_factory)


def _run_in_the_trap(info: RankInfo, trap: Callable[[], None], *given: Any) -> Any:
    trap()
    return run_rank(info, *given)


def reports(trap: Callable[[], None], prepared: Prepared, tp: int) -> list[InputReport]:
    results, weights, inputs, losses = prepared
    ranks = run_local_ranks(_run_in_the_trap, tp, trap, weights, inputs, ParallelSection(tensor=tp), results)
    return [merge(probe, loss, found) for probe, loss, found in zip(inputs, losses, zip(*ranks))]


@pytest.mark.parametrize(
    ("trap", "case", "tp"),
    [*TRAPS, *(pytest.param(*one, marks=pytest.mark.sweep) for one in MORE)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_mistake_turns_verify_red(
    trap: Callable[[], None], case: str, tp: int, prepared: Callable[[str], Prepared]
) -> None:
    assert not all(report.ok for report in reports(trap, prepared(case), tp))


def test_without_a_mistake_verify_is_green(prepared: Callable[[str], Prepared]) -> None:
    found = reports(nothing, prepared(FAR), 1)
    assert [report.name for report in found] == ["random", "past the window"] and all(report.ok for report in found)


def test_only_an_input_past_the_length_shows_that_queries_grow(prepared: Callable[[str], Prepared]) -> None:
    random, beyond = reports(queries_do_not_grow, prepared(FAR), 1)
    assert random.ok and not beyond.ok
