"""Initial values of adapters' parameters that follow from the base weights: DoRA's magnitudes."""

from __future__ import annotations

from torch import Tensor

from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.hf.peft.merging import low_rank_sum
from megatron_ds.hf.peft.projections import Projection
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.adapter_layers import LoRASpec
from megatron_ds.layers.param_spec import ParamSpec, initial_shard, pad_shard
from megatron_ds.parallel.grid import Axes


class InitialValues:
    """Initial values of parameters that follow from base weights.

    Args:
        adapters: the adapters.
        weights: reader of the base weights.
        seed: seed of the parameters that begin at random.
    """

    def __init__(self, adapters: Adapters, weights: HFWeights, seed: int) -> None:
        self._adapters, self._weights, self._seed = adapters, weights, seed
        self._magnitudes = adapters.magnitudes

    def has(self, name: str) -> bool:
        """Test whether a native parameter has such a value."""
        return name in self._magnitudes

    def shard(self, name: str, spec: ParamSpec, axes: Axes) -> Tensor:
        """Return a rank's shard of the value, padding included; see `HFWeights.shard`. Holds one full weight."""
        full = self._magnitude(*self._magnitudes[name])
        return pad_shard(full[tuple(slice(*bounds) for bounds in spec.local_ranges(axes))], spec, axes)

    def _magnitude(self, module: str, one: Projection) -> Tensor:
        """Return the norms of the rows of W + s B A, (out,)."""
        adapters, adapter = self._adapters, self._adapters.adapters[module]
        assert isinstance(adapter, LoRASpec)
        sizes = adapters.axis_sizes
        weight = one.row.op.slot(one.source, self._weights.full(one.native), sizes).float()
        parameters = {}
        for letter, native in adapters.names_of(module, one).items():
            if letter in "ab":
                shape = adapters.table[native].op.native_shape(sizes)
                std, bound = (adapter.a_std, adapter.a_bound) if letter == "a" else (None, adapter.b_bound)
                parameters[letter] = initial_shard(native, ParamSpec(shape, std=std, bound=bound), self._seed, {})
        return low_rank_sum(weight, one, adapter, parameters).norm(dim=1)
