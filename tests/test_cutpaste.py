"""CutPaste against plain transcriptions: boxes, pixels, colours, Gaussian and map."""

import colorsys
import math

import numpy as np
import pytest
import torch
from conftest import class_of
from scipy.spatial.transform import Rotation
from torch.nn import functional as F

from draem_nb import cutpaste
from draem_nb.cutpaste import (CutPasteDetector, Gaussian, Pastes, ResNet18, draw_patches, draw_plan, draw_scars, fit,
                               make_batch, paper, paste, patch_features, spread, train_network)
from draem_nb.simulator import generator_of

TINY = paper().replace(name='tiny', size=32, width=4, steps=2, batch=3, patch=16, stride=8)
STILL = torch.tensor([[1., 1., 1., 0.]])        # a jitter that changes nothing


def noise(n: int, *size: int, seed: int = 0) -> torch.Tensor:
    "(n, 3, H, W) uint8."
    return torch.randint(256, (n, 3, *size), generator=generator_of(9, seed), dtype=torch.uint8)


def test_patches_have_the_published_sizes():
    "An area uniform in 2 to 15 % of an image that is not square, one of two ratios; all of it inside."
    size = torch.tensor([400, 200])
    p = draw_patches(paper(), 4000, (400, 200), generator_of(0))
    share, ratio = p.sides.prod(1) / 80_000, p.sides[:, 0] / p.sides[:, 1]
    assert 0.019 < share.min() < 0.022 and 0.148 < share.max() < 0.152
    assert share.mean().item() == pytest.approx(0.085, abs=0.003)
    assert 0.29 < ratio.min() < 0.33 and 3.1 < ratio.max() < 3.4
    # half of them uniform in 0.3 to 1, half in 1 to 3.3
    flat, tall = ratio[ratio < 0.99], ratio[ratio > 1.01]
    assert 0.45 < (ratio < 1).float().mean() < 0.55
    assert flat.mean().item() == pytest.approx(0.65, abs=0.03) and tall.mean().item() == pytest.approx(2.15, abs=0.06)
    for centre in (p.source, p.target):
        assert (centre - p.sides / 2 >= 0).all() and (centre + p.sides / 2 <= size).all()
        reach = (centre - p.sides / 2) / (size - p.sides).clamp(min=1)              # anywhere between both edges
        assert reach.min() < 0.01 and reach.max() > 0.99 and (reach.mean(0) - 0.5).abs().max() < 0.03


def test_scars_have_the_published_sizes():
    "2 to 16 by 10 to 25 pixels at 256, half of it at 128; turned to both sides; every corner inside."
    for side, scale in ((256, 1.), (128, 0.5)):
        s = draw_scars(paper().replace(size=side), 4000, (side, side), generator_of(1))
        widths, lengths = (s.sides / scale).T
        assert 2 <= widths.min() < 2.1 and 15.9 < widths.max() <= 16
        assert 10 <= lengths.min() < 10.1 and 24.9 < lengths.max() <= 25
        assert -45 <= s.degrees.min() < -44 and 44 < s.degrees.max() <= 45 and s.degrees.mean().abs() < 2
        turn = torch.complex(s.degrees.deg2rad().cos(), s.degrees.deg2rad().sin())
        for row, column in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            corner = torch.complex(s.sides[:, 1] * column / 2, s.sides[:, 0] * row / 2) * turn
            at = s.target + torch.stack([corner.imag, corner.real], 1)
            assert at.min() > -0.01 and at.max() < side + 0.01


def test_what_is_pasted_comes_from_the_image_and_the_mask_is_where():
    "Upright boxes in whole pixels, one touching the top left corner and one the bottom right."
    x = noise(2, 32, 48).float() / 255
    sides, source, target = torch.tensor([[[6., 9.], [5., 4.]], [[3., 4.5], [10.5, 20.]], [[29., 43.5], [2.5, 46.]]])
    pasted, mask = paste(x, Pastes(sides, source, target, torch.zeros(2), STILL.expand(2, 4)))
    expected, where = x.clone(), torch.zeros(2, 1, 32, 48, dtype=torch.bool)
    expected[0, :, 26:32, 39:48], where[0, :, 26:32, 39:48] = x[0, :, 0:6, 0:9], True
    expected[1, :, 0:5, 44:48], where[1, :, 0:5, 44:48] = x[1, :, 8:13, 18:22], True
    assert torch.equal(mask, where) and torch.allclose(pasted, expected, atol=1e-4)
    assert torch.equal(pasted[~mask.expand_as(pasted)], x[~mask.expand_as(x)])


