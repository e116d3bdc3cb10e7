"""Protects the losses: sums over what is under the loss, by hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_train import dpo_loss
from losses import IGNORE_INDEX, cross_entropy_sum, sequence_log_probs


def test_cross_entropy_is_a_sum():
    """Two labels of probability 1/2 and 1/4: ln 2 + ln 4; a third position is ignored."""
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [1.0, 1.0, 1.0]]]).log()
    labels = torch.tensor([[0, 1, IGNORE_INDEX]])
    assert float(cross_entropy_sum(logits, labels)) == pytest.approx(math.log(8))
    assert float(cross_entropy_sum(logits, torch.full_like(labels, IGNORE_INDEX))) == 0


def test_sequence_log_probs_gathers_by_document_and_leaves_padding_out():
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, 3], [IGNORE_INDEX, 4, 0]])
    documents = torch.tensor([[0, 0, 1], [1, 1, 2]])
    log_p = logits.log_softmax(-1)
    wanted = [log_p[0, 0, 1] + log_p[0, 1, 2], log_p[0, 2, 3] + log_p[1, 1, 4]]
    torch.testing.assert_close(
        sequence_log_probs(logits, labels, documents, 2), torch.stack(wanted)
    )


def test_dpo_loss_by_hand():
    """Margins 0 and ln 3 (beta 1): ln 2 and -ln(3/4); a tie counts half."""
    reference = torch.tensor([-3.0, -4.0, -1.0, -1.0])
    policy = reference + torch.tensor([0.5, 0.5, math.log(3), 0.0])
    loss, metrics = dpo_loss(policy, reference, 1.0)
    assert float(loss) == pytest.approx(math.log(2) - math.log(0.75), rel=1e-5)
    assert float(metrics["reward_accuracy"][0]) == 1.5 and metrics["reward_accuracy"][1] == 2
    assert float(metrics["reward_margin"][0]) == pytest.approx(math.log(3), rel=1e-5)
