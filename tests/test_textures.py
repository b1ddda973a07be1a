"draem_nb.textures: every operation and every chain against Pillow, the draws, folders of images, other devices."
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from draem_nb import textures as T
from draem_nb.recipes import official, paper
from draem_nb.simulator import AnomalySimulator, _at_once
from draem_nb.textures import OPERATIONS, Augmentation, augment, draw_augmentation, load_textures


def gen(seed=0): return torch.Generator().manual_seed(seed)


def pillow(x, f):
    images = [f(Image.fromarray(np.ascontiguousarray(i.permute(1, 2, 0).numpy()))) for i in x]
    return torch.stack([torch.tensor(np.array(image)).permute(2, 0, 1) for image in images])


def hsv(image, hue, saturation):
    h, s, v = image.convert('HSV').split()
    h = h.point([(i + int(hue)) % 255 for i in range(256)])
    s = s.point([min(max(i + int(saturation), 0), 255) for i in range(256)])
    return Image.merge('HSV', (h, s, v)).convert('RGB')


def enhance(kind): return lambda image, factor: kind(image).enhance(factor)


PILLOW = dict(
    posterize=lambda image, bits: ImageOps.posterize(image, int(bits)), solarize=ImageOps.solarize, equalize=ImageOps.equalize,
    invert=ImageOps.invert, autocontrast=lambda image, cutoff=0: ImageOps.autocontrast(image, int(cutoff)),
    sharpness=enhance(ImageEnhance.Sharpness), brightness=enhance(ImageEnhance.Brightness), color=enhance(ImageEnhance.Color),
    rotate=Image.Image.rotate, add_hue_saturation=hsv,
    gamma_contrast=lambda image, *gammas: image.point([round(255 * (v / 255) ** g) for g in gammas for v in range(256)]),
    multiply_add=lambda image, m, a: image.point([min(max(round(m * v + a), 0), 255) for v in range(256)] * 3))


def arguments(augmentation, row, step):
    name = augmentation.names[row][step]
    return name, augmentation.strengths[row, step, :len(T._STRENGTHS[augmentation.kind][name])].tolist()


def one_by_one(x, augmentation):
    def chain(image, row):
        for step in range(augmentation.operations.shape[1]):
            name, strengths = arguments(augmentation, row, step)
            image = PILLOW[name](image, *strengths)
        return image
    return torch.cat([pillow(x[i:i + 1], lambda image: chain(image, i)) for i in range(len(x))])


def random_images(n, size, g):
    "n images, each with noise, a few levels, a narrow range, a ramp with noise, or a single colour."
    noise = torch.randint(256, (n, 3, *size), generator=g)
    ramp = torch.linspace(0, 255, size[1]).expand(3, *size).int() + noise // 16
    low, width = torch.randint(200, (3, 1, 1), generator=g), torch.randint(1, 56, (3, 1, 1), generator=g)
    kinds = [lambda i: noise[i], lambda i: noise[i] // 85 * 85, lambda i: low + noise[i] % width, lambda i: ramp[i].clamp(max=255),
             lambda i: noise[i, :, :1, :1].expand(3, *size)]
    return torch.stack([kinds[i % len(kinds)](i) for i in range(n)]).to(torch.uint8)


SIZES = [(1, 1), (1, 9), (7, 1), (2, 2), (2, 50), (3, 3), (3, 4), (5, 31), (17, 16), (64, 37), (96, 128)]
STRENGTHS = dict(  # wider than what is drawn
    posterize=(1, 8, 1), solarize=(0, 256, 1), equalize=None, invert=None, autocontrast=(0, 49, 1), sharpness=(0, 4, 3),
    brightness=(0, 4, 3), color=(0, 4, 3), rotate=(-180, 180, 2))


