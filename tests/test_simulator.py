"draem_nb.simulator: the distribution of plans, what they depend on, and what the pixels promise."
import os
import signal
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import gen

from draem_nb.perlin import perlin_noise
from draem_nb.recipes import demo, official, paper
from draem_nb.simulator import AnomalySimulator, draw_plan, in_position


def random_images(n, size, g): return torch.randint(256, (n, 3, *size), generator=g, dtype=torch.uint8)


@pytest.fixture(scope='module')
def plans(): return [draw_plan(official(), 50, 70, 16, seed=3, step=step) for step in range(400)]


def every(plans, name): return torch.cat([getattr(plan, name) for plan in plans])


def assert_uniform(x, low, high):
    "3,000 numbers and more: both ends are reached, the quartiles are where they belong."
    assert low <= x.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < x.max() <= high
    expected = torch.tensor([low + (high - low) * q for q in (0.25, 0.5, 0.75)])
    assert (x.quantile(torch.tensor([0.25, 0.5, 0.75])) - expected).abs().max() < 0.05 * (high - low)


def test_noise_turns_both_ways(plans): assert_uniform(every(plans, 'mask_degrees'), -90, 90)


def test_images_turn_both_ways_three_times_in_ten(plans):
    degrees = every(plans, 'degrees')
    assert_uniform(degrees, -90, 90)
    assert abs(len(degrees) / (400 * 16) - 0.3) < 0.02
    always = [draw_plan(paper(), 50, 70, 16, 0, step) for step in range(200)]
    assert_uniform(every(always, 'degrees'), -45, 45)
    assert all(plan.turned.tolist() == list(range(16)) for plan in always)


def test_half_stay_clean_and_the_texture_weighs_a_fifth_to_all(plans):
    assert abs(len(every(plans, 'anomalous')) / (400 * 16) - 0.5) < 0.02
    assert_uniform(every(plans, 'opacity'), 0.2, 1)
    assert len(every([draw_plan(official().replace(clean_share=0.2), 5, 5, 16, 0, s) for s in range(100)],
                     'anomalous')) > 0.75 * 1600


def test_both_scales_are_uniform_and_independent(plans):
    pairs = every(plans, 'scales')
    share = (pairs[:, 0] * 6 + pairs[:, 1]).bincount(minlength=36) / len(pairs)
    assert len(share) == 36 and (share - 1 / 36).abs().max() < 0.015


def test_images_and_textures_are_drawn_equally_often(plans):
    for name, n in (('image', 50), ('texture', 70)):
        share = every(plans, name).bincount(minlength=n) * n / len(every(plans, name))
        assert len(share) == n and 0.5 < share.min() and share.max() < 1.6


NAMES = [f.name for f in fields(draw_plan(official(), 1, 1, 1, 0, 0))]


@pytest.mark.parametrize('recipe', [official(), paper()], ids=['official', 'paper'])
@pytest.mark.parametrize('name', NAMES)
def test_every_choice_follows_from_seed_and_step(recipe, name):
    recipe = recipe.replace(clean_share=0.3, own_share=0.5, soft_share=0.5, flips=True)
    value = lambda seed, step: getattr(draw_plan(recipe, 5000, 5000, 64, seed, step), name)
    same = lambda a, b: a.shape == b.shape and torch.equal(a, b)
    if name == 'augmentation':
        raw, value = value, lambda seed, step: torch.cat([raw(seed, step).operations.flatten(),
                                                          raw(seed, step).strengths.flatten()])
    torch.manual_seed(1)
    first = value(2, 7)
    torch.manual_seed(2)
    assert same(first, value(2, 7))
    if recipe.name == 'paper' and name == 'turned': return         # all, always
    for seed, step in ((3, 7), (2, 8), (7, 2)): assert not same(first, value(seed, step)), (seed, step)


def test_an_epoch_is_a_permutation_of_its_own():
    order = lambda seed, epoch: torch.cat([draw_plan(paper(), 64, 5, 8, seed, 8 * epoch + s).image
                                           for s in range(8)]).tolist()
    orders = [order(seed, epoch) for seed in range(4) for epoch in range(3)]
    assert all(sorted(o) == list(range(64)) for o in orders)
    assert len({tuple(o) for o in orders}) == 12


