"""Each known trap, put in on purpose, must turn the parity check red: the checks can fail, and for these reasons.

The traps are those of public frameworks and of their users' reports. Each patch is applied in the forked ranks only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ds.engine import base, build, module
from megatron_ds.engine.pipeline.boundary import Boundary
from megatron_ds.engine.pipeline.engine import PipelinedModel
from megatron_ds.layers import attention, cross_entropy, linear, rotary
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.models import bert
from megatron_ds.parallel import collectives
from megatron_ds.parallel.grid import Grid
from megatron_ds.parallel.tensor import TensorParallel
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_on
from tests.ranks import run_grid

RECIPE = Recipe(steps=2)  # enough to see each of them, and so are five


def partial_norm_gradients() -> None:
    """Sequence parallelism: gradients of norms and row-parallel biases are left partial."""
    TensorParallel.between = lambda self, parameter: parameter  # type: ignore[method-assign]


def partial_head_norm_gradients() -> None:
    """q/k norms see this rank's heads only; their gradients are left partial."""
    TensorParallel.inside = lambda self, parameter: parameter  # type: ignore[method-assign]


def tied_gradients_not_summed() -> None:
    """The two copies of a tied embedding each learn from their own gradient."""
    PipelinedModel.get_tied_weights_and_groups = lambda self: []  # type: ignore[method-assign]