@pytest.mark.parametrize('name', STRENGTHS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_operations_equal_pillow(name, size):
    g, f = gen(hash(size) % 1000), getattr(T, name)
    x = random_images(15, size, g)
    if STRENGTHS[name] is None:
        assert torch.equal(f(x), pillow(x, PILLOW[name]))
        return
    low, high, kind = STRENGTHS[name]
    s = torch.rand(15, generator=g) * (high - low) + low
    if kind == 1: s = s.round()
    s[:2] = torch.tensor([low, high])
    theirs = torch.cat([pillow(x[i:i + 1], lambda image: PILLOW[name](image, s[i].item())) for i in range(15)])
    assert torch.equal(f(x, s), theirs)
    assert torch.equal(f(x[3:4], s[3].item()), theirs[3:4])  # a plain number instead of a tensor


def test_hue_and_saturation_equal_pillow_on_every_color():
    green, blue = torch.meshgrid(torch.arange(256), torch.arange(256), indexing='ij')
    rng = np.random.default_rng(0)
    for red in range(0, 256, 16):
        x = torch.stack([torch.stack([torch.full_like(green, red + i), green, blue]) for i in range(16)])
        x = x.permute(1, 0, 2, 3).reshape(1, 3, 16 * 256, 256).to(torch.uint8)
        for h, s in [(0, 0), (int(rng.integers(-50, 51)), int(rng.integers(-50, 51)))]:
            assert torch.equal(T.add_hue_saturation(x, h, s), pillow(x, lambda image: hsv(image, h, s))), (red, h, s)


def test_rounded_mean_of_sharpness_is_exact():
    "13 is odd, so no mean of whole numbers lies half-way, and single precision rounds all 3,316 sums to the right side."
    total = torch.arange(13 * 255 + 1)
    assert torch.equal((total.float() * (1 / 13)).round().long(), (2 * total + 13) // 26)


def test_last_division_of_hsv_is_exact():
    "The same for V S w / 21675, whose numerator has at most 5.5 million values."
    total = torch.arange(255 * 255 * 85 + 1)
    assert torch.equal((total.float() * (1 / (255 * 85))).round().long(), (2 * total + 21675) // (2 * 21675))


@pytest.mark.parametrize('kind', ['official', 'paper'])
@pytest.mark.parametrize('size', [(3, 3), (33, 47), (64, 64)], ids=str)
def test_chains_equal_pillow(kind, size):
    g = gen(7)
    for k in (1, 3, 6):
        x, plan = random_images(60, size, g), draw_augmentation(kind, 60, g, k)
        assert torch.equal(augment(x, plan), one_by_one(x, plan))


@pytest.mark.parametrize('kind', ['official', 'paper'])
@pytest.mark.parametrize('size', [(3, 3), (33, 47), (64, 64)], ids=str)
def test_the_loops_of_a_cpu_give_the_same_bytes(kind, size):
    "What the simulator paints there, where the mask is the whole picture and lets nothing through."
    for k in (1, 3, 6):
        recipe = official().replace(augmentation=kind, n_augmentations=k, mask_shape='rectangle', opacity=(1., 1.), clean_share=0., rotation_probability=0.)
        textures, black = random_images(60, size, gen(k)), torch.zeros(1, 3, *size, dtype=torch.uint8)
        simulator = AnomalySimulator(textures, recipe)
        plan = simulator.plan(1, 60, 0, k)
        plan.rectangle[:] = torch.tensor([0., 0., 1., 1.])
        assert torch.equal(simulator(black, plan).augmented, augment(textures[plan.texture], plan.augmentation) / 255)


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (3, 3), (5, 200), (33, 47)], ids=str)
def test_both_ways_to_the_pixels_agree_at_any_size(size):
    textures, images = random_images(7, size, gen(1)), random_images(5, size, gen(2))
    textures[1], textures[2] = 0, 255
    full = official().replace(perlin_threshold=-2., rotation_probability=1., n_augmentations=6)
    for recipe in (official(), paper(), full, official().replace(perlin_scales=(0, 8)), official().replace(mask_shape='rectangle'),
                   official().replace(texture_source='color', match_gray=True), official().replace(augmentation='none'), official().replace(clean_share=1.)):
        normal = images[:, :1].repeat(1, 3, 1, 1) if recipe.match_gray else images
        simulator = AnomalySimulator(textures, recipe, normal)
        for seed in range(3):
            plan = simulator.plan(5, 12, seed, seed)
            loops, whole = simulator(normal, plan), _at_once(simulator, normal, plan)
            same = loops.mask == whole.mask
            assert (~same).sum() <= 1 and torch.equal(loops.is_anomalous, loops.mask.flatten(1).any(1))
            torch.testing.assert_close(loops.target, whole.target, rtol=0, atol=1e-5)
            torch.testing.assert_close(loops.augmented * same, whole.augmented * same, rtol=0, atol=1e-5)


def test_a_plan_that_does_not_fit_is_refused():
    simulator = AnomalySimulator(random_images(4, (32, 32), gen()), official())
    images = random_images(3, (32, 32), gen())
    with pytest.raises(IndexError, match='more images than the 3'): simulator(images, simulator.plan(100, 16, 0, 0))
    plan = simulator.plan(3, 16, 0, 0)
    plan.texture += 4
    with pytest.raises(IndexError, match='more textures than the 4'): simulator(images, plan)


def test_threads_share_a_batch_also_after_a_fork():
    textures = random_images(4, (128, 128), gen())
    simulator, threads = AnomalySimulator(textures, official()), torch.get_num_threads()
    plan = simulator.plan(4, 24, 0, 0)
    try:
        torch.set_num_threads(1)
        alone = simulator(textures, plan).augmented
        torch.set_num_threads(2)
        assert torch.equal(simulator(textures, plan).augmented, alone)
        if not (child := os.fork()):
            wrong = 1
            try:
                signal.alarm(60)        # ends a child that hangs
                wrong = int(not np.array_equal(simulator(textures, plan).augmented.numpy(), alone.numpy()))     # torch.equal would want PyTorch's threads, which are gone
            finally: os._exit(wrong)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally: torch.set_num_threads(threads)


def test_nowhere_to_keep_what_was_compiled():
    code = 'import torch; from draem_nb.compiled import _cells; print(_cells(8, 1)[0].tolist())'
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | {'NUMBA_CACHE_DIR': '/proc/none'}, capture_output=True, text=True)
    assert done.stdout == '[0, 0, 0, 0, 1, 1, 1, 1]\n', done.stderr