@pytest.mark.parametrize('color, levels', [('rgb', (255, 0, 0)), ('bgr', (0, 0, 255))])
def test_a_red_texture_is_as_bright_in_either_order_of_channels(color, levels):
    red = torch.tensor(levels, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    recipe = demo().replace(size=32, color=color, augmentation='none', mask_shape='rectangle', opacity=(1., 1.),
                            clean_share=0.)
    simulator = AnomalySimulator(red, recipe, black)
    s = simulator(black, simulator.plan(1, 4, 0, 0))
    assert torch.allclose(s.augmented, 0.299 * s.mask.expand(-1, 3, -1, -1))


def test_opacity_is_the_weight_of_the_texture():
    white, black = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    simulator = AnomalySimulator(white, official().replace(augmentation='none', clean_share=0.))
    plan = simulator.plan(1, 8, 0, 0)
    s = simulator(black, plan)
    assert torch.allclose(s.augmented, (s.mask * plan.opacity.view(-1, 1, 1, 1)).expand(-1, 3, -1, -1), atol=1e-6)


def test_the_noise_turns_by_the_angle_of_the_plan():
    "A quarter turn counter-clockwise of what is there without; no pixel lies between two others."
    textures = random_images(2, (48, 48), gen())
    simulator = AnomalySimulator(textures, official().replace(clean_share=0.))
    plan = simulator.plan(2, 24, 0, 0)
    at = lambda degrees: simulator(textures,
                                   replace(plan, mask_degrees=torch.full_like(plan.mask_degrees, degrees))).mask
    assert torch.equal(at(90.), at(0.).rot90(1, (2, 3))) and torch.equal(at(-90.), at(0.).rot90(-1, (2, 3)))


def test_normal_images_turn_by_the_angle_of_the_plan():
    images = random_images(3, (48, 48), gen())
    simulator = AnomalySimulator(images, official().replace(rotation_probability=1., clean_share=1.))
    plan = simulator.plan(3, 6, 0, 0)
    s = simulator(images, replace(plan, degrees=torch.tensor([90., -90, 180, 0, 90, 0])))
    expected = torch.stack([images[i].rot90(k, (1, 2)) for i, k in zip(plan.image, (1, -1, 2, 0, 1, 0))])
    assert torch.equal(s.target, expected / 255) and torch.equal(s.augmented, s.target) and not s.mask.any()


def test_a_threshold_beyond_the_noise_leaves_every_sample_clean():
    images = random_images(3, (32, 32), gen())
    simulator = AnomalySimulator(images, official().replace(perlin_threshold=2., clean_share=0.))
    s = simulator(images, simulator.plan(3, 8, 0, 0))
    assert not s.is_anomalous.any() and not s.mask.any() and torch.equal(s.target, s.augmented)


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (3, 3), (5, 200), (33, 47)], ids=str)
def test_any_size(size):
    textures, images = random_images(7, size, gen(1)), random_images(5, size, gen(2))
    textures[1], textures[2] = 0, 255
    full = official().replace(perlin_threshold=-2., rotation_probability=1., n_augmentations=6)
    for recipe in (official(), paper(), full, official().replace(perlin_scales=(0, 8)),
                   official().replace(mask_shape='rectangle'),
                   official().replace(texture_source='color', match_gray=True), official().replace(clean_share=1.)):
        normal = images[:, :1].repeat(1, 3, 1, 1) if recipe.match_gray else images
        simulator = AnomalySimulator(textures, recipe, normal)
        for seed in range(3):
            s = simulator(normal, simulator.plan(5, 12, seed, seed))
            assert (torch.equal(s.is_anomalous, s.mask.flatten(1).any(1)) and s.augmented.min() >= 0
                    and s.augmented.max() <= 1)
            outside = (s.mask == 0).expand_as(s.target)
            assert torch.equal(s.augmented[outside], s.target[outside])
            if recipe.match_gray: assert (s.augmented[:, :1] == s.augmented).all()


def test_images_of_another_place_are_refused():
    simulator = AnomalySimulator(random_images(4, (32, 32), gen()), official())
    plan = simulator.plan(3, 4, 0, 0)
    with pytest.raises(ValueError, match='images must be on the host, not on meta'):
        simulator(random_images(3, (32, 32), gen()).to('meta'), plan)


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
                # torch.equal would want PyTorch's threads, which are gone
                wrong = int(not np.array_equal(simulator(textures, plan).augmented.numpy(), alone.numpy()))
            finally: os._exit(wrong)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally: torch.set_num_threads(threads)


def test_own_share_is_the_share_of_anomalies_filled_from_the_class():
    drawn = [draw_plan(demo().replace(own_share=0.3), 50, 70, 16, seed=3, step=step) for step in range(400)]
    assert (abs(every(drawn, 'own').float().mean() - 0.3) < 0.03
            and not every([draw_plan(demo(), 50, 70, 16, 3, s) for s in range(20)], 'own').any())
    own, opacity = every(drawn, 'own'), every(drawn, 'opacity')
    assert_uniform(opacity[own], 0.5, 1.)
    assert_uniform(opacity[~own], 0.2, 1.)
    assert every(drawn, 'own_image').unique().tolist() == list(range(50))


