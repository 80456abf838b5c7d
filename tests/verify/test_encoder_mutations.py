"""What can be got wrong in encoders and encoder-decoders, put in on purpose: each turns the verification red, at the
stage where it is."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.hf.family import Family, Row
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.tensor_mapping import Op
from megatron_ds.layers import attention
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.embedding import LearnedPositions, TokenTypes
from megatron_ds.layers.relative_bias import RelativePositions
from megatron_ds.models import bert, t5
from megatron_ds.models.block import Block, BlockInputs
from megatron_ds.verify import verify_hf
from tests.halves import halved
from tests.parity.encoder_cases import ENCODER_CASES
from tests.verify.test_mutations import BLOCK, with_option, with_row

Patch = Callable[[pytest.MonkeyPatch], None]
STACKS = ("encoder", "decoder")


def of_family(model_type: str, mutate: Callable[[Family], Family]) -> Patch:
    """A mistake in a family's table or translation."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(FAMILIES._entries, model_type, mutate(FAMILIES[model_type]))

    patch.__name__ = mutate.__name__
    return patch


def exchanged(family: Family, pairs: Sequence[tuple[str, str]]) -> Family:
    """A family in which each two native parameters have one another's tensors."""
    other = {one: two for pair in pairs for one, two in (pair, pair[::-1])}

    def rows(config: Any) -> list[Row]:
        table = family.rows(config)
        assert other.keys() <= {row.native for row in table}, other
        return [replace(row, native=other.get(row.native, row.native)) for row in table]

    return replace(family, rows=rows)


# ---- encoders ----------------------------------------------------------------------------------------------------


def queries_and_keys_swapped(family: Family) -> Family:
    def rows(config: Any) -> list[Row]:
        table = {row.native: row for row in family.rows(config)}
        for part in ("weight", "bias"):
            q, kv = f"{BLOCK}.attention.qkv.q_{part}", f"{BLOCK}.attention.qkv.kv_{part}"
            names = table[q].names, table[kv].names
            table[q] = replace(table[q], names=names[1][:1])
            table[kv] = replace(table[kv], names=(names[0][0], names[1][1]))
        return list(table.values())

    return replace(family, rows=rows)


def square_weight_transposed(family: Family) -> Family:
    op = Op(("(n d) h",), "h (n d)")
    return with_row(family, f"{BLOCK}.attention.out.weight", lambda row: replace(row, op=op))


def norms_swapped(family: Family) -> Family:
    first, second = f"{BLOCK}.attention_output_norm", f"{BLOCK}.mlp_output_norm"
    return exchanged(family, [(f"{first}.{part}", f"{second}.{part}") for part in ("weight", "bias")])


def norm_before_the_sum(family: Family) -> Family:
    return with_option(family, norm_place="output")


def causal_encoder(family: Family) -> Family:
    return with_option(family, causal=True)


def activation_of_the_head(family: Family) -> Family:
    """RoBERTa's head with the activation of its blocks."""
    return with_option(family, head_activation="relu")


def padding_counted(family: Family) -> Family:
    """RoBERTa's positions count padding as any other token."""

    def translate(config: Any) -> Any:
        core = family.translate(config)
        return replace(core, positions=replace(core.positions, skipped_id=None))

    return replace(family, translate=translate)


def segments_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TokenTypes.forward
    monkeypatch.setattr(TokenTypes, "forward", lambda self, x, types=None: forward(self, x))


def mask_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "_allowed", lambda self, *arguments: None)


def positions_one_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoBERTa's begin a row too early."""
    forward = LearnedPositions.forward

    def shifted(self: LearnedPositions, x: Tensor, counted: Tensor | None = None) -> Tensor:
        first = self.table
        self.table = replace(first, offset=first.offset - 1)
        found = forward(self, x, counted)
        self.table = first
        return found

    monkeypatch.setattr(LearnedPositions, "forward", shifted)


def last_position_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = bert.Pooler.forward
    monkeypatch.setattr(bert.Pooler, "forward", lambda self, hidden: forward(self, hidden.flip(0)))


