"""The picture: a PNG of the promised size that shows what the file holds, for any number of points."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.errors import DataError
from megatron_ds.monitor import MetricsWriter, StepMetrics, ValidMetrics, draw_loss
from megatron_ds.monitor.plot import (
    BAD_COLOR,
    BUSIEST_COLOR,
    LEAST_COLOR,
    SCORE_COLORS,
    TRAIN_COLOR,
    VALID_COLOR,
    bin_curve,
    smooth,
)


def write(path: Path, losses: list[float], valid: dict[int, float] | None = None) -> Path:
    with MetricsWriter(path) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.write(StepMetrics(step, loss, 1.0, 3e-4, 1024, 0.5, 2048.0, 0.1))
        for step, loss in (valid or {}).items():
            writer.write(ValidMetrics(step, loss))
    return path


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def has_color(path: Path, color: str) -> bool:
    rgb = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return bool((np.abs(pixels(path) - rgb).max(axis=-1) <= 2).any())


def draw(tmp_path: Path, losses: list[float], valid: dict[int, float] | None = None) -> Path:
    png = tmp_path / "pictures" / "loss.png"
    assert draw_loss(write(tmp_path / "metrics.jsonl", losses, valid), png, "a run") is True
    return png


def test_png_of_the_promised_size(tmp_path: Path) -> None:
    png = draw(tmp_path, [3.0, 2.0, 1.5], {3: 1.7})
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert pixels(png).shape == (750, 1200, 3)
    assert has_color(png, TRAIN_COLOR) and has_color(png, VALID_COLOR) and not has_color(png, BAD_COLOR)
    assert [path.name for path in png.parent.iterdir()] == ["loss.png"], "no temporary file is left"


def test_the_picture_follows_the_data(tmp_path: Path) -> None:
    first = pixels(draw(tmp_path, [3.0, 2.0, 1.5]))
    again = pixels(draw(tmp_path, [3.0, 2.0, 1.5]))
    other = pixels(draw(tmp_path, [3.0, 2.5, 1.5]))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("steps", [1, 60])
def test_experts_have_a_panel_of_their_own(tmp_path: Path, steps: int) -> None:
    plain, metrics, png = draw(tmp_path, [3.0]), tmp_path / "experts.jsonl", tmp_path / "experts.png"
    assert not has_color(plain, BUSIEST_COLOR) and not has_color(plain, LEAST_COLOR)
    load = {"moe_tokens_min": 20.0, "moe_tokens_mean": 50.0, "moe_tokens_max": 80.0}
    with MetricsWriter(metrics) as writer:
        for step in range(1, steps + 1):
            writer.write(StepMetrics(step, 3.0, 1.0, 3e-4, 1024, 0.5, 2048.0, 0.1, metrics=load))
    assert draw_loss(metrics, png, "a run") and pixels(png).shape == (750, 1200, 3)
    assert all(has_color(png, color) for color in (TRAIN_COLOR, BUSIEST_COLOR, LEAST_COLOR))


def test_one_point_shows(tmp_path: Path) -> None:
    assert has_color(draw(tmp_path, [3.0]), TRAIN_COLOR)


def test_validation_alone_shows(tmp_path: Path) -> None:
    png = draw(tmp_path, [], {10: 2.0})
    assert has_color(png, VALID_COLOR) and not has_color(png, TRAIN_COLOR)


def test_no_points_no_picture(tmp_path: Path) -> None:
    assert draw_loss(write(tmp_path / "metrics.jsonl", []), tmp_path / "loss.png", "a run") is False
    assert not (tmp_path / "loss.png").exists()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")


@pytest.mark.parametrize("losses", [[3.0, math.nan, 2.0], [math.nan], [math.inf] * 60])
def test_values_that_are_not_finite_are_marked(tmp_path: Path, losses: list[float]) -> None:
    assert has_color(draw(tmp_path, losses), BAD_COLOR)


def test_a_title_is_text_not_markup(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", [1.0])
    assert draw_loss(metrics, tmp_path / "loss.png", r"$\frac{ unclosed $ <b>")


def test_no_global_figure_is_touched(tmp_path: Path) -> None:
    draw(tmp_path, [1.0])
    assert "matplotlib.pyplot" not in sys.modules


def test_a_spike_in_a_million_points_survives() -> None:
    steps = np.arange(1.0, 1e6 + 1)
    loss = 2 + np.sin(steps)
    loss[765_432] = 50.0
    loss[1000:9000] = math.nan
    bins = bin_curve(steps, loss, max_bins=1500)
    assert bins.steps.size == 1500
    assert np.nanmax(bins.high) == 50.0 and np.nanmin(bins.low) == np.nanmin(loss)
    assert bins.count.sum() == 1_000_000 - 8000
    assert np.isnan(bins.high).sum() >= 10, "a gap stays a gap"
    np.testing.assert_allclose(bins.total.sum(), np.nansum(loss))


def test_few_points_are_left_as_they_are() -> None:
    steps, loss = np.arange(1.0, 8), np.array([5.0, 4, math.nan, 2, 3, 1, 0])
    bins = bin_curve(steps, loss, max_bins=100)
    np.testing.assert_array_equal(bins.steps, steps)
    np.testing.assert_array_equal(bins.low, loss)
    np.testing.assert_array_equal(bins.high, loss)


@pytest.mark.parametrize("points", [1, 2, 3, 99, 5000])
def test_smoothing_keeps_a_constant_and_does_not_lag(points: int) -> None:
    steps = np.arange(1.0, points + 1)
    loss = np.full(points, 3.0)
    loss[points // 2 + 1 :: 7] = math.nan
    np.testing.assert_allclose(smooth(bin_curve(steps, loss)), 3.0)
    line = smooth(bin_curve(steps, steps))
    middle = line.size // 2
    assert line.size < 9 or line[middle] == pytest.approx(steps[points // 2], rel=0.01)


def test_smoothing_takes_the_noise_out() -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    assert smooth(bin_curve(np.arange(20_000.0), noise)).std() < 0.1 * noise.std()


@pytest.mark.parametrize("validations", [1, 3])
def test_metrics_of_labels_have_a_panel_of_their_own(tmp_path: Path, validations: int) -> None:
    plain, metrics, png = draw(tmp_path, [3.0]), tmp_path / "labels.jsonl", tmp_path / "labels.png"
    assert not any(has_color(plain, color) for color in SCORE_COLORS.values())
    with MetricsWriter(metrics) as writer:
        writer.write(StepMetrics(1, 3.0, 1.0, 3e-4, 1024, 0.5, 2048.0, 0.1))
        for step in range(validations):
            scores = {"accuracy": 0.5 + step / 10, "macro_f1": 0.3, "spearman": math.nan, "other": 7.0}
            writer.write(ValidMetrics(step + 1, 2.0, scores))
    assert draw_loss(metrics, png, "a run") and pixels(png).shape == (750, 1200, 3)
    drawn = {name for name, color in SCORE_COLORS.items() if has_color(png, color)}
    assert drawn == {"accuracy", "macro_f1"} and has_color(png, TRAIN_COLOR)
