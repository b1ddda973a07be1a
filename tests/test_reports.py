"""Reports seen from outside: kernels that die, runs that fail or are stopped, folders that hold something else, pages
that load nothing."""

import ast
import asyncio
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import zmq.backend
from nbclient.exceptions import CellExecutionError, DeadKernelError

from draem_nb import execution, reports
from draem_nb.cli import main
from draem_nb.parameters import report_names, report_notebook, report_parameters
from draem_nb.execution import RunFailed, run_report
from draem_nb.reports import run_many

COMMAND = Path(sys.executable).parent / 'draem_nb'
END = "reports.finish(run_dir, {'image': {'auroc': 0.5 + seed / 10, 'ap': None}}, complete)"


@pytest.fixture
def notebook(tmp_path) -> Callable[..., Path]:
    "Writes a report notebook of the given cells."
    def write(*cells: str, end: str = END, name: str = 'tiny') -> Path:
        code = nbformat.v4.new_code_cell
        start = [code('import os, signal, sys, time\nfrom pathlib import Path\nfrom tqdm import tqdm\nfrom draem_nb '
                      'import reports'),
                 code("category = 'brick'\nrecipe = 'demo'\nseed = 0\nrun_dir = None\ncomplete = True",
                      metadata=dict(tags=['parameters']))]
        nb = nbformat.v4.new_notebook(cells=[*start, nbformat.v4.new_markdown_cell('# Tiny'),
                                             *map(code, cells), code(end)],
                                      metadata=dict(kernelspec=dict(name='python3', display_name='python3',
                                                                    language='python')))
        path = tmp_path / f'{name}.ipynb'
        nbformat.write(nb, path)
        return path
    return write


def outputs(path: Path) -> list[dict]:
    return [output for cell in nbformat.read(path, 4).cells for output in cell.get('outputs', [])]


def test_a_complete_run_has_everything_and_is_not_repeated(notebook, tmp_path):
    tiny = notebook("Path(run_dir, 'executions').open('a').write('x')")
    first = run_report(tiny, dict(seed=1), tmp_path / 'run')
    again = run_report(tiny, dict(seed=1, recipe='demo'), tmp_path / 'run')
    assert first == again and (tmp_path / 'run' / 'executions').read_text() == 'x'
    assert (first.metrics == {'image': {'auroc': 0.6, 'ap': None}}
            == json.loads((tmp_path / 'run' / 'metrics.json').read_text()))
    assert {p.name for p in (tmp_path / 'run').iterdir()} == {'executions', 'metrics.json', 'parameters.json',
                                                              'report.html', 'report.ipynb', 'timing.json'}
    assert first.report.exists() and first.seconds >= 0
    with pytest.raises(ValueError, match='holds a complete run with seed=1 where this one has seed=2; choose '
                       'another folder'):
        run_report(tiny, dict(seed=2), tmp_path / 'run')


def test_bad_names_and_folders_leave_nothing_behind(notebook, tmp_path):
    tiny = notebook()
    with pytest.raises(ValueError, match="has no parameter 'sede'; there are: category, recipe, seed$"):
        run_report(tiny, dict(sede=1), tmp_path / 'run')
    with pytest.raises(ValueError, match="unknown report 'no such'; there are: ablation, calibrate, category, compare, "
                       "export, inspect, learning_curve, official, summary"):
        run_report('no such', {}, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='cannot write to run folder .*file'):
        run_report(tiny, {}, tmp_path / 'file' / 'run')


def test_a_failing_run_keeps_its_notebook_and_never_looks_complete(notebook, tmp_path):
    with pytest.raises(RunFailed, match='no part in the picture') as caught:
        run_report(notebook("raise ValueError('no part in the picture')"), {}, tmp_path / 'run')
    assert (caught.value.reason == 'no part in the picture' and caught.value.notebook == tmp_path / 'run'
            / 'report.failed.ipynb')
    assert 'ValueError' in str(caught.value) and str(caught.value.notebook) in str(caught.value)
    assert {p.name for p in (tmp_path / 'run').iterdir()} == {'parameters.json', 'report.failed.ipynb'}
    assert any(o['output_type'] == 'error' for o in outputs(caught.value.notebook))
    # The cause is gone: the same folder, now complete, and nothing is left of the failure.
    run_report(notebook(), dict(seed=1), tmp_path / 'run')
    assert {p.name for p in (tmp_path / 'run').iterdir()} == {'metrics.json', 'parameters.json', 'report.html',
                                                              'report.ipynb', 'timing.json'}


