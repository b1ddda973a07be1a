"""What the two training aids compute: Muon's step, and the side heads' loss, against plain definitions."""

import pytest
import torch
from torch import nn

from draem_nb.losses import ssim_loss
from draem_nb.networks import Draem
from draem_nb.optimizers import Muon, inner_kernels, make_optimizers, orthogonalise
from draem_nb.recipes import demo
from draem_nb.supervision import SideHeads, supervision_weight


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_net() -> Draem:
    return Draem(2, 2)


@pytest.mark.parametrize('shape', [(3, 8, 24), (3, 24, 8)], ids=['wide', 'tall'])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrices = random(*shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    levelled = u.mT @ orthogonalise(matrices) @ v.mT               # diagonal where the singular vectors are kept
    values = levelled.diagonal(dim1=1, dim2=2)
    assert (levelled - torch.diag_embed(values)).abs().max() < 1e-4
    assert 0.6 < values.min() and values.max() < 1.3


def test_a_step_of_muon_is_its_definition():
    "Nesterov's momentum 0.9 of the gradient, orthogonalised, times the rate; then every filter at norm 1."
    unit = lambda k: k / k.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    kernel = nn.Parameter(3 * random(6, 4, 3, 3))
    expected, momentum = unit(kernel.detach().clone()), torch.zeros(6, 4, 3, 3)
    optimizer = Muon([kernel], lr=0.1)
    torch.testing.assert_close(kernel.data, expected)
    for step in range(3):
        kernel.grad = random(6, 4, 3, 3, seed=step + 1)
        momentum = 0.9 * momentum + kernel.grad
        move = orthogonalise((kernel.grad + 0.9 * momentum).flatten(1)[None]).view_as(kernel)
        expected = unit(expected - 0.1 * move)
        optimizer.step()
        torch.testing.assert_close(kernel.data, expected)


def test_muon_trains_the_inner_kernels_and_adam_everything_else():
    "Of each sub-network all kernels but the first and the last; with no rate for Muon, Adam trains everything."
    net, extra = small_net(), nn.Parameter(torch.zeros(1))
    kernels = inner_kernels(net)
    convolutions = [[m.weight for m in sub.modules() if isinstance(m, nn.Conv2d)]
                    for sub in (net.reconstructive, net.discriminative)]
    assert [id(k) for k in kernels] == [id(k) for ks in convolutions for k in ks[1:-1]]
    adam, muon = make_optimizers(net, demo(), [extra])
    trained = [[id(p) for group in o.param_groups for p in group['params']] for o in (adam, muon)]
    assert trained[1] == [id(k) for k in kernels] and id(extra) in trained[0] and not set(trained[0]) & set(trained[1])
    assert sorted(trained[0] + trained[1]) == sorted([id(extra), *map(id, net.parameters())])
    assert (adam.param_groups[0]['lr'], muon.param_groups[0]['lr']) == (demo().lr, demo().kernel_lr)
    alone, = make_optimizers(net, demo().replace(kernel_lr=None))
    assert len(alone.param_groups[0]['params']) == len(list(net.parameters()))


def heads_and_picture() -> tuple[Draem, SideHeads, torch.Tensor]:
    net, picture = small_net(), random(2, 3, 32, 32).sigmoid()
    heads = SideHeads(net.reconstructive, 2, torch.Generator().manual_seed(0))
    net.reconstructive(picture)
    return net, heads, picture


def test_the_loss_of_the_side_heads_is_its_definition():
    """Sum over four heads of 1 - SSIM + 10 MSE to the mean of the channels; each a picture of the
    full size, gray at the start."""
    _, heads, picture = heads_and_picture()
    pictures = heads.pictures()
    assert [tuple(p.shape) for p in pictures] == [(2, 1, 32, 32)] * 4
    assert all((p - 0.5).abs().mean() < 0.2 for p in pictures)
    gray = picture.sum(1, keepdim=True) / 3
    expected = sum(ssim_loss(gray, p) + 10 * (p - gray).square().mean() for p in pictures)
    torch.testing.assert_close(heads.loss(picture), expected)


def test_the_loss_of_the_side_heads_reaches_every_layer_up_to_the_last_head():
    """Encoder and decoder learn from it down to the first convolution; what lies behind `decoder.db3`, the last
    that is listened to, does not."""
    net, heads, picture = heads_and_picture()
    heads.loss(picture).backward()
    with_gradient = {name for name, p in net.reconstructive.named_parameters() if p.grad is not None
                     and p.grad.abs().max() > 0}
    behind = {name for name, _ in net.reconstructive.named_parameters()
              if name.startswith(('decoder.up4', 'decoder.db4', 'decoder.fin_out'))}
    kernels = {name for name, p in net.reconstructive.named_parameters() if p.ndim == 4}
    assert kernels - behind <= with_gradient and not behind & with_gradient
    assert all(h.weight.grad.abs().max() > 0 for h in heads.heads)


def test_the_weight_of_the_side_heads_falls_to_zero_at_nine_tenths():
    assert [supervision_weight(2., share) for share in (0., 0.45, 0.9, 1.)] == pytest.approx([2., 1., 0., 0.])
