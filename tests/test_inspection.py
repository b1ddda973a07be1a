"""Another operating point for a detector that is trained: by command, kept beside the old one, and
never by less than was promised."""
import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from draem_nb import methods
from draem_nb.cli import main
from draem_nb.data import demo_category, load_category
from draem_nb.drift import held_out_table
from draem_nb.files import write_json
from draem_nb.inspection import (folds_of, promised_rate, smallest_rate, threshold_for, threshold_interval,
                                 trained_on)
from draem_nb.runs import file_notes, input_files


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


# --- photos of the same part


def photos_of(rng, parts, each=4):
    "Scores of photos: what a part is like, and a little of their own."
    return (rng.normal(size=(parts, 1)) + 0.1 * rng.normal(size=(parts, each))).ravel(), [
        str(i // each) for i in range(parts * each)
    ]


def test_a_promise_by_part_is_kept_where_one_by_image_is_not():
    rng, alarms = np.random.default_rng(0), dict(part=[], image=[])
    for _ in range(3000):
        scores, groups = photos_of(rng, 20)
        new, held_out, of = scores[-4:], scores[:-4], groups[:-4]
        alarms['part'].append((new > threshold_for(held_out, 0.1, of)).mean())
        alarms['image'].append((new > threshold_for(held_out, 0.02)).mean())
    assert 0.07 < np.mean(alarms['part']) < 0.11  # of 19 parts; 0.1 was promised
    assert np.mean(alarms['image']) > 0.035  # of 76 images, taken for as many parts; 0.02 was promised
    assert promised_rate(held_out, held_out.max(), of) == 1 / 20 and promised_rate(held_out, held_out.max()) == 1 / 77
    with pytest.raises(ValueError, match='19 held-out good parts cannot promise 2.00% .* at least 49 good parts'):
        threshold_for(held_out, 0.02, of)


def test_groups_of_one_image_change_nothing():
    scores, names = np.random.default_rng(0).normal(size=50), [str(i) for i in range(50)]
    for share in (0.02, 0.1, 0.5):
        assert threshold_for(scores, share, names) == threshold_for(scores, share)
        assert threshold_interval(scores, 0.5, groups=names) == threshold_interval(scores, 0.5)


def test_parts_are_held_out_together_and_remembered(tmp_path):
    for i in range(20):
        (folder := tmp_path / 'cup' / 'train' / 'good').mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)).save(
            folder / f'part{i // 4}_{i}.png'
        )
    recipe = methods.recipe_of('autoencoder', size=32, steps=2)
    data = load_category(tmp_path, 'cup', 32, groups=r'(part\d+)_')
    assert (
        data.notes == ('Training images are held out part by part: 20 show 5 parts.',)
        and data.fingerprint == load_category(tmp_path, 'cup', 32).fingerprint
    )
    methods.fit('autoencoder', data, recipe, 'cpu', run_dir=tmp_path / 'run')
    held_out = json.loads((tmp_path / 'run' / 'run.json').read_text())['held_out']
    assert len(held_out) == 4 and len({name.split('_')[0] for name in held_out}) == 1
    kept = json.loads((tmp_path / 'run' / 'threshold.json').read_text())
    assert kept['held_out_groups'] == [held_out[0].split('_')[0]] * 4
    with pytest.raises(ValueError, match='holds a run with another recipe or data .other held out'):
        methods.fit('autoencoder', load_category(tmp_path, 'cup', 32), recipe, 'cpu', run_dir=tmp_path / 'run')
    (tmp_path / 'run' / 'threshold.json').write_text(json.dumps(kept | dict(held_out_groups=['a'])))
    with pytest.raises(ValueError, match='threshold.json is damaged or not ours'):
        methods.load(tmp_path / 'run', 'cpu')


@pytest.mark.parametrize(
    'pattern, says',
    [
        ('part', 'has no brackets'),
        ('(part', 'is no regular expression'),
        ('(tile)', 'does not match train/good/part0_0.png'),
    ],
)
def test_a_wrong_pattern_is_named(tmp_path, pattern, says):
    (folder := tmp_path / 'cup' / 'train' / 'good').mkdir(parents=True)
    Image.new('L', (32, 32)).save(folder / 'part0_0.png')
    with pytest.raises(ValueError, match=says):
        load_category(tmp_path, 'cup', 32, groups=pattern)