def test_an_own_source_is_the_image_moved_mirrored_and_no_other_texture():
    images, textures = random_images(4, (32, 64), gen()), torch.zeros(3, 3, 32, 64, dtype=torch.uint8)
    plan = next(p for p in (draw_plan(demo().replace(own_share=1., clean_share=0.), 4, 3, 4, 0, step)
                            for step in range(50)))
    still = replace(plan, own_change=torch.tensor([[0., 0., 1., 1., 0.5, 0.5]] * 4), opacity=torch.ones(4))
    made = AnomalySimulator(textures, demo())(images, still)
    assert made.is_anomalous.any()
    on = made.mask.expand_as(made.target) > 0
    torch.testing.assert_close(made.augmented[on], (images[still.own_image].float() / 255)[on])
    moved = replace(still, own_change=torch.tensor([[0.25, 0.5, 0.1, 1., 0.5, 0.5]] * 4))
    expected = images[still.own_image].roll((8, 32), (2, 3)).flip(2).float() / 255
    torch.testing.assert_close(AnomalySimulator(textures, demo())(images, moved).augmented[on], expected[on])


def test_soft_share_is_the_share_of_anomalies_that_fade_in():
    drawn = [draw_plan(demo().replace(soft_share=0.3), 50, 70, 16, seed=3, step=step) for step in range(400)]
    softness = every(drawn, 'softness')
    assert abs((softness > 0).float().mean() - 0.3) < 0.03
    assert_uniform(softness[softness > 0], 0., 1.)
    assert not every([draw_plan(demo(), 50, 70, 16, 3, step) for step in range(20)], 'softness').any()


def test_a_soft_anomaly_gets_the_opacity_that_its_noise_says():
    images, textures = torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.full((1, 3, 64, 96), 255, dtype=torch.uint8)
    recipe = official().replace(clean_share=0., soft_share=1., augmentation='none', perlin_rotation=0.)
    simulator, checked = AnomalySimulator(textures, recipe), 0
    for step in range(40):
        plan = simulator.plan(1, 1, 0, step)
        plan = replace(plan, turned=plan.turned[:0], degrees=plan.degrees[:0], opacity=torch.ones(1))
        height = perlin_noise(plan.scales, (64, 96), angles=plan.angles)[0, 0] - recipe.perlin_threshold
        if height.max() < 0.05: continue
        weight = (height / (plan.softness * height.max())).clamp(0, 1)
        batch = simulator(images, plan)
        torch.testing.assert_close(batch.augmented[0, 0], weight, atol=1e-3, rtol=0)
        assert torch.equal(batch.mask[0, 0][(weight - 0.2).abs() > 1e-3] > 0,
                           (weight > 0.2)[(weight - 0.2).abs() > 1e-3])
        checked += 1
    assert checked > 10


def test_soft_edges_leave_every_other_draw_as_it_was():
    one, other = (draw_plan(demo().replace(own_share=0.5, soft_share=share), 50, 70, 16, 3, 4) for share in (0., 1.))
    assert all(torch.equal(a, b) for name, a in vars(one).items() if isinstance(a, torch.Tensor) and name != 'softness'
               for b in [getattr(other, name)])


def test_flips_change_the_position_of_normal_images_and_no_other_choice():
    plain, flipped = (draw_plan(demo().replace(flips=flips), 50, 70, 16, 0, 3) for flips in (False, True))
    for field in fields(plain):
        same = all(torch.equal(*pair) for pair in zip(*(
            vars(of).values() if hasattr(of, 'strengths') else [torch.as_tensor(of)]
            for of in (getattr(plain, field.name), getattr(flipped, field.name))))
            if isinstance(pair[0], torch.Tensor))
        assert same == (field.name != 'position'), field.name
    assert not plain.position.any()
    positions = every([draw_plan(demo().replace(flips=True), 5, 5, 16, 0, s) for s in range(400)], 'position')
    assert (positions.bincount(minlength=8) / 6400 - 1 / 8).abs().max() < 0.02


@pytest.mark.parametrize('size, n', [((32, 32), 8), ((32, 64), 4)])
def test_a_position_mirrors_rows_columns_and_in_a_square_the_diagonal(size, n):
    g = gen()
    images, textures, recipe = random_images(3, size, g), random_images(2, size, g), demo().replace(flips=True)
    simulator = AnomalySimulator(textures, recipe)
    plan = replace(simulator.plan(3, 8, 0, 0), image=torch.full((8,), 2), position=torch.arange(8))
    made = simulator(images, plan).target * 255
    assert torch.equal(made.round().byte(), in_position(images, plan))
    assert torch.equal(made[0].round().byte(), images[2])
    for position in (1, 2): assert torch.equal(made[position].round().byte(), images[2].flip(position))
    if n == 8: assert torch.equal(made[7].round().byte(), images[2].flip((1, 2)).mT)
    assert len({image.numpy().tobytes() for image in made.round().byte()}) == n
