"The daily life of a detector: a line that changes, a folder that is watched."
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from copy import copy
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from draem_nb import drift, layouts, losses, methods, recipes, simulator, training
from draem_nb.corrections import read_corrections
from draem_nb.data import demo_category, load_category
from draem_nb.detector import STATISTICS, AnomalyDetector
from draem_nb.cli import main
from draem_nb.textures import load_textures
from draem_nb.watch import COLUMNS, watch


class Brightness(AnomalyDetector):
    size, device = (32, 32), torch.device('cpu')

    def maps_and_scores(self, batch):
        maps = batch.float().mean(1, keepdim=True) / 255
        return None, maps, maps.mean((1, 2, 3))


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    "A run of an autoencoder of three steps on the built-in class."
    folder, root = tmp_path_factory.mktemp('run'), demo_category('brick')
    methods.fit('autoencoder', load_category(root.parent, 'brick', 64),
                methods.recipe_of('autoencoder', size=64, steps=3), 'cpu', run_dir=folder)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    "Twelve good photos."
    (folder := tmp_path / 'photos').mkdir()
    for path in sorted((demo_category('brick') / 'train' / 'good').glob('*.png'))[::16][:12]:
        shutil.copy(path, folder / path.name)
    return folder


def test_an_unchanged_line_is_called_changed_as_rarely_as_stated():
    rng = np.random.default_rng(0)
    found = [drift.changes(pd.DataFrame(rows[:25]), pd.DataFrame(rows[25:]), 0.1).changed.any()
             for rows in rng.normal(size=(400, 45, 5))]
    assert 0.03 < np.mean(found) < 0.14         # 0.1, less what the jumps of the statistic leave over


@pytest.mark.parametrize('name, change', [('brightness', lambda x: x * 0.6),
                                          ('red - green', lambda x: x * torch.tensor([1, 0.8, 1]).view(1, 3, 1, 1))])
