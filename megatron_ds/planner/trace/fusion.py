"""The kernels that torch.compile makes of a graph of operators, without generating code.

Elementwise functions, reductions and copies are fused; everything else, such as products and attention, is a call of
its own. The rules are Inductor's in short: an elementwise result that one kernel alone reads is never written, one that
several kernels read is computed again in each unless it reads many tensors itself, and kernels over the same elements
that share a tensor are one. What a kernel reads and writes is then known.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

MOST_READS = 4
"""Tensors that an elementwise result reads at most if it is computed again for each kernel that needs it."""

Reads = Mapping[Node, frozenset[tuple[int, int]]]
"""Buffers that a value is computed from, and of each the parts that are read: first element, and bytes."""


@dataclass(frozen=True)
class Elements:
    """The elements that a kernel loops over.

    Attributes:
        number: of its inputs.
        results: of a reduction; None = it reduces nothing.
        is_across: the reduction is over the first dims, such as the sum of a bias' gradient over all tokens.
    """

    number: int
    results: int | None = None
    is_across: bool = False


@dataclass
class Kernel:
    """One call: a fused kernel, or an operator that is not fused.

    Attributes:
        operator: that is called; None = a fused kernel.
        computed: buffers that it computes; those that nothing outside of it reads are not written.
        reads: see `Reads`.
        elements: loops that it has.
    """

    operator: Node | None = None
    computed: list[Node] = field(default_factory=list)
    reads: dict[Node, set[tuple[int, int]]] = field(default_factory=dict)
    elements: list[Elements] = field(default_factory=list)

    def takes(self, elements: Elements, fuses_across: bool) -> bool:
        """Return whether a loop can be part of this kernel.

        Args:
            elements: the loop.
            fuses_across: kernels of this device sum over the first dims, too, while they compute their elements.
        """
        return self.operator is None and all(_match(one, elements, fuses_across) for one in self.elements)

    def add(self, buffers: Iterable[Node], reads: Reads, elements: Elements) -> None:
        """Have the kernel compute buffers, too."""
        self.computed.extend(buffers)
        self.elements.append(elements)
        for source, parts in reads.items():
            self.reads.setdefault(source, set()).update(parts)

    @property
    def read_bytes(self) -> int:
        """Bytes of the buffers of other kernels that it reads, each element once."""
        outside = {source: parts for source, parts in self.reads.items() if source not in self.computed}
        return sum(min(stored_bytes(source), sum(size for _, size in parts)) for source, parts in outside.items())


def _match(one: Elements, other: Elements, fuses_across: bool) -> bool:
    """Return whether two loops can be one."""
    if one.is_across != other.is_across and not fuses_across:
        return one.results == other.number if one.is_across else other.results == one.number
    if one.results is None or other.results is None:
        return one.number == other.number or other.number == one.results or one.number == other.results
    return one.number == other.number and (one.results == other.results or one.is_across != other.is_across)


def kernels_of(graph: Graph, fuses_across: bool) -> list[Kernel]:
    """Return the kernels of a graph of ATen operators, in the order in which they run.

    Args:
        graph: its nodes have values without data (`meta["val"]`).
        fuses_across: see `Kernel.takes`.
    """
    found = _Lowering(fuses_across)
    for node in graph.nodes:
        found.lower(node)
    return found.kernels


class _Lowering:
    """The kernels of the nodes so far.

    Attributes:
        kernels: in the order in which they run.
    """

    def __init__(self, fuses_across: bool) -> None:
        self.kernels: list[Kernel] = []
        self._fuses_across = fuses_across
        self._reads: dict[Node, Reads] = {}  # of elementwise results that are not buffers
        self._kernel_of: dict[Node, int] = {}  # buffer -> index of its kernel

    def lower(self, node: Node) -> None:
        """Add a node."""
        if node.op == "output":
            for given in node.all_input_nodes:
                self._make(given)
        elif node.op != "call_function" or is_view(node):
            return
        elif node.target is not operator.getitem:
            self._compute(node)

    def _compute(self, node: Node) -> None:
        if not is_fused(node):
            self._call(node)
        else:
            self._reads[node] = reads = self._reads_of(node)
            if _reduces(node) or (len(node.users) > 1 and len(reads) > MOST_READS):
                self._make(node)

    def _call(self, node: Node) -> None:
        for given in node.all_input_nodes:
            self._make(given)
        reads: dict[Node, set[tuple[int, int]]] = {}
        for given in node.all_input_nodes:
            reads.setdefault(base_of(given), set()).add(_part(given))
        self._kernel_of.update(dict.fromkeys(buffers_of(node), len(self.kernels)))
        self.kernels.append(Kernel(node, buffers_of(node), reads))

    def _reads_of(self, node: Node) -> Reads:
        """Return what an elementwise function or a reduction reads."""
        found: dict[Node, frozenset[tuple[int, int]]] = {}
        looked_up = node.args[0] if node.target in _LOOKS_UP else None
        for given in node.all_input_nodes:
            base = base_of(given)
            if base in self._reads:
                reads = self._reads[base]
            else:
                start, size = _part(given)
                reads = {base: frozenset({(start, min(size, _nbytes(node)) if given is looked_up else size)})}
            for source, parts in reads.items():
                found[source] = found.get(source, frozenset()) | parts
        return found

    def _make(self, node: Node) -> None:
        """Have a value be a buffer."""
        base = base_of(node)
        if base not in self._reads:
            return
        reads = self._reads.pop(base)
        elements = _elements(base)
        first = max((self._kernel_of.get(source, -1) for source in reads), default=-1)
        index = self._find(reads, elements, max(first, 0))
        self.kernels[index].add(buffers_of(base), reads, elements)
        self._kernel_of.update(dict.fromkeys(buffers_of(base), index))

    def _find(self, reads: Reads, elements: Elements, first: int) -> int:
        """Return the kernel that shares most with a loop and does not come before what it reads; or a new one."""
        shared = {}
        for index in range(first, len(self.kernels)):
            kernel = self.kernels[index]
            if kernel.takes(elements, self._fuses_across):
                known = {*kernel.reads, *kernel.computed}
                shared[index] = sum(stored_bytes(source) for source in reads if source in known)
        best = max(shared, key=lambda index: shared[index], default=None)
        if best is None or not shared[best]:
            self.kernels.append(Kernel())
            return len(self.kernels) - 1
        return best


def buffers_of(node: Node) -> list[Node]:
    """Return the nodes of what a call returns: those of the parts if it returns several tensors."""
    parts = [user for user in node.users if user.target is operator.getitem]
    return parts or [node]


def base_of(node: Node) -> Node:
    """Return the value that a node is a view of, or the node."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_view(node: Node) -> bool:
    """Return whether a node is another view of what it is given."""
    target = node.target
    if target is operator.getitem:
        return is_view(node.all_input_nodes[0])  # one of the parts of a tensor
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target in _VIEWS)


