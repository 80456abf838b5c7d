"""Initial values: the same full tensor at every layout, of which a rank draws no more than its shard needs."""

import random
from math import prod

import pytest
import torch

from megatron_ds.layers import param_spec
from megatron_ds.layers.param_spec import ParamSpec, initial_shard, over_tensor
from megatron_ds.parallel.random import derive_seed
from tests.layers.test_param_spec import places, random_spec
from tests.parallel.axes import ALONE, axes_at
from tests.ranks import run_alone

SPECS = {
    "rows": ParamSpec((1000, 64), over_tensor(0), std=0.5),
    "columns": ParamSpec((64, 1000), over_tensor(1), std=0.5),
    "padded vocabulary": ParamSpec((1003, 48), over_tensor(0), std=0.5),
    "uneven columns": ParamSpec((48, 1003), over_tensor(1), bound=0.5),
    "shared kv heads": ParamSpec((2 * 96, 200), over_tensor(0, units=2), std=0.5),
    "copies": ParamSpec((300, 100), std=0.5),
    "long vector": ParamSpec((50_000,), over_tensor(0), bound=0.5),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(param_spec, "TILE_ELEMENTS", 1000)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards_are_cut_out_of_one_tensor(spec: ParamSpec, size: int) -> None:
    full = initial_shard("w", spec, 7, axes_at(tensor=(0, 1)))
    assert full.shape == spec.shape
    for rank in range(size):
        axes = axes_at(tensor=(rank, size))
        ranges = spec.local_ranges(axes)
        shard = initial_shard("w", spec, 7, axes)
        lengths = tuple(slice(0, stop - start) for start, stop in ranges)
        assert torch.equal(shard[lengths], full[tuple(slice(*bounds) for bounds in ranges)])
        shard[lengths] = 0
        assert shard.shape == spec.local_shape(axes) and not shard.any(), "padding is zero"


def test_of_any_shape_divided_by_any_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(param_spec, "TILE_ELEMENTS", 10)
    chance = random.Random(1)
    for _ in range(150):
        spec, sizes = random_spec(chance), {name: chance.choice((1, 2, 3)) for name in ("extra", "tensor")}
        full = initial_shard("w", spec, 7, ALONE | axes_at(extra=(0, 1)))
        for place in places(**sizes):
            axes = axes_at(**place)
            ranges = spec.local_ranges(axes)
            shard = initial_shard("w", spec, 7, axes)[tuple(slice(0, stop - start) for start, stop in ranges)]
            assert torch.equal(shard, full[tuple(slice(*bounds) for bounds in ranges)]), (spec, place)


def test_a_parameter_of_one_tile_has_the_values_of_its_name_and_seed() -> None:
    spec = ParamSpec((20, 50), over_tensor(0), std=0.02)
    generator = torch.Generator().manual_seed(derive_seed("init", 7, "w"))
    assert torch.equal(initial_shard("w", spec, 7, ALONE), torch.empty(20, 50).normal_(0.0, 0.02, generator=generator))
    assert not torch.equal(initial_shard("v", spec, 7, ALONE), initial_shard("w", spec, 7, ALONE))


def test_values_are_distributed_as_declared_and_no_tile_repeats() -> None:
    normal = initial_shard("w", ParamSpec((1024, 512), std=0.5), 7, ALONE)
    count = normal.numel()
    assert abs(float(normal.mean())) < 5 * 0.5 / count**0.5
    assert float(normal.std()) == pytest.approx(0.5, rel=5 / (2 * count) ** 0.5)
    beyond = float((normal.abs() > 1.0).float().mean())
    assert beyond == pytest.approx(0.0455, rel=0.05), "4.55 % of a normal distribution is beyond two deviations"
    tile = param_spec._tile_shape((1024, 512))
    assert prod(tile) <= 1000 and len(normal[:: tile[0], :: tile[1]].unique()) == count // prod(tile)
    uniform = initial_shard("w", ParamSpec((1024, 512), bound=0.5), 7, ALONE)
    assert float(uniform.std()) == pytest.approx(1 / 12**0.5, rel=0.01)
    assert -0.5 <= float(uniform.min()) < -0.499 and 0.499 < float(uniform.max()) <= 0.5


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_draws_its_share(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = param_spec._draw
    monkeypatch.setattr(param_spec, "_draw", lambda shape, *rest: (drawn.append(prod(shape)), draw(shape, *rest))[1])
    spec = ParamSpec((512, 768), over_tensor(dim), std=1.0)
    for size in (1, 2, 4, 8):
        for rank in range(size):
            drawn.clear()
            initial_shard("w", spec, 7, axes_at(tensor=(rank, size)))
            assert max(drawn) <= 1000
            assert sum(drawn) <= 1.1 * spec.numel / size + 1000


def _on_threads(num_threads: int) -> torch.Tensor:
    param_spec.TILE_ELEMENTS = 1000
    torch.set_num_threads(num_threads)
    return initial_shard("w", SPECS["padded vocabulary"], 7, axes_at(tensor=(1, 2)))


def test_threads_change_nothing() -> None:
    assert torch.equal(
        run_alone(_on_threads, 4), initial_shard("w", SPECS["padded vocabulary"], 7, axes_at(tensor=(1, 2)))
    )
