"""Initial values that follow from the base weights: DoRA's magnitudes, and what peft makes of a full weight.

PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) begin with A and B of a decomposition of W, and train them on
W - s B A, which replaces W. peft computes both again when it loads such an adapter, and so does this: files hold only A
and B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConversionError
from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.hf.peft.merging import low_rank_sum
from megatron_ds.hf.peft.projections import Projection
from megatron_ds.hf.weights import HFWeights
from megatron_ds.layers.adapter_layers import LoRASpec
from megatron_ds.layers.param_spec import ParamSpec, initial_shard, pad_shard
from megatron_ds.parallel.grid import Axes
from megatron_ds.parallel.random import derive_seed

_MODULES_KEPT = 16  # more than the adapted modules of a layer; A and B are small


class InitialValues:
    """Initial values of adapters, and of base weights that are changed by them. Each is a full weight in memory.

    Args:
        adapters: the adapters.
        weights: reader of the base weights.
        seed: seed of the parameters that begin at random.
    """

    def __init__(self, adapters: Adapters, weights: HFWeights, seed: int) -> None:
        self._adapters, self._weights, self._seed = adapters, weights, seed
        self._makers: dict[str, Callable[[str], Tensor]] = {}
        self._modules: dict[str, tuple[str, Projection]] = {}
        for module, projections in adapters.modules.items():
            adapter = adapters.adapters[module]
            if not isinstance(adapter, LoRASpec):
                continue
            for one in projections:
                names = adapters.names_of(module, one)
                self._modules |= dict.fromkeys(names.values(), (module, one))
                if adapter.init is not None:
                    self._makers |= {names[letter]: self._low_rank for letter in "ab"}
                if adapter.changes_base:
                    self._makers[one.native] = self._residual
                if adapter.dora:
                    self._makers[names["m"]] = self._magnitude
        self._decomposed = lru_cache(_MODULES_KEPT)(self._decompose)

    def has(self, name: str) -> bool:
        """Test whether a native parameter has such a value."""
        return name in self._makers

    def full(self, name: str) -> Tensor:
        """Return the full value of a native parameter, fp32."""
        return self._makers[name](name)

    def shard(self, name: str, spec: ParamSpec, axes: Axes) -> Tensor:
        """Return a rank's shard of the value, padding included; see `HFWeights.shard`."""
        full = self.full(name)
        return pad_shard(full[tuple(slice(*bounds) for bounds in spec.local_ranges(axes))], spec, axes)

    def _magnitude(self, name: str) -> Tensor:
        """Return the norms of the rows of W + s B A, (out,); of W where a decomposition made A and B."""
        module, one = self._modules[name]
        adapters, adapter = self._adapters, self._spec(module)
        parameters = {}
        for letter in "ab":
            native = adapters.names_of(module, one)[letter]
            shape = adapters.table[native].op.native_shape(adapters.axis_sizes)
            std, bound = (adapter.a_std, adapter.a_bound) if letter == "a" else (None, adapter.b_bound)
            parameters[letter] = initial_shard(native, ParamSpec(shape, std=std, bound=bound), self._seed, {})
        weight = one.row.op.slot(one.source, self._weights.full(one.native), adapters.axis_sizes)
        return low_rank_sum(weight.float(), one, adapter.scale, parameters).norm(dim=1)

    def _residual(self, name: str) -> Tensor:
        """Return W - s B A with the initial A and B, of a base weight with some projections that have adapters."""
        full = self._weights.full(name).float().clone(memory_format=torch.contiguous_format)
        for module, one, row in self._adapters.changes[name]:
            if not self._spec(module).changes_base:
                continue
            names = self._adapters.names_of(module, one)
            parameters = {letter: self._low_rank(names[letter]) for letter in "ab"}
            slot = row.op.slot(one.source, full, self._adapters.axis_sizes)
            slot.copy_(low_rank_sum(slot, one, -self._spec(module).scale, parameters).reshape(slot.shape))
        return full

    def _low_rank(self, name: str) -> Tensor:
        """Return an initial A or B that peft makes of a full weight; those of one layer's modules are kept."""
        module, _ = self._modules[name]
        return self._decomposed(module)[name]

    def _decompose(self, module: str) -> dict[str, Tensor]:
        """Return native name -> initial value, of A and of each projection's B."""
        adapters, adapter = self._adapters, self._spec(module)
        a, b = peft_initial(self._weight(module), adapter, derive_seed("init", self._seed, module))
        found = {}
        for one in adapters.modules[module]:
            for letter, value in (("a", a), ("b", b)):
                native = adapters.names_of(module, one)[letter]
                found[native] = adapters.table[native].op.read(partial(_only, value), adapters.axis_sizes)
        return found

    def _weight(self, module: str) -> Tensor:
        """Return a module's weight in transformers, (out, in)."""
        first = self._adapters.modules[module][0]
        if not first.is_trainable:  # a table, which may be tied and have the name of another
            return self._weights.full(first.native).float()
        weight = self._weights.tensor(f"{module}.weight").float()
        if first.is_inputs_first and self._spec(module).init == "olora":
            raise ConversionError(
                f"peft.init_lora_weights=olora: peft cannot make it of {module}, whose weight is stored inputs first; "
                "nearest: pissa"
            )
        return weight.t() if first.is_inputs_first else weight

    def _spec(self, module: str) -> LoRASpec:
        adapter = self._adapters.adapters[module]
        assert isinstance(adapter, LoRASpec), adapter
        return adapter


def _only(tensor: Tensor, source: int) -> Tensor:
    """Return the tensor as the only source of an operation."""
    assert source == 0, source
    return tensor


def peft_initial(weight: Tensor, adapter: LoRASpec, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) as peft initializes them for a weight (out, in), fp32.

    Args:
        weight: the weight, which is not changed.
        adapter: rank, scale and initialization.
        seed: of what is drawn.
    """
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    alpha: Any = adapter.scale * adapter.rank
    config = LoraConfig(r=adapter.rank, lora_alpha=alpha, init_lora_weights=adapter.init)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made: Any = Linear(layer, "default", config=config, r=adapter.rank, lora_alpha=alpha)
    return made.lora_A["default"].weight.detach(), made.lora_B["default"].weight.detach()
