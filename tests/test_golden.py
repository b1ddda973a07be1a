"""Networks, losses and score against numbers that the authors' released code gave (tests/golden.json, figures alone).

Inputs and weights are waves and hashes that anyone can make: see `wave`, `noise` and `fill`."""
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from draem_nb.detector import image_score
from draem_nb.losses import draem_loss, focal_loss, ssim_loss
from draem_nb.networks import Draem
from draem_nb.recipes import official

GOLDEN = json.loads((Path(__file__).parent / 'golden.json').read_text())


def wave(shape, a, b): return torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b).view(shape)


def noise(shape, k):
    "In -1..1, from the fraction of a large sine."
    h = 43758.5453 * torch.sin(12.9898 * (torch.arange(math.prod(shape), dtype=torch.float64) + 1) + 78.233 * (k + 1))
    return (2 * (h - h.floor()) - 1).view(shape)


def fill(net):
    "Weights of one sub-network: the k-th entry of its state dict is made of noise k."
    state = net.state_dict()
    for k, (name, old) in enumerate(state.items()):
        w = noise(old.shape, k)
        if old.ndim == 4: w = w * math.sqrt(6 / old[0].numel())
        elif name.endswith('running_var'): w = 1 + 0.2 * w
        elif name.endswith('weight'): w = 1 + 0.1 * w
        else: w = 0.1 * w
        if not name.endswith('num_batches_tracked'): state[name] = w
    net.load_state_dict(state)


def filled(dtype=torch.float64):
    net = Draem(8, 8).double()
    for part in net.children(): fill(part)
    return net.to(dtype)


target = 0.5 + 0.3 * wave((2, 3, 64, 64), 0.0137, 0)
image = target + 0.2 * noise((2, 3, 64, 64), 1000)
mask = (wave((2, 1, 64, 64), 0.0091, 0.3) > 0.8).double()
at = lambda z: z[:, :, 5::17, 3::19].flatten()


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance,
                               atol=tolerance)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('mode, tolerance', [('eval', 1e-5), ('train', 4e-3)])
def test_networks(mode, tolerance, dtype, layout):
    "The figures were made in float32, whose batch statistics put the logits in train mode 2e-3 away from float64."
    net = filled(dtype).train(mode == 'train').to(memory_format=layout)
    with torch.no_grad(): reconstruction, logits = net(image.to(dtype).contiguous(memory_format=layout))
    assert_close(at(reconstruction), GOLDEN[mode]['reconstruction'], tolerance)
    assert_close(at(logits), GOLDEN[mode]['logits'], tolerance)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_losses(dtype, tolerance):
    x, t, m, logits = (v.to(dtype) for v in (image, target, mask, 2 * wave((2, 2, 64, 64), 0.0173, 0.9)))
    assert_close(ssim_loss(x, t), GOLDEN['ssim'], tolerance)
    assert_close(ssim_loss(t, x.clone().requires_grad_()).detach(), GOLDEN['ssim'], tolerance)       # the quick way
    assert_close(F.mse_loss(x, t), GOLDEN['l2'], tolerance)
    assert_close(focal_loss(logits, m), GOLDEN['focal'], tolerance)
    found = draem_loss(x, logits, t, m, official())
    assert_close(torch.stack(found), [GOLDEN['ssim'] + GOLDEN['l2'] + GOLDEN['focal'], GOLDEN['ssim'], GOLDEN['l2'],
                                      GOLDEN['focal']], tolerance)


def test_six_joint_steps():
    """Adam at 1e-3, times 0.2 after four steps, in float64, from inputs and weights rounded to
    float32: losses before each step.

    Adam divides tiny gradients by themselves, so every step makes a difference about a thousand
    times larger: the released window,
    rounded to float32, is 1e-7 away in the first row, 1e-6 in the second, 1e-3 in the third, and
    a few percent from then on."""
    net = filled(torch.float32).double().train()
    x, t = image.float().double(), target.float().double()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4], 0.2)
    losses, rates = [], []
    for _ in range(6):
        found = draem_loss(*net(x), t, mask, official())
        losses.append(torch.stack(found[1:]).detach())
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step(); scheduler.step()
    for row, expected, tolerance in zip(losses, GOLDEN['steps']['losses_ssim_l2_focal'],
                                        (1e-6, 1e-5, 2e-3, 0.2, 0.2, 0.2)):
        assert_close(row, expected, tolerance)
    assert rates == pytest.approx(GOLDEN['steps']['lr'])


def test_image_scores():
    assert_close(image_score(torch.sigmoid(3 * wave((2, 1, 64, 64), 0.021, 0.1)), official().score_window),
                 GOLDEN['score_21'], 1e-6)
