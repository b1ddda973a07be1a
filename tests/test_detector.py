"What a detector takes and refuses, and what a checkpoint keeps of the recipe."

import numpy as np
import pytest
import torch
from PIL import Image

from draem_nb.data import demo_category, load_category
from draem_nb.detector import AnomalyDetector, Detector, as_images, fit, image_score, upper_quantile
from draem_nb.recipes import demo
from draem_nb.textures import load_textures
from draem_nb.tiling import load_detector
from draem_nb.training import load_checkpoint, train

TINY = dict(size=32, base_width=4, base_channels=2, steps=3, batch=2, score_window=5, precision='float32', checkpoint_every=2)


@pytest.fixture(scope='module')
def root(tmp_path_factory): return demo_category('brick', tmp_path_factory.mktemp('demo')).parent


@pytest.mark.parametrize('fields', [dict(), dict(image_size=64)])
def test_trained_without_antialiasing_it_looks_without(root, tmp_path, fields):
    "Images, textures, checkpoint and predictions from files, in tiles as well."
    recipe = demo().replace(**TINY, antialias=False, **fields)
    size = recipe.image_size or recipe.size
    category, textures = load_category(root, 'brick', size, antialias=False), load_textures(size=32, antialias=False)
    detector = load_detector(train(category, textures, recipe, tmp_path, 'cpu'), 'cpu')
    assert not detector.antialias and torch.equal(detector.predict(category.paths[:3]).maps, detector.predict(category.test[:3]).maps)
    smooth = load_category(root, 'brick', size)
    assert not torch.equal(smooth.test[:3], category.test[:3])
    large = torch.stack([torch.from_numpy(np.array(Image.open(p).convert('RGB'))).permute(2, 0, 1) for p in category.paths[:3]])
    assert torch.equal(detector.predict(large).maps, detector.predict(category.test[:3]).maps)       # tensors are shrunk alike
    with pytest.raises(ValueError, match='recipe field antialias is False, but the class was loaded otherwise; load it with antialias=False'):
        train(smooth, textures, recipe, tmp_path / 'other', 'cpu')


def test_fit_shrinks_the_built_in_textures_as_the_recipe_says(root):
    "The same weights as with textures that are given."
    recipe = demo().replace(**TINY, antialias=False)
    category = load_category(root, 'brick', 32, antialias=False)
    nets = [fit(category, recipe, 'cpu', textures).net.state_dict() for textures in (None, load_textures(size=32, antialias=False), load_textures(size=32))]
    same = [all(torch.equal(v, other[k]) for k, v in nets[0].items()) for other in nets[1:]]
    assert same == [True, False]


def test_a_checkpoint_that_does_not_say_it_was_antialiased(root, tmp_path):
    category, recipe = load_category(root, 'brick', 32), demo().replace(**TINY)
    path = train(category, load_textures(size=32), recipe, tmp_path, 'cpu')
    state = load_checkpoint(path)
    del state['recipe']['antialias']
    torch.save(state, path)
    assert Detector.load(path, 'cpu').antialias


@pytest.mark.parametrize('dtype', ['uint16', 'int16', 'int32', 'int64', 'bool'])
def test_other_whole_numbers_are_refused_in_one_sentence(dtype):
    for images in (np.ones((1, 8, 8, 3), dtype), torch.ones(1, 3, 8, 8).to(getattr(torch, dtype))):
        with pytest.raises(ValueError, match=f'images must be uint8, or float in 0..1, not {dtype}; divide by the largest value'): as_images(images, (8, 8))
    with pytest.raises(ValueError, match='not float in 0 .. 255'): as_images(np.array([[0., 255.]]), (8, 8))
    with pytest.raises(ValueError, match='not float in nan .. nan'): as_images(torch.full((1, 3, 8, 8), torch.nan), (8, 8))


def test_image_score_counts_the_padding():
    "A hot corner of 11 x 11 pixels: at the border the window of 21 x 21 has 121 pixels in it, and 320 of padding."
    maps = torch.zeros(1, 1, 64, 64)
    maps[..., :11, :11] = 1
    assert image_score(maps, 21).item() == pytest.approx(121 / 441)


@pytest.mark.parametrize('n, quantile, rank', [(1000, 0.995, 995), (1000, 0.9, 900), (10, 0.995, 10), (4, 0.5, 2), (5, 0.5, 3), (3, 0., 1), (3, 1., 3)])
def test_upper_quantile(n, quantile, rank):
    values = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy() + 1.
    assert upper_quantile(values, quantile) == rank


class Red(AnomalyDetector):
    "The map is the first channel that it looks at; the score its maximum."
    size, device = (32, 32), torch.device('cpu')
    def __init__(self, **fields): self.__dict__.update(fields)
    def _look(self, batch): return batch / 255, batch[:, :1] / 255, batch[:, 0].amax((1, 2)) / 255


def images(*reds):
    batch = torch.zeros(len(reds), 3, 32, 32, dtype=torch.uint8)
    for image, red in zip(batch, reds): image[0, :4] = red
    return batch


def test_thresholds_are_exceeded_not_reached():
    "None of the images that set the thresholds is called anomalous, no pixel of theirs a defect."
    detector = Red(quantile=1.).calibrate(images(51, 102))
    found = detector.predict(images(102, 103))
    assert found.is_anomalous.tolist() == [False, True] and found.masks.flatten(1).any(1).tolist() == [False, True]
    assert detector.n_held_out == 2 and detector.threshold == detector.pixel_threshold == pytest.approx(0.4)


@pytest.mark.parametrize('floor, threshold', [(0.5, 0.5), (0.2, 0.4)])
def test_pixel_floor_is_the_least_that_the_pixel_threshold_can_be(floor, threshold):
    assert Red(quantile=1., pixel_floor=floor).calibrate(images(51, 102)).pixel_threshold == pytest.approx(threshold)


def test_channel_order():
    "A detector of BGR looks at blue where one of RGB looks at red, and gives its reconstructions back in RGB."
    red, blue = images(200), images(200).flip(1)
    for color, seen in (('rgb', red), ('bgr', blue)):
        found = Red(color=color).predict(seen, reconstructions=True)
        assert found.maps.max() == pytest.approx(200 / 255) and torch.equal(found.reconstructions, seen)