def windows_wider_by_one(family: Family) -> Family:
    def translate(config: Any) -> Any:
        core = family.translate(config)
        return replace(core, windows=tuple(window and window + 1 for window in core.windows))

    return replace(family, translate=translate)


def rotations_of_the_other_kind_of_layer(family: Family) -> Family:
    def translate(config: Any) -> Any:
        core = family.translate(config)
        full, sliding = core.rotary[:2]
        return replace(core, rotary=tuple(sliding if rope == full else full for rope in core.rotary))

    return replace(family, translate=translate)


def windows_of_last_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in causal models."""
    both = attention.allowed_keys_on_both_sides

    def before(length: int, window: int | None, *others: Any) -> Tensor | None:
        mask = both(length, window, *others)
        return mask.tril() if window is not None and window < length and mask is not None else mask

    monkeypatch.setattr(attention, "allowed_keys_on_both_sides", before)


def norm_in_the_first_block_too(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Block.__init__

    def with_norm(self: Block, config: Any, layer: int, *others: Any) -> None:
        init(self, config, layer, *others)
        if layer == 0:
            self.attention_norm = torch.nn.LayerNorm(config.hidden_size, elementwise_affine=False)  # type: ignore[assignment]

    monkeypatch.setattr(Block, "__init__", with_norm)


def no_norm_after_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert.EncoderExit, "forward", lambda self, activations: activations)


# ---- encoder-decoders --------------------------------------------------------------------------------------------


def with_stack_option(family: Family, **options: Any) -> Family:
    """A family whose translation gets an option of both stacks wrong."""

    def translate(config: Any) -> Any:
        core = family.translate(config)
        return replace(core, **{stack: replace(getattr(core, stack), **options) for stack in STACKS})

    return replace(family, translate=translate)


def scores_scaled(family: Family) -> Family:
    """By 1/sqrt(head_dim), as everywhere else."""
    return with_stack_option(family, attention_scale=None)


def logits_not_scaled(family: Family) -> Family:
    return with_option(family, logit_multiplier=1.0)


def gate_and_up_swapped(family: Family) -> Family:
    for stack in STACKS:
        native = f"{stack}.{BLOCK}.mlp.up.weight"
        family = with_row(family, native, lambda row: replace(row, names=row.names[::-1]))
    return family


def tables_of_distances_swapped(family: Family) -> Family:
    one, two = (f"{stack}.blocks.0.attention.relative.weight" for stack in STACKS)
    return exchanged(family, [(one, two)])


def self_and_cross_attention_swapped(family: Family) -> Family:
    parts = ("qkv.q_weight", "qkv.kv_weight", "out.weight")
    return exchanged(family, [(f"decoder.{BLOCK}.attention.{part}", f"decoder.{BLOCK}.cross.{part}") for part in parts])


def encoder_norm_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = t5.StackExit.forward

    def without(self: t5.StackExit, wire: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**forward(self, wire), t5.ENCODED: wire[t5.HIDDEN]} if self.name == t5.ENCODED else forward(self, wire)

    monkeypatch.setattr(t5.StackExit, "forward", without)


def cross_attention_reads_its_own_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Attention.forward

    def own(
        self: Attention, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, **others: Any
    ) -> Tensor:
        return forward(self, x, mask if context is None else None)

    monkeypatch.setattr(Attention, "forward", own)


def cross_attention_reads_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t5, "BlockInputs", lambda *names: BlockInputs(*names[:2]))


def decoders_distances_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = RelativePositions.buckets
    monkeypatch.setattr(RelativePositions, "buckets", lambda self, length, causal: buckets(self, length, False))


def encoders_distances_in_one_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = RelativePositions.buckets
    monkeypatch.setattr(RelativePositions, "buckets", lambda self, length, causal: buckets(self, length, True))


def last_distance_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last distance on, the bucket is the first one."""
    buckets = RelativePositions.buckets

    def wrong(self: RelativePositions, length: int, causal: bool) -> Tensor:
        far = torch.arange(1 - length, length).abs() >= self.max_distance
        return buckets(self, length, causal).masked_fill(far, 0)

    monkeypatch.setattr(RelativePositions, "buckets", wrong)