def test_a_changed_line_is_named(name, change):
    images = torch.randint(100, 120, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    detector = Brightness().calibrate(images[:30])
    before, now = drift.held_out_table(detector), change(images[30:].float()).byte()
    found = drift.changes(before, drift.table_of(detector.predict(now).scores, detector.statistics(now)))
    assert found.changed[name] and not found.changed['sharpness'] and name in drift.in_words(found, 30, 30)


def test_statistics_are_kept_with_the_run_and_damaged_ones_are_named(run, tmp_path):
    detector = methods.load(run, 'cpu')
    assert detector.held_out_statistics.shape == (detector.n_held_out, len(STATISTICS))
    detector.save_calibration(tmp_path)
    for text in ('{}', '[1]', 'x', '{"brightness": [1]}',
                 (tmp_path / 'held_out.json').read_text().replace('[', '[NaN, ', 1)):
        (tmp_path / 'held_out.json').write_text(text)
        with pytest.raises(ValueError, match='held_out.json is damaged or not ours'):
            Brightness().load_calibration(tmp_path)
    detector.held_out_statistics = None
    detector.save_calibration(tmp_path)
    assert not (tmp_path / 'held_out.json').exists()        # those of another calibration do not stay


def test_an_inspection_says_whether_the_line_has_changed(run, photos, tmp_path, capsys):
    ask = lambda out: main(['inspect', '--run-dir', str(run), '--images', str(photos), '--out-dir',
                            str(tmp_path / out)])
    result = lambda out: json.loads((tmp_path / out / 'metrics.json').read_text())['changed']
    for path in photos.iterdir():
        light = np.array(Image.open(path).convert('RGB')) * [1., 1., 0.6]
        Image.fromarray(light.astype(np.uint8)).save(path)
    assert ask('yellow') == 0 and 'blue - yellow' in result('yellow')
    assert ('The line has changed: ' in capsys.readouterr().out
            and 'The line has changed: ' in (tmp_path / 'yellow' / 'report.html').read_text())
    shutil.copytree(run, old := tmp_path / 'old')
    (old / 'held_out.json').unlink()
    assert main(['inspect', '--run-dir', str(old), '--images', str(photos), '--out-dir',
                 str(tmp_path / 'without')]) == 0
    assert (result('without') is None and 'has not kept the brightness'
            in (tmp_path / 'without' / 'report.html').read_text())


def test_a_file_that_grows_is_judged_once_and_when_it_is_whole(tmp_path, monkeypatch):
    (folder := tmp_path / 'in').mkdir()
    Image.new('L', (40, 40), 200).save(tmp_path / 'whole.png')
    data = (tmp_path / 'whole.png').read_bytes()
    parts = iter([data[:10], data[:30], None, None, None, data])        # it pauses in the middle, for three looks
    monkeypatch.setattr('draem_nb.watch.time.sleep', lambda _: (folder / 'a.png').write_bytes(part)
                        if (part := next(parts, None)) else None)
    detector = Brightness().calibrate(torch.full((5, 3, 32, 32), 90, dtype=torch.uint8))
    [row] = watch(detector, folder, tmp_path / 'out', 0, looks=20)
    assert (row['verdict'], row['bytes'], row['score']) == ('anomalous', len(data), pytest.approx(200 / 255, abs=1e-4))
    with open(tmp_path / 'out' / 'verdicts.csv') as file: [kept] = csv.DictReader(file)
    assert kept['correction'] == ''                                     # a column for a person
    corrected = ','.join((kept | dict(correction='good')).values())
    (copy := tmp_path / 'copy.csv').write_text(','.join(kept) + '\n' + corrected)
    assert read_corrections(copy) == {folder / 'a.png': 'good'}


def test_a_second_watch_and_a_folder_in_itself_are_refused(tmp_path):
    (folder := tmp_path / 'in').mkdir()
    detector = Brightness().calibrate(torch.full((5, 3, 32, 32), 90, dtype=torch.uint8))
    Image.new('L', (40, 40), 200).save(folder / 'a.png')
    next(first := watch(detector, folder, tmp_path / 'out', 0))
    with pytest.raises(ValueError, match='is in use by another command'):
        next(watch(detector, folder, tmp_path / 'out', 0))
    first.close()
    with pytest.raises(ValueError, match='lies in the watched folder'): next(watch(detector, folder, folder / 'out', 0))


def test_a_killed_watch_goes_on_and_judges_nothing_twice(run, photos, tmp_path):
    names, waiting = sorted(path.name for path in photos.iterdir()), tmp_path / 'waiting'
    waiting.mkdir()
    for name in names[6:]: shutil.move(photos / name, waiting / name)
    (photos / '가 "b".png').write_bytes((photos / names[0]).read_bytes())
    command = [sys.executable, '-m', 'draem_nb', 'watch', '--run-dir', str(run), '--images', str(photos), '--out-dir',
               str(tmp_path / 'out'), '--every', '0.1', '--device', 'cpu', '--post', 'http://127.0.0.1:9/']
    start = lambda: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                     env=dict(os.environ, OMP_NUM_THREADS='1'))
    first = start()
    told = [json.loads(first.stdout.readline()) for _ in range(4)]
    first.send_signal(signal.SIGKILL); first.communicate()
    with open(tmp_path / 'out' / 'verdicts.csv', 'a') as file: file.write('/half')
    for name in names[6:]: shutil.move(waiting / name, photos / name)
    second, until = start(), time.monotonic() + 120
    while len((tmp_path / 'out' / 'verdicts.csv').read_text().splitlines()) < 14 and time.monotonic() < until:
        time.sleep(0.3)
    time.sleep(1)                           # the last row is told after it is in the table
    second.send_signal(signal.SIGTERM)
    out, err = second.communicate(timeout=60)
    told_again = [json.loads(line) for line in out.splitlines()]
    rows = list(csv.DictReader((tmp_path / 'out' / 'verdicts.csv').read_text(encoding='utf-8').splitlines()))
    assert sorted(Path(row['file']).name for row in rows) == sorted([*names, '가 "b".png'])
    assert not {row['file'] for row in told} & {row['file'] for row in told_again} and second.returncode == 0
    assert f'did not take {len(told_again)} of them' in err and err.count('the watch goes on') == 1
    page = (tmp_path / 'out' / 'report.html').read_text()           # of the day, not of the second watch alone
    assert '13 files judged today' in page and page.count('<figure') == 13 and '가 &quot;b&quot;.png' in page
    assert (f'{len(told_again)} photos judged' in err and 'latency' in err
            and all(float(row['seconds']) > 0 for row in rows))
    assert all((tmp_path / 'out' / 'overlays' / f'{name}.png').exists() for name in names)


def test_watch_needs_a_run_with_a_threshold_and_a_known_option(run, tmp_path, capsys):
    shutil.copytree(run, bare := tmp_path / 'bare')
    (bare / 'threshold.json').unlink()
    assert main(['watch', '--run-dir', str(bare), '--images', str(tmp_path)]) == 1
    assert 'has no threshold' in capsys.readouterr().err
    assert main(['watch', '--run-dir', str(run), '--images', str(tmp_path), '--threshold', 'nan']) == 1
    assert main(['watch', '--run-dir', str(run), '--images', str(tmp_path), '--post', 'http://example.org/']) == 1
    assert 'is no address of this machine' in capsys.readouterr().err
    with pytest.raises(SystemExit): main(['watch', '--run', str(run), '--images', str(tmp_path)])


