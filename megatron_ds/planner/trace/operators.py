"""torch's operators as operations: matrix products, fused attention, and streams of bytes for all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_ds.planner.operations import Attention, Operation, Product, Stream
from megatron_ds.planner.trace.attention_operator import BACKWARD, FORWARD
from megatron_ds.planner.trace.storages import tensors_in

Arguments = Sequence[Any]


def operations_of(func: Any, args: Arguments, kwargs: dict[str, Any], result: Any) -> Iterable[Operation]:
    """Return the operations of a call of an operator; the arguments are those of `__torch_dispatch__`."""
    if func.namespace in ("prim", "c10d"):
        return ()
    name = func._schema.name.removeprefix("aten::")
    if name in _PRODUCTS:
        return _PRODUCTS[name](args, result)
    if name in _ATTENTION:
        return [_ATTENTION[name](args, kwargs)]
    if name in _WITHOUT_WORK or func.is_view:
        return ()
    if name == "embedding_dense_backward":
        return _streams({"zero_": result.nbytes, "index_add_": 2 * args[0].nbytes + args[1].nbytes})
    num_bytes = _ROWS[name](args, kwargs, result) if name in _ROWS else _read_and_written(func, args, kwargs, result)
    return _streams({_function(name, kwargs): num_bytes})


def _streams(num_bytes: Mapping[str, int]) -> list[Operation]:
    return [Stream(number, name=name) for name, number in num_bytes.items() if number]


def _function(name: str, kwargs: Mapping[str, Any]) -> str:
    """Return the name of what an operator does to memory: several operators do the same, and some have two formulas."""
    if kwargs.get("approximate") == "tanh":
        return name.replace("gelu", "gelu_tanh")
    return _SAME.get(name, name)


_SAME: Mapping[str, str] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "fill_", "ones", "ones_like", "full", "full_like"), "zero_"),
    **dict.fromkeys(("embedding", "index"), "index_select"),
    "stack": "cat",
    "_to_copy": "copy_",
}


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _product(left: Tensor, right: Tensor) -> list[Operation]:
    """(..., m, k) x (..., k, n)."""
    batch = left.shape[0] if left.dim() == 3 else 1
    sizes = (left.shape[-2], right.shape[-1], left.shape[-1])
    return [Product(*sizes, batch, _dtype(left))] if batch and all(sizes) else []


def _vector_product(matrix: Tensor, vector: Tensor) -> list[Operation]:
    return [Product(matrix.shape[0], 1, matrix.shape[1], 1, _dtype(matrix))]


def _grouped_product(args: Arguments, result: Any) -> list[Operation]:
    """Return the products of groups of rows that are as equal as they can be."""
    left, right = args[0], args[1]
    groups = right.shape[0] if right.dim() == 3 else result.shape[0]
    rows = left.shape[0] if right.dim() == 3 else left.shape[1]
    size, larger = divmod(rows, groups)
    found: list[Operation] = []
    for length, count in ((size + 1, larger), (size, groups - larger)):
        m, k = (length, left.shape[1]) if right.dim() == 3 else (left.shape[0], length)
        if count and length:
            found.append(Product(m, right.shape[-1], k, count, _dtype(left)))
    return found


def _linear_pointwise(args: Arguments, result: Any) -> list[Operation]:
    x, weight = args[0], args[1]
    rows = x.numel() // max(x.shape[-1], 1)
    return [Product(rows, weight.shape[0], weight.shape[1], 1, _dtype(x))]


_PRODUCTS: dict[str, Callable[[Arguments, Any], Iterable[Operation]]] = {
    "mm": lambda args, result: _product(args[0], args[1]),
    "bmm": lambda args, result: _product(args[0], args[1]),
    "addmm": lambda args, result: _product(args[1], args[2]),
    "addmm_": lambda args, result: _product(args[1], args[2]),
    "baddbmm": lambda args, result: _product(args[1], args[2]),
    "mv": lambda args, result: _vector_product(args[0], args[1]),
    "addmv": lambda args, result: _vector_product(args[1], args[2]),
    "_grouped_mm": _grouped_product,
    "mkldnn::_linear_pointwise": _linear_pointwise,
}


def _attention(q: Tensor, k: Tensor, pairs: int, backward: bool, masked: bool = False) -> Attention:
    """Return the call of a kernel on queries (B, N, S, D) and keys (B, K, C, D)."""
    rows, heads, queries, dim = q.shape
    keys = k.shape[2]
    return Attention(rows, heads, k.shape[1], dim, queries, keys, pairs, backward, _dtype(q), masked)


def _of_torch(q_at: int, causal_at: int) -> Callable[[Arguments, dict[str, Any]], Attention]:
    """Return the reader of calls of torch's kernels, whose arguments say which pairs they compute."""

    def found(args: Arguments, kwargs: dict[str, Any]) -> Attention:
        q, k = args[q_at], args[q_at + 1]
        causal = args[causal_at] if len(args) > causal_at else kwargs.get("is_causal", False)
        queries, keys = q.shape[2], k.shape[2]
        pairs = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
        return _attention(q, k, pairs, backward=q_at == 1, masked=kwargs.get("attn_mask") is not None)

    return found


