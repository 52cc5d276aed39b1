"""The focal loss and deep supervision, counted by hand."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import lib

LN2 = math.log(2)
PAPER = (0.2, 0.3, 0.5)  # weights of the outputs at 1/2, 1/4 and 1/8


def test_focal_loss_by_hand():
    """p = 0.5 and 0.8, γ = 2, α = ¼: (¼·½²·ln 2 + ¼·⅕²·ln 1.25) / 2; a third pixel is ignored."""
    logits = torch.tensor([[0.0, math.log(4), 5.0], [0.0, 0.0, -3.0]])[None, :, None]
    want = (0.25 * 0.25 * LN2 + 0.25 * 0.04 * math.log(1.25)) / 2
    got = lib.focal_loss(logits, torch.tensor([[[1, 0, -1]]]), 2.0, 0.25)
    assert got.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("ignore_index", [-1, 255])
def test_gamma_0_is_cross_entropy(ignore_index):
    """γ = 0, α = 1 has PyTorch's value and gradient, which is 0 where, and only where, ignored."""
    torch.manual_seed(0)
    target = torch.randint(0, 5, (3, 6, 7))
    target[torch.rand(3, 6, 7) < 0.3] = ignore_index
    ours = torch.randn(3, 5, 6, 7).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    one = lib.focal_loss(ours, target, 0.0, ignore_index=ignore_index)
    two = F.cross_entropy(theirs, target, ignore_index=ignore_index)
    torch.testing.assert_close(one, two)
    (one + two).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(ours.grad.abs().sum(1) > 0, target != ignore_index)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_the_formula_in_double(gamma):
    """Value and gradient are those of -(1 - p)^γ log p, written plainly in float64."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 4, 5, 5)).requires_grad_()
    plain = logits.detach().double().requires_grad_()
    target = torch.randint(0, 4, (2, 5, 5))
    p = plain.softmax(1).gather(1, target[:, None])[:, 0]
    want, got = (-((1 - p) ** gamma) * p.log()).mean(), lib.focal_loss(logits, target, gamma)
    (want + got).backward()
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, plain.grad.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.fault(31)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_finite_at_logits_of_200(gamma, dtype):
    """At ±200 value and gradient are finite: right costs 0, wrong 400 and is still pushed away."""
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], dtype=dtype)[None, :, None]
    logits.requires_grad_()
    right = lib.focal_loss(logits, torch.tensor([[[0, 1]]]), gamma)
    wrong = lib.focal_loss(logits, torch.tensor([[[1, 0]]]), gamma)
    assert right.item() == 0 and wrong.item() == 400
    (right + wrong).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0, 0, 0] > 0.4  # half the mean's slope of 1


@pytest.mark.fault(17)
def test_no_counted_pixel_is_zero():
    """All pixels ignored: the loss is 0, its gradient 0, never NaN."""
    logits = torch.randn(2, 2, 3, 3, requires_grad=True)
    loss = lib.focal_loss(logits, torch.full((2, 3, 3), -1), 2.0)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def zeros(side: int) -> list[torch.Tensor]:
    """Return logits of two classes, all 0, which cost ln 2 a pixel, on four levels."""
    return [torch.zeros(1, 2, side // 2**i, side // 2**i) for i in range(4)]


def test_level_weights_by_hand():
    """Logits of zero cost (1 + 0.2 + 0.3 + 0.5) · ln 2; one level right costs its weight less."""
    target = torch.zeros(1, 16, 16).long()
    for level, weight in enumerate((0, 1, *PAPER)):
        logits = zeros(16)
        if level:
            logits[level - 1][:, 0] = 1000
        loss = lib.deep_supervision_loss(logits, target, PAPER, gamma=0.0)
        assert loss.item() == pytest.approx((2 - weight) * LN2, rel=1e-6)


def test_coarse_targets_are_every_second_pixel():
    """A lone labelled pixel at (1, 1) counts at full size and, as (0, 0), at half size only."""
    target = torch.full((1, 8, 8), -1)
    target[0, 1, 1] = 0
    loss = lib.deep_supervision_loss(zeros(8), target, PAPER, gamma=0.0)
    assert loss.item() == pytest.approx(1.2 * LN2, rel=1e-6)


@pytest.mark.fault(19)
@pytest.mark.parametrize("h,w", [(65, 127), (1, 1), (17, 16)])
def test_odd_sizes_have_a_loss(h, w):
    """Outputs of the padded size against an odd target: a finite loss and finite gradients."""
    model = lib.UNet(1, 4, 2, shuffle=2)
    logits, target = model(torch.randn(2, 1, h, w)), torch.randint(0, 4, (2, h, w))
    loss = lib.deep_supervision_loss(logits, target, (0.1, 0.1, 0.1), gamma=2.0)
    loss.backward()
    assert loss.isfinite() and model.heads[0].weight.grad.isfinite().all()
