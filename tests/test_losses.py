"The losses where the released figures (test_golden.py) do not look: weights, exponent and error maps."
import pytest
import torch
from torch.nn import functional as F

from draem_nb.losses import draem_loss, reconstruction_error, ssim_loss, ssim_map
from draem_nb.recipes import official

g = torch.Generator().manual_seed(0)
target, reconstruction = (torch.rand(2, 3, 32, 64, generator=g) for _ in range(2))
logits, mask = torch.randn(2, 2, 32, 64, generator=g), (torch.rand(2, 1, 32, 64, generator=g) > 0.8).float()


def test_every_weight_weighs_its_own_term():
    plain = draem_loss(reconstruction, logits, target, mask, official())
    assert plain.l2 == F.mse_loss(reconstruction, target) and plain.ssim == ssim_loss(target, reconstruction)
    for name, term in (('ssim_weight', plain.ssim), ('l2_weight', plain.l2), ('focal_weight', plain.focal)):
        found = draem_loss(reconstruction, logits, target, mask, official().replace(**{name: 3.}))
        assert found.total.item() == pytest.approx((plain.total + 2 * term).item(), rel=1e-5)


@pytest.mark.parametrize('gamma', [0., 1., 2., 5.])
def test_focal_exponent_is_the_recipes(gamma):
    found = draem_loss(reconstruction, logits, target, mask, official().replace(focal_gamma=gamma)).focal
    p = logits.double().softmax(1).gather(1, mask.long())                 # of the true class
    assert found.item() == pytest.approx((-(1 - p)**gamma * p.log()).mean().item(), rel=1e-3)


@pytest.mark.parametrize('kind', ['ssim', 'msgms'])
def test_error_maps_are_0_where_alike_and_at_most_1(kind):
    assert reconstruction_error(target, target, kind).abs().max() < 1e-5
    error = reconstruction_error(target, reconstruction, kind)
    assert error.shape == (2, 1, 32, 64) and 0 <= error.min() and 0.05 < error.mean() and error.max() <= 1


def test_msgms_by_hand():
    """Of a slanted plane and a flat one: gradient magnitudes s at every scale (2 s at half the size) beside 0; c =
    0.0026, away from the border."""
    plane = (0.004 * torch.arange(64.)).expand(1, 3, 64, 64)
    found = reconstruction_error(plane, torch.full((1, 3, 64, 64), 0.5), 'msgms')[0, 0, 32, 32]
    similar = [0.0026 / ((2 * 0.004 * 2**scale)**2 + 0.0026) for scale in range(4)]
    assert found.item() == pytest.approx(1 - sum(similar) / 4, rel=1e-3)


def test_gradients_in_float64():
    x, y = target.double()[:1, :, :16, :16], reconstruction.double()[:1, :, :16, :16].requires_grad_()
    assert torch.autograd.gradcheck(ssim_loss, (x, y)) and ssim_map(x, y).dtype == torch.float64
