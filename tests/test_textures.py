"The augmentation of textures against Pillow and imgaug, its draws, folders of images."
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import gen
from PIL import Image

from draem_nb import textures as T
from draem_nb.recipes import official
from draem_nb.simulator import AnomalySimulator
from draem_nb.textures import OPERATIONS, PILLOW, Augmentation, draw_augmentation, load_textures


WHOLE = official().replace(mask_shape='rectangle', opacity=(1., 1.), clean_share=0., rotation_probability=0.)


def augment(x, augmentation):
    "Textures as the simulator paints them where the mask is the whole picture and lets nothing through."
    simulator = AnomalySimulator(x, WHOLE)
    plan = simulator.plan(1, len(x), 0, 0)
    plan = replace(plan, texture=torch.arange(len(x)), augmentation=augmentation,
                   rectangle=torch.tensor([0., 0., 1., 1.]).repeat(len(x), 1))
    return (simulator(torch.zeros_like(x[:1]), plan).augmented * 255).round().byte()


def apply(x, *chain):
    "The same operations `(name, *strengths)` on all images; a strength is a number or one for each."
    kind = next(kind for kind, names in OPERATIONS.items() if {name for name, *_ in chain} <= set(names))
    strengths = torch.zeros(len(x), len(chain), 4)
    for k, (_, *values) in enumerate(chain):
        for i, value in enumerate(values): strengths[:, k, i] = torch.as_tensor(value)
    operations = torch.tensor([[OPERATIONS[kind].index(name) for name, *_ in chain]]).repeat(len(x), 1)
    return augment(x, Augmentation(kind, operations, strengths))


def pillow(x, f):
    images = [f(Image.fromarray(np.ascontiguousarray(i.permute(1, 2, 0).numpy()))) for i in x]
    return torch.stack([torch.tensor(np.array(image)).permute(2, 0, 1) for image in images])


def random_images(n, size, g):
    "n images, each with noise, a few levels, a narrow range, a ramp with noise, or a single colour."
    noise = torch.randint(256, (n, 3, *size), generator=g)
    ramp = torch.linspace(0, 255, size[1]).expand(3, *size).int() + noise // 16
    low, width = torch.randint(200, (3, 1, 1), generator=g), torch.randint(1, 56, (3, 1, 1), generator=g)
    kinds = [lambda i: noise[i], lambda i: noise[i] // 85 * 85, lambda i: low + noise[i] % width,
             lambda i: ramp[i].clamp(max=255),
             lambda i: noise[i, :, :1, :1].expand(3, *size)]
    return torch.stack([kinds[i % len(kinds)](i) for i in range(n)]).to(torch.uint8)


SIZES = [(1, 1), (1, 9), (7, 1), (2, 2), (2, 50), (3, 3), (3, 4), (5, 31), (17, 16), (64, 37), (96, 128)]
STRENGTHS = dict(  # wider than what is drawn
    posterize=(1, 8, True), solarize=(0, 256, True), invert=None, autocontrast=(0, 49, True), sharpness=(0, 4, False),
    brightness=(0, 4, False), color=(0, 4, False))


