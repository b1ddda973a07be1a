"""The autoencoder against plain transcriptions: its training, its network, its map and score."""

import numpy as np
import pytest
import torch
from conftest import class_of
from scipy import ndimage
from sklearn.decomposition import PCA
from torch import nn

from draem_nb import autoencoder
from draem_nb.autoencoder import Autoencoder, AutoencoderDetector, AutoencoderRecipe, fit
from draem_nb.simulator import generator_of
from draem_nb.training import split_held_out

TINY = AutoencoderRecipe(size=32, steps=3, bottleneck=5, score_window=5, batch=4)


def planes(n: int = 12) -> torch.Tensor:
    "(n, 3, 32, 32) uint8, each of its own gray, so a step tells which it saw."
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 32, 32).contiguous()


def trained(net, images, recipe, seed=0):
    return autoencoder._train_in_place(net, images, recipe, generator_of(seed), 'test')


def pictures_seen(monkeypatch, loss='l2') -> list:
    "The images that the loss compares with, step by step: a list that grows."
    seen, plain = [], autoencoder._LOSSES[loss]
    monkeypatch.setitem(autoencoder._LOSSES, loss, lambda y, x: (seen.append(x.clone()), plain(y, x))[1])
    return seen


def test_a_linear_autoencoder_finds_the_principal_components():
    "Of all linear encoders and decoders of two numbers, the first two components have the smallest squared error."
    g = generator_of(2)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=g))[0] * torch.tensor([60., 45., *[8.] * 10])[:, None]
    images = (torch.randn(60, 12, generator=g) @ directions + 128).clamp(0, 255).byte().view(60, 3, 2, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Linear(2, 12), nn.Unflatten(1, (3, 2, 2)))
    for p in net.parameters(): nn.init.normal_(p, 0, 0.3, generator=g)
    for lr in (5e-2, 5e-3, 5e-4):
        trained(net, images, AutoencoderRecipe(steps=300, batch=240, lr=lr, weight_decay=0.))
    x = images.flatten(1).float() / 255
    pca = PCA(2).fit(x.numpy())
    best = np.square(x.numpy() - pca.inverse_transform(pca.transform(x.numpy()))).mean()
    with torch.no_grad(): assert 0.999 < (net[:3](x) - x).square().mean().item() / best < 1.1
    span = np.linalg.qr(net[2].weight.detach().numpy())[0]
    assert np.linalg.svd(span.T @ pca.components_.T)[1].min() > 0.99       # cosines of the angles between both


def test_the_map_is_the_error_of_its_loss_and_the_score_the_maximum_of_its_mean():
    g = generator_of(2)
    images = torch.randint(256, (2, 3, 32, 64), generator=g, dtype=torch.uint8)
    window = np.exp(-(np.arange(11) - 5)**2 / (2 * 1.5**2))
    window = np.multiply.outer(window, window) / window.sum()**2
    for loss in ('l2', 'ssim'):
        recipe = TINY.replace(size=(32, 64), loss=loss)
        net = autoencoder._set_first_weights(Autoencoder((32, 64), 5), g)
        found = AutoencoderDetector(net, recipe, torch.zeros(0)).predict(images)
        with torch.no_grad(): y = net(images.float() / 255).double().numpy()
        x = images.double().numpy() / 255
        if loss == 'l2': error = np.square(x - y).mean(1)
        else:
            local = lambda a: ndimage.correlate(a, window[None, None], mode='constant')
            (mx, my), (vx, vy) = (local(x), local(y)), (local(a * a) - local(a)**2 for a in (x, y))
            both, c1, c2 = local(x * y) - mx * my, 0.01**2, 0.03**2
            ssim = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            error = (1 - ssim.mean(1)) / 2
        assert np.allclose(found.maps, error, atol=1e-4)
        mean = ndimage.uniform_filter(found.maps.double().numpy(), (0, 5, 5), mode='constant')
        assert np.allclose(found.scores, mean.max((1, 2)), atol=1e-5)


def test_the_network_is_the_published_one():
    "Nine convolutions down, the same backwards up (Bergmann et al., 2018, table 1); leaky between, none at the ends."
    net = Autoencoder((128, 128), 100)
    widths, kernels, strides = ([32, 32, 32, 64, 64, 128, 64, 32, 100], [4, 4, 3, 4, 3, 4, 3, 3, 8],
                                [2, 2, 1, 2, 1, 2, 1, 1, 1])
    down = [m for m in net.encoder if isinstance(m, nn.Conv2d)]
    up = [m for m in net.decoder if isinstance(m, nn.ConvTranspose2d)][::-1]
    assert [m.out_channels for m in down] == [m.in_channels for m in up] == widths
    for layers in (down, up):
        assert [m.kernel_size for m in layers] == [(k, k) for k in kernels]
        assert [m.stride for m in layers] == [(s, s) for s in strides]
    slopes = [m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2] * 16 and isinstance(net.encoder[-1], nn.Conv2d)
    assert isinstance(net.decoder[-1], nn.ConvTranspose2d)
    assert sum(p.numel() for p in net.parameters()) == sum(
        2 * a * b * k * k + a + b for a, b, k in zip([3, *widths], widths, kernels))


