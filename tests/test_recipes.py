"The recipes: steps and milestones as the released code counts them, and how images are shrunk."
import copy
import dataclasses
import json
import re

import numpy as np
import pytest

from draem_nb.methods import METHODS, recipe_of
from draem_nb.recipes import Recipe, ablations, demo, official, paper


@pytest.mark.parametrize('n, batch, steps', [(60, 8, 8), (64, 8, 8), (1, 8, 1), (391, 8, 49), (60, 32, 2)])
def test_an_epoch_has_a_whole_number_of_steps(n, batch, steps):
    "As the released code's loader counts them; the learning rate falls with the end of an epoch."
    for recipe, falls in ((official(), (560, 630)), (paper(), (400, 600))):
        recipe = recipe.replace(batch=batch)
        assert recipe.total_steps(n) == 700 * steps
        assert tuple(round(m * recipe.total_steps(n)) for m in recipe.lr_milestones) == tuple(e * steps for e in falls)
    assert official().replace(epochs=0.5, batch=batch).total_steps(n) == -(-steps // 2)
    assert official().replace(steps=17).total_steps(n) == 17


def test_published_values():
    "Released code and paper, field by field where they differ."
    assert official() == Recipe() and not official().antialias and paper().antialias and demo().antialias
    assert (official().lr, official().lr_decay, official().lr_milestones, official().batch,
            official().epochs) == (1e-4, 0.2, (0.8, 0.9), 8, 700.)
    assert (paper().lr, paper().lr_decay, paper().lr_milestones) == (1e-4, 0.1, (400 / 700, 600 / 700))
    assert (official().opacity, paper().opacity, official().focal_gamma,
            official().score_window) == ((0.2, 1.), (0.1, 1.), 2., 21)
    assert (official().rotation_degrees, official().rotation_probability, paper().rotation_degrees,
            paper().rotation_probability) == (90., 0.3, 45., 1.)
    assert (official().perlin_scales, official().perlin_threshold, official().clean_share,
            official().init_std) == ((0, 5), 0.5, 0.5, 0.02)
    assert official().ssim_weight == official().l2_weight == official().focal_weight == 1 and len(ablations()) == 9


@pytest.mark.parametrize('fields, says', [
    (dict(reconstructive='false'), "reconstructive is 'false'; it must be a valid boolean"),
    (dict(match_gray='no'), "match_gray is 'no'; it must be a valid boolean"),
    (dict(perlin_threshold=None), 'perlin_threshold is None; it must be a valid number'),
    (dict(score_window=-3), 'score_window is -3; it must be greater'),
    (dict(score_window=4), 'score_window is 4; it must be odd'),
    (dict(lr_decay=1e30), r'lr_decay is 1e+30; it must be less than or equal to 1'),
    (dict(lr='x'), "lr is 'x'; it must be a valid number"),
    (dict(lr=float('nan')), 'lr is nan; it must be a finite number'), (dict(lr=True), 'lr is True; it must be'),
    (dict(steps=True), 'steps is True; it must be a valid integer'),
    (dict(n_augmentations=100), 'n_augmentations is 100; it must be less than or equal to 10'),
    (dict(size=1e8), 'size is 100000000.0; it must be a valid integer or a tuple'),
    (dict(size=[64]), 'size is [64]; it must be a valid integer or a pair'),
    (dict(opacity=[0.9, 0.1]), 'opacity is (0.9, 0.1); it must be a pair (low, high)'),
    (dict(lr_milestones=[2.]), 'lr_milestones is [2.0]; it must be less than 1'),
    (dict(seed=-1), 'seed is -1; it must be greater'), (dict(holdout=1), 'holdout is 1; it must be less than 1'),
    (dict(color=['rgb']), "color is ['rgb']; it must be 'rgb' or 'bgr'")])
def test_a_value_that_cannot_work_is_one_sentence(fields, says):
    "It names the field, the value and the rule, and nothing is turned into another type."
    with pytest.raises(ValueError) as caught: demo().replace(**fields)
    assert str(caught.value).startswith(f'recipe field {says}') and '\n' not in str(caught.value)


def test_a_recipe_is_a_frozen_dataclass_and_survives_json():
    "Lists become tuples, whole numbers stand for floats, unknown names are refused."
    for recipe in (official(), paper(), demo()):
        assert (Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe == copy.deepcopy(recipe)
                and hash(recipe) == hash(recipe.replace()))
    assert demo().replace(epochs=5).epochs == 5 and demo().replace(size=[64, 96]).size == (64, 96)
    with pytest.raises(dataclasses.FrozenInstanceError): demo().seed = 1
    with pytest.raises(ValueError, match=re.escape('unknown recipe field learning_rate; there are: name, size')):
        Recipe(learning_rate=1)


@pytest.mark.parametrize('name', METHODS)
def test_the_recipes_of_all_methods_are_as_strict(name):
    "No field takes what is no number, and each takes what JSON and NumPy make of its own value."
    recipe = recipe_of(name)
    assert recipe.replace(seed=np.int64(3), quantile=np.float32(0.5)) == recipe.replace(seed=3, quantile=0.5)
    assert type(recipe.replace(seed=np.int64(3)).seed) is int
    assert type(recipe)(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe == copy.deepcopy(recipe)
    for field, value in dataclasses.asdict(recipe).items():
        for wrong in ('x', {}, float('nan'), float('inf'), [], -1e30, [[None]]):
            if (field, wrong) in (('name', 'x'), ('lr_milestones', [])): continue
            with pytest.raises(ValueError, match=f'^recipe field {field} is ') as caught:
                recipe.replace(**{field: wrong})
            assert '\n' not in str(caught.value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with pytest.raises(ValueError, match=f'^recipe field {field} is True; it must be'):
                recipe.replace(**{field: True})
        if isinstance(value, bool):
            with pytest.raises(ValueError, match=f'^recipe field {field} is 1; it must be'):
                recipe.replace(**{field: 1})