@pytest.mark.parametrize('degrees', [0., 30., -45.])
def test_a_scar_is_a_turned_box_of_the_image_about_its_centre(degrees):
    "Of a slanted plane, whose value between pixels is exact, in double precision pixel by pixel."
    y, x = np.mgrid[:40, :56] + 0.5
    plane = torch.tensor(np.array([0.2 + 0.01 * y + 0.002 * x, 0.9 - 0.01 * x, 0.4 + 0.004 * y])).float()[None]
    box = Pastes(torch.tensor([[4., 15.]]), torch.tensor([[12., 30.5]]), torch.tensor([[25.3, 20.2]]),
                 torch.tensor([degrees]), STILL)
    pasted, mask = paste(plane, box)
    a = math.radians(degrees)
    dy, dx = y - 25.3, x - 20.2
    down, right = dy * math.cos(a) + dx * math.sin(a), dx * math.cos(a) - dy * math.sin(a)
    inside = (abs(down) < 2) & (abs(right) < 7.5)
    assert (mask[0, 0].numpy() == inside).all() and abs(inside.sum() - 60) <= 8
    fy, fx = 12 + down, 30.5 + right
    expected = np.array([0.2 + 0.01 * fy + 0.002 * fx, 0.9 - 0.01 * fx, 0.4 + 0.004 * fy])
    assert np.allclose(pasted[0].numpy()[:, inside], expected[:, inside], atol=1e-5)
    assert np.allclose(pasted[0].numpy()[:, ~inside], plane[0].numpy()[:, ~inside], atol=0)


def test_colours_change_by_brightness_contrast_saturation_and_hue_in_turn():
    "The mean gray of the contrast is that of the box alone; a hue is a turn about the gray axis."
    x = torch.rand(1, 3, 24, 24, generator=generator_of(2)) * 0.4 + 0.3
    jitter = torch.tensor([[1.08, 0.93, 1.07, -0.06]])
    box = Pastes(torch.tensor([[6., 8.]]), torch.tensor([[5., 6.]]), torch.tensor([[15., 16.]]), torch.zeros(1), jitter)
    found = paste(x, box)[0][0, :, 12:18, 12:20].double().numpy()
    gray = lambda c: np.tensordot([0.299, 0.587, 0.114], c, 1)
    c = x[0, :, 2:8, 2:10].double().numpy() * 1.08
    c = gray(c).mean() + (c - gray(c).mean()) * 0.93
    c = gray(c) + (c - gray(c)) * 1.07
    turn = Rotation.from_rotvec(np.ones(3) / 3**0.5 * -0.06 * 2 * np.pi).as_matrix()
    assert np.allclose(found, np.tensordot(turn, c, 1).clip(0, 1), atol=1e-5)
    # a third of a turn to the front: red becomes green
    red = torch.tensor([0.8, 0.1, 0.1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    third = Pastes(*torch.tensor([[[8., 8.]], [[4., 4.]], [[4., 4.]]]), torch.zeros(1), STILL + torch.eye(4)[3:] / 3)
    r, g, b = paste(red, third)[0][0, :, 4, 4].tolist()
    assert colorsys.rgb_to_hsv(r, g, b)[0] == pytest.approx(1 / 3, abs=1e-3)


def test_a_batch_is_windows_of_the_images_and_each_once_more_with_each_paste():
    recipe, images = TINY.replace(batch=40), noise(5, 32, 32)
    plan = draw_plan(recipe, 5, (16, 16), 7)
    batch, classes = make_batch(images, plan, (16, 16))
    assert classes.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert set(plan.image.tolist()) == set(range(5)) and plan.corner.min() == 0 and plan.corner.max() == 16
    for i, (image, (y, x)) in enumerate(zip(plan.image.tolist(), plan.corner.tolist())):
        assert torch.equal(batch[i], images[image, :, y:y + 16, x:x + 16].float() / 255)
    for kind in (0, 1):
        assert torch.equal(batch[40 * (kind + 1):40 * (kind + 2)], paste(batch[:40], plan.pastes[kind])[0])
    assert (plan.pastes[0].degrees == 0).all() and (plan.pastes[1].degrees != 0).all()


def test_a_plan_is_its_seed_window_and_step():
    numbers = lambda plan: [plan.image, plan.corner, *(v for p in plan.pastes for v in vars(p).values())]
    same = lambda a, b: all(map(torch.equal, numbers(a), numbers(b)))
    plan = lambda seed=1, window=(16, 16), step=4: draw_plan(TINY.replace(seed=seed), 9, window, step)
    assert same(plan(), plan())
    assert not same(plan(), plan(seed=2)) and not same(plan(), plan(step=5)) and not same(plan(), plan(window=(8, 16)))


def ledoit_wolf(f: np.ndarray) -> np.ndarray:
    "The shrunk covariance of (N, D) features (Ledoit and Wolf, 2004), as the paper writes it."
    n, d = f.shape
    x = f - f.mean(0)
    s = x.T @ x / n
    mu = np.trace(s) / d
    distance = ((s - mu * np.eye(d))**2).sum() / d
    noise = min(sum(((np.outer(row, row) - s)**2).sum() for row in x) / d / n**2, distance)
    return noise / distance * mu * np.eye(d) + (1 - noise / distance) * s


@pytest.mark.parametrize('n', [12, 200])
def test_the_distance_is_mahalanobis(n):
    "Fewer features than numbers, and more; the transcription in double precision."
    g = generator_of(3)
    mix = torch.randn(20, 20, generator=g)
    f, others = (torch.randn(k, 20, generator=g) @ mix + 3 for k in (n, 30))
    x = f.double().numpy()
    difference = others.double().numpy() - x.mean(0)
    expected = np.sqrt(np.einsum('ni,ij,nj->n', difference, np.linalg.inv(ledoit_wolf(x)), difference))
    assert np.allclose(Gaussian.fit(f).distance(others), expected, rtol=1e-4)


def test_a_pixel_is_the_weighted_mean_of_the_patches_over_it():
    "M(y) = sum d_k G(y - c_k) / sum G(y - c_k), G of three standard deviations to the edge, in plain loops."
    distances, patch, stride = torch.rand(2, 3, 4, generator=generator_of(4)), 8, 4
    above, below = np.zeros((2, 16, 20)), np.zeros((16, 20))
    for row in range(3):
        for column in range(4):
            for y in range(row * stride, row * stride + patch):
                for x in range(column * stride, column * stride + patch):
                    away = (y + 0.5 - row * stride - patch / 2)**2 + (x + 0.5 - column * stride - patch / 2)**2
                    weight = math.exp(-away / (2 * (patch / 6)**2))
                    above[:, y, x] += weight * distances[:, row, column].numpy()
                    below[y, x] += weight
    assert np.allclose(spread(distances, patch, stride)[:, 0], above / below, atol=1e-5)


def test_every_patch_has_the_feature_that_it_has_alone(monkeypatch):
    net, images = ResNet18(2).eval(), noise(3, 32, 48).float() / 255
    with torch.no_grad():
        whole = patch_features(net, images, 16, 8)
        monkeypatch.setattr(cutpaste, '_AT_ONCE', 4)            # so few at once change nothing
        parts = patch_features(net, images, 16, 8)
        assert whole.shape == (3, 3, 5, 16) and torch.allclose(whole, parts, atol=1e-5)
        for i, row, column in ((0, 0, 0), (1, 2, 1), (2, 1, 4)):
            alone = images[i:i + 1, :, 8 * row:8 * row + 16, 8 * column:8 * column + 16]
            assert torch.allclose(whole[i, row, column], net.features(alone)[0], atol=1e-5)


def test_the_first_step_is_sgd_with_decay_at_the_full_rate():
    recipe, images = TINY.replace(steps=1, batch=2, lr=0.01, weight_decay=0.1, momentum=0.9), noise(4, 32, 32)
    before, _ = train_network(images, recipe.replace(steps=0), (32, 32))
    after, losses = train_network(images, recipe, (32, 32))
    old = [p.detach().clone() for p in before.parameters()]
    batch, classes = make_batch(images, draw_plan(recipe, 4, (32, 32), 0), (32, 32))
    loss = F.cross_entropy(before.train()(batch), classes)
    assert losses.tolist() == pytest.approx([loss.item()], rel=1e-4)
    for p, gradient, new in zip(old, torch.autograd.grad(loss, list(before.parameters())), after.parameters()):
        assert torch.allclose(new, p - 0.01 * (gradient + 0.1 * p), atol=1e-4)


def test_the_rate_falls_along_one_cosine(monkeypatch):
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, 'step', lambda self: (rates.append(self.param_groups[0]['lr']), step(self)))
    train_network(noise(3, 32, 32), TINY.replace(steps=5, width=2, batch=1, lr=0.02), (32, 32))
    assert rates == pytest.approx([0.02 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)])


