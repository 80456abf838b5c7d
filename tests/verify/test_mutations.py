"""What converters got wrong, put in on purpose: each turns the verification red, though most round trips stay clean."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.hf.family import Family, Row
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.tensor_mapping import Op
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.verify import verify_hf
from tests.parity.cases import CONFIGS
from tests.parity.family_cases import FAMILY_CASES

SQUARE = {**CONFIGS["llama"], "num_key_value_heads": 8}
GRANITE = next(config for config in FAMILY_CASES.values() if config["model_type"] == "granite")
GEMMA = next(config for config in FAMILY_CASES.values() if config["model_type"] == "gemma2")
BLOCK = "blocks.{n}"


def with_row(family: Family, native: str, change: Callable[[Row], Row]) -> Family:
    """A family with one row changed."""

    def rows(config: DecoderConfig) -> list[Row]:
        table = family.rows(config)
        assert native in {row.native for row in table}, native
        return [change(row) if row.native == native else row for row in table]

    return replace(family, rows=rows)


def with_option(family: Family, **options: Any) -> Family:
    """A family whose translation gets an option wrong."""
    return replace(family, translate=lambda config: replace(family.translate(config), **options))


def gate_and_up_swapped(family: Family) -> Family:
    return with_row(family, f"{BLOCK}.mlp.up.weight", lambda row: replace(row, names=row.names[::-1]))


def key_and_value_swapped(family: Family) -> Family:
    return with_row(family, f"{BLOCK}.attention.qkv.kv_weight", lambda row: replace(row, names=row.names[::-1]))


def square_weight_transposed(family: Family) -> Family:
    op = Op(("(n d) h",), "h (n d)")
    return with_row(family, f"{BLOCK}.attention.out.weight", lambda row: replace(row, op=op))


def heads_permuted(family: Family) -> Family:
    op = Op(("(g k d) h",), "(k g d) h")
    return with_row(family, f"{BLOCK}.attention.qkv.q_weight", lambda row: replace(row, op=op, split="k"))


def norms_swapped(family: Family) -> Family:
    def rows(config: DecoderConfig) -> list[Row]:
        places = {f"{BLOCK}.attention_norm.weight": "mlp_norm", f"{BLOCK}.mlp_norm.weight": "attention_norm"}
        return [
            replace(row, native=f"{BLOCK}.{places[row.native]}.weight") if row.native in places else row
            for row in family.rows(config)
        ]

    return replace(family, rows=rows)


def residual_multiplier_dropped(family: Family) -> Family:
    return with_option(family, residual_multiplier=1.0)


def embedding_multiplier_dropped(family: Family) -> Family:
    return with_option(family, embedding_multiplier=1.0)


def logit_multiplier_dropped(family: Family) -> Family:
    return with_option(family, logit_multiplier=1.0)


def attention_scale_dropped(family: Family) -> Family:
    return with_option(family, attention_scale=None)


def softcap_dropped(family: Family) -> Family:
    return with_option(family, logit_softcap=None)


def windows_dropped(family: Family) -> Family:
    return with_option(family, windows=())


MUTATIONS: list[tuple[Callable[[Family], Family], dict[str, Any], str | None]] = [
    # mutation, config, the first stage whose output is off (None: only after the last block)
    (gate_and_up_swapped, CONFIGS["llama"], "blocks.0"),
    (key_and_value_swapped, CONFIGS["llama"], "blocks.0"),
    (square_weight_transposed, SQUARE, "blocks.0"),
    (heads_permuted, CONFIGS["llama"], "blocks.0"),
    (norms_swapped, CONFIGS["llama"], "blocks.0"),
    (residual_multiplier_dropped, GRANITE, "blocks.0"),
    (embedding_multiplier_dropped, GRANITE, "entry"),
    (attention_scale_dropped, GRANITE, "blocks.0"),
    (logit_multiplier_dropped, GRANITE, None),
    (softcap_dropped, GEMMA, None),
    (windows_dropped, CONFIGS["mistral"], "blocks.0"),
]


@pytest.mark.parametrize(("mutate", "config", "where"), MUTATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mutation_turns_the_verification_red(
    mutate: Callable[[Family], Family],
    config: dict[str, Any],
    where: str | None,
    directory_of: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = directory_of(config)
    kind = config["model_type"]
    monkeypatch.setitem(FAMILIES._entries, kind, mutate(FAMILIES[kind]))
    report = verify_hf(directory)
    assert not report.ok
    assert not any(one.logits.within(1e-4) for one in report.inputs), "by far, not by a little"
    assert report.inputs[0].first_difference == where
    assert not report.round_trip.changed, "a round trip alone sees nothing"
