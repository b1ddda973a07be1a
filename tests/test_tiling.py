"draem_nb.tiling and training on crops: large images in bounded memory, equality with the plain way, reports."
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from draem_nb import data
from draem_nb.data import load_category
from draem_nb.detector import AnomalyDetector, Detector
from draem_nb.metrics import evaluate_maps
from draem_nb.networks import Draem, initialise
from draem_nb.recipes import demo
from draem_nb.reports import run_report
from draem_nb.textures import load_textures
from draem_nb.tiling import TiledDetector, load_draem
from draem_nb.training import RandomCrops, Trainer, train


def net(size=32, color='rgb', **recipe):
    return Detector(initialise(Draem(4, 2), torch.Generator().manual_seed(0)).eval(),
                    demo().replace(size=size, color=color, base_width=4, base_channels=2, score_window=5, **recipe),
                    'cpu')


class Bright(AnomalyDetector):
    "The map is the red channel: what a tiled detector makes of it is known."
    size, device, quantile, color = (32, 64), torch.device('cpu'), 0.9, 'rgb'
    def maps_and_scores(self, batch):
        x = batch.float() / 255
        return x, x[:, :1], x.amax((1, 2, 3))


@pytest.mark.parametrize('size', [(32, 64), (96, 64), (224, 192), (64, 320)])
@pytest.mark.parametrize('overlap', [0., 0.25, 0.6])
def test_blending_changes_nothing_that_all_tiles_agree_on(size, overlap):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = TiledDetector(Bright(), size, overlap).predict(images, batch=5, reconstructions=True)
    assert torch.allclose(found.maps, images[:, 0] / 255, atol=1e-6) and torch.equal(found.reconstructions, images)
    assert found.masks is None and found.is_anomalous is None and found.paths is None


def test_bgr_detectors_get_bgr_tiles():
    images = torch.randint(0, 256, (2, 3, 96, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rgb, bgr = (TiledDetector(net(color=color), (96, 64)).predict(x, reconstructions=True)
                for color, x in (('rgb', images), ('bgr', images.flip(1))))
    assert torch.equal(rgb.maps, bgr.maps) and torch.equal(rgb.reconstructions, bgr.reconstructions.flip(1))


def test_input_of_any_form(tmp_path):
    tiled = TiledDetector(net(), 64)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    expected = tiled.predict(images).maps
    for i, image in enumerate(images): Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f'{i}.png')
    for given in (tmp_path, [tmp_path / f'{i}.png' for i in range(3)], images.permute(0, 2, 3, 1).numpy(),
                  images / 255):
        assert torch.equal(tiled.predict(given).maps, expected)
    assert (tiled.predict(tmp_path).paths == sorted(tmp_path.iterdir()) and tiled.predict(images[:0]).maps.shape
            == (0, 64, 64))
    with pytest.raises(ValueError, match='no images to predict'): tiled.predict([])


def test_many_maps_lie_in_a_file(monkeypatch):
    monkeypatch.setattr(data, '_IN_MEMORY', 100)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tiled = TiledDetector(net(), 64).calibrate(images)
    found = tiled.predict(images)
    monkeypatch.undo()
    assert (torch.equal(found.maps, tiled.predict(images).maps)
            and torch.equal(found.masks, found.maps > tiled.pixel_threshold))


def test_metrics_in_parts_are_the_same(monkeypatch):
    from draem_nb import metrics
    g = torch.Generator().manual_seed(0)
    # many ties
    maps, masks = torch.rand(3, 40, 40, generator=g).mul(50).round(), torch.rand(3, 40, 40, generator=g) > 0.9
    whole = evaluate_maps(maps, masks)
    monkeypatch.setattr(metrics, '_PART', 97)
    assert evaluate_maps(maps, masks) == whole


CLASS = 'gravel'        # in `root`
TINY = dict(size=32, image_size=96, base_width=4, base_channels=2, steps=6, batch=4, score_window=5,
            precision='float32', checkpoint_every=3)

def test_training_on_crops_same_bits_and_resumed(root, tmp_path):
    category, textures, recipe = load_category(root, 'gravel', 96), load_textures(size=32), demo().replace(**TINY)
    weights = [torch.load(train(category, textures, recipe, tmp_path / name, 'cpu'))['net'] for name in 'ab']
    (tmp_path / 'c').mkdir()
    step = Trainer.step
    def stop(self):
        if self.done == 4: raise RuntimeError('pulled the plug')
        step(self)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match='plug'):
        patch.setattr(Trainer, 'step', stop)
        train(category, textures, recipe, tmp_path / 'c', 'cpu')
    weights.append(torch.load(train(category, textures, recipe, tmp_path / 'c', 'cpu'))['net'])
    assert all(torch.equal(v, other[k]) for other in weights[1:] for k, v in weights[0].items())
    turned = dataclasses.replace(category, train=category.train.flip(1))
    plan = Trainer(category.train, textures, recipe, torch.device('cpu')).simulator.plan(80, 4, 0, 0)
    assert torch.equal(RandomCrops(category.train, recipe).draw(plan, 0)[0],
                       RandomCrops(turned.train, recipe, flipped=True).draw(plan, 0)[0])
    with pytest.raises(ValueError, match='image_size is 96, but the class was loaded at .32, 32.; load it at '
                       'the image_size'):
        train(load_category(root, 'gravel', 32), textures, recipe, tmp_path / 'd', 'cpu')