def test_calibrate_by_part(run, tmp_path, capsys):
    folder, root = run
    n = len(list((root / 'test' / 'good').iterdir()))
    ask = lambda *more: main(
        [
            'calibrate',
            '--run-dir',
            str(folder),
            '--images',
            str(root / 'test' / 'good'),
            '--groups',
            r'(\d\d)\d\.',
            '--out-dir',
            str(tmp_path / 'report'),
            *more,
        ]
    )
    assert ask('--false-alarms', '0.05') == 1 and 'held-out good parts cannot promise 5.00%' in capsys.readouterr().err
    assert not (tmp_path / 'report').exists()
    assert ask() == 0
    new = json.loads((folder / 'threshold.json').read_text())
    assert len(new['held_out_groups']) == len(new['held_out_scores']) == n
    assert json.loads((tmp_path / 'report' / 'metrics.json').read_text())['promised'] == pytest.approx(
        1 / (len(set(new['held_out_groups'])) + 1)
    )


# --- few images


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "A run of twelve photos of six parts, none of them held out, and its photos."
    root, folder = tmp_path_factory.mktemp('few'), tmp_path_factory.mktemp('few-run')
    for i, path in enumerate(sorted((demo_category('brick') / 'train' / 'good').glob('*.png'))[:15]):
        (to := root / 'cup' / 'good').mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / f'part{i // 2:02}_{i}.png')
    asked = dict(category='cup', data_root=str(root), layout=None, region=None, groups=r'(part\d+)_')
    data = load_category(root, 'cup', 64, groups=asked['groups'])
    methods.fit('padim', data, methods.recipe_of('padim', size=64, holdout=0), 'cpu', run_dir=folder)
    write_json(asked, folder / 'parameters.json')
    write_json(file_notes(input_files(asked), {}), folder / 'inputs.json')
    return folder, data


def test_cross_fitted_scores_are_of_images_that_were_not_learned(few, tmp_path, capsys):
    folder, data = few
    ask = lambda k, out: main(['calibrate', '--run-dir', str(folder), '--cross-fit', k, '--device', 'cpu', '--out-dir',
                               str(tmp_path / out)])
    assert ask('3', 'report') == 0
    kept, parts = json.loads((folder / 'threshold.json').read_text()), list(dict.fromkeys(data.groups))
    assert kept['held_out_groups'] == list(data.groups) and kept['cross_fit'] == 3
    assert kept['threshold'] == max(kept['held_out_scores']) and kept['false_alarms'] == 1 / (len(parts) + 1)
    folds, rows = folds_of(len(data.train), 3, data.groups), torch.arange(len(data.train))
    for fold in range(3):                                       # by hand
        learned = dataclasses.replace(data, train=data.train[folds != fold], groups=(), train_paths=[
            path for path, of in zip(data.train_paths, folds) if of != fold])
        detector = methods.fit('padim', learned, methods.recipe_of('padim', size=64, holdout=0), 'cpu')
        scores = detector.predict(data.train[folds == fold]).scores
        assert [kept['held_out_scores'][i] for i in rows[folds == fold]] == pytest.approx(scores.tolist())
    detector = methods.load(folder, 'cpu')                      # what was kept says that others gave the scores
    assert detector.cross_fit == 3 and 'score' not in held_out_table(detector)
    assert ask('40', 'more') == 1 and f'from 2 to {len(parts)}, the number of parts' in capsys.readouterr().err


def test_no_promise_from_images_that_were_learned(few, run, tmp_path, capsys):
    folder, data = few
    before = (folder / 'threshold.json').read_bytes() if (folder / 'threshold.json').exists() else None
    assert set(trained_on(folder).values()) == {f'good/{path.name}' for path in data.train_paths}
    assert trained_on(run[0]) == {}                             # it has not noted its files
    assert main(['calibrate', '--run-dir', str(folder), '--images', str(data.train_paths[0].parent), '--device',
                 'cpu']) == 1
    assert f'and {len(data.train) - 1} more of these images, so it finds them too normal' in capsys.readouterr().err
    assert ((folder / 'threshold.json').read_bytes() if before else None) == before
    assert not list(folder.glob('calibrate-*'))                 # a failed start leaves no folder


# --- corrections


@pytest.fixture
def corrected_run(run, tmp_path):
    "A copy of the run, five new photos, and a function that types `draem_nb correct`."
    shutil.copytree(run[0], folder := tmp_path / 'copy')
    photos = sorted((run[1] / 'test' / 'crack').glob('*.png'))[:5]

    def correct(**words):
        (tmp_path / 'verdicts.csv').write_text(
            'file;verdict;correction\n'
            + ''.join(f'{photo.absolute()};?;{words.get(f"p{i}", "")}\n' for i, photo in enumerate(photos))
        )
        return main(['correct', '--run-dir', str(folder), str(tmp_path / 'verdicts.csv'), '--device', 'cpu'])

    return folder, photos, correct


