"""The formula of the loss, and what its difference is measured against."""

import math

import pytest
import torch

from megatron_ds.verify.loss import ReferenceLoss, mean_loss, reference_loss


def test_each_term_is_a_mean_over_its_labels() -> None:
    logits = torch.zeros(2, 3, 5)
    logits[0, 0, 4] = 2.0
    labels = {
        "targets": torch.tensor([[4, -100, 1], [-100, -100, -100]]),
        "next_sentence_label": torch.tensor([-100, 1]),
    }
    outputs = {"logits": logits, "next_sentence": torch.tensor([[9.0, -9.0], [0.0, 1.0]])}
    first, second = math.log(4 + math.e**2) - 2.0, math.log(5)
    sentence = math.log(1 + math.e) - 1.0
    assert float(mean_loss(outputs, labels)) == pytest.approx((first + second) / 2 + sentence, rel=1e-6)


def test_directions_are_multiplied() -> None:
    hidden, along = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, -1.0]]])
    assert float(mean_loss({"hidden": hidden}, {"hidden_direction": along})) == 0.5


def test_a_product_that_adds_up_to_nothing_is_measured_against_its_chance() -> None:
    hidden, along = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[3.0, -3.0]]])
    loss = reference_loss({"hidden": hidden}, {"hidden_direction": along})
    assert loss == ReferenceLoss(0.0, pytest.approx(math.sqrt(18) / 2))
    assert loss.difference(1e-3).relative == pytest.approx(1e-3 / (math.sqrt(18) / 2))


def test_what_is_not_a_number_equals_nothing() -> None:
    assert not ReferenceLoss(math.nan, math.nan).difference(math.nan).within(1.0)
    assert not ReferenceLoss(1.0, 1.0).difference(math.nan).within(1.0)
    assert not ReferenceLoss(2.0, 2.0).difference(1.0).within(0.4)
