"""Tests that the losses, sums over supervised positions, match manual arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import sft_train
import train
from dpo_train import dpo_loss
from trainlib.data.batch import IGNORE_INDEX, Batch
from trainlib.engine.losses import cross_entropy_sum, sequence_log_probs, token_losses


def test_cross_entropy_is_summed():
    """Labels with probabilities 1/2 and 1/4 give ln 2 + ln 4; a third position is ignored."""
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [1.0, 1.0, 1.0]]]).log()
    labels = torch.tensor([[0, 1, IGNORE_INDEX]])
    assert float(cross_entropy_sum(logits.clone(), labels)) == pytest.approx(math.log(8))
    assert float(cross_entropy_sum(logits, torch.full_like(labels, IGNORE_INDEX))) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_match_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 50, generator=generator) * torch.tensor(
        [[1.0], [9], [1], [1], [0], [1], [1]]
    )
    logits[3] += 3e4  # Far from 0, where exp alone would overflow.
    logits[5, 4] = 200.0  # All others have probability 0.
    logits[6, 0] = torch.inf  # Ignored: torch returns NaN there, ours 0.
    labels = torch.tensor([3, 49, IGNORE_INDEX, 0, 7, 1, IGNORE_INDEX])
    weights = torch.arange(1.0, 8.0)
    results = []
    for losses in (token_losses, lambda x, y: F.cross_entropy(
        x if dtype == torch.float64 else x.float(), y, ignore_index=IGNORE_INDEX, reduction="none"
    )):  # fmt: skip
        leaf = logits.clone().to(dtype).requires_grad_()
        values = losses(leaf.clone(), labels)
        (values * weights).sum().backward()
        results.append((values, leaf.grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert ours.dtype == theirs.dtype and our_grad.dtype == dtype
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grad[:6], their_grad[:6])
    assert ours[2] == 0 == our_grad[[2, 6]].abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_can_be_reused(dtype):
    """The loss plus a z-loss and an entropy term has the same gradients as in float64.

    Fails if the loss modifies the logits, which both terms read after it.
    """

    def gradient(logits: torch.Tensor, losses) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        output = leaf.clone()  # Like the output of a layer, which the loss could overwrite.
        loss = losses(output, labels).sum()
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        z_loss = 1e-4 * wide.logsumexp(-1).square().sum()
        entropy = -(wide.softmax(-1) * wide.log_softmax(-1)).sum()
        (loss + z_loss - 0.01 * entropy).backward()
        assert leaf.grad is not None
        return leaf.grad

    logits = 3 * torch.randn(6, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([1, 0, IGNORE_INDEX, 10, 4, 4])
    exact = gradient(logits.double(), lambda x, y: F.cross_entropy(
        x, y, ignore_index=IGNORE_INDEX, reduction="none"))  # fmt: skip
    ours = gradient(logits, token_losses)
    assert ours.dtype == dtype
    tolerances = (
        {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(ours.double(), exact, **tolerances)


def test_a_second_backward_pass_is_rejected():
    loss = token_losses(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="recompute the loss"):
        loss.backward()


def test_sequence_log_probs_sums_by_document_and_omits_padding():
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, 3], [IGNORE_INDEX, 4, 0]])
    documents = torch.tensor([[0, 0, 1], [1, 1, 2]])
    log_p = logits.log_softmax(-1)
    expected = [log_p[0, 0, 1] + log_p[0, 1, 2], log_p[0, 2, 3] + log_p[1, 1, 4]]
    torch.testing.assert_close(
        sequence_log_probs(logits, labels, documents, 2), torch.stack(expected)
    )


def test_the_dpo_loss_matches_manual_arithmetic():
    """Margins 0 and ln 3 (beta 1) give ln 2 and -ln(3/4); a tie counts as half correct."""
    reference = torch.tensor([-3.0, -4.0, -1.0, -1.0])
    policy = reference + torch.tensor([0.5, 0.5, math.log(3), 0.0])
    loss, metrics = dpo_loss(policy, reference, 1.0)
    assert float(loss) == pytest.approx(math.log(2) - math.log(0.75), rel=1e-5)
    assert float(metrics["reward_accuracy"][0]) == 1.5 and metrics["reward_accuracy"][1] == 2
    assert float(metrics["reward_margin"][0]) == pytest.approx(math.log(3), rel=1e-5)


def test_the_penalty_lowers_the_margin_of_a_chosen_answer_that_became_less_likely():
    """Pal et al., arXiv:2402.13228, equation 3, for two pairs: the second one is not penalized."""
    policy, reference = (
        torch.tensor([-6.0, -9.0, -3.0, -8.0]),
        torch.tensor([-5.0, -7.0, -4.0, -7.0]),
    )
    loss, metrics = dpo_loss(policy, reference, 0.5, penalty=3.0)
    first = 0.5 * (-1.0 + 2.0 - 3.0 * 1.0)
    second = 0.5 * (1.0 + 1.0)
    expected = math.log1p(math.exp(-first)) + math.log1p(math.exp(-second))
    assert float(loss) == pytest.approx(expected)
    assert dpo_loss(policy, reference, 0.5)[1] == metrics  # Rewards and accuracy are DPO's.
    policy.requires_grad_()
    dpo_loss(policy, reference, 0.5, penalty=3.0)[0].backward()
    assert float(policy.grad[0]) == pytest.approx(-4 * float(policy.grad[1]))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_beta_is_the_slope_of_the_dpo_loss(beta):
    """Fails if beta is omitted. The margin is beta ln 9, the gradient -+ beta sigmoid(-margin)."""
    policy = torch.tensor([math.log(9.0), 0.0], requires_grad=True)
    loss, metrics = dpo_loss(policy, torch.zeros(2), beta)
    loss.backward()
    wrong = 1 / (1 + 9**beta)
    assert float(loss.detach()) == pytest.approx(-math.log(1 - wrong), rel=1e-5)
    assert policy.grad.tolist() == pytest.approx([-beta * wrong, beta * wrong], rel=1e-5)
    assert metrics["reward_margin"][0].item() == pytest.approx(beta * math.log(9), rel=1e-5)


@pytest.mark.parametrize("stage", [train, sft_train])
def test_bits_per_byte_of_a_uniform_model_match_manual_arithmetic(stage):
    """Fails if the logarithm has another base: 5 labels of 3 bits on 12 bytes are 15 / 12."""
    labels = torch.tensor([[3, 1, IGNORE_INDEX, 7], [0, IGNORE_INDEX, 2, IGNORE_INDEX]])
    zeros = torch.zeros_like(labels)
    batch = Batch(
        zeros, labels, zeros, zeros, zeros[0], zeros[0], num_targets=5, num_bytes=12, num_tokens=8
    )

    def model(select, **_):
        return torch.zeros(2, 4, 8)[select]

    loss, metrics = stage.loss_fn(model, batch)
    total, count = metrics["bits_per_byte"]
    assert float(loss) == pytest.approx(5 * math.log(8))
    assert (float(total), count) == (pytest.approx(15), 12)