def test_what_is_not_in_the_bottleneck_is_not_in_the_reconstruction():
    "The derivative of 3,072 reconstructed values by 3,072 given ones has the rank of the bottleneck."
    net = autoencoder._set_first_weights(Autoencoder((32, 32), 5), generator_of(3)).double()
    x = torch.rand(1, 3, 32, 32, generator=generator_of(4)).double().requires_grad_()
    directions = torch.randn(9, 3, 32, 32, generator=generator_of(5)).double()
    y = net(x)[0]
    rows = torch.stack([torch.autograd.grad((y * d).sum(), x, retain_graph=True)[0].flatten() for d in directions])
    assert torch.linalg.matrix_rank(rows, rtol=1e-9) == 5


def test_first_weights_are_hes_for_leaky_relu():
    "Uniform with variance 2 / (1.04 n); n counts the inputs that reach one value, a stride of 2 leaves a quarter."
    make = lambda seed: autoencoder._set_first_weights(Autoencoder((128, 128), 100), generator_of(seed))
    net = make(0)
    for name, layers in (('down', net.encoder), ('up', net.decoder)):
        for i, m in enumerate(m for m in layers if hasattr(m, 'weight')):
            if name == 'down': n = m.in_channels * m.kernel_size[0]**2
            else: n = m.in_channels * (1 if i == 0 else m.kernel_size[0]**2 / m.stride[0]**2)
            assert m.weight.abs().max().item() == pytest.approx((6 / (1.04 * n))**0.5, rel=0.02)
            assert m.weight.var().item() == pytest.approx(2 / (1.04 * n), rel=0.1)
            assert not m.bias.any()
    weights = lambda net: nn.utils.parameters_to_vector(net.parameters())
    assert torch.equal(weights(net), weights(make(0))) and not torch.equal(weights(net), weights(make(1)))


def test_a_step_is_adams():
    "The first step moves each weight by lr in the direction of its gradient, the decay added to that."
    recipe = TINY.replace(steps=1, lr=1e-3, weight_decay=0.1)
    images = torch.randint(256, (6, 3, 32, 32), generator=generator_of(6), dtype=torch.uint8)
    net = autoencoder._set_first_weights(Autoencoder((32, 32), 5), generator_of(7))
    before = [p.detach().clone() for p in net.parameters()]
    x = images[torch.randint(6, (4,), generator=generator_of(0))].float() / 255
    loss = (net(x) - x).square().mean()
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    assert trained(net, images, recipe).tolist() == pytest.approx([loss.item()], rel=1e-5)
    for old, gradient, new in zip(before, gradients, net.parameters()):
        g = gradient.double() + 0.1 * old.double()
        assert torch.allclose(new.double(), old - 1e-3 * g / (g.abs() + 1e-8), atol=2e-5)


@pytest.mark.parametrize('flips', [False, True])
def test_images_are_mirrored_only_where_asked(monkeypatch, flips):
    image = torch.randint(256, (1, 3, 32, 32), generator=generator_of(8), dtype=torch.uint8)
    mirrored = [image.flip(axes).float()[0] / 255 for axes in ([], [2], [3], [2, 3])]
    seen, recipe = pictures_seen(monkeypatch), TINY.replace(steps=80, batch=1, flips=flips)
    trained(nn.Conv2d(3, 3, 1), image, recipe)
    which = [next(i for i, m in enumerate(mirrored) if torch.allclose(x[0], m)) for x in seen]
    counts = np.bincount(which, minlength=4)
    assert counts.tolist() == [80, 0, 0, 0] if not flips else 10 <= counts.min() and counts.max() <= 30


def test_held_out_images_train_nothing_and_set_the_threshold(monkeypatch):
    recipe, seen = TINY.replace(steps=12, batch=8, holdout=0.25, seed=3), pictures_seen(monkeypatch)
    detector = fit(class_of(planes()), recipe, 'cpu')
    kept, held_out = split_held_out(12, recipe)
    assert {round(x * 255) for part in seen for x in part[:, 0, 0, 0].tolist()} == set(kept.tolist())
    assert detector.held_out_scores == detector.predict(planes()[held_out]).scores.tolist()
    assert detector.threshold == max(detector.held_out_scores)


def test_a_seed_gives_the_same_bits_and_its_run_comes_back(tmp_path):
    weights = lambda detector: nn.utils.parameters_to_vector(detector.net.parameters())
    first, again = (fit(class_of(planes()), TINY.replace(seed=1), 'cpu') for _ in range(2))
    assert torch.equal(weights(first), weights(again)) and torch.equal(first.losses, again.losses)
    assert first.threshold == again.threshold
    # another seed on the same images
    one, two = (fit(class_of(planes()), TINY.replace(seed=seed, holdout=0.), 'cpu') for seed in (1, 2))
    assert not torch.equal(weights(one), weights(two)) and not torch.equal(one.losses, two.losses)
    first.save(tmp_path)
    loaded = autoencoder.load(tmp_path, 'cpu')
    assert loaded.recipe == first.recipe and loaded.threshold == first.threshold
    assert torch.equal(loaded.predict(planes()).maps, first.predict(planes()).maps)
