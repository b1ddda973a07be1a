"What a detector takes and refuses, and what a checkpoint keeps of the recipe."

import dataclasses
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from draem_nb.data import load_category
from draem_nb.detector import AnomalyDetector, Detector, as_images, fit, image_score, upper_quantile
from draem_nb.networks import Draem, initialise
from draem_nb.recipes import demo
from draem_nb.textures import load_textures
from draem_nb.tiling import TiledDetector, load_draem
from draem_nb.training import load_checkpoint, train

CLASS = 'brick'        # in `root`
TINY = dict(size=32, base_width=4, base_channels=2, steps=3, batch=2, score_window=5, precision='float32',
            checkpoint_every=2)


@pytest.mark.parametrize('fields', [dict(), dict(image_size=64)])
def test_trained_without_antialiasing_it_looks_without(root, tmp_path, fields):
    "Images, textures, checkpoint and predictions from files, in tiles as well."
    recipe = demo().replace(**TINY, antialias=False, **fields)
    size = recipe.image_size or recipe.size
    category, textures = load_category(root, 'brick', size, antialias=False), load_textures(size=32, antialias=False)
    detector = load_draem(train(category, textures, recipe, tmp_path, 'cpu'), 'cpu')
    assert not detector.antialias and torch.equal(detector.predict(category.paths[:3]).maps,
                                                  detector.predict(category.test[:3]).maps)
    smooth = load_category(root, 'brick', size)
    assert not torch.equal(smooth.test[:3], category.test[:3])
    large = torch.stack([torch.from_numpy(np.array(Image.open(p).convert('RGB'))).permute(2, 0, 1)
                         for p in category.paths[:3]])
    # tensors are shrunk alike
    assert torch.equal(detector.predict(large).maps, detector.predict(category.test[:3]).maps)
    with pytest.raises(ValueError, match='recipe field antialias is False, but the class was loaded otherwise; load it '
                       'with antialias=False'):
        train(smooth, textures, recipe, tmp_path / 'other', 'cpu')


def test_fit_shrinks_the_built_in_textures_as_the_recipe_says(root):
    "The same weights as with textures that are given."
    recipe = demo().replace(**TINY, antialias=False)
    category = load_category(root, 'brick', 32, antialias=False)
    nets = [fit(category, recipe, 'cpu', textures).net.state_dict()
            for textures in (None, load_textures(size=32, antialias=False), load_textures(size=32))]
    same = [all(torch.equal(v, other[k]) for k, v in nets[0].items()) for other in nets[1:]]
    assert same == [True, False]


def test_a_checkpoint_that_does_not_say_it_was_antialiased(root, tmp_path):
    category, recipe = load_category(root, 'brick', 32), demo().replace(**TINY)
    path = train(category, load_textures(size=32), recipe, tmp_path, 'cpu')
    state = load_checkpoint(path)
    del state['recipe']['antialias']
    torch.save(state, path)
    assert Detector.load(path, 'cpu').antialias


@pytest.mark.parametrize('dtype, remedy', [*((whole, '; divide by the largest value') for whole in (
    'uint16', 'int16', 'int32', 'int64')), ('bool', '$')])
def test_other_whole_numbers_are_refused_in_one_sentence(dtype, remedy):
    for images in (np.ones((1, 8, 8, 3), dtype), torch.ones(1, 3, 8, 8).to(getattr(torch, dtype))):
        with pytest.raises(ValueError, match=f'images must be uint8, or float in 0..1, not {dtype}{remedy}'):
            as_images(images, (8, 8))
    with pytest.raises(ValueError, match='not float in 0 .. 255'): as_images(np.array([[0., 255.]]), (8, 8))
    with pytest.raises(ValueError, match='not float in nan .. nan'):
        as_images(torch.full((1, 3, 8, 8), torch.nan), (8, 8))


def test_image_score_counts_the_padding():
    "A hot corner of 11 x 11 pixels: at the border the window of 21 x 21 has 121 pixels in it, and 320 of padding."
    maps = torch.zeros(1, 1, 64, 64)
    maps[..., :11, :11] = 1
    assert image_score(maps, 21).item() == pytest.approx(121 / 441)


@pytest.mark.parametrize('n, quantile, rank', [(1000, 0.995, 995), (1000, 0.9, 900), (10, 0.995, 10), (4, 0.5, 2),
                                               (5, 0.5, 3), (3, 0., 1), (3, 1., 3)])
def test_upper_quantile(n, quantile, rank):
    values = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy() + 1.
    assert upper_quantile(values, quantile) == rank