BASE, MASKED, PAIRS = (ENCODER_CASES[f"bert-{name}"] for name in ("base", "masked", "pretraining"))
MODERNBERT = ENCODER_CASES["modernbert-masked"]
ROBERTA = ENCODER_CASES["roberta-masked-relu"]
TIED, GATED = ENCODER_CASES["t5-tied-relu"], ENCODER_CASES["t5-gated"]
FIRST = "encoder.blocks.0"

MUTATIONS: list[tuple[Patch, dict[str, Any], str | None]] = [
    # mutation, config, the first stage whose output is off (None: only after the last block)
    (of_family("bert", queries_and_keys_swapped), MASKED, "blocks.0"),
    (of_family("bert", square_weight_transposed), MASKED, "blocks.0"),
    (of_family("bert", norms_swapped), BASE, "blocks.0"),
    (of_family("bert", norm_before_the_sum), BASE, "blocks.0"),
    (of_family("bert", causal_encoder), PAIRS, "blocks.0"),
    (of_family("roberta", activation_of_the_head), ROBERTA, None),
    (of_family("roberta", padding_counted), ROBERTA, "entry"),
    (positions_one_too_low, ROBERTA, "entry"),
    (segments_ignored, PAIRS, "entry"),
    (mask_ignored, BASE, "blocks.0"),
    (mask_ignored, ROBERTA, "blocks.0"),
    (last_position_pooled, PAIRS, None),
    (last_position_pooled, BASE, None),
    (of_family("modernbert", windows_wider_by_one), MODERNBERT, "blocks.1"),
    (of_family("modernbert", rotations_of_the_other_kind_of_layer), MODERNBERT, "blocks.0"),
    (windows_of_last_keys, MODERNBERT, "blocks.1"),
    (norm_in_the_first_block_too, ENCODER_CASES["modernbert-biases"], "blocks.0"),
    (no_norm_after_the_last_block, MODERNBERT, None),
    (of_family("t5", scores_scaled), TIED, FIRST),
    (of_family("t5", logits_not_scaled), TIED, None),
    (of_family("t5", gate_and_up_swapped), GATED, FIRST),
    (of_family("t5", tables_of_distances_swapped), TIED, FIRST),
    (of_family("t5", self_and_cross_attention_swapped), GATED, "decoder.blocks.0"),
    (encoder_norm_left_out, TIED, "decoder.blocks.0"),
    (cross_attention_reads_its_own_stack, GATED, "decoder.blocks.0"),
    (cross_attention_reads_padding, TIED, "decoder.blocks.0"),
    (decoders_distances_in_both_directions, GATED, "decoder.blocks.0"),
    (encoders_distances_in_one_direction, TIED, FIRST),
]


def name_of(value: Any) -> str:
    return getattr(value, "__name__", "") or (value["model_type"] if isinstance(value, dict) else "")


@pytest.mark.parametrize(("mutate", "config", "where"), halved(MUTATIONS), ids=name_of)
def test_a_mutation_turns_the_verification_red(
    mutate: Patch,
    config: dict[str, Any],
    where: str | None,
    directory_of: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = directory_of(config)
    mutate(monkeypatch)
    report = verify_hf(directory)
    first = report.inputs[0]
    assert not report.ok and not first.ok
    assert max(apart.relative for apart in first.outputs.values()) > 1e-3, "by far, not by a little"
    assert first.first_difference == where
    assert not report.round_trip.changed, "a round trip alone sees nothing"


def test_only_the_second_input_reaches_the_last_distance(
    directory_of: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(TIED)
    last_distance_too_far(monkeypatch)
    near, far = verify_hf(directory).inputs
    assert near.ok and not far.ok
    assert far.first_difference == FIRST


def test_the_next_sentence_alone_is_off_where_its_head_is(
    directory_of: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(PAIRS)
    last_position_pooled(monkeypatch)
    assert verify_hf(directory).inputs[0].wrong_outputs == ["next_sentence"]
