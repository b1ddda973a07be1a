"The recipes: steps and milestones as the released code counts them, and how images are shrunk."
import pytest

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
    assert (official().lr, official().lr_decay, official().lr_milestones, official().batch, official().epochs) == (1e-4, 0.2, (0.8, 0.9), 8, 700.)
    assert (paper().lr, paper().lr_decay, paper().lr_milestones) == (1e-4, 0.1, (400 / 700, 600 / 700))
    assert (official().opacity, paper().opacity, official().focal_gamma, official().score_window) == ((0.2, 1.), (0.1, 1.), 2., 21)
    assert (official().rotation_degrees, official().rotation_probability, paper().rotation_degrees, paper().rotation_probability) == (90., 0.3, 45., 1.)
    assert (official().perlin_scales, official().perlin_threshold, official().clean_share, official().init_std) == ((0, 5), 0.5, 0.5, 0.02)
    assert official().ssim_weight == official().l2_weight == official().focal_weight == 1 and len(ablations()) == 9