@pytest.mark.parametrize('name', STRENGTHS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_operations_equal_pillow(name, size):
    g = gen(sum(size))
    x = random_images(15, size, g)
    if STRENGTHS[name] is None:
        assert torch.equal(apply(x, (name,)), pillow(x, PILLOW[name]))
        return
    low, high, whole = STRENGTHS[name]
    s = torch.rand(15, generator=g) * (high - low) + low
    if whole: s = s.round()
    s[:2] = torch.tensor([low, high])
    theirs = torch.cat([pillow(x[i:i + 1], lambda image, i=i: PILLOW[name](image, s[i].item())) for i in range(15)])
    assert torch.equal(apply(x, (name, s)), theirs)


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_equalize(size):
    "imgaug's rule, channel by channel, as it is written."
    def channel(x):
        counts = np.bincount(x.ravel(), minlength=256)
        step = counts[:255].sum() // 255
        if (counts > 0).sum() <= 1 or step == 0: return x
        return ((step // 2 + counts.cumsum() - counts) // step).clip(max=255)[x]
    x = random_images(15, size, gen(sum(size)))
    assert np.array_equal(apply(x, ('equalize',)).numpy(), [[channel(c) for c in image] for image in x.numpy()])


# Levels that imgaug 0.4 (with OpenCV 4.11) makes of an image that anyone can make, at [5::17, 3::19].
IMGAUG = json.loads((Path(__file__).parent / 'imgaug.json').read_text())
# by the number of the colour space: HSV, HLS (a hue between two steps), Lab, Luv
TOLERANCE = {1: 1, 2: 8, 3: 2, 4: 3}


@pytest.mark.parametrize('what', [key for key in IMGAUG if key != 'image'])
def test_operations_equal_imgaug(what):
    h, w = 80, 96
    i = np.arange(3 * h * w, dtype=np.uint64)
    level = (i * 2654435761 % 2**32 >> 7).astype(np.int64) % 97 + np.arange(3 * h * w) // 3 % w
    x = torch.tensor((level.reshape(h, w, 3) + [0, 20, 40]) % 256).byte().permute(2, 0, 1)[None]
    seen = lambda y: y[0].permute(1, 2, 0)[5::17, 3::19].flatten().int()
    assert seen(x).tolist() == IMGAUG['image']
    chain = [(name, *map(float, strengths)) for name, *strengths in (step.split() for step in what.split('; '))]
    error = (seen(apply(x, *chain)) - torch.tensor(IMGAUG[what])).abs()
    name, *strengths = chain[0]
    largest = TOLERANCE.get(strengths[2], 0) if name == 'multiply_add' else name == 'add_hue_saturation'
    assert error.max() <= largest and error.float().mean() < 0.25 * (largest > 0) + 1e-9


@pytest.mark.parametrize('kind', ['official', 'paper'])
@pytest.mark.parametrize('size', [(3, 3), (33, 47), (64, 64)], ids=str)
def test_a_chain_is_its_operations_one_after_the_other(kind, size):
    g = gen(7)
    for k in (2, 3, 6):
        x, plan = random_images(60, size, g), draw_augmentation(kind, 60, g, k)
        whole, y = augment(x, plan), x
        for step in range(k):
            y = augment(y, Augmentation(kind, plan.operations[:, step:step + 1], plan.strengths[:, step:step + 1]))
        assert torch.equal(whole, y)


@pytest.mark.parametrize('kind', ['official', 'paper'])
def test_what_is_computed_for_the_mask_alone_is_right(kind):
    "Under a Perlin mask there is what would be there if the whole texture were augmented."
    for k in (1, 3, 6):
        x = random_images(40, (48, 80), gen(k))
        simulator = AnomalySimulator(x, official().replace(augmentation=kind, n_augmentations=k, opacity=(1., 1.),
                                                           clean_share=0.))
        plan = simulator.plan(40, 40, 0, k)
        s = simulator(x, plan)
        under = (s.mask > 0).expand_as(s.augmented)
        assert torch.equal((s.augmented * 255).round().byte()[under],
                           augment(x[plan.texture], plan.augmentation)[under])


def test_the_textures_stay_as_they_are():
    x = random_images(30, (32, 32), gen(5))
    before = x.clone()
    for kind in OPERATIONS: augment(x, draw_augmentation(kind, 30, gen(6)))
    assert torch.equal(x, before)


def test_rounded_mean_of_sharpness_is_exact():
    """13 is odd, so no mean of whole numbers lies half-way, and single precision rounds all
    3,316 sums to the right side."""
    total = torch.arange(13 * 255 + 1)
    assert torch.equal((total.float() * (1 / 13)).round().long(), (2 * total + 13) // 26)


def test_none_and_empty():
    x = random_images(5, (8, 8), gen())
    assert torch.equal(augment(x, draw_augmentation('none', 5, gen())), x)
    assert torch.equal(augment(x, draw_augmentation('paper', 5, gen(), 0)), x)


def test_nowhere_to_keep_what_was_compiled():
    code = 'import torch; from draem_nb.compiled import _cells_of_axis; print(_cells_of_axis(8, 1)[0].tolist())'
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | {'NUMBA_CACHE_DIR': '/proc/none'},
                          capture_output=True, text=True)
    assert done.stdout == '[0, 0, 0, 0, 1, 1, 1, 1]\n', done.stderr


# --- the draws

@pytest.mark.parametrize('kind', ['official', 'paper'])
def test_draws(kind):
    plan = draw_augmentation(kind, 20_000, gen(8))
    assert plan.operations.shape == (20_000, 3) and plan.strengths.shape == (20_000, 3, 4)
    assert all(len(set(row)) == 3 for row in plan.operations.tolist())
    for step in range(3):  # each operation is as likely as any other, in every place
        share = plan.operations[:, step].bincount(minlength=len(OPERATIONS[kind])) / 20_000
        assert (share - 1 / len(OPERATIONS[kind])).abs().max() < 0.03
    for i, (name, ranges) in enumerate(T._STRENGTHS[kind].items()):
        strengths = plan.strengths[plan.operations == i]
        for j, (low, high) in enumerate(ranges):
            s = strengths[:, j]
            if (kind, name) == ('official', 'solarize'):
                assert 0.45 < (s == 256).float().mean() < 0.55
                s = s[s != 256]
            assert (low <= s.min() < low + 0.05 * (high - low) + 1e-6 and high - 0.05 * (high - low)
                    - 1e-6 < s.max() <= high)
            assert (s.mean() - (low + high) / 2).abs() < 0.06 * (high - low)
            if isinstance(low, int): assert torch.equal(s, s.round()) and len(s.unique()) == high - low + 1


def test_draws_follow_from_the_generator_alone():
    torch.manual_seed(1)
    a = draw_augmentation('official', 8, gen(9))
    torch.manual_seed(2)
    b, c = draw_augmentation('official', 8, gen(9)), draw_augmentation('official', 8, gen(10))
    assert torch.equal(a.operations, b.operations) and torch.equal(a.strengths, b.strengths)
    assert not torch.equal(a.strengths, c.strengths)
    g = gen(9)
    assert not torch.equal(draw_augmentation('official', 8, g).strengths, draw_augmentation('official', 8, g).strengths)


def test_bad_input():
    with pytest.raises(ValueError, match="unknown augmentation 'randaugment'; there are: paper, official, none"):
        draw_augmentation('randaugment', 1, gen())
    with pytest.raises(ValueError, match="n_operations is 11, but there are 10 in 'official'"):
        draw_augmentation('official', 1, gen(), 11)
    with pytest.raises(ValueError, match='n_operations is -1'): draw_augmentation('official', 1, gen(), -1)


# --- the images

def test_built_in_photographs():
    x = load_textures(size=(64, 96))
    assert x.shape == (30, 3, 64, 96) and x.dtype == torch.uint8
    assert torch.equal(x, load_textures(size=(64, 96)))
    assert len({i.numpy().tobytes() for i in x}) == 30
    assert (x.float().std((1, 2, 3)) > 5).all()  # none of them is empty


def test_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('DRAEM_NB_CACHE', str(tmp_path / 'cache'))
    with pytest.raises(FileNotFoundError, match='missing does not exist'): load_textures(tmp_path / 'missing')
    (tmp_path / 'dtd' / 'notes').mkdir(parents=True)
    (tmp_path / 'dtd' / 'notes' / 'about.txt').write_text('no image')
    with pytest.raises(FileNotFoundError, match='dtd holds no images'): load_textures(tmp_path / 'dtd')
    for name, color in (('dotted', (255, 0, 0)), ('banded', (0, 255, 0))):
        (tmp_path / 'dtd' / name).mkdir()
        Image.new('RGB', (50, 40), color).save(tmp_path / 'dtd' / name / f'{name}_0001.png')
    x = load_textures(tmp_path / 'dtd', 32)
    assert x[:, :, 0, 0].tolist() == [[0, 255, 0], [255, 0, 0]]  # sorted by path, RGB
    with pytest.raises(ValueError, match='100'): load_textures(tmp_path / 'dtd', 100)
    (tmp_path / 'dtd' / 'dotted' / 'dotted_0002.jpg').write_bytes(b'')
    with pytest.raises(ValueError, match=r'dotted_0002\.jpg'): load_textures(tmp_path / 'dtd', 32)