@pytest.mark.parametrize('work, says', [('import sys; sys.exit(0)', 'ended without results'),
                                        ('os.kill(os.getpid(), signal.SIGKILL)', 'the kernel died before'),
                                        ("reports.finish(run_dir, {'auroc': float('nan')}, complete)",
                                         'plain JSON without nan'),
                                        ("reports.finish(run_dir, {}, complete); raise KeyError('late')",
                                         "KeyError: 'late'")])
def test_what_ends_early_is_a_failure(notebook, tmp_path, work, says):
    with pytest.raises(RunFailed, match=re.escape(says)): run_report(notebook(work), {}, tmp_path / 'run')
    assert not {'metrics.json', 'report.html', 'report.ipynb'} & {p.name for p in (tmp_path / 'run').iterdir()}
    assert 'failed' in nbformat.read(tmp_path / 'run' / 'report.failed.ipynb', 4).cells[0].source


def started(notebook: Path, run_dir: Path, **streams) -> tuple[subprocess.Popen, int]:
    "A report that sleeps, in a process of its own, and the id of its kernel."
    code = ('import sys; from draem_nb import cli, execution, parameters; '
            'parameters.report_notebook = execution.report_notebook = lambda '
            f'name: cli.Path({str(notebook)!r}); sys.exit(cli.main(["category", "--run-dir", '
            f'{str(run_dir)!r}]))')
    # A shell's background job ignores Ctrl-C and hands that on; the report is started as at a
    # terminal, wherever the tests run.
    process = subprocess.Popen([sys.executable, '-c', code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 300
    while not (run_dir / 'pid').exists() and time.monotonic() < deadline and process.poll() is None: time.sleep(0.1)
    return process, int((run_dir / 'pid').read_text())


SLEEP = ("Path(run_dir, 'pid.tmp').write_text(str(os.getpid())); os.replace(Path(run_dir, 'pid.tmp'), "
         "Path(run_dir, 'pid'))\n"
         "try: time.sleep(600)\nexcept KeyboardInterrupt: Path(run_dir, 'checkpoint').write_text('saved'); raise")


def gone(pid: int, seconds: float = 60.) -> bool:
    "Whether the process ends within so many seconds."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try: state = Path(f'/proc/{pid}/stat').read_text().rsplit(')')[-1].split()[0]
        except FileNotFoundError: return True
        if state == 'Z': return True
        time.sleep(0.1)
    return False


def test_a_kernel_killed_from_outside_is_one_sentence(notebook, tmp_path):
    process, kernel = started(notebook(SLEEP), tmp_path / 'run')
    os.kill(kernel, signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and 'Traceback' not in err
    assert (err.splitlines()[-2].startswith('draem_nb: the kernel died before the report was finished')
            and 'report.failed.ipynb' in err.splitlines()[-1])
    assert not (tmp_path / 'run' / 'metrics.json').exists() and (tmp_path / 'run' / 'report.failed.ipynb').exists()


def test_ctrl_c_lets_the_notebook_save_and_says_how_to_go_on(notebook, tmp_path):
    process, kernel = started(notebook(SLEEP), tmp_path / 'run')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and 'the same command goes on' in err and 'Traceback' not in err
    assert (tmp_path / 'run' / 'checkpoint').read_text() == 'saved' and gone(kernel)
    assert not (tmp_path / 'run' / 'metrics.json').exists()


def test_ctrl_c_shows_no_traceback_of_the_kernel(notebook, tmp_path):
    # IPython prints one to the error stream where it cannot format an exception.
    unformatted = ("class Stopped(KeyboardInterrupt):\n"
                   "    def _render_traceback_(self): raise RuntimeError('unformatted')\n"
                   + SLEEP.replace('; raise', '; raise Stopped'))
    process, kernel = started(notebook(unformatted), tmp_path / 'run')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err.splitlines()[-1].startswith('draem_nb: stopped')
    assert 'Traceback' not in err and 'Unexpected exception' not in out
    assert (tmp_path / 'run' / 'checkpoint').read_text() == 'saved'


def test_ctrl_c_in_the_kernel_alone_is_a_stop_as_well(notebook, tmp_path):
    with pytest.raises(KeyboardInterrupt, match='stopped at step 3'):
        run_report(notebook("raise KeyboardInterrupt('stopped at step 3')"), {}, tmp_path / 'run')
    assert (tmp_path / 'run' / 'report.failed.ipynb').exists() and not (tmp_path / 'run' / 'metrics.json').exists()


def test_a_kernel_that_ends_unawaited_prints_no_traceback(caplog):
    # What Ctrl-C can leave behind: nbclient's task, ended by the kernel's death or by the error of the interrupted
    # cell, its exception never asked for.
    async def die(): raise DeadKernelError('Kernel died')
    async def end(): raise CellExecutionError('Cell In[3]', 'KeyboardInterrupt', '')
    async def other(): raise ValueError('another')
    async def main():
        for task in (die, end, other): asyncio.ensure_future(task())
        await asyncio.sleep(0)
    asyncio.run(main())
    gc.collect()
    assert 'another' in caplog.text and 'Kernel died' not in caplog.text and 'Cell In' not in caplog.text


def test_no_kernel_outlives_its_report(notebook, tmp_path):
    process, kernel = started(notebook(SLEEP), tmp_path / 'run')
    process.kill()
    process.communicate()
    assert gone(kernel)


def test_the_kernel_is_this_python_whatever_jupyter_finds(notebook, tmp_path, monkeypatch):
    spec = tmp_path / 'jupyter' / 'kernels' / 'python3'
    spec.mkdir(parents=True)
    (spec / 'kernel.json').write_text(json.dumps(dict(argv=['/bin/false', '{connection_file}'], display_name='wrong',
                                                      language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
    result = run_report(notebook(end='reports.finish(run_dir, {"python": sys.executable}, complete)'), {},
                        tmp_path / 'run')
    assert result.metrics['python'] == sys.executable


def test_a_long_temporary_folder_is_no_place_for_sockets(notebook, tmp_path, monkeypatch):
    (long := tmp_path / ('l' * 120)).mkdir()            # the path of a Unix socket has at most 107 bytes
    monkeypatch.setattr(tempfile, 'tempdir', str(long))
    assert run_report(notebook(), dict(seed=1), tmp_path / 'run').metrics['image']['auroc'] == 0.6
    monkeypatch.setattr(os, 'access', lambda *of: False)
    with pytest.raises(RunFailed, match=f'the temporary folder {long} is too long for the sockets of a kernel; set '):
        run_report(notebook(), {}, tmp_path / 'other')


@pytest.mark.parametrize('command, says', [(['sleep', '600'], 'the kernel did not start within 1 s; run fewer at a'),
                                           (['false'], 'the kernel died at its start; `.*python.* may show why')])
def test_a_kernel_that_does_not_start_is_one_sentence(notebook, tmp_path, monkeypatch, command, says):
    monkeypatch.setattr(execution._Kernel, 'format_kernel_cmd', lambda self, extra_arguments=None: command)
    monkeypatch.setattr(execution, '_START', 1)
    with pytest.raises(RunFailed, match=f'^{says}'): run_report(notebook(), {}, tmp_path / 'run')


def test_the_end_of_a_kernel_waits_for_nothing():
    manager = execution._Kernel()
    client = manager.client()
    client.start_channels(stdin=False)
    # The context of a client that waits for all of its sockets would wait for this one, which nobody closes.
    stray = zmq.backend.Socket(client.context, zmq.PUSH)
    assert not client.hb_channel.is_alive()             # nor is there a thread whose end could be missed
    end = threading.Thread(target=client.stop_channels, daemon=True)
    end.start()
    end.join(10)
    assert not end.is_alive()
    stray.close()
    asyncio.run(manager.cleanup_resources())


def test_progress_is_shown_and_only_its_end_is_kept(notebook, tmp_path, capsys):
    run_report(notebook('for i in tqdm(range(200), mininterval=0): print(end="", flush=True); time.sleep(0.002)',
                        'print("to be seen")'), {}, tmp_path / 'run')
    seen = capsys.readouterr()
    assert 'to be seen' in seen.out and '200/200' in seen.err
    bar, = [o for o in outputs(tmp_path / 'run' / 'report.ipynb') if o.get('name') == 'stderr']
    assert '200/200' in bar['text'] and len(bar['text']) < 200


class Loads(HTMLParser):
    "Collects every address that a browser would load by itself."
    def __init__(self) -> None: super().__init__(); self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found += [value or '' for name, value in attributes if name in ('src', 'srcset', 'data', 'poster')
                       or (name == 'href' and tag != 'a')]


def test_the_page_loads_nothing_and_has_its_pictures(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'agg')          # as servers do; a report has pictures all the same
    picture = ('import matplotlib.pyplot as plt, pandas as pd\nplt.plot([1, 2])\nplt.show()\nprint("<script '
               'src=https://example.org/x.js></script>")\npd.DataFrame({"a": [1]})')
    page = run_report(notebook(picture), {}, tmp_path / 'run').report.read_text()
    loads = Loads()
    loads.feed(page)
    assert any(address.startswith('data:image/png') for address in loads.found)
    assert all(address.startswith('data:')
               for address in loads.found), [a[:80] for a in loads.found if not a.startswith('data:')]
    assert not re.search(r'url\(\s*["\']?(https?:)?//|@import|import\(|MathJax', page)
    assert '<summary>code</summary>' in page and '>plot<' in page          # the code is there, folded


def test_many_runs_go_on_after_a_failure_and_run_only_what_is_missing(notebook, tmp_path):
    tiny = notebook("Path(run_dir, 'executions').open('a').write('x')\nassert category != 'grass' or "
                    "Path(run_dir).parent.joinpath('dry').exists(), 'the grass is wet'")
    sets = [dict(category='brick'), dict(category='grass'), dict(category='brick', seed=1)]
    table = run_many(sets, tmp_path / 'runs', tiny)
    assert (list(table.status) == ['complete', 'failed', 'complete'] and table.error[1] == 'AssertionError: '
            'the grass is wet')
    (tmp_path / 'runs' / 'dry').mkdir()
    again = run_many(sets, tmp_path / 'runs', tiny)
    assert list(again.status) == ['complete'] * 3 and list(again.image_auroc) == [0.5, 0.5, 0.6]
    assert (tmp_path / 'runs' / 'brick-demo-seed0' / 'executions').read_text() == 'x'


def test_papermill_alone_makes_a_complete_run(notebook, tmp_path):
    papermill.execute_notebook(notebook(), tmp_path / 'out.ipynb', dict(run_dir=str(tmp_path / 'run'), seed=2),
                               progress_bar=False)
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['image']['auroc'] == 0.7
    assert not (tmp_path / 'run' / 'results.json').exists()


@pytest.mark.parametrize('name', report_names())
def test_every_parameter_of_a_report_is_seen_and_explained(name):
    cell, = [c for c in nbformat.read(report_notebook(name), 4).cells if 'parameters' in c.metadata.get('tags', [])]
    written = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body
               if isinstance(node, ast.Assign)}
    own = 'out_dir' if 'out_dir' in written else 'run_dir'
    assert {own, 'complete'} < written.keys() and written['complete'] is True
    assert {key: default for key, (default, _) in report_parameters(name).items()} == {k: v for k, v in written.items()
                                                                                       if k not in (own, 'complete')}
    assert all(text for _, text in report_parameters(name).values())


def test_a_question_to_the_command_line_imports_nothing_heavy():
    code = ('import sys; from draem_nb.cli import main; code = 0\ntry: main(sys.argv[1:])\nexcept SystemExit as e: '
            'code = e.code\n'
            'print(sorted({"torch", "pandas", "papermill", "matplotlib", "numpy"} & set(sys.modules)), '
            'file=sys.stderr); sys.exit(code)')
    for arguments, status in ((['--help'], 0), (['--version'], 0), (['inspect', '--help'], 0), (['inspct'], 2)):
        done = subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True)
        assert done.returncode == status and done.stderr.rstrip().endswith('[]'), done.stderr


def test_command_line_help_and_bad_options(capsys):
    for arguments, says in ((['--help'], 'inspect'), (['category', '--help'], '--textures-root')):
        with pytest.raises(SystemExit) as caught: main(arguments)
        assert caught.value.code == 0 and says in capsys.readouterr().out
    for arguments, says in ((['category', '--seed', 'one'], 'seed must be a value like 0'),
                            (['category', '--overrides', '{steps: 1}'], 'overrides must be'),
                            (['category', '--sede', '1'], 'unrecognized arguments: --sede'),
                            (['category', '--sede', '1'], 'did you mean --seed?'),
                            (['categry'], 'did you mean category?')):
        with pytest.raises(SystemExit) as caught: main(arguments)
        assert caught.value.code == 2 and says in capsys.readouterr().err
    assert main(['inspect']) == 1 and 'inspect needs run_dir' in capsys.readouterr().err


def made_up_run(folder: Path, category: str, seed: int, auroc: float) -> None:
    conditions = dict(category=category, recipe='made up', size=[64, 64], base_width=8, base_channels=4, steps=20,
                      batch=4, seed=seed, mask_rule='half')
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text('{"device": "cpu"}')
    (folder / 'metrics.json').write_text(json.dumps(dict(image=dict(auroc=auroc, f1_max=.9),
                                                         pixel=dict(auroc=.9, ap=.5, f1_max=None, aupro=.7),
                                                         conditions=conditions)))


def test_summary_writes_every_table_in_three_forms(tmp_path):
    for category, seed, auroc in (('metal_nut', 0, .9), ('metal_nut', 1, 1.), ('brick', 0, .8)):
        made_up_run(tmp_path / f'{category}-{seed}', category, seed, auroc)
    for _ in range(2): result = run_report('summary', dict(runs_dir=str(tmp_path)), tmp_path / 'summary')   # made anew
    assert result.metrics['runs'] == 3 and result.metrics['classes'] == ['brick', 'metal_nut']
    for name in ('detection', 'pixel_auroc', 'pixel_ap', 'image_f1_max', 'pixel_f1_max', 'aupro'):
        assert {p.suffix for p in (tmp_path / 'summary').glob(f'{name}.*')} == {'.csv', '.html', '.tex'}
    tex, page = ((tmp_path / 'summary' / f'detection.{end}').read_text() for end in ('tex', 'html'))
    assert r'metal\_nut & 67' not in tex and re.search(r'metal\\_nut & .*95\.0 \$\\pm\$ 7\.1',
                                                       tex) and r'\textbf{' in tex and '**' not in tex
    assert '95.0 ± 7.1' in page and '**' not in page
    assert ('no average, because there is no run of bottle' in result.report.read_text()
            and not list(tmp_path.rglob('*.tmp')))


@pytest.fixture(scope='module')
def parts(tmp_path_factory) -> Path:
    "A small class in MVTec's layout, called as one of MVTec's."
    from draem_nb.data import demo_category
    root = tmp_path_factory.mktemp('parts')
    shutil.copytree(demo_category('brick'), root / 'screw')
    for path in (root / 'screw' / 'test').rglob('*.png'):
        if int(path.stem) > 1: path.unlink()
    return root


def test_official_reads_pairs_in_the_released_form(parts, tmp_path):
    import torch

    from draem_nb.data import load_category
    from draem_nb.detector import Detector
    from draem_nb.evaluation import evaluate
    from draem_nb.networks import Draem
    torch.manual_seed(0)
    net = Draem(4, 4)
    ask = dict(checkpoints=str(tmp_path), data_root=str(parts))
    with pytest.raises(RunFailed, match=r'no class in .* \(screw\) has a file'):
        run_report('official', ask, tmp_path / 'run')
    torch.save(net.reconstructive.state_dict(), tmp_path / 'r_screw_.pckl')
    with pytest.raises(RunFailed, match='but has 1 and 0'): run_report('official', ask, tmp_path / 'run')
    torch.save(net.discriminative.state_dict(), tmp_path / 'r_screw__seg.pckl')
    found = run_report('official', ask, tmp_path / 'run').metrics
    detector = Detector.from_official(tmp_path / 'r_screw_.pckl', tmp_path / 'r_screw__seg.pckl', 'cpu')
    by_hand = evaluate(detector, load_category(parts, 'screw', 256, antialias=False), mask_rule='official')
    assert (found['classes'] == {'screw': json.loads(json.dumps(by_hand))}
            and by_hand['conditions']['mask_rule'] == 'official')
    assert found['mean_image_AUROC'] is None                       # one class is no average over fifteen


def test_compare_needs_two_runs_of_one_class(parts, tmp_path):
    from draem_nb.data import load_category
    from draem_nb.recipes import demo
    from draem_nb.textures import load_textures
    from draem_nb.training import train
    tiny = demo().replace(size=32, base_width=4, base_channels=4, steps=2, perlin_scales=(0, 2), precision='float32')
    for seed in (0, 1):
        train(load_category(parts, 'screw', 32), load_textures(size=32), tiny.replace(seed=seed), tmp_path / f's{seed}',
              'cpu')
    first, second = str(tmp_path / 's0'), str(tmp_path / 's1')
    result = run_report('compare', dict(first=first, second=second, data_root=str(parts)), tmp_path / 'compare')
    assert result.metrics['recipe_fields_that_differ'] == ['seed'] and result.metrics['same_training_images'] is True
    images = pd.read_csv(tmp_path / 'compare' / 'images.csv')
    assert (len(images) == len(load_category(parts, 'screw', 32).test) and result.metrics['verdicts_differ'] is None
            and not images['verdicts differ'].any())
    row = result.metrics['metrics']['pixel AP']
    assert row['difference'] == pytest.approx(row['second'] - row['first']) and row['low'] <= row['high']
    with pytest.raises(RunFailed, match='both are runs of screw, which is no built-in class; give data_root'):
        run_report('compare', dict(first=first, second=second), tmp_path / 'c1')
    # the same images at another size
    train(load_category(parts, 'screw', 64), load_textures(size=64), tiny.replace(size=64), tmp_path / 'large', 'cpu')
    large, files = str(tmp_path / 'large'), {'train/good/0.png': [1, 2, 'a' * 64], 'textures 1.png': [1, 2, 'b' * 64]}
    compared = lambda name: run_report('compare', dict(first=first, second=large, data_root=str(parts)),
                                       tmp_path / name).metrics['same_training_images']
    assert compared('unknown') is None
    for folder in (first, large): (Path(folder) / 'inputs.json').write_text(json.dumps(files))
    assert compared('same') is True
    (Path(large) / 'inputs.json').write_text(json.dumps(files | {'train/good/0.png': [1, 2, 'c' * 64]}))
    assert compared('different') is False
    with pytest.raises(FileNotFoundError, match='holds no checkpoint.pt; give the folder of a trained run'):
        run_report('compare', dict(first=first, second=str(tmp_path / 'none'), data_root=str(parts)), tmp_path / 'c2')
    with pytest.raises(ValueError, match=r'compare needs first \(folder of a finished run\) and second'):
        reports.default_folder('compare', {})


def test_every_row_of_an_ablation_is_asked_for(monkeypatch, tmp_path):
    "Every row of the paper's table that a recipe can express, and one of fewer textures."
    from draem_nb.methods import recipe_of
    from draem_nb.recipes import ablations
    asked: list[dict] = []
    def noted(sets: list[dict], folder: Path) -> pd.DataFrame:
        asked.extend(sets)
        return pd.DataFrame(dict(status=['failed'] * len(sets), error='noted'))
    monkeypatch.setattr(reports, 'run_many', noted)
    cells = [cell.source for cell in nbformat.read(report_notebook('ablation'), 4).cells if cell.cell_type == 'code']
    names = dict(__name__='ablation')
    exec(cells[0], names)
    names |= dict(n_textures=[2], overrides=dict(size=32), run_dir=str(tmp_path))
    exec(cells[1], names)
    with pytest.raises(ValueError, match='DRAEM: noted'): exec(cells[2], names)
    assert list(names['fields']) == [*ablations(), '2 source textures'] and len(ablations()) == 9
    recipes = [recipe_of('draem', 'demo', **row['overrides']) for row in asked]
    for recipe, fields in zip(recipes, [*ablations().values(), dict(n_textures=2)], strict=True):
        assert recipe.size == 32 and all(getattr(recipe, field) == value for field, value in fields.items())
    assert len(set(recipes)) == len({reports.default_folder('category', row) for row in asked}) == 10


def test_ablation_rows_are_runs_of_their_own(parts, tmp_path):
    from draem_nb.recipes import ablations
    ask = dict(category='screw', data_root=str(parts), rows=['Recon.-AE (MSGMS map)', 'DRAEM'], n_textures=[2],
               overrides=dict(size=32, base_width=4, base_channels=4, steps=2, batch=2, perlin_scales=[0, 2],
                              precision='float32'))
    result = run_report('ablation', ask, tmp_path / 'ablation')
    assert list(result.metrics['rows']) == ['Recon.-AE (MSGMS map)', 'DRAEM', '2 source textures']
    assert list(result.metrics['differences']) == ['Recon.-AE (MSGMS map)', '2 source textures']
    assert (tmp_path / 'ablation' / 'figures' / 'ablation.png').exists()
    for name, of in result.metrics['differences'].items():        # paired with the full method, in percentage points
        apart = result.metrics['rows'][name]['pixel']['ap'] - result.metrics['rows']['DRAEM']['pixel']['ap']
        assert (of['pixel AP']['difference'] == pytest.approx(100 * apart)
                and of['pixel AP']['low'] <= of['pixel AP']['high'])
    ran = [json.loads(p.read_text())['recipe'] for p in (tmp_path / 'ablation').glob('*/run.json')]
    fields = ablations()['Recon.-AE (MSGMS map)'].items()           # each row is a run with its fields
    assert sum(all(r[field] == value for field, value in fields) for r in ran) == 1
    assert len(ran) == 3 and sorted(r['n_textures'] or 0 for r in ran) == [0, 0, 2]
    tiles = dict(ask, rows=['opacity only', 'DRAEM'], n_textures=[], overrides=dict(ask['overrides'], image_size=64))
    # of large images too, both tables are of the same maps
    result = run_report('ablation', tiles, tmp_path / 'tiles')
    apart = [result.metrics['rows'][name]['pixel']['ap'] for name in ('opacity only', 'DRAEM')]
    assert (result.metrics['differences']['opacity only']['pixel AP']['difference']
            == pytest.approx(100 * (apart[0] - apart[1])))
    with pytest.raises(RunFailed, match='unknown rows Disc; there are: Disc. only'):
        run_report('ablation', dict(ask, rows=['Disc']), tmp_path / 'other')


def test_a_learning_curve_is_of_one_run(parts, tmp_path):
    from draem_nb.data import load_category
    from draem_nb.recipes import demo
    from draem_nb.textures import load_textures
    from draem_nb.training import load_checkpoint, train
    fields = dict(size=32, base_width=4, base_channels=4, steps=6, batch=2, perlin_scales=[0, 2], precision='float32',
                  score_window=5)
    ask = dict(category='screw', data_root=str(parts), overrides=fields, seeds=[0, 1], at_steps=[2, 3])
    folder, whole = tmp_path / 'curve' / 'seed1', train(load_category(parts, 'screw', 32), load_textures(size=32),
                                                        demo().replace(**fields, seed=1), tmp_path / 'whole', 'cpu')
    found = run_report('learning_curve', ask, tmp_path / 'curve').metrics
    assert found['steps'] == [2, 3, 6] and [(p['seed'], p['step'])
                                            for p in found['curve']] == [(s, t) for s in (0, 1) for t in (2, 3, 6)]
    last, kept = (load_checkpoint(path)['net'] for path in (whole, folder / 'checkpoint-6.pt'))
    assert all((last[name] == kept[name]).all() for name in last)
    point = found['curve'][-1]
    assert (json.loads((folder / 'metrics.json').read_text())['pixel']['ap'] == point['pixel AP']
            and 0 < point['simulated AP, held out'] <= 1)
    assert found['last_stretch']['1']['pixel AP']['difference'] == pytest.approx(point['pixel AP']
                                                                                 - found['curve'][-2]['pixel AP'])
    assert ('No checkpoint was chosen' in (tmp_path / 'curve' / 'report.html').read_text()
            and len(pd.read_csv(tmp_path / 'curve' / 'learning_curve.csv')) == 6)
    with pytest.raises(RunFailed, match='at_steps must lie between 1 and the 6 steps'):
        run_report('learning_curve', dict(ask, at_steps=[7]), tmp_path / 'late')
    assert (reports.default_folder('learning_curve', dict(category='nut', seeds=[0, 2])).name
            == 'learning_curve-nut-demo-seeds0-2')