def test_the_report_of_a_watch_stays_small_and_begins_at_midnight(tmp_path):
    (folder := tmp_path / 'in').mkdir()
    detector = Brightness().calibrate(torch.full((5, 3, 32, 32), 90, dtype=torch.uint8))
    now = time.time_ns()
    (tmp_path / 'out').mkdir()
    with open(tmp_path / 'out' / 'verdicts.csv', 'w') as file:
        file.write(','.join(COLUMNS) + '\n')
        for i in range(3000):
            ago = 0 if i >= 1000 else 30 * 3600 * 10**9                 # the first thousand are of another day
            file.write(f'{folder}/{i}.png,5,{now - ago + i},0.2,0.3,-0.1,normal,,0,,,,,0.0\n')
    Image.new('L', (9, 9), 200).save(folder / 'new.png')
    assert len(list(watch(detector, folder, tmp_path / 'out', 0.01, looks=3))) == 1
    page = (tmp_path / 'out' / 'report.html').read_text()
    assert '2001 files judged today, 1 alarms, 0 unreadable' in page and page.count('<figure') == 30
    assert len(page) < 200_000 and 'http-equiv="Content-Security-Policy"' in page


def test_a_report_of_ones_own_has_a_command(tmp_path, capsys):
    cells = [nbformat.v4.new_markdown_cell('# Mine\n\n> Counts what I count.'),
             nbformat.v4.new_code_cell('what = 3    # how often it is counted\nrun_dir = None\ncomplete = True',
                                       metadata=dict(tags=['parameters']))]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook := tmp_path / 'mine.ipynb')
    with pytest.raises(SystemExit, match='^0$'): main([str(notebook), '--help'])
    assert 'how often it is counted' in (said := capsys.readouterr().out) and 'Counts what I count.' in said
    assert main([str(notebook), '--what', '4']) == 1
    assert 'name one with --run-dir' in capsys.readouterr().err


def test_a_loss_a_simulator_and_a_layout_of_ones_own(tmp_path, monkeypatch, capsys):
    "The example of CONTRIBUTING, on the command line."
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / 'CONTRIBUTING.md').read_text()
    [example] = re.findall(r'```python\n(# mine.py\n.*?)```', text, re.DOTALL)
    for module, names in ((training, ('draem_loss', 'AnomalySimulator')), (layouts, ('LAYOUTS',))):
        for name in names: monkeypatch.setattr(module, name, copy(getattr(module, name)))       # put back at the end
    (tmp_path / 'mine.py').write_text(example)
    (folder := tmp_path / 'photos' / 'screw' / 'a').mkdir(parents=True)
    for path in sorted((demo_category('brick') / 'train' / 'good').glob('*.png'))[:12]: shutil.copy(path, folder)
    tiny = dict(size=32, base_width=4, base_channels=4, steps=2, batch=2, perlin_scales=[0, 2], precision='float32')
    ask = lambda *more: main(['category', '--data-root', 'photos', '--category', 'screw', '--overrides',
                              json.dumps(tiny), '--run-dir', 'run', '--device', 'cpu', *more])
    assert ask('--own', 'none.py') == 1 and 'own is none.py, which does not exist' in capsys.readouterr().err
    assert ask('--own', 'mine.py') == 0 and 'fit' not in capsys.readouterr().err
    weights = lambda run: torch.cat([v.flatten() for v in torch.load(Path(run) / 'checkpoint.pt')['net'].values()
                                     if v.is_floating_point()])
    data, recipe = load_category('photos', 'screw', 32), recipes.demo().replace(**tiny)
    training.train(data, load_textures(size=32), recipe, 'here', 'cpu')     # with what the file has put in place
    assert torch.allclose(weights('run'), weights('here')) and training.draem_loss.__name__ == 'with_l1'
    training.draem_loss = losses.draem_loss
    training.train(data, load_textures(size=32), recipe, 'another loss', 'cpu')
    training.AnomalySimulator = simulator.AnomalySimulator
    training.train(data, load_textures(size=32), recipe, 'plain', 'cpu')
    assert not torch.allclose(weights('here'), weights('another loss'))
    assert not torch.allclose(weights('another loss'), weights('plain'))
    assert json.loads(Path('run/metrics.json').read_text())['image']['n'] == 5
    (tmp_path / 'mine.py').write_text(example + '# another')
    assert ask('--own', 'mine.py') == 1 and 'the file of your own is another' in capsys.readouterr().err
    (tmp_path / 'mine.py').write_text('1 / 0')
    assert ask('--own', 'mine.py') == 1 and 'mine.py failed: ZeroDivisionError' in capsys.readouterr().err
