"""Times of products, attention and streams against published measurements, and corrections by measured times."""

from dataclasses import replace

import pytest

from megatron_ds.planner.operations import Attention, Collective, Product, Stream, Work
from megatron_ds.planner.profiles import Device, find_device
from megatron_ds.planner.profiles.device import MeasuredAttention, MeasuredProduct, MeasuredStream
from megatron_ds.planner.timing.roofline import attention_s, product_s, seconds, stream_s

A100, H100 = (find_device(name, measured=False) for name in ("a100-80", "h100"))


def tflops(product: Product, device: Device) -> float:
    return product.flops / product_s(product, device) / 1e12


@pytest.mark.parametrize(
    ("device", "dtype", "size", "measured"),
    [
        *((A100, "float16", *row) for row in ((1024, 119), (2048, 222), (4096, 228), (8192, 254), (16384, 257))),
        *((H100, "float8_e4m3fn", *row) for row in ((2048, 1011), (4096, 1217), (8192, 1290), (16384, 1377))),
    ],
)
def test_squares_take_the_measured_time(device: Device, dtype: str, size: int, measured: float) -> None:
    """Azure/AI-benchmarking-guide: short benches, of whose speed 0.7 to 1 remains in the long runs of the profiles."""
    assert 0.7 < tflops(Product(size, size, size, dtype=dtype), device) / measured < 1.02


def test_a_thin_product_takes_the_measured_time() -> None:
    """Azure/AI-benchmarking-guide: 802,816 x 192 x 768 on A100 at 158 TFLOP/s."""
    assert tflops(Product(802_816, 192, 768, dtype="float16"), A100) == pytest.approx(158, rel=0.12)


def test_the_last_wave_of_tiles_takes_as_long_as_a_complete_one() -> None:
    assert A100.products.num_cores == 108
    full, one_more = Product(256 * 27, 128 * 4, 8192), Product(256 * 27 + 1, 128 * 4, 8192)
    assert product_s(one_more, A100) > 1.25 * product_s(full, A100)
    assert product_s(Product(256 * 27 - 100, 128 * 4, 8192), A100) == product_s(full, A100)


def test_a_product_with_few_rows_waits_for_memory() -> None:
    product = Product(1, 8192, 8192)
    assert product_s(product, H100) == pytest.approx(8192 * 8192 * 2 / (3.35e12 * 0.887) + 4e-6, rel=0.01)
    added = product_s(product, H100, extra_bytes=8 * 8192 * 8192) - product_s(product, H100)
    assert added == pytest.approx(8 * 8192 * 8192 / (3.35e12 * 0.887), rel=0.01)
    large = Product(8192, 8192, 8192)
    assert product_s(large, H100, extra_bytes=1000) == product_s(large, H100), "hidden behind the products"


