"""Bounds of documents, found on the host for all micro-batches of a step."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.documents import DocumentLimit, cumulative_lengths, document_starts, with_document_bounds
from megatron_ds.layers.kernels import AttentionCall
from megatron_ds.layers.kernels.flash import FLASH_3, FLASH_4, flash_attention
from megatron_ds.layers.kernels.reference import reference_attention
from megatron_ds.layers.kernels.varlen import torch_varlen
from tests.layers.test_kernels import flash_attn_func

CPU = torch.device("cpu")
FIRST = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 0, 0, 1, 0, 1, 2]])
SECOND = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 5, 6, 0]])  # a row that begins within a document


def test_bounds_of_a_step_have_one_shape() -> None:
    limit = DocumentLimit()
    found = with_document_bounds([{"position_ids": FIRST}, {"position_ids": SECOND}], limit)
    bounds = [batch["document_bounds"] for batch in found]
    assert all(one.dtype == torch.int32 for one in bounds) and limit.longest == 8
    assert bounds[0].tolist() == [[0, 3, *[8] * 7], [0, 1, 2, 3, 5, *[8] * 4]]
    assert bounds[1].tolist() == [[0, *[8] * 8], [0, 7, *[8] * 7]]
    assert cumulative_lengths(2, 8, bounds[1], CPU).tolist() == [0, *[8] * 8, 8, 15, *[16] * 7]
    assert cumulative_lengths(3, 8, None, CPU).tolist() == [0, 8, 16, 24]
    with_document_bounds([{"position_ids": FIRST[1:, :5]}], limit)
    assert limit.longest == 2
    batches = [{"input_ids": FIRST}]
    assert with_document_bounds(batches, limit) is batches and limit.longest is None


def test_starts() -> None:
    assert document_starts(FIRST).tolist() == [[0, 0, 0, 3, 3, 3, 3, 3], [0, 1, 2, 3, 3, 5, 5, 5]]
    assert document_starts(SECOND).tolist() == [[0] * 8, [0] * 7 + [7]]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, **options: Any) -> Tensor:
    """Documents of tokens in a row, some without a token."""
    assert bounds.dtype == torch.int32 and int(bounds[-1]) == len(q) and bounds.is_contiguous()
    lengths = bounds.diff().tolist()
    assert min(lengths) >= 0 and max(lengths) <= longest
    parts = zip(*(part.split(lengths) for part in (q, k, v)))
    return torch.cat([flash_attn_func(*(one[None] for one in part), **options)[0] for part in parts])


def varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The signature of `torch.nn.attention.varlen.varlen_attn` in torch 2.11."""
    assert cu_seq_q is cu_seq_k and max_q == max_k and scale is not None and window_size[1] == 0
    options: dict[str, Any] = {"softmax_scale": scale, "window_size": window_size, "causal": True, "softcap": 0.0}
    return one_by_one(query, key, value, cu_seq_q, max_q, **options)


def varlen_2_13(*tensors: Any, enable_gqa: bool = False, seqused_k: Any = None, **options: Any) -> Tensor:
    """That of torch 2.13, which refuses fewer key heads without `enable_gqa`."""
    assert enable_gqa
    return varlen_2_11(*tensors, **options)


def varlen_2_14(*tensors: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
    """That of torch 2.14, which would choose cuDNN."""
    assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
    return varlen_2_13(*tensors, enable_gqa=enable_gqa, **options)


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, longest_q: int, longest_k: int, **options: Any
) -> tuple[Tensor, Tensor]:
    assert bounds_q is bounds_k and longest_q == longest_k
    return one_by_one(q, k, v, bounds_q, longest_q, **options), torch.zeros(())


def flash_4(*tensors: Any, window_size: tuple[int | None, int | None], **options: Any) -> tuple[Tensor, Tensor]:
    """Release 4 has no window where its bounds are None, and returns the log-sum-exp."""
    window = (-1, -1) if window_size == (None, None) else window_size
    function = flash_varlen if len(tensors) > 3 else lambda *tensors, **options: (flash_attn_func(*tensors, **options),)
    return function(*tensors, window_size=window, **options)


def kernel_of(name: str, patch: pytest.MonkeyPatch) -> Any:
    """A kernel whose library is a stand-in that computes documents one by one."""
    if name.startswith("varlen"):
        from torch.nn.attention import varlen

        functions = {"varlen_2.11": varlen_2_11, "varlen_2.13": varlen_2_13, "varlen_2.14": varlen_2_14}
        patch.setattr(varlen, "varlen_attn", functions[name])
        if name == "varlen_2.14":
            patch.setattr(varlen, "_select_backend", None, raising=False)
        return torch_varlen()
    library = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}[name]
    module = ModuleType(library)
    module.flash_attn_func = flash_4 if name == "flash4" else flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_4 if name == "flash4" else flash_varlen  # type: ignore[attr-defined]
    patch.setitem(sys.modules, library, module)
    if name == "flash4":
        patch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    return {"flash2": flash_attention, "flash3": FLASH_3, "flash4": FLASH_4}[name]()


@pytest.mark.parametrize("name", ["varlen_2.11", "varlen_2.13", "varlen_2.14", "flash2", "flash3", "flash4"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
def test_kernels_for_documents(name: str, window: int | None, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernel_of(name, monkeypatch)
    limit = DocumentLimit()
    batch = with_document_bounds([{"position_ids": FIRST}], limit)[0]
    call = AttentionCall(0.3, window)
    if packed:
        call = replace(call, positions=FIRST, bounds=batch["document_bounds"], longest=limit.longest)
    torch.manual_seed(0)
    tensors = [torch.randn(8, 2, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    found, expected = kernel(*tensors, call), reference_attention(*tensors, call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(found.shape)
    for one, other in zip(*(torch.autograd.grad(y, tensors, direction) for y in (found, expected))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if packed:  # without bounds they are found on the device
        again = kernel(*tensors, replace(call, bounds=None, longest=None))
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
