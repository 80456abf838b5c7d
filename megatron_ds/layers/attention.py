"""Attention with grouped query heads (Ainslie et al. 2023), divided over the tensor axis by query head.

One class serves causal and bidirectional self-attention, and cross-attention to the states of another stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec, Output
from megatron_ds.layers.alibi import HeadSlopes
from megatron_ds.layers.attention_masks import (
    Row,
    Span,
    allowed_keys,
    allowed_keys_on_both_sides,
    seen_by,
    without_blind_rows,
)
from megatron_ds.layers.attention_shape import AttentionShape
from megatron_ds.layers.context.fetch import FetchPlan, fetch, plan_fetch, union
from megatron_ds.layers.context.ring import ring_attention
from megatron_ds.layers.context.ulysses import HeadExchange
from megatron_ds.layers.documents import DocumentLimit
from megatron_ds.layers.dora import column_adapter, row_adapter
from megatron_ds.layers.kernels import REFERENCE, AttentionCall, Kernels, KernelsByCall
from megatron_ds.layers.kernels.reference import AttentionKernel, is_plain_attention
from megatron_ds.layers.key_value_cache import KeyValueCache, SourceCache
from megatron_ds.layers.linear import QKVLinear, RowParallelLinear
from megatron_ds.layers.norm import AcrossHeadsNorm, EachHeadNorm, Norm
from megatron_ds.layers.param_spec import ParamSpec, make_parameter, over_tensor
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.relative_bias import RelativeBias, biases_of_pairs, rounded_biases
from megatron_ds.layers.rotary import BY_LENGTH, Angles, RotaryTable
from megatron_ds.layers.scaled_dot_product import scaled_dot_product
from megatron_ds.parallel.context import ContextParallel, Runs, index_of_runs
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


class Attention(nn.Module):
    """Multi-head attention: (S, B, H) -> (S, B, H), or (S/t, B, H) -> (S/t, B, H) under sequence parallelism.

    Each rank holds N/t query heads and the K/gcd(K, t) key and value heads that these read; where t does not divide K,
    neighbouring ranks hold the same key and value heads.

    Context ranks each have their own positions, S/c, of queries, keys and values. Around the attention core they
    exchange them for heads (`context.ulysses`), and the core gets the keys and values that its queries see
    (`context.fetch`, `context.ring`).

    Args:
        shape: sizes and options.
        tp: the tensor axis; t divides N.
        rotary: shared table of angles; None = no rotation.
        recompute: whether the attention core is recomputed in the backward pass.
        rng: random streams of the dropout; its masks differ between tensor ranks, which hold different heads.
        kernels: the kernels of attention, of rotations and of norms over heads.
        documents: the longest document of a step, where an engine sets it.

    Attributes:
        cache: keys and values of earlier positions, or of a source, while rows are continued; None = rows are whole.
    """

    kv_index: Tensor
    cache: KeyValueCache | SourceCache | None = None

    def __init__(
        self,
        shape: AttentionShape,
        tp: TensorParallel,
        rotary: RotaryTable | None,
        recompute: Recompute,
        rng: RngStreams | None,
        kernels: Kernels = REFERENCE,
        documents: DocumentLimit | None = None,
    ) -> None:
        super().__init__()
        self.kernels, self.documents = kernels.attention, documents or DocumentLimit()
        self.rotary_kernel = kernels.rotary
        self._is_prepared = False
        self.shape, self.rotary, self.recompute, self.rng = shape, rotary, recompute, rng
        self.context = tp.context
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.qkv = QKVLinear(
            *(shape.hidden_size, heads, kv_heads, dim, tp),
            q_std=shape.q_std,
            kv_std=shape.kv_std,
            bias=shape.qkv_bias,
        )
        self.out = RowParallelLinear(heads * dim, shape.hidden_size, tp, std=shape.out_std, bias=shape.out_bias)
        self.adapters = nn.ModuleDict()
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if shape.qk_norm is not None and (shape.qk_norm_across_heads or shape.qk_norm_each_head):
            over_heads = AcrossHeadsNorm if shape.qk_norm_across_heads else EachHeadNorm
            self.q_norm = over_heads(heads, dim, shape.qk_norm, tp)
            self.k_norm = over_heads(kv_heads, dim, shape.qk_norm, tp)
        elif shape.qk_norm is not None:
            self.q_norm = Norm(dim, shape.qk_norm, tp, tp.inside, kernels)
            self.k_norm = Norm(dim, shape.qk_norm, tp, tp.inside, kernels)
        local = heads // tp.axis.size
        held = range(tp.axis.rank * local, (tp.axis.rank + 1) * local)
        kv_of_held = _kv_of_head(held, heads // kv_heads, kv_heads // self.qkv.num_shards[1])
        self.exchange = HeadExchange(tp.context.ulysses, held, kv_of_held)
        relative, share = shape.relative, self.exchange.share
        self.relative = RelativeBias(relative, heads, tp, causal=shape.causal, share=share) if relative else None
        sinks = ParamSpec((heads,), over_tensor(0), std=shape.kv_std, decay=False)
        self.sinks = make_parameter(sinks, tp.axes) if shape.sinks else None
        # of the attention core
        self.heads, self.kv_of_head = self.exchange.heads, self.exchange.kv_of_head
        self.slopes = HeadSlopes(self.heads, heads)
        # on the device, because an index of Python numbers would be copied there in each forward pass
        self.register_buffer("kv_index", torch.tensor(self.kv_of_head), persistent=False)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        source: Tensor | None = None,
        positions: Tensor | None = None,
        bounds: Tensor | None = None,
        angles: Angles | None = None,
    ) -> Tensor:
        """Attend to x itself, or to a `source` (C, B, H) that is divided like x.

        Masks and positions are those of whole rows on every context rank.

        Args:
            x: (S, B, H).
            key_mask: (B, S or C), nonzero where a position may be attended to; None = everywhere.
            source: of keys and values; None = x.
            positions: (B, S) positions within the documents of a packed sequence, 0 where a document begins; documents
                do not attend to one another. None = one document.
            bounds: (B, D + 1) positions where these documents begin, for kernels that read them; see
                `with_document_bounds`.
            angles: what `RotaryTable.cos_sin` returns for x; None = it is called here.
        """
        if isinstance(self.cache, SourceCache) and self.cache.held is not None:
            return self._left(self._by_torch(self._queries(x), *self.cache.held, Row(key_mask)))
        q, kv = self.qkv(x, source)
        q = q.unflatten(-1, (-1, self.shape.head_dim))
        k, v = kv.unflatten(-1, (-1, 2, self.shape.head_dim)).unbind(-2)
        if self.adapters:
            q, k, v = self._adapted(x, x if source is None else source, q, k, v)
        if not self.shape.qk_norm_after_rotary:
            q, k = self._normed(q, k)
        if self.cache is not None:
            return self._left(self._continued(q, k, v, key_mask))
        of_tokens = positions if self.context.axis.size == 1 else own_positions(positions, self.context, q)
        if self.rotary is not None:
            given = of_tokens if positions is not None else None
            q, k = self.rotary.rotate(q, k, given, angles, self.rotary_kernel)
        if self.shape.qk_norm_after_rotary:
            q, k = self._normed(q, k)
        if self.shape.query_temperature is not None:
            q = self.shape.query_temperature.scale(q, of_tokens)
        q, k, v = self.exchange.enter(q, k, v)
        # once on every rank: ZeRO-3 gathers the table at each call, collectively
        distances = self.relative(q.shape[0] * self.context.ring.size) if self.relative is not None else None
        row = Row(key_mask, positions, bounds, distances)
        if self.context.ring.size == 1:
            core = self.recompute.run("selective", self._core, q, k, v, *row)
        elif source is not None:
            core = self._with_fetched_source(q, k, v, row)
        elif self._passes_around(q.shape[0] * self.context.ring.size, key_mask):
            core = self._by_ring(q, k, v, row)
        else:
            core = self._with_fetched_keys(q, k, v, row)
        core = self.exchange.leave(core)
        if "out" not in self.adapters:
            return self.out(core)
        adapter: Any = self.adapters["out"]
        return adapter.around(self.out, core)

    def _left(self, core: Tensor) -> Tensor:
        """Project the output of the attention core, (S, B, N/t * D), with its adapter."""
        if "out" not in self.adapters:
            return self.out(core)
        adapter: Any = self.adapters["out"]
        return adapter.around(self.out, core)

    def _queries(self, x: Tensor) -> Tensor:
        """Return the queries alone, with their adapters and norms: (S, B, heads, D)."""
        q = self.qkv.queries(x).unflatten(-1, (-1, self.shape.head_dim))
        if "q" in self.adapters:
            adapter: Any = self.adapters["q"]
            q = adapter.adapted(x, {"q": q})["q"]
        return q if self.q_norm is None or self.shape.qk_norm_after_rotary else self.q_norm(q)

    def _continued(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attend to kept keys and values: (S, B, heads, D) of new positions -> (S, B, N/t * D). Not differentiable.

        The keys and values of a source, whose mask is `key_mask`, are kept for the next call.
        """
        assert self.context.axis.size == 1, "rows of context ranks are not continued"
        cache, shape = self.cache, self.shape
        if isinstance(cache, SourceCache):
            cache.held = k, v
            return self._by_torch(q, k, v, Row(key_mask))
        assert cache is not None and shape.causal, cache
        rows, count = cache.rows, len(q)
        positions = rows.new_positions(count, q.shape[1], q.device)
        if self.rotary is not None:
            length = rows.num_past + count if self.rotary.config.scaling in BY_LENGTH else rows.capacity
            q, k = self.rotary.rotate(q, k, positions, self.rotary.cos_sin(length, like=q), self.rotary_kernel)
        if shape.qk_norm_after_rotary:
            q, k = self._normed(q, k)
        if shape.query_temperature is not None:
            q = shape.query_temperature.scale(q, positions)
        k, v, span = cache.extend(k, v)
        distances = self.relative(count if span is None else rows.capacity) if self.relative is not None else None
        if span is None:
            documents = positions if rows.positions is not None else None
            return self._core(q, k, v, *Row(None, documents, None, distances))
        row = Row(None, rows.positions, None, distances)
        by_products = all(one is None for one in (shape.alibi, distances, shape.softcap, self.sinks))
        if count == 1 and by_products and self._is_grouped(k.shape[2]):
            return self._by_one_query(q, k, v, row, span)
        return self._by_torch(q, k, v, row, span)

    def _by_one_query(self, q: Tensor, k: Tensor, v: Tensor, row: Row, span: Span) -> Tensor:
        """Attend by one query of each head, without repeating keys: q (1, B, N/t, D) -> (1, B, N/t * D).

        The query heads that share a key head are its queries. Keys and values are (C, B, K/c, D).
        """
        k, v = (part.permute(1, 2, 0, 3) for part in (k, v))
        queries = q[0].unflatten(1, (k.shape[1], -1))
        mask = self._allowed(q.permute(1, 2, 0, 3), row, span)
        return scaled_dot_product(queries, k, v, mask, scale=self.shape.scale).flatten(1)[None]

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise queries and keys, (S, B, heads, D), where the layer has norms of them."""
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))

    def adapt(self, outputs: Sequence[str], adapter: LoRASpec | IA3Spec) -> None:
        """Add an adapter to `("out",)`, or to projections of one input: `("q",)`, `("k", "v")` and so on."""
        shape, hidden, rng = self.shape, self.shape.hidden_size, self.rng
        if tuple(outputs) == ("out",):
            width, layer = shape.num_heads * shape.head_dim, self.out.frozen()
            self.adapters["out"] = row_adapter(width, hidden, adapter, self.out.tp, rng, layer)
            return
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        sizes = {"q": Output(queries), "k": Output(keys, shape.num_kv_heads), "v": Output(keys, shape.num_kv_heads)}
        wanted = {name: sizes[name] for name in outputs}
        layer = self.qkv.frozen(shape.head_dim)
        self.adapters["_".join(outputs)] = column_adapter(hidden, wanted, adapter, self.out.tp, rng, layer)

    def _adapted(self, x: Tensor, source: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the adapters to the queries, which project x, and to keys and values, which project the source."""
        found = {"q": q, "k": k, "v": v}
        adapter: Any
        for name, adapter in self.adapters.items():
            if name != "out":
                found = adapter.adapted(x if name.startswith("q") else source, found)
        return found["q"], found["k"], found["v"]

    def _passes_around(self, length: int, key_mask: Tensor | None) -> bool:
        """Return whether keys and values of a row pass around the ring; else each rank fetches those that it needs.

        A window needs few of them, and the ring drops no probabilities.
        """
        drops = self.training and self.shape.dropout > 0.0
        needs_all = self._may_attend_to_all(key_mask)
        return self.context.method == "ring" and self._window(length) is None and not drops and not needs_all

    def _may_attend_to_all(self, key_mask: Tensor | None) -> bool:
        """Return whether a query that sees no key attends to all of the row, which no part of a row can know.

        That is so where scores have a bias or a bound, as transformers has it.
        """
        by_scores = (self.shape.alibi, self.relative, self.shape.softcap, self.sinks)
        return key_mask is not None and any(one is not None for one in by_scores)

    def _by_ring(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        """Attend to keys and values that pass by: (S/r, B, heads, D) each -> (S/r, B, heads * D)."""
        ring = self.context.ring
        length = q.shape[0] * ring.size
        call = self._call(q, row, length)
        k, v = (self._in_groups(part) for part in (k, v))
        return ring_attention(q, k, v, call, ring, partial(self.context.ring_runs, length)).flatten(2)

    @torch.compiler.disable  # the plan is kept, and a kernel may be made at its first call
    def _with_fetched_keys(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        """Attend to the keys and values that the queries see: (S/r, B, heads, D) each -> (S/r, B, heads * D)."""
        ring, shape = self.context.ring, self.shape
        length = q.shape[0] * ring.size
        of_ranks = [self.context.ring_runs(length, rank) for rank in range(ring.size)]
        spans = [[seen_by(run, length, shape.causal, shape.window) for run in runs] for runs in of_ranks]
        if self._may_attend_to_all(row.key_mask):
            spans = [[Span(run, range(length), length) for run in runs] for runs in of_ranks]
        k, v, plan = self._fetch(k, v, tuple(union([span.keys for span in one]) for one in spans))
        parts = []
        for span, queries in zip(spans[ring.rank], q.split([len(span.queries) for span in spans[ring.rank]])):
            keys, core = plan.slice_of(span.keys), partial(self._core, span=span)
            parts.append(self.recompute.run("selective", core, queries, k[keys], v[keys], *row))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.compiler.disable  # the plan is kept
    def _with_fetched_source(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        """Attend to all states of another stack: (S/r, B, heads, D) -> (S/r, B, heads * D).

        Keys and values are (C/r, B, heads, D).
        """
        size = self.context.ring.size
        k, v, _ = self._fetch(k, v, ((range(k.shape[0] * size),),) * size)
        return self.recompute.run("selective", self._core, q, k, v, *row)

    def _fetch(self, k: Tensor, v: Tensor, wanted: tuple[Runs, ...]) -> tuple[Tensor, Tensor, FetchPlan]:
        """Return the keys and values at the positions that this rank wants, and where each is.

        Args:
            k, v: this rank's, (S/r, B, heads, D).
            wanted: positions of each rank.
        """
        ring = self.context.ring
        held = tuple(self.context.ring_runs(k.shape[0] * ring.size, rank) for rank in range(ring.size))
        plan = plan_fetch(held, wanted, ring.rank, k.device)
        return *fetch(k, v, plan, ring), plan

    def _core(self, q: Tensor, k: Tensor, v: Tensor, *of_row: Tensor | None, span: Span | None = None) -> Tensor:
        """Compute the attention core: q (S, B, N/t, D), k and v (C, B, K/c, D) -> (S, B, N/t * D).

        Args:
            q, k, v: queries, keys and values.
            of_row: the tensors of a `Row`, since recomputation follows the gradients of tensors alone.
            span: the positions of q, k and v, if they are a part of the row; None = all of it.
        """
        row = Row(*of_row)
        call = self._call_of(q, k, row, span)
        kernel = self._kernel(q, k, v, call) if call is not None else None
        if call is None or kernel is None:
            return self._by_torch(q, k, v, row, span)
        k, v = (self._in_groups(part) for part in (k, v))
        return kernel(q, k, v, call).flatten(2)

    def _call_of(self, q: Tensor, k: Tensor, row: Row, span: Span | None) -> AttentionCall | None:
        """Return the options of a call that kernels are asked for; None = it is PyTorch's.

        Of the spans of a row it is those whose queries are the last ones of their keys, without masks and biases.
        """
        if self.kernels is None or q.dtype == torch.float32:
            return None
        if span is None:
            return self._call(q, row) if q.shape[0] == k.shape[0] else None
        masks = row.key_mask, row.positions, row.distances, self.shape.alibi
        if not self.shape.causal or any(one is not None for one in masks):
            return None
        return self._call(q, Row(), span.length)

    def _window(self, length: int) -> int | None:
        """Return the window in a row of a length; None = a query sees every position."""
        window = self.shape.window
        return window if window is not None and window < length else None

    def prepare(self, x: Tensor, key_mask: Tensor | None, positions: Tensor | None) -> None:
        """Have the kernel made and checked that a call needs, if it is made at its first call.

        Code that torch.compile traces cannot do that. Nothing is computed, and no parameter is read.

        Args:
            x, key_mask, positions: as in `forward`.
        """
        if not isinstance(self.kernels, KernelsByCall) or self._is_prepared or x.dtype == torch.float32:
            return
        self._is_prepared = True
        if self.context.ring.size > 1:
            return
        shape, batch, length = self.shape, x.shape[1], self.out.tp.full_length(x)
        q = x.new_empty(length, batch, len(self.heads), shape.head_dim)
        kv_heads = len(set(self.kv_of_head)) if self._is_grouped(len(set(self.kv_of_head))) else len(self.heads)
        kv = x.new_empty(length, batch, kv_heads, shape.head_dim)
        distances = None
        if self.relative is not None:
            distances = x.new_empty(len(self.heads), 2 * length - 1, dtype=torch.float32)
        self._kernel(q, kv, kv, self._call(q, Row(key_mask, positions, None, distances)))

    def _call(self, q: Tensor, row: Row, length: int | None = None) -> AttentionCall:
        """Return the options of self-attention by queries (S, B, N/t, D), as kernels are asked for it.

        Args:
            q: the queries.
            row: masks and biases.
            length: of the row, if it has more positions than the queries.
        """
        shape, length = self.shape, q.shape[0] if length is None else length
        key_bias = self._alibi(length, q, row)[:, :, 0] if shape.alibi is not None else None
        return AttentionCall(
            shape.scale,
            self._window(length),
            shape.softcap,
            row.positions,
            causal=shape.causal,
            bounds=row.bounds,
            longest=self.documents.longest,
            key_mask=row.key_mask,
            key_bias=key_bias,
            distance_bias=rounded_biases(row.distances, q.dtype) if row.distances is not None else None,
            dropout=shape.dropout if self.training else 0.0,
            sinks=self._own_sinks,
        )

    @property
    def _own_sinks(self) -> Tensor | None:
        """The sinks of the heads of the attention core."""
        return self.sinks[self.exchange.share] if self.sinks is not None else None

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionKernel | None:
        """Return the kernel of a call; None = the layer's PyTorch code."""
        if isinstance(self.kernels, KernelsByCall):
            return self.kernels.find(q, k, v, call)
        return self.kernels if is_plain_attention(q, k, v, call) else None

    def _by_torch(self, q: Tensor, k: Tensor, v: Tensor, row: Row, span: Span | None = None) -> Tensor:
        """Compute the attention core by torch alone: masks and biases are tensors of all pairs of a tile."""
        whole = span or Span.of_row(q.shape[0])
        tiles = whole.tiles(self.shape.causal, self._window(whole.length))
        if len(tiles) == 1 or not self._computes_masked_pairs(row, whole):
            return self._tile_by_torch(q, k, v, row, span)
        parts = []
        for tile in tiles:
            queries, keys = whole.index_of(tile)
            parts.append(self._tile_by_torch(q[queries], k[keys], v[keys], row, tile))
        return torch.cat(parts)

    def _computes_masked_pairs(self, row: Row, span: Span) -> bool:
        """Return whether torch would compute pairs that causality or a window hides, which tiles can leave out.

        Of a whole row with plain causality it computes those alone that are seen.
        """
        shape, window = self.shape, self._window(span.length)
        if self._may_attend_to_all(row.key_mask) or not (shape.causal or window is not None):
            return False
        terms = (*row, shape.alibi, shape.softcap, window, self.sinks)
        return span != Span.of_row(span.length) or any(one is not None for one in terms)

    def _tile_by_torch(self, q: Tensor, k: Tensor, v: Tensor, row: Row, span: Span | None) -> Tensor:
        """Compute the attention core of a tile, or of a row (`span` is None)."""
        shape = self.shape
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        mask = self._allowed(q, row, span)
        has_bias = shape.alibi is not None or row.distances is not None
        by_scores = shape.softcap is not None or self.sinks is not None
        plain = mask is None and not has_bias and not by_scores
        kernel_repeats = plain and (q.dtype != torch.float32 or q.device.type == "cpu")
        k, v = (self._for_each_head(part, kernel_repeats) for part in (k, v))
        dropout = shape.dropout if self.training else 0.0
        with self.rng.sharded() if dropout > 0.0 and self.rng is not None else nullcontext():
            if by_scores:
                y = self._by_scores(q, k, v, self._bias(q, mask, row, span), dropout)
            elif has_bias:
                y = scaled_dot_product(*(q, k, v, self._bias(q, mask, row, span), dropout), scale=shape.scale)
            else:
                blind = None
                if row.key_mask is not None and mask is not None:
                    mask, blind = without_blind_rows(mask)
                y = scaled_dot_product(
                    *(q, k, v, mask, dropout),
                    is_causal=plain and shape.causal,
                    scale=shape.scale,
                    enable_gqa=k.shape[1] != q.shape[1],
                )
                y = y if blind is None else y.masked_fill(blind, 0.0)
        return y.permute(2, 0, 1, 3).flatten(2)

    def _by_scores(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
        """Compute the formula step by step, since no function of torch caps scores or has sinks.

        It allocates (B, N/t, S, S) tensors.
        """
        scores, softcap = (q @ k.transpose(-1, -2)) * self.shape.scale, self.shape.softcap
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + bias
        if self._own_sinks is not None:
            sinks = self._own_sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
        return F.dropout(probabilities, dropout) @ v

    def _allowed(self, q: Tensor, row: Row, span: Span | None) -> Tensor | None:
        """Return the mask of the keys that each query sees; None if causality, or no mask at all, is enough."""
        length = q.shape[2] if span is None else span.length
        if self.shape.causal:
            return allowed_keys(length, self.shape.window, row.key_mask, q.device, row.positions, span)
        assert row.positions is None, "documents share a sequence of causal models only"
        return allowed_keys_on_both_sides(length, self.shape.window, row.key_mask, q.device, span)

    def _bias(self, q: Tensor, mask: Tensor | None, row: Row, span: Span | None) -> Tensor:
        """Return the term added to the scores, (1 or B, 1 or N/t, S, C).

        It sums the biases by distance, and is the lowest number of the dtype at keys that are masked.
        """
        length = q.shape[2] if span is None else span.length
        seen = q.new_zeros(())
        if self.shape.alibi is not None:
            seen = self._alibi(length, q, row)
            seen = seen if span is None else span.of_keys(seen)
        if row.distances is not None:
            seen = seen + biases_of_pairs(row.distances, span or Span.of_row(length), q.dtype)
        if mask is None and self.shape.causal:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[None, None]
        return seen if mask is None else torch.where(mask, seen, torch.finfo(q.dtype).min)

    def _alibi(self, length: int, like: Tensor, row: Row) -> Tensor:
        """Return the biases of the keys, (B or 1, N/t, 1, S)."""
        assert self.shape.alibi is not None
        given = length, self.heads, self.shape.num_heads, like, row.key_mask, row.positions
        return self.shape.alibi.bias(*given, self.slopes.on(like.device))

    def _in_groups(self, part: Tensor) -> Tensor:
        """Repeat key or value heads (S, B, K/c, D) if groups of neighbouring query heads do not share them."""
        return part if self._is_grouped(part.shape[2]) else part[:, :, self.kv_index]

    def _is_grouped(self, kv_heads: int) -> bool:
        """Return whether neighbouring query heads read the same key head, and groups of one size all of them."""
        group = len(self.kv_of_head) // kv_heads
        return self.kv_of_head == tuple(head // group for head in range(group * kv_heads))

    def _for_each_head(self, part: Tensor, kernel_repeats: bool) -> Tensor:
        """Repeat key or value heads for each query head: (B, K/c, S, D) -> (B, N/t, S, D).

        They are unchanged if the kernel repeats heads itself: flash attention and cuDNN do for plain causal attention.
        With a mask, or in fp32 on a GPU, torch may choose another kernel, which does not; torch would compute all
        scores instead, (B, N/t, S, S).
        """
        if self.kv_of_head == tuple(range(part.shape[1])):
            return part
        if not self._is_grouped(part.shape[1]):
            return part[:, self.kv_index]
        return part if kernel_repeats else part.repeat_interleave(len(self.kv_of_head) // part.shape[1], dim=1)


@torch.compiler.disable
def own_positions(positions: Tensor | None, context: ContextParallel, q: Tensor) -> Tensor:
    """Return the positions of this rank's tokens, (B or 1, S/c).

    Args:
        positions: (B, S), of whole rows; None = 0..S-1.
        context: the ranks that divide the rows.
        q: (S/c, ...), a tensor of this rank's tokens.
    """
    length = q.shape[0] * context.axis.size
    if positions is None:
        return index_of_runs(context.runs(length), q.device)[None]
    return positions[:, context.positions(length, q.device)]


def _kv_of_head(heads: range, group: int, kv_heads: int) -> tuple[int, ...]:
    """Return, for each of a rank's query heads, the local index of the key head that it reads.

    Args:
        heads: the rank's query heads, as indices in the full model.
        group: query heads per key head.
        kv_heads: the number of key heads that the rank holds; its first one is a multiple of this number.
    """
    return tuple(head // group % kv_heads for head in heads)