def test_maps_and_scores_are_distances_of_patches_and_images():
    "0.5 is the farthest patch of the images that were learned from, so no normal map is above it."
    images = noise(12, 32, 32)
    detector = fit(class_of(images), TINY.replace(holdout=0.), 'cpu')
    found, x = detector.predict(images), images.float() / 255
    with torch.no_grad():
        features = patch_features(detector.nets['patches'], x, 16, 8)
        distances = detector.gaussians['patches'].distance(features.flatten(0, 2)).view(12, 3, 3)
        image = detector.gaussians['images'].distance(detector.nets['images'].features(x))
    assert detector.farthest == pytest.approx(distances.max().item(), rel=1e-4)
    m = spread(distances, 16, 8)[:, 0]
    assert torch.allclose(found.maps, m / (m + distances.max()), atol=1e-4)
    assert found.maps.max() <= 0.5001 and torch.allclose(found.scores, image, rtol=1e-3)
    assert detector.predict(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)).maps.max() > 0.5


def test_a_seed_gives_the_same_bits():
    state = lambda d: [*(v for net in d.nets.values() for v in net.state_dict().values()), *d.losses.values(),
                       *(v for g in d.gaussians.values() for v in vars(g).values())]
    first, again, other = (fit(class_of(noise(12, 32, 32)), TINY.replace(seed=seed), 'cpu') for seed in (1, 1, 2))
    assert isinstance(first, CutPasteDetector) and all(map(torch.equal, state(first), state(again)))
    assert first.threshold == again.threshold and first.farthest == again.farthest
    assert not any(map(torch.equal, first.losses.values(), other.losses.values()))