def test_this_was_good_sets_the_threshold_without_training(corrected_run, capsys):
    folder, photos, correct = corrected_run
    earlier = set(folder.glob('threshold-before-*.json'))
    checkpoint, old = (folder / 'checkpoint.pt').read_bytes(), json.loads((folder / 'threshold.json').read_text())
    score = float(methods.load(folder, 'cpu').predict(photos[:1]).scores[0])
    assert correct(p0='good') == 0
    new, said = json.loads((folder / 'threshold.json').read_text()), capsys.readouterr().out
    assert new['held_out_scores'] == [*old['held_out_scores'], pytest.approx(score)] and new['n_corrected'] == 1
    groups = old.get('held_out_groups', [])
    aim = promised_rate(old['held_out_scores'], old['threshold'], groups)
    of = [*groups, 'the new one'] if groups else []
    assert new['threshold'] == threshold_for(new['held_out_scores'], old.get('false_alarms') or aim, of)
    assert (folder / 'checkpoint.pt').read_bytes() == checkpoint and 'Nothing was trained' in said
    [kept] = set(folder.glob('threshold-before-*.json')) - earlier
    assert json.loads(kept.read_text()) == old and kept.name in said and f"{old['threshold']:.4f}" in said
    assert methods.load(folder, 'cpu').held_out_statistics.shape == (len(new['held_out_scores']), 4)
    assert (
        correct(p0='ok') == 0 and 'no image was newly called good' in capsys.readouterr().out
    )  # told twice, counted once
    assert correct(p0='bad') == 0  # a change of mind
    assert json.loads((folder / 'threshold.json').read_text())['held_out_scores'] == old['held_out_scores']


def test_this_was_bad_enters_the_recall_and_nothing_else(corrected_run, tmp_path, capsys):
    folder, photos, correct = corrected_run
    old = (folder / 'threshold.json').read_bytes()
    assert (
        correct(p1='bad', p2='NG') == 0 and 'Of 2 parts that were called bad by a correction' in capsys.readouterr().out
    )
    assert (folder / 'threshold.json').read_bytes() == old
    (tmp_path / 'new').mkdir()
    shutil.copy(photos[0], tmp_path / 'new')
    assert (
        main(
            ['inspect', '--run-dir', str(folder), '--images', str(tmp_path / 'new'), '--out-dir', str(tmp_path / 'out')]
            + ['--false-alarms', '0.3']
        )
        == 0
    )
    assert 'Of 2 parts that were called bad by a correction' in (tmp_path / 'out' / 'report.html').read_text()
    with open(tmp_path / 'out' / 'verdicts.csv') as file: [row] = csv.DictReader(file)
    kept, groups = json.loads(old), json.loads(old).get('held_out_groups', [])
    asked = threshold_for(kept['held_out_scores'], 0.3, groups)         # of this inspection alone
    assert row['correction'] == '' and float(row['threshold']) == pytest.approx(asked, abs=1e-6)
    assert asked != kept['threshold'] and (folder / 'threshold.json').read_bytes() == old


def test_a_later_calibration_remembers(corrected_run, run, tmp_path):
    folder, photos, correct = corrected_run
    assert correct(p0='good') == 0
    assert (
        main(
            [
                'calibrate',
                '--run-dir',
                str(folder),
                '--images',
                str(run[1] / 'test' / 'good'),
                '--out-dir',
                str(tmp_path / 'report'),
            ]
        )
        == 0
    )
    new = json.loads((folder / 'threshold.json').read_text())
    score = float(methods.load(folder, 'cpu').predict(photos[:1]).scores[0])
    assert new['n_corrected'] == 1 and new['held_out_scores'][-1] == pytest.approx(score)
    assert len(new['held_out_scores']) == len(list((run[1] / 'test' / 'good').iterdir())) + 1


@pytest.mark.parametrize(
    'words, says',
    [(dict(p0='maybe'), "line 2: the correction is 'maybe'; it must be good or bad"), ({}, 'holds no corrections')],
)
def test_a_wrong_correction_changes_nothing(corrected_run, capsys, words, says):
    folder, _, correct = corrected_run
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert correct(**words) == 1 and says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
