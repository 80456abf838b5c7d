"""Accuracy, macro F1 and Spearman's correlation against their definitions, from sums over parts."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megatron_ds.models.label_metrics import (
    classification_metrics,
    multi_label_tallies,
    num_tallies,
    regression_metrics,
    single_label_tallies,
    spearman,
)

EMPTY = np.empty((0, 0))


def f1_by_definition(predicted: Sequence[bool], actual: Sequence[bool]) -> float | None:
    """From precision and recall; None = the class does not occur."""
    hits = sum(a and b for a, b in zip(predicted, actual))
    if not any(predicted) and not any(actual):
        return None
    precision = hits / sum(predicted) if any(predicted) else 0.0
    recall = hits / sum(actual) if any(actual) else 0.0
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def macro_f1(predicted: torch.Tensor, actual: torch.Tensor) -> float:
    found = [f1_by_definition(one.tolist(), other.tolist()) for one, other in zip(predicted.T, actual.T)]
    known = [value for value in found if value is not None]
    return sum(known) / len(known)


@pytest.mark.parametrize("num_labels", [2, 3, 7])
def test_one_class_of_each(num_labels: int) -> None:
    draw = torch.Generator().manual_seed(num_labels)
    logits = torch.randn(40, num_labels, generator=draw)
    labels = torch.randint(0, max(2, num_labels - 1), (40,), generator=draw)  # the last of seven is never a label
    labels[::9] = -100
    parts = [single_label_tallies(logits[part], labels[part]) for part in (slice(0, 13), slice(13, 40))]
    assert all(len(part) == num_tallies(num_labels) for part in parts)
    found = classification_metrics(sum(parts).double().numpy(), EMPTY)
    known = labels != -100
    predicted, actual = logits.argmax(1)[known], labels[known]
    classes = torch.arange(num_labels)
    assert found["accuracy"] == float((predicted == actual).double().mean())
    expected = macro_f1(predicted[:, None] == classes, actual[:, None] == classes)
    assert found["macro_f1"] == pytest.approx(expected, abs=1e-12)
    assert found["macro_f1"] != pytest.approx(found["accuracy"], abs=1e-3), "another mean than that over rows"


def test_several_classes_of_each() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, generator=draw)
    labels = (torch.rand(30, 4, generator=draw) < 0.4).float()
    labels[::7] = math.nan
    found = classification_metrics(multi_label_tallies(logits, labels).double().numpy(), EMPTY)
    known = ~labels.isnan().any(1)
    predicted, actual = (logits.sigmoid() > 0.5)[known], labels[known].bool()
    assert found["accuracy"] == pytest.approx(float((predicted == actual).all(1).double().mean()))
    assert found["macro_f1"] == pytest.approx(macro_f1(predicted, actual), abs=1e-12)


def test_nothing_is_said_of_nothing() -> None:
    tallies = single_label_tallies(torch.randn(3, 2), torch.full((3,), -100))
    assert classification_metrics(tallies.numpy(), EMPTY) == {}
    assert regression_metrics(EMPTY, np.full((2, 2), np.nan)) == {}
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


def rank_by_definition(values: Sequence[float], value: float) -> float:
    return sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2


def test_correlation_of_ranks() -> None:
    """Values without ties by the formula with squared differences; with ties as Pearson's of mean ranks."""
    draw = random.Random(1)
    one, other = [draw.sample(range(50), 20) for _ in range(2)]
    ranks = [[rank_by_definition(values, value) for value in values] for values in (one, other)]
    squares = sum((a - b) ** 2 for a, b in zip(*ranks))
    assert spearman(np.array(one), np.array(other)) == pytest.approx(1 - 6 * squares / (20 * (20**2 - 1)))
    tied = [draw.randrange(4) for _ in range(20)]
    ranks = [[rank_by_definition(values, value) for value in values] for values in (one, tied)]
    assert spearman(np.array(one), np.array(tied)) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman(np.array([1, 2, 3]), np.array([10.0, 20, 1e9])) == pytest.approx(1.0)
    kept = np.array([[1.0, 5, 2, 9], [2, 4, 4, 8], [3, 6, 6, 1], [math.nan] * 4])
    expected = (1.0 + spearman(kept[:3, 1], kept[:3, 3])) / 2
    assert regression_metrics(EMPTY, kept) == {"spearman": pytest.approx(expected)}
