"""Another operating point for a detector that is trained: by command, kept beside the old one, and
never by less than was promised."""
import json

import numpy as np
import pytest

from draem_nb import methods
from draem_nb.data import demo_category, load_category
from draem_nb.inspection import promised_rate, smallest_rate, threshold_for
from draem_nb.reports import main


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of an autoencoder of three steps, and its class."
    folder, root = tmp_path_factory.mktemp('run'), demo_category('brick')
    methods.fit('autoencoder', load_category(root.parent, 'brick', 64),
                methods.recipe_of('autoencoder', size=64, steps=3), 'cpu', run_dir=folder)
    return folder, root


@pytest.mark.parametrize('n', [1, 5, 19, 20, 99, 100])
def test_the_lowest_threshold_that_keeps_the_promise(n):
    scores = np.random.default_rng(n).normal(size=n)
    for share in (0.02, 0.05, 0.1, 0.5, 0.9):
        if share < smallest_rate(n) - 1e-12: continue
        threshold = threshold_for(scores, share)
        assert promised_rate(scores, threshold) <= share + 1e-9
        lower = scores[scores < threshold].max(initial=-np.inf)
        assert promised_rate(scores, lower) > share + 1e-9 or threshold == -np.inf


def test_new_images_alarm_as_often_as_promised():
    rng, alarms = np.random.default_rng(0), []
    for _ in range(4000):
        scores = rng.exponential(size=20)
        alarms.append(scores[-1] > threshold_for(scores[:19], 0.1))
    assert abs(np.mean(alarms) - 0.1) < 0.015


def test_calibrate_sets_the_promised_threshold_and_keeps_the_old_one(run, tmp_path, capsys):
    folder, root = run
    old = json.loads((folder / 'threshold.json').read_text())
    assert main(['calibrate', '--run-dir', str(folder), '--images', str(root / 'test' / 'good'), '--false-alarms',
                 '0.25', '--out-dir', str(tmp_path / 'report')]) == 0
    new = json.loads((folder / 'threshold.json').read_text())
    assert len(new['held_out_scores']) == len(list((root / 'test' / 'good').iterdir()))
    assert new['threshold'] == threshold_for(new['held_out_scores'], 0.25)
    [kept] = folder.glob('threshold-before-*.json')
    assert json.loads(kept.read_text()) == old
    assert methods.load(folder, 'cpu').threshold == new['threshold']
    assert json.loads((tmp_path / 'report' / 'metrics.json').read_text())['promised'] <= 0.25


def test_a_share_that_so_few_images_cannot_promise_changes_nothing(run, tmp_path, capsys):
    folder, root = run
    before = (folder / 'threshold.json').read_bytes()
    assert main(['calibrate', '--run-dir', str(folder), '--images', str(root / 'test' / 'good'), '--false-alarms',
                 '0.001', '--out-dir', str(tmp_path / 'report')]) == 1
    assert 'calibrate with at least 999 good images' in capsys.readouterr().err
    assert (folder / 'threshold.json').read_bytes() == before