class Red(AnomalyDetector):
    "The map is the first channel that it looks at; the score its maximum."
    size, device = (32, 32), torch.device('cpu')
    def __init__(self, **fields): self.__dict__.update(fields)
    def maps_and_scores(self, batch): return batch / 255, batch[:, :1] / 255, batch[:, 0].amax((1, 2)) / 255


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


@pytest.mark.parametrize('detector', [Red(), TiledDetector(Red(), (64, 32))])
def test_nonsense_is_refused(detector):
    for batch in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f'batch is {batch}; it must be a whole number of at least 1'):
            detector.predict(images(1), batch=batch)
    for quantile in (5., -0.1, float('nan')):
        with pytest.raises(ValueError, match=f'quantile is {quantile}; it must be between 0 and 1'):
            detector.calibrate(images(1), quantile)
    assert detector.quantile == 0.995 and detector.threshold is None


class Broken(Red):
    "Nothing that it says of a red image is a number."
    def maps_and_scores(self, batch):
        return None, torch.where(batch[:, :1] > 0, torch.nan,
                                 0.), torch.where(batch[:, 0].amax((1, 2)) > 0, torch.inf, 0.)


@pytest.mark.parametrize('detector', [Broken(), TiledDetector(Broken(), (64, 32))])
def test_scores_that_are_not_finite_are_refused(detector, tmp_path):
    "NaN exceeds no threshold: the image would be called good."
    size = detector.size
    batch = torch.zeros(20, 3, *size, dtype=torch.uint8)
    batch[17, 0] = 9
    for look in (detector.predict, detector.calibrate):
        with pytest.raises(ValueError,
                           match='the score of image 17 is not finite: the weights of the detector are damaged'):
            look(batch)
    Image.new('RGB', size[::-1], 'red').save(tmp_path / 'part7.png')
    with pytest.raises(ValueError, match='the score of image .*part7.png is not finite'): detector.predict(tmp_path)
    assert detector.threshold is None


@pytest.mark.parametrize('change', [dict(threshold=float('nan')), dict(pixel_threshold=float('inf')),
                                    dict(threshold=None), dict(threshold='0.5'), dict(held_out_scores=[0.1, None]),
                                    dict(held_out_scores=0.1), dict(quantile=True), dict(predict='oops'),
                                    dict(mask_rule='official')])
def test_damaged_calibrations_are_refused(change, tmp_path):
    Red().calibrate(images(51, 102)).save_calibration(tmp_path)
    kept = json.loads((tmp_path / 'threshold.json').read_text())
    same = Red(); same.load_calibration(tmp_path)
    assert same.threshold == kept['threshold'] and same.held_out_scores == kept['held_out_scores']
    for text in (json.dumps(kept | change), json.dumps(kept)[:40], '[]',
                 json.dumps({k: v for k, v in kept.items() if k != 'quantile'})):
        (tmp_path / 'threshold.json').write_text(text)
        other = Red()
        with pytest.raises(ValueError, match='threshold.json is damaged or not ours: .*; delete it and '
                           'calibrate again'):
            other.load_calibration(tmp_path)
        assert other.threshold is None and callable(other.predict)


def checkpoint(tmp_path):
    "Of an untrained net, as a run keeps it."
    net = initialise(Draem(4, 2), torch.Generator().manual_seed(0))
    torch.save(dict(net=net.state_dict(), recipe=dataclasses.asdict(demo().replace(**TINY))),
               tmp_path / 'checkpoint.pt')
    return tmp_path / 'checkpoint.pt'


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    state = load_checkpoint(checkpoint(tmp_path))
    state['net']['discriminative.encoder_segment.block1.1.running_mean'][0] = value
    torch.save(state, tmp_path / 'checkpoint.pt')
    with pytest.raises(ValueError, match='checkpoint.pt is damaged: a value of '
                       'net.discriminative.encoder_segment.block1.1.running_mean is not finite'):
        Detector.load(tmp_path, 'cpu')


def test_random_bytes_in_a_checkpoint_are_refused(tmp_path):
    "Wherever they lie in the weights; PyTorch alone loads them."
    path = checkpoint(tmp_path)
    whole, g = path.read_bytes(), torch.Generator().manual_seed(0)
    with zipfile.ZipFile(path) as archive: largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    start = largest.header_offset + 200
    for place in (start + largest.file_size // 2,
                  *(torch.randint(len(whole) // 4, 3 * len(whole) // 4, (8,), generator=g).tolist())):
        damaged = bytearray(whole)
        for i in range(place, place + 64): damaged[i] ^= 0x15
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='is damaged|not a readable checkpoint'): Detector.load(tmp_path, 'cpu')
    path.write_bytes(whole)
    assert Detector.load(tmp_path, 'cpu').threshold is None
