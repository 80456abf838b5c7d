"""Operations of a training step as numbers: what a device computes, what it reads and writes, what it sends.

A trace of the model's own layers yields them (`planner.trace`); rooflines and link models turn them into seconds. All
sizes are those of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from megatron_ds.planner.moments import Moment


@dataclass(frozen=True)
class Product:
    """Matrix products (m, k) x (k, n) of `batch` independent pairs, in one call.

    Attributes:
        m, n, k: sizes.
        batch: number of pairs.
        dtype: torch's name without `torch.`, such as "bfloat16".
    """

    m: int
    n: int
    k: int
    batch: int = 1
    dtype: str = "bfloat16"

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k * self.batch


@dataclass(frozen=True)
class Attention:
    """One call of a fused attention kernel, which keeps no scores.

    Attributes:
        rows: sequences.
        heads, kv_heads, head_dim: of this rank.
        queries, keys: lengths.
        pairs: pairs of a query and a key of one head of one sequence that are computed (half of them if causal).
        backward: the backward pass, which computes 2.5 times the products.
        dtype: see `Product`.
        masked: a tensor of all pairs is added to the scores.
    """

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    pairs: int
    backward: bool = False
    dtype: str = "bfloat16"
    masked: bool = False

    @property
    def flops(self) -> int:
        """Multiplications and additions: 4 head_dim a pair forward, 10 head_dim backward."""
        return (10 if self.backward else 4) * self.head_dim * self.pairs * self.heads * self.rows


@dataclass(frozen=True)
class Stream:
    """An operation that is limited by memory: elementwise functions, norms, copies, sums.

    Attributes:
        num_bytes: read and written.
        launches: kernels that are started.
        name: of the function, as torch has it ("silu", "_softmax"), for devices whose profile has times by name.
    """

    num_bytes: int
    launches: int = 1
    name: str = ""


CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]


@dataclass(frozen=True)
class Collective:
    """One collective along an axis of the grid.

    Attributes:
        kind: of collective.
        axis: role or axis of the grid: "tensor", "context", "expert", "data", "shard", "pipeline", ...
        num_bytes: size of the complete buffer: what an all-reduce sums, an all-gather returns, a reduce-scatter takes,
            and what one rank gives to an all-to-all.
        ranks: number of ranks along the axis.
        hidden: it runs while the rank computes something that does not need it.
        uneven_bytes: what this rank sends to others in an all-to-all whose parts differ; None = the parts are equal.
    """

    kind: CollectiveKind
    axis: str
    num_bytes: int
    ranks: int
    hidden: bool = False
    uneven_bytes: int | None = None

    @property
    def sent_bytes(self) -> Fraction:
        """Bytes that each rank sends, for ring algorithms; exact."""
        if self.uneven_bytes is not None:
            return Fraction(self.uneven_bytes)
        share = Fraction(self.ranks - 1, self.ranks)
        factor = 2 if self.kind == "all_reduce" else 1
        return factor * share * self.num_bytes


@dataclass(frozen=True)
class Message:
    """A message from one rank to another.

    Attributes:
        axis: see `Collective`.
        num_bytes: sent.
        hidden: see `Collective`.
    """

    axis: str
    num_bytes: int
    hidden: bool = False

    @property
    def sent_bytes(self) -> Fraction:
        """Bytes that the rank sends."""
        return Fraction(self.num_bytes)


@dataclass(frozen=True)
class HostCopy:
    """A copy between the device and its host.

    Attributes:
        num_bytes: copied.
        to_host: to the host; False = from it.
        hidden: see `Collective`.
    """

    num_bytes: int
    to_host: bool
    hidden: bool = True


@dataclass(frozen=True)
class ModuleHooks:
    """DeepSpeed's hooks of one pass of a module at ZeRO-3, which run on the host: they fetch and release weights."""


Operation = Product | Attention | Stream | Collective | Message | HostCopy | ModuleHooks


class Work(Counter[Operation]):
    """Counts of operations. `+` adds two; `times` repeats all of one."""

    def __add__(self, other: Counter[Operation]) -> Work:  # type: ignore[override]
        found = Work(self)
        found.update(other)
        return found

    def times(self, number: int) -> Work:
        """Return the work of `number` repetitions."""
        return Work({operation: count * number for operation, count in self.items()})

    @property
    def flops(self) -> int:
        """Multiplications and additions of products and attention."""
        return sum(one.flops * count for one, count in self.items() if isinstance(one, Product | Attention))

    @property
    def sent_bytes(self) -> Mapping[str, Fraction]:
        """Bytes that the rank sends, by axis; exact."""
        found: dict[str, Fraction] = {}
        for one, count in self.items():
            if isinstance(one, Collective | Message):
                found[one.axis] = found.get(one.axis, Fraction(0)) + one.sent_bytes * count
        return found


@dataclass(frozen=True)
class LayerTrace:
    """One layer of a model on one rank, for one micro-batch: its operations and its memory.

    Attributes:
        name: of its `LayerSpec`.
        is_block: it is a transformer block.
        forward: operations of the forward pass.
        backward: operations of the backward pass, recomputation included.
        kept_bytes: memory that the forward pass leaves until the layer's backward pass: its output and whatever its
            backward pass reads. The layer's input counts for the layer before.
        output_bytes: of its output, which is part of `kept_bytes`, and which the next stage gets if one begins there.
        forward_peak_bytes: the most that is live during the forward pass, beyond what was live before it.
        backward_peak_bytes: the most that is live during the backward pass, beyond what was live before the layer's
            forward pass: kept memory, the gradients of output and input, and temporaries; without gradients of
            parameters.
        grad_input_bytes: of the gradient of its input, which is live after its backward pass.
        recompute: the part of `backward` that repeats operations of the forward pass.
        shared_bytes: memory that the layer's first forward pass leaves for all later ones, such as tables of angles,
            which layers after it share. No other number contains it.
        host_bytes: part of what the forward pass leaves that is kept in host memory, and in no other number.
        in_forward, in_backward: moments of both passes in their order, the last of which is the end; empty = not
            recorded.
        released_bytes: memory of its input that nothing reads after its forward pass. It counts in the layers before,
            and is free then, unless an engine holds the input.
        like: name of the equal layer that has been run for this trace.
    """

    name: str
    is_block: bool
    forward: Work
    backward: Work
    kept_bytes: int
    output_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    grad_input_bytes: int
    recompute: Work = field(default_factory=Work)
    shared_bytes: int = 0
    host_bytes: int = 0
    in_forward: tuple[Moment, ...] = ()
    in_backward: tuple[Moment, ...] = ()
    released_bytes: int = 0
    like: str = ""