def is_fused(node: Node) -> bool:
    """Return whether a compiler fuses a node with others."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor | tuple | list):
        return False
    name = target._schema.name
    return torch.Tag.pointwise in target.tags or name.startswith("prims::") or name in _FUSED or _reduces(node)


def _reduces(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in _REDUCTIONS


def _elements(node: Node) -> Elements:
    """Return the loop of a fused node."""
    value = node.meta["val"]
    results = (value if isinstance(value, Tensor) else value[0]).numel()
    if not _reduces(node):
        return Elements(results)
    given = node.all_input_nodes[0].meta["val"]
    dims = _reduced_dims(node, given.dim())
    return Elements(given.numel(), results, results > 1 and given.dim() - 1 not in dims)


def _reduced_dims(node: Node, num_dims: int) -> list[int]:
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dims is None or dims == []:
        return list(range(num_dims))
    listed = [dims] if isinstance(dims, int) else dims
    return [one % max(num_dims, 1) for one in listed]


def _part(node: Node) -> tuple[int, int]:
    """Return the first element of a value in its storage, and the bytes of its elements in memory."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return 0, _nbytes(node)
    stored = 1
    for size, stride in zip(value.shape, value.stride()):
        stored *= size if stride else 1
    return int(value.storage_offset()), stored * value.element_size()


def _nbytes(node: Node) -> int:
    return sum(one.nbytes for one in values_of(node))


def stored_bytes(node: Node) -> int:
    """Return the bytes of a buffer."""
    return sum(one.untyped_storage().nbytes() for one in values_of(node))


def values_of(node: Node) -> Iterator[Tensor]:
    """Yield the tensors that a node returns, without data."""
    value = node.meta.get("val")
    for one in value if isinstance(value, tuple | list) else (value,):
        if isinstance(one, Tensor):
            yield one


def _named(names: Iterable[str]) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names)


_VIEWS = {torch.ops.aten._unsafe_view.default, torch.ops.aten.alias.default, torch.ops.aten.detach.default}
_LOOKS_UP = {torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor, torch.ops.aten.gather.default}
_REDUCTIONS = _named(("sum", "mean", "amax", "amin", "max", "min", "var_mean", "var", "prod", "any", "all", "argmax"))
_FUSED = _named(
    (
        *("cat", "slice_scatter", "select_scatter", "clone", "copy", "constant_pad_nd", "full", "full_like", "arange"),
        *("zeros", "ones", "new_zeros", "zeros_like", "ones_like", "where", "index", "embedding", "gather", "tril"),
        *("triu", "rand_like", "rand", "bernoulli", "_to_copy", "scalar_tensor", "flip", "repeat", "roll"),
    )
)
