"""The FLOP count against products counted one by one, the rates against their units."""

import pytest

from megatron_ds.monitor import Throughput, model_flops_per_token


def test_flops_are_those_of_the_products_of_a_small_model() -> None:
    layers, heads, head_size, hidden, ffn, vocab, seq = 3, 4, 16, 48, 160, 1000, 128
    products = []  # (rows, inner, columns) of every matrix product of a sequence, forward
    for _ in range(layers):
        products += [(seq, hidden, heads * head_size)] * 3 + [(seq, heads * head_size, hidden)]
        products += [(seq, hidden, ffn), (seq, ffn, hidden)]
        products += [(seq, head_size, seq), (seq, seq, head_size)] * heads
    products.append((seq, hidden, vocab))
    forward = sum(2 * rows * inner * columns for rows, inner, columns in products)
    params = layers * (4 * hidden * heads * head_size + 2 * hidden * ffn) + hidden * vocab
    assert model_flops_per_token(params, layers, heads * head_size, seq) * seq == 3 * forward
    frozen = model_flops_per_token(params, layers, heads * head_size, seq, params)
    assert (frozen + 2 * params) * seq == 3 * forward  # no gradients of weights


def test_rates_have_their_units() -> None:
    rates = Throughput(flops_per_token=6e9, world_size=8).rates(tokens=40_000, seconds=0.5)
    assert rates.tokens_per_s == 80_000
    assert rates.tflops_per_rank == pytest.approx(80_000 * 6e9 / 8 / 1e12)
    assert rates.tflops_per_rank == pytest.approx(60)
    assert rates.mfu is None
    assert Throughput(6e9, 8, peak_flops=120e12).rates(40_000, 0.5).mfu == pytest.approx(0.5)


def test_no_time_is_no_rate() -> None:
    with pytest.raises(AssertionError, match="seconds=0"):
        Throughput(1.0, 1).rates(1, 0)