def test_report_of_a_tiled_run(root, tmp_path):
    results = run_report('category', dict(category='gravel', data_root=str(root), overrides=TINY),
                         tmp_path / 'run').metrics
    assert results['conditions']['size'] == [96, 96] and results['conditions']['changes']['image_size'] == 96
    tiled = load_draem(tmp_path / 'run', 'cpu')
    assert isinstance(tiled, TiledDetector) and tiled.threshold == results['operating_point']['threshold']


LARGE = '''
import json, sys
import numpy as np, torch
torch.set_num_threads(1)
from draem_nb.data import load_images
from draem_nb.detector import Detector
from draem_nb.metrics import evaluate_maps
from draem_nb.networks import Draem, initialise
from draem_nb.recipes import demo
from draem_nb.runs import peak_memory_mib
from draem_nb.tiling import TiledDetector
from draem_nb.training import Trainer
recipe = demo().replace(size=256, image_size=4096, base_width=2, base_channels=2, steps=4, batch=2,
                        precision='float32', match_gray=True)
detector = Detector(initialise(Draem(2, 2), torch.Generator().manual_seed(0)).eval(), recipe, 'cpu')
small = torch.zeros(16, 3, 256, 256, dtype=torch.uint8)
detector.predict(small)                                        # everything is imported and warm
trainer = Trainer(small, small, recipe.replace(image_size=None), torch.device('cpu')); trainer.step()
peak = lambda: int(peak_memory_mib())
marks = [peak()]
images = load_images([sys.argv[1]] * 3, 4096, cache=True)      # three images of 48 MiB, mapped
marks.append(peak())
trainer = Trainer(images, small, recipe, torch.device('cpu'))
trainer.step()
marks.append(peak())
found = TiledDetector(detector, 4096, overlap=0.125).predict(images[:1])
marks.append(peak())
mask = torch.zeros(1, 4096, 4096, dtype=torch.bool); mask[0, 100:140, 2000:2300] = True
metrics = evaluate_maps(found.maps, mask)
marks.append(peak())
print(json.dumps(dict(marks=marks, shape=list(found.maps.shape), metrics=metrics)))
'''

def test_memory_at_4096(tmp_path, monkeypatch):
    """MiB at the peak, beyond what the libraries and one small batch take: reading, training on
    crops, predicting, measuring."""
    monkeypatch.setenv('DRAEM_NB_CACHE', str(tmp_path / 'cache'))
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), dtype=np.uint8)
    Image.fromarray(np.tile(noise, (8, 8))).save(tmp_path / 'large.bmp')
    done = subprocess.run([sys.executable, '-c', LARGE, tmp_path / 'large.bmp'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    start, *marks = result['marks']
    assert result['shape'] == [1, 4096, 4096] and 0 <= result['metrics']['auroc'] <= 1
    assert marks[0] - start < 700 and marks[-1] - start < 900


MANY = '''
import os, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from draem_nb import data, detector, evaluation, metrics
from draem_nb.data import CategoryData, large_part, large_zeros
from draem_nb.evaluation import evaluate
from draem_nb.tiling import TiledDetector
# small images count as large ones
data._IN_MEMORY = detector._PART = metrics._PART = evaluation._LOOKED_AT = 1 << 20
class Bright(detector.AnomalyDetector):
    size, device, quantile = (512, 512), torch.device('cpu'), 0.995
    def maps_and_scores(self, batch):
        return batch.float() / 255, batch[:, :1].float() / 255, batch.amax((1, 2, 3)).float()
now = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1]) / 1024
def peak_of(n):
    images, masks = large_zeros((n, 3, 1024, 1024), torch.uint8), large_zeros((n, 1, 1024, 1024), torch.bool)
    for i in range(n):
        g = torch.Generator().manual_seed(i)
        images[i] = torch.randint(0, 200, (1, 1024, 1024), dtype=torch.uint8, generator=g)
    labels = torch.arange(n) >= n // 2
    for i in (n // 2, n - 1): masks[i, :, 100:130, 200:260] = True; images[i, :, 100:130, 200:260] = 255
    category = CategoryData('part', Path('.'), (1024, 1024), images, images, masks, masks, labels,
                            ['dent' if label else 'good' for label in labels],
                            [Path('part') / f'{i}.png' for i in range(n)],
                            [Path('part') / f'{i}.png' for i in range(n)])
    tiled = TiledDetector(Bright(), 1024)
    tiled.calibrate(large_part(images, range(1, n // 2)))
    peak, over = [0], threading.Event()
    def watch():
        while not over.wait(0.002): peak[0] = max(peak[0], now())
    thread = threading.Thread(target=watch); thread.start()
    tiled.calibrate(large_part(images, range(1, n // 2)))
    found = tiled.predict(category.test, reconstructions=True)
    evaluate(tiled, category, found)
    over.set(); thread.join()
    return peak[0]
for n in (4, 20):       # each in a process of its own: freed memory may stay with one
    if not os.fork(): print(peak_of(n), flush=True); os._exit(0)
    os.wait()
'''

def test_memory_does_not_grow_with_the_number_of_large_images():
    """Calibrated, predicted, evaluated: of 20 images as of 4, but for what mapped files take, which the system may take
    back. 16 images more have 64 MiB of maps and 96 MiB of masks, tiles and reconstructions."""
    # Every array in a mapping of its own: else freed memory that the allocator keeps is counted.
    done = subprocess.run([sys.executable, '-c', MANY], capture_output=True, text=True,
                          env=os.environ | {'MALLOC_MMAP_THRESHOLD_': '1000000'})
    assert done.returncode == 0, done.stderr
    few, many = map(float, done.stdout.split())
    print(few, many)
    assert many - few < 16