_ATTENTION: dict[str, Callable[[Arguments, dict[str, Any]], Attention]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _of_torch(0, 4),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _of_torch(1, 7),
    "_scaled_dot_product_flash_attention": _of_torch(0, 4),
    "_scaled_dot_product_flash_attention_backward": _of_torch(1, 11),
    "_scaled_dot_product_efficient_attention": _of_torch(0, 6),
    "_scaled_dot_product_efficient_attention_backward": _of_torch(1, 11),
    FORWARD: lambda args, kwargs: _attention(args[0], args[1], args[-1], backward=False),
    BACKWARD: lambda args, kwargs: _attention(args[1], args[2], args[-1], backward=True),
}

_WITHOUT_WORK = frozenset(
    {
        *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach"),
        *("lift_fresh", "_local_scalar_dense", "set_", "resize_", "alias", "sym_size", "is_same_size"),
    }
)


def _touched(x: Tensor) -> int:
    """Return the bytes of a tensor's elements in memory, of which several may be one."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def _read_and_written(func: Any, args: Arguments, kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes of all tensors that go in and come out; one that is changed in place counts twice."""
    name = func._schema.name
    given = () if name in _ONLY_WRITTEN else tensors_in((tuple(args), kwargs))
    return sum(map(_touched, given)) + sum(map(_touched, tensors_in(result)))


_ONLY_WRITTEN = frozenset(
    {
        *("aten::zero_", "aten::fill_", "aten::zeros_like", "aten::ones_like", "aten::full_like"),
        *("aten::new_zeros", "aten::new_ones", "aten::new_full"),
    }
)


def _looked_up(args: Arguments, kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes of rows that are read and written, and of the indices."""
    indices = sum(one.nbytes for one in tensors_in(tuple(args[1:])))
    return 2 * sum(one.nbytes for one in tensors_in(result)) + indices


def _put(source_at: int) -> Callable[[Arguments, dict[str, Any], Any], int]:
    """Return the bytes of rows that are put into a tensor: read, written, and of the indices."""

    def found(args: Arguments, kwargs: dict[str, Any], result: Any) -> int:
        source = args[source_at] if len(args) > source_at else kwargs.get("source")
        num_bytes = source.nbytes if isinstance(source, Tensor) else 0
        return 2 * num_bytes + sum(one.nbytes for one in tensors_in(tuple(args[1:source_at])))

    return found


def _copied(args: Arguments, kwargs: dict[str, Any], result: Any) -> int:
    return _touched(args[1]) + args[0].nbytes


_ROWS: dict[str, Callable[[Arguments, dict[str, Any], Any], int]] = {
    "embedding": lambda args, kwargs, result: 2 * result.nbytes + args[1].nbytes,
    "index_select": _looked_up,
    "index": _looked_up,
    "gather": _looked_up,
    "index_copy_": _put(3),
    "index_add_": _put(3),
    "index_put_": _put(2),
    "scatter_": _put(3),
    "scatter_add_": _put(3),
    "copy_": _copied,
}
