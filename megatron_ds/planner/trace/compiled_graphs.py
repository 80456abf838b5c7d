"""A backend of torch.compile for traces: graphs that allocate what compiled code does, and record its kernels.

torch itself traces a block, breaks it into graphs, and decides what a graph keeps for its backward pass. Nothing is
generated; `trace.fusion` says which kernels there would be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from megatron_ds.planner.operations import Stream
from megatron_ds.planner.trace.fusion import Kernel, base_of, is_view, kernels_of, stored_bytes
from megatron_ds.planner.trace.recorder import Recorder

FUSED = "fused"
"""The name of streams of fused kernels."""

_MOST_VARIANTS = 1024
"""Graphs of one function, for blocks of different sizes and options."""

Backend = Callable[..., Any]


@contextmanager
def recording_backend(recorder: Recorder) -> Iterator[Backend]:
    """Yield a backend of torch.compile whose graphs a recorder sees, within the block.

    Graphs that torch has compiled in this process are forgotten, and are compiled again when they are needed.
    """
    from torch._dynamo.backends.common import aot_autograd  # its imports take seconds
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    compiler = partial(_compile, recorder)
    with torch._dynamo.config.patch(
        recompile_limit=_MOST_VARIANTS, accumulated_recompile_limit=_MOST_VARIANTS, suppress_errors=False
    ):
        try:
            yield aot_autograd(
                fw_compiler=compiler,
                bw_compiler=compiler,
                decompositions=select_decomp_table,
                partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
            )
        finally:
            torch._dynamo.reset()


def _compile(recorder: Recorder, module: GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], list[Any]]:
    """Return a function that runs a graph; it takes a list, and empties it."""
    graph = _RecordedGraph(recorder, module, inputs)

    def run(given: list[Any]) -> list[Any]:
        return graph(given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _RecordedGraph:
    """A graph as it runs on tensors without values. It empties the list of its inputs, as compiled code does.

    Args:
        recorder: gets the kernels.
        module: the graph, of ATen operators.
        inputs: examples.
    """

    def __init__(self, recorder: Recorder, module: GraphModule, inputs: Sequence[Any]) -> None:
        self._recorder, self._module = recorder, module
        self._inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        (self._output,) = (node for node in module.graph.nodes if node.op == "output")
        on_cpu = any(isinstance(one, Tensor) and one.device.type == "cpu" for one in inputs)
        kernels = kernels_of(module.graph, fuses_across=not on_cpu)
        readers: dict[Node, set[int]] = defaultdict(set)
        for index, kernel in enumerate(kernels):
            for source in kernel.reads:
                readers[source].add(index)
        for given in self._output.all_input_nodes:
            readers[base_of(given)].add(len(kernels))
        self._steps = [_Step(kernel, index, readers) for index, kernel in enumerate(kernels)]
        self._unread = [node for node in self._inputs if not readers[node]]

    def __call__(self, inputs: list[Any]) -> list[Any]:
        tensors = dict(zip(self._inputs, inputs))
        inputs.clear()
        for node in self._module.graph.nodes:
            if node.op == "get_attr":
                tensors[node] = getattr(self._module, node.target)
        for node in self._unread:
            del tensors[node]
        for step in self._steps:
            step.run(tensors, self._recorder)
        return list(map_arg(self._output.args[0], partial(_value, tensors)))


class _Step:
    """One kernel of a graph.

    Args:
        kernel: the kernel.
        index: of it.
        readers: buffer -> kernels that read it.
    """

    def __init__(self, kernel: Kernel, index: int, readers: dict[Node, set[int]]) -> None:
        self.operator = kernel.operator
        self.computed = kernel.computed
        self.written = [node for node in kernel.computed if readers[node] - {index}]
        self.num_bytes = kernel.read_bytes + sum(map(stored_bytes, self.written))
        known = {*kernel.reads, *kernel.computed}
        self.freed = [node for node in known if max(readers[node], default=index) <= index]

    def run(self, tensors: dict[Node, Any], recorder: Recorder) -> None:
        """Allocate what the kernel writes, record it, and free what nothing reads any more."""
        if self.operator is not None:
            found = _call(tensors, self.operator)
            for node in self.computed:
                tensors[node] = found if node is self.operator else found[node.args[1]]
            del found
        else:
            for node in self.written:
                tensors[node] = _allocate(node.meta["val"])
            if self.num_bytes:
                recorder.record(Stream(self.num_bytes, name=FUSED))
        for node in self.freed:
            tensors.pop(node, None)


def _allocate(like: Any) -> Any:
    if isinstance(like, Tensor):
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return type(like)(map(_allocate, like))


def _value(tensors: dict[Node, Any], node: Node) -> Any:
    """Return the value of a node that is a buffer, or a view of one."""
    if node in tensors or not is_view(node):
        return tensors[node]
    return _call(tensors, node)


def _call(tensors: dict[Node, Any], node: Node) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), partial(_value, tensors))
    return node.target(*args, **kwargs)  # type: ignore[operator]