def attention_tflops(device: Device, head_dim: int, length: int, *passes: bool) -> float:
    """TFLOP/s of causal attention on 16,384 tokens over forward (False) and backward (True) passes."""
    pairs = length * (length + 1) // 2
    rows = max(1, 16384 // length)
    found = [Attention(rows, 16, 16, head_dim, length, length, pairs, backward) for backward in passes]
    return sum(one.flops for one in found) / sum(attention_s(one, device) for one in found) / 1e12


@pytest.mark.parametrize(
    ("length", "measured"), [(512, 292), (1024, 423), (2048, 521), (4096, 579), (8192, 602), (16384, 616)]
)
def test_attention_takes_the_published_time_on_h100(length: int, measured: float) -> None:
    """FlashAttention-3, forward, causal, heads of 128 (Shah et al. 2024, figure 5)."""
    assert attention_tflops(H100, 128, length, False) == pytest.approx(measured, rel=0.08)


def test_attention_takes_the_published_time_on_a100() -> None:
    """FlashAttention-2 at 8,192 tokens and heads of 64 (Azure/AI-benchmarking-guide)."""
    assert attention_tflops(A100, 64, 8192, False, True) == pytest.approx(180, rel=0.12)


def test_attention_is_slower_backward_and_with_narrow_heads() -> None:
    assert attention_tflops(H100, 128, 8192, True) < attention_tflops(H100, 128, 8192, False)
    assert attention_tflops(H100, 64, 8192, False) < 0.8 * attention_tflops(H100, 128, 8192, False)


def test_a_stream_takes_its_bytes_and_its_launches() -> None:
    assert stream_s(Stream(10**9), A100) == pytest.approx(1 / 1700 + 4e-6, rel=0.01), "triad at 1.70 TB/s"
    assert stream_s(Stream(10**9), H100) == pytest.approx(1 / 2970 + 4e-6, rel=0.01), "triad at 2.97 TB/s"
    assert stream_s(Stream(0, launches=5), H100) == pytest.approx(20e-6)


def test_work_is_the_sum_of_its_operations_without_communication() -> None:
    product, stream = Product(256, 256, 256), Stream(1000)
    work = Work({product: 3, stream: 2, Collective("all_reduce", "tensor", 10**9, 8): 5})
    assert seconds(work, H100) == pytest.approx(3 * product_s(product, H100) + 2 * stream_s(stream, H100))
    assert seconds(Collective("all_reduce", "tensor", 10**9, 8), H100) == 0.0


def with_table(device: Device, **tables: tuple[object, ...]) -> Device:
    return device.model_copy(update=tables)


def test_measured_products_override_the_formula_and_lead_it_between_them() -> None:
    """A device whose products take twice the formula's time, if n is small, and half of it if n is large."""

    def truth_us(m: int, n: int, k: int) -> float:
        return product_s(Product(m, n, k), H100) * 1e6 * (2.0 if n < 1000 else 0.5)

    sizes = [(m, n, k) for m in (512, 2048, 8192) for n in (256, 4096) for k in (512, 4096)]
    table = [MeasuredProduct(m=m, n=n, k=k, dtype="bfloat16", us=truth_us(m, n, k)) for m, n, k in sizes]
    device = with_table(H100, measured_products=tuple(table))
    for m, n, k in sizes:
        assert product_s(Product(m, n, k), device) * 1e6 == pytest.approx(truth_us(m, n, k), rel=0.02)
    assert product_s(Product(1024, 256, 1024), device) * 1e6 == pytest.approx(truth_us(1024, 256, 1024), rel=0.1)
    assert product_s(Product(1024, 4096, 1024), device) * 1e6 == pytest.approx(truth_us(1024, 4096, 1024), rel=0.1)
    middle = product_s(Product(2048, 1024, 2048), device) / product_s(Product(2048, 1024, 2048), H100)
    assert 0.7 < middle < 1.5
    far = product_s(Product(10**6, 10**6, 4096), device) / product_s(Product(10**6, 10**6, 4096), H100)
    assert 0.49 <= far <= 2.01, "no extrapolation beyond what was measured"
    other = Product(512, 256, 512, dtype="float32")
    assert product_s(other, device) == product_s(other, H100), "a dtype that was not measured"


def test_measured_attention_and_streams_override_the_formulas() -> None:
    sizes = {"rows": 1, "heads": 8, "kv_heads": 8, "head_dim": 64, "queries": 512, "keys": 512, "pairs": 512 * 512}
    attention = MeasuredAttention(**sizes, backward=False, dtype="bfloat16", us=1234)
    streams = [
        MeasuredStream(num_bytes=1000, us=10),
        MeasuredStream(num_bytes=100_000, us=40),
        MeasuredStream(name="silu", num_bytes=1000, us=50),
    ]
    device = with_table(H100, measured_attention=(attention,), measured_streams=tuple(streams))
    assert attention_s(Attention(**sizes), device) * 1e6 == pytest.approx(1234)
    assert stream_s(Stream(50_500), device) * 1e6 == pytest.approx(25), "straight in bytes"
    assert stream_s(Stream(1000, name="silu"), device) * 1e6 == pytest.approx(50)
    assert stream_s(Stream(1000, name="unheard"), device) * 1e6 == pytest.approx(10)
    assert stream_s(Stream(1000, name="silu_"), device) * 1e6 == pytest.approx(50), "the same function, in place"
    assert stream_s(Stream(101_000, launches=2), device) * 1e6 == pytest.approx(50)
    assert stream_s(Stream(0, launches=0), device) == 0.0


def test_a_mask_takes_longer_by_its_measured_share() -> None:
    sizes = {"rows": 1, "heads": 8, "kv_heads": 8, "head_dim": 64, "queries": 512, "keys": 512, "pairs": 512 * 512}
    larger = {**sizes, "keys": 1024, "pairs": 512 * 1024}
    plain = MeasuredAttention(**sizes, backward=False, dtype="float32", us=1000)
    masked = MeasuredAttention(**sizes, backward=False, dtype="float32", masked=True, us=1300)
    without, device = (with_table(H100, measured_attention=rows) for rows in ((plain,), (plain, masked)))
    for given in (sizes, larger):
        unmasked = Attention(**given, dtype="float32")
        assert attention_s(unmasked, device) == attention_s(unmasked, without)
        assert attention_s(replace(unmasked, masked=True), device) == pytest.approx(1.3 * attention_s(unmasked, device))
        assert attention_s(replace(unmasked, masked=True), without) == attention_s(unmasked, without)
    backward = Attention(**sizes, backward=True, dtype="float32", masked=True)
    assert attention_s(backward, device) == attention_s(backward, without), "only what was measured"


def test_all_that_a_disturbed_cpu_computes_takes_longer() -> None:
    rows = tuple(MeasuredProduct(m=m, n=256, k=256, dtype="bfloat16", us=m) for m in (64, 1024))
    cpu = with_table(find_device("cpu").model_copy(update={"steady": 1.0}), measured_products=rows)
    disturbed = cpu.model_copy(update={"steady": 0.8})
    product, stream = Product(256, 256, 256, dtype="float32"), Stream(10**7)
    attention = Attention(1, 8, 8, 64, 128, 128, 128 * 128, dtype="float32")
    halves = [replace(one, dtype="bfloat16") for one in (product, attention)]
    for one in (product, stream, attention, *halves, Work({product: 3, stream: 2, attention: 1})):
        assert seconds(one, disturbed) == pytest.approx(seconds(one, cpu) / 0.8)


def test_the_limit_of_power_slows_down_what_computes() -> None:
    """A large product as much as in a long run; the start of a small one, and fp32, not at all."""
    large, small = Product(8192, 8192, 8192), Product(16, 16, 16)
    rows = [
        MeasuredProduct(m=one.m, n=one.n, k=one.k, dtype=one.dtype, us=product_s(one, H100) * 1e6)
        for one in (large, small, Product(8192, 8192, 8192, dtype="float32"))
    ]
    burst = with_table(H100, measured_products=tuple(rows))
    steady = burst.model_copy(update={"steady": 0.8})
    assert product_s(large, steady) == pytest.approx(product_s(large, burst) / 0.8)
    assert product_s(small, steady) == pytest.approx(product_s(small, burst), rel=1e-3)
    for unmeasured in (Product(8192, 8192, 8192, dtype="float32"), Attention(1, 8, 8, 64, 512, 512, 512 * 512)):
        assert seconds(unmeasured, steady) == seconds(unmeasured, burst)