@pytest.mark.parametrize('kind', ['official', 'paper', 'none'])
def test_nothing_is_asked_of_the_device(kind):
    "Tensors on 'meta' have no values: reading one, or indexing with a mask, would raise."
    x = torch.empty(40, 3, 64, 32, dtype=torch.uint8, device='meta')
    y = augment(x, draw_augmentation(kind, 40, gen()))
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.uint8, 'meta')


def test_layouts_and_views():
    plan = draw_augmentation('official', 12, gen(3))
    x = random_images(24, (32, 64), gen(4))
    expected = augment(x[::2].contiguous(), plan)
    assert torch.equal(augment(x[::2], plan), expected)
    assert torch.equal(augment(x[::2].contiguous(memory_format=torch.channels_last), plan), expected)
    assert torch.equal(augment(x[::2].flip(1).flip(1), plan), expected)


def test_the_textures_stay_as_they_are():
    x = random_images(30, (32, 32), gen(5))
    before = x.clone()
    for kind in OPERATIONS:
        y = augment(x, draw_augmentation(kind, 30, gen(6)))
        y.fill_(0)
        assert torch.equal(x, before)


# --- the draws

@pytest.mark.parametrize('kind', ['official', 'paper'])
def test_draws(kind):
    plan = draw_augmentation(kind, 20_000, gen(8))
    assert plan.operations.shape == (20_000, 3) and plan.strengths.shape == (20_000, 3, 3)
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
            assert low <= s.min() < low + 0.05 * (high - low) + 1e-6 and high - 0.05 * (high - low) - 1e-6 < s.max() <= high
            assert (s.mean() - (low + high) / 2).abs() < 0.06 * (high - low)
            if name in T._WHOLE: assert torch.equal(s, s.round()) and len(s.unique()) == high - low + 1


def test_draws_follow_from_the_generator_alone():
    torch.manual_seed(1)
    a = draw_augmentation('official', 8, gen(9))
    torch.manual_seed(2)
    b, c = draw_augmentation('official', 8, gen(9)), draw_augmentation('official', 8, gen(10))
    assert torch.equal(a.operations, b.operations) and torch.equal(a.strengths, b.strengths)
    assert not torch.equal(a.strengths, c.strengths)
    g = gen(9)
    assert not torch.equal(draw_augmentation('official', 8, g).strengths, draw_augmentation('official', 8, g).strengths)


def test_none_and_empty():
    x = random_images(5, (8, 8), gen())
    assert torch.equal(augment(x, draw_augmentation('none', 5, gen())), x)
    assert torch.equal(augment(x, draw_augmentation('paper', 5, gen(), 0)), x)
    for kind in OPERATIONS: assert augment(x[:0], draw_augmentation(kind, 0, gen())).shape == (0, 3, 8, 8)


def test_bad_input():
    with pytest.raises(ValueError, match="unknown augmentation 'randaugment'; there are: paper, official, none"):
        draw_augmentation('randaugment', 1, gen())
    with pytest.raises(ValueError, match="n_operations is 11, but the augmentation 'official' has 10"): draw_augmentation('official', 1, gen(), 11)
    with pytest.raises(ValueError, match='n_operations is -1'): draw_augmentation('official', 1, gen(), -1)
    with pytest.raises(ValueError, match='drawn for 2 textures, but there are 3'):
        augment(random_images(3, (8, 8), gen()), draw_augmentation('paper', 2, gen()))
    for x in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match='takes uint8 images'): augment(x, Augmentation('none', torch.zeros(len(x), 0), torch.zeros(len(x), 0, 3)))
        for f in (T.invert, T.equalize, lambda x: T.color(x, 1), lambda x: T.rotate(x, 1), lambda x: T.sharpness(x, 1), lambda x: T.add_hue_saturation(x, 1, 1)):
            with pytest.raises(ValueError, match='takes uint8 images'): f(x)


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


@pytest.mark.skipif('DRAEM_NB_REAL_DATA' not in os.environ, reason='DRAEM_NB_REAL_DATA is not set')
def test_real_textures(tmp_path, monkeypatch):
    monkeypatch.setenv('DRAEM_NB_CACHE', str(tmp_path / 'cache'))
    x = load_textures(Path(os.environ['DRAEM_NB_REAL_DATA']) / 'dtd_subset' / 'images', 64)
    assert len(x) > 10
    x = x[torch.arange(100) % len(x)]
    for kind in ('official', 'paper'):
        plan = draw_augmentation(kind, 100, gen(11))
        assert torch.equal(augment(x, plan), one_by_one(x, plan))
