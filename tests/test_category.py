"""The main job from the outside: the command line, on small budgets, good and bad input, demo and real data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from draem_nb.reports import run_report

CLASS = 'gravel'        # in `root`
TINY = dict(size=64, base_width=4, base_channels=4, steps=12, batch=4)
REAL = os.environ.get('DRAEM_NB_REAL_DATA')


def draem_nb(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.executable).parent / 'draem_nb', *args], cwd=cwd, capture_output=True, text=True)


def category(root: Path, run_dir: Path, overrides: dict = TINY, **options: str) -> subprocess.CompletedProcess:
    options = dict(category='gravel', data_root=root, run_dir=run_dir, overrides=json.dumps(overrides), **options)
    return draem_nb('category', *[a for k, v in options.items() for a in (f'--{k.replace("_", "-")}', str(v))],
                    cwd=root.parent)


@pytest.fixture(scope='module')
def run_dir(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('run')
    run_report('category', dict(category='gravel', data_root=str(root), overrides=TINY, seed=3), folder)
    return folder


def test_two_runs_with_one_seed_have_the_same_metrics_to_the_byte(root, run_dir, tmp_path):
    run_report('category', dict(category='gravel', data_root=str(root), overrides=TINY, seed=3), tmp_path / 'b')
    assert (run_dir / 'metrics.json').read_bytes() == (tmp_path / 'b' / 'metrics.json').read_bytes()
    run = json.loads((run_dir / 'run.json').read_text())
    assert run['recipe']['seed'] == 3 and run['recipe']['steps'] == 12
    files = {p.name for p in run_dir.iterdir()}
    assert {'run.json', 'checkpoint.pt', 'report.ipynb', 'report.html', 'figures', 'metrics.json', 'threshold.json',
            'losses.csv'} <= files


def test_good_parts_alone_are_enough(root, tmp_path):
    shutil.copytree(root / 'gravel' / 'train', tmp_path / 'data' / 'parts' / 'train')
    result = run_report('category', dict(category='parts', data_root=str(tmp_path / 'data'), overrides=TINY),
                        tmp_path / 'run')
    assert result.metrics['image']['auroc'] is None and 'no test images' in result.metrics['notes'][0]


def test_command_line_prints_the_table_and_the_path(root, tmp_path):
    done = category(root, tmp_path / 'run', kinds='["crack"]')
    assert done.returncode == 0, done.stderr
    assert 'auroc' in done.stdout and 'report.html' in done.stdout
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['together']['kinds'] == ['crack']


def test_papermill_runs_the_notebook_as_it_is(root, tmp_path):
    notebook = Path(__file__).resolve().parent.parent / 'nbs' / 'reports' / 'category.ipynb'
    subprocess.run([sys.executable, '-m', 'papermill', notebook, tmp_path / 'out.ipynb', '-p', 'category', 'gravel',
                    '-p', 'data_root', str(root),
                    '-p', 'overrides', json.dumps(TINY), '-p', 'run_dir', str(tmp_path / 'run'), '--no-progress-bar'],
                   check=True, capture_output=True)
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['conditions']['category'] == 'gravel'


@pytest.mark.parametrize('options, overrides, says', [
    (dict(category='screw'), {}, "unknown class 'screw'"),
    (dict(data_root='nowhere'), {}, 'nowhere'),
    (dict(recipe='fast'), {}, "unknown recipe 'fast'; there are: official, paper, demo"),
    (dict(), dict(learning_rate=1), 'unknown recipe field learning_rate; there are: name, size'),
    (dict(), dict(size=100), '96'),
    (dict(textures_root='no textures'), {}, 'no textures'),
    (dict(kinds='["craks"]'), {}, 'no test images of kind craks; there are: crack'),
    (dict(device='cuda:7'), {}, "device='cuda:7'"),
], ids=lambda v: '-'.join(v) if isinstance(v, dict) else '')
def test_bad_input_is_one_sentence_and_no_run(root, tmp_path, options, overrides, says):
    done = category(root, tmp_path / 'run', {**TINY, **overrides},
                    **options) if not {'category', 'data_root'} & options.keys() else draem_nb(
        'category', '--run-dir', str(tmp_path / 'run'), '--category', options.get('category', 'gravel'), '--data-root',
        str(options.get('data_root', root)), cwd=root.parent)
    assert done.returncode == 1, done.stdout
    sentence = done.stderr.strip().splitlines()
    assert any(says in line and line.startswith('draem_nb: ') for line in sentence), done.stderr
    assert 'Traceback' not in done.stderr and not (tmp_path / 'run' / 'metrics.json').exists()


def test_unknown_parameter_lists_those_that_there_are(root, tmp_path):
    with pytest.raises(ValueError, match="no parameter 'steps'; there are: category, data_root"):
        run_report('category', dict(category='gravel', steps=3), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_trained_detector_looks_at_new_images(root, run_dir, tmp_path):
    done = draem_nb('inspect', '--run-dir', str(run_dir), '--images', str(root / 'gravel' / 'test' / 'hole'),
                    '--out-dir', str(tmp_path / 'seen'), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / 'seen' / 'verdicts.csv').read_text().splitlines()
    assert (len(rows) == 1 + len(list((root / 'gravel' / 'test' / 'hole').iterdir()))
            and rows[0].startswith('file,score'))
    scores = [float(row.split(',')[1]) for row in rows[1:]]
    assert scores == sorted(scores, reverse=True) and not list((tmp_path / 'seen').rglob('*.tmp'))
    assert all(len(list((tmp_path / 'seen' / kind).iterdir())) == len(scores)
               for kind in ('heatmaps', 'overlays', 'masks'))


@pytest.mark.skipif(not REAL, reason='DRAEM_NB_REAL_DATA names no folder with real images')
def test_real_defects_and_real_textures(tmp_path):
    params = dict(category='magnetic_tile', data_root=REAL, textures_root=f'{REAL}/dtd_subset/images',
                  kinds=['blowhole', 'crack'], overrides=dict(TINY, steps=25))
    result = run_report('category', params, tmp_path / 'run')
    assert result.metrics['image']['n'] == 582 and set(result.metrics['kinds']) == {'blowhole', 'break', 'crack',
                                                                                    'fray', 'uneven'}
    assert result.metrics['together']['image']['n'] == 194 + 115 + 57
    assert all(0 <= v <= 1 for v in result.metrics['pixel'].values())
