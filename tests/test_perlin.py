"draem_nb.perlin: the definition in double precision, and what the noise depends on."
import math

import numpy as np
import pytest
import torch
from conftest import gen

from draem_nb.perlin import lattice_noise, perlin_noise, random_angles


@pytest.mark.parametrize('size', [(64, 64), (61, 100), (32, 96)], ids=str)
def test_it_is_the_definition(size):
    scales, angles = torch.tensor([[0, 0], [0, 3], [3, 0], [5, 2], [1, 4]]), random_angles(5, 5, gen())
    noise = perlin_noise(scales, size, angles=angles)
    assert noise.shape == (5, 1, *size) and noise.dtype == torch.float32
    for ours, one, cells in zip(noise[:, 0].numpy(), angles.double().numpy(), (2**scales).tolist()):
        assert np.abs(ours - lattice_noise(one, cells, size)).max() < 2e-5


def test_the_definition_by_hand():
    "Where all vectors of one cell point down, u below the upper edge the noise is sqrt(2) (u - f(u)); sideways, of v."
    u = np.arange(16)[:, None] / 16
    expected = math.sqrt(2) * (u - (6 * u**5 - 15 * u**4 + 10 * u**3)) * np.ones(24)
    assert np.allclose(lattice_noise(np.zeros((2, 2)), (1, 1), (16, 24)), expected)
    assert np.allclose(lattice_noise(np.full((2, 2), math.pi / 2), (1, 1), (24, 16)), expected.T)


def test_the_first_scale_is_that_of_the_rows():
    noise = perlin_noise(torch.tensor([[0, 4]]).repeat(20, 1), 64, gen())
    assert noise.diff(dim=3).abs().mean() > 3 * noise.diff(dim=2).abs().mean()


def test_angles_follow_from_the_generator_and_fill_the_circle():
    a, b, c = random_angles(50, 5, gen(1)), random_angles(50, 5, gen(1)), random_angles(50, 5, gen(2))
    assert a.shape == (50, 33, 33) and torch.equal(a, b) and not torch.equal(a, c)
    assert 0 <= a.min() < 0.001 and 2 * math.pi - 0.001 < a.max() <= 2 * math.pi and abs(a.mean() - math.pi) < 0.03
    k = torch.tensor([[2, 3]])
    torch.manual_seed(0)
    first = perlin_noise(k, 32, gen(3))
    torch.manual_seed(1)
    assert torch.equal(first, perlin_noise(k, 32, gen(3))) and not torch.equal(first, perlin_noise(k, 32, gen(4)))


def test_as_many_masks_as_the_released_code_makes():
    "600 draws without turn: mean area 5.4 %, empty 4.3 %."
    masks = perlin_noise(torch.randint(0, 6, (600, 2), generator=gen()), 128, gen(1)) > 0.5
    area = masks.float().mean((1, 2, 3))
    assert abs(area.mean() - 0.054) < 0.006 and abs((area == 0).float().mean() - 0.043) < 0.03