def flags_lost() -> None:
    """Shards without `tensor_model_parallel` are counted once a tensor group in the gradient norm."""
    fill = module._fill

    def losing(module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        fill(module, *args, **kwargs)
        for parameter in module.parameters():
            if hasattr(parameter, "tensor_model_parallel"):
                del parameter.tensor_model_parallel

    module._fill = losing


def mean_of_means() -> None:
    """The loss is averaged per data rank, then over data ranks."""
    base.Engine._count = lambda self, batches: tuple(  # type: ignore[method-assign]
        self.grid.loss.size * sum(int((batch[name] != -100).sum()) for batch in batches)
        for name in self.head.label_columns
    )


def padding_in_the_softmax() -> None:
    """Rows that pad the vocabulary take part in the softmax."""

    cross_entropy.VocabShard.start = property(lambda self: self.axis.rank * self.weight.shape[0])  # type: ignore[assignment]
    cross_entropy.VocabShard.valid = property(lambda self: self.weight.shape[0])  # type: ignore[assignment]


def bias_before_the_reduction() -> None:
    """A row-parallel bias is added on every rank and summed with the partial products."""
    linear.RowParallelLinear.forward = lambda self, x: self.tp.leave(  # type: ignore[method-assign]
        F.linear(x, self.weight, self.bias)
    )


def adjacent_pairs() -> None:
    """Rotary pairs are neighbours instead of half a head apart."""
    rotate = rotary.rotate
    rotary.rotate = lambda x, cos, sin, adjacent=False: rotate(x, cos, sin, adjacent=True)


def frequencies_unscaled() -> None:
    """The rope scaling of the config is ignored."""
    rotary.RotaryConfig.inverse_frequencies = lambda self, length: (
        1.0
        / (  # type: ignore[method-assign]
            self.theta ** (torch.arange(0, self.dim, 2).float() / self.dim)
        )
    )


def decay_by_shape() -> None:
    """Weight decay is decided by the number of dims, after ZeRO-3 has flattened them all to one."""

    def by_shape(module: torch.nn.Module, section: Any, *others: Any) -> list[dict[str, Any]]:
        return [
            {"params": [p for p in module.parameters() if p.dim() >= 2], "weight_decay": section.weight_decay},
            {"params": [p for p in module.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]

    build.param_groups = by_shape


def window_off_by_one() -> None:
    """A window of W keys that does not count the query's own."""
    allowed = attention.allowed_keys
    attention.allowed_keys = lambda length, window, *others: allowed(
        length, None if window is None else window + 1, *others
    )


def input_gradient_not_reduced() -> None:
    """Column-parallel input gradients stay this rank's partial sums (f without its backward)."""
    collectives._CopyTo.backward = staticmethod(lambda ctx, grad: (grad, None))  # type: ignore[assignment]


def shared_heads_not_summed() -> None:
    """Key and value heads that several ranks hold learn from each rank's own query heads alone."""
    linear.sum_over_holders = lambda grad, axis, num_shards: grad


def shared_heads_counted_often() -> None:
    """Every rank counts the heads that it shares in the gradient norm."""
    holds_first = ParamSpec.holds_first
    ParamSpec.holds_first = lambda self, axes: bool(self.splits) or holds_first(self, axes)  # type: ignore[method-assign]


def one_mean_over_both_losses() -> None:
    """Masked tokens and pairs are averaged together, as if they were labels of one kind."""
    count = base.Engine._count
    base.Engine._count = lambda self, batches: (sum(count(self, batches)),) * 2  # type: ignore[method-assign]


def first_position_of_every_part() -> None:
    """Under sequence parallelism each rank's pooler takes the first position of its own part."""
    bert.reduce_from = lambda first, axis: collectives.reduce_from(first, axis) / axis.size
    bert.Pooler.forward = lambda self, hidden: torch.tanh(  # type: ignore[method-assign]
        self.dense(bert.reduce_from(hidden[0], self.tp.axis))
    )


def encoder_learns_nothing_from_later_stages() -> None:
    """What travels beside a decoder's own states comes without a gradient's way back."""
    unpack = Boundary.unpack

    def detached(self: Boundary, *args: Any) -> Any:
        wire = unpack(self, *args)
        return {name: state.detach() if name == "encoded" else state for name, state in wire.items()}

    Boundary.unpack = detached  # type: ignore[method-assign]


def columns_mixed_up() -> None:
    """A stage takes the decoder's padding for the encoder's."""
    unpack = Boundary.unpack

    def mixed(self: Boundary, *args: Any) -> Any:
        wire = unpack(self, *args)
        return {name: torch.ones_like(column) if name == "attention_mask" else column for name, column in wire.items()}

    Boundary.unpack = mixed  # type: ignore[method-assign]


TRAPS: list[tuple[Callable[[], None], str, Place]] = [
    (partial_norm_gradients, "llama", Place(2, 1, 1, 1, True)),
    (partial_norm_gradients, "gpt2", Place(2, 1, 1, 1, True)),
    (partial_head_norm_gradients, "qwen3", Place(2, 1, 1, 1)),
    (tied_gradients_not_summed, "qwen3", Place(1, 2, 1, 1)),
    (flags_lost, "llama", Place(2, 1, 1, 1)),
    (mean_of_means, "llama", Place(1, 1, 2, 1)),
    (padding_in_the_softmax, "llama", Place(2, 1, 1, 1)),
    (bias_before_the_reduction, "gpt2", Place(2, 1, 1, 1)),
    (adjacent_pairs, "llama", Place(1, 1, 1, 1)),
    (frequencies_unscaled, "llama", Place(1, 1, 1, 1)),
    (decay_by_shape, "llama", Place(1, 1, 2, 3)),
    (window_off_by_one, "mistral", Place(1, 1, 1, 1)),
    (input_gradient_not_reduced, "llama", Place(2, 1, 1, 1)),
    (shared_heads_not_summed, "qwen2-2kv", Place(4, 1, 1, 1)),
    (shared_heads_counted_often, "qwen2-2kv", Place(4, 1, 1, 1)),
    (tied_gradients_not_summed, "t5-gated", Place(1, 4, 1, 1)),
    (tied_gradients_not_summed, "bert-masked", Place(1, 2, 1, 1)),
    (partial_norm_gradients, "bert-pretraining", Place(2, 1, 1, 1, True)),
    (flags_lost, "t5-tied-relu", Place(2, 1, 1, 1)),
    (mean_of_means, "bert-pretraining", Place(1, 1, 2, 1)),
    (one_mean_over_both_losses, "bert-pretraining", Place(1, 1, 1, 1)),
    (first_position_of_every_part, "bert-pretraining", Place(2, 1, 1, 1, True)),
    (encoder_learns_nothing_from_later_stages, "t5-tied-relu", Place(1, 4, 1, 1)),
    (columns_mixed_up, "t5-tied-relu", Place(1, 2, 1, 1)),
    (columns_mixed_up, "bert-masked", Place(1, 2, 1, 1)),
]


def _train_in_the_trap(grid: Grid, trap: Callable[[], None], directory: Path, place: Place) -> dict[str, Any]:
    trap()
    return train_on(grid, directory, place, RECIPE)


@pytest.mark.parametrize(("trap", "case", "place"), TRAPS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_trap_turns_parity_red(trap: Callable[[], None], case: str, place: Place, references: Any) -> None:
    directory, reference = references(case, RECIPE)
    caught = relative_errors(run_grid(_train_in_the_trap, place.layout, trap, directory, place)[0], reference)
    assert not within_fp32(caught), caught
