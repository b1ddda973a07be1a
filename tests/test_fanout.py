"""Fan-out with real processes on the loopback address: workers and schedulers that die, runs that fail or hang,
full disks, two commands at once.

Most runs are a notebook that sleeps and keeps a checkpoint: a count in a file."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from PIL import Image

pytest.importorskip('distributed')
from draem_nb import cli, fanout, recipes, reports, runs
from draem_nb.reports import run_many, run_report
from draem_nb.runs import locked

# Ten steps, each noted in a file like a checkpoint; another file has a line for each beginning.
STEPS = ("(Path(run_dir) / 'begun').open('a').write('x')\ncount = Path(run_dir) / 'checkpoint.pt'\n"
         "while (done := int(count.read_text()) if count.exists() else 0) < steps:\n"
         "    time.sleep(0.3)\n    with replacing(count) as temporary: temporary.write_text(str(done + 1))\n    "
         "print(f'step {done + 1} of {steps}', flush=True)")
END = "reports.finish(run_dir, {'image': {'auroc': 0.5 + seed / 10, 'ap': None}}, complete)"


@pytest.fixture
def notebook(tmp_path) -> Path:
    code = nbformat.v4.new_code_cell
    cells = [code('import os, signal, time\nfrom pathlib import Path\nfrom draem_nb import reports\nfrom draem_nb.data '
                  'import replacing'),
             code("category = 'brick'\nrecipe = 'demo'\nseed = 0\nsteps = 1\ndata_root = None\ndevice = None\nwork = "
                  "''\nrun_dir = None\ncomplete = True", metadata=dict(tags=['parameters'])),
             code('exec(work)'), code(STEPS), code(END)]
    path = tmp_path / 'tiny.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells,
                                            metadata=dict(kernelspec=dict(name='python3', display_name='python3',
                                                                          language='python'))), path)
    return path


def until(true: Callable[[], object], seconds: float = 300.) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := true(): return value
        time.sleep(0.1)
    raise TimeoutError


def command(sets: list[dict], runs: Path, notebook: Path, scheduler: str = 'local', **options) -> subprocess.Popen:
    "`run_many` in a process of its own, as at a terminal."
    code = (f'from draem_nb.reports import run_many\nif __name__ == "__main__":\n    found = run_many({sets!r}, '
            f'{str(runs)!r}, {str(notebook)!r}, scheduler={scheduler!r}, **{options!r})\n'
            f'    raise SystemExit(int((found.status != "complete").any()))\n')
    script = notebook.with_name('command.py')
    script.write_text(code)
    return subprocess.Popen([sys.executable, script], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def workers_of(pid: int) -> list[int]:
    "Processes below `pid` that are the parents of a run: dask's workers."
    children: dict[int, list[int]] = {}
    names = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(stat.read_text().rsplit(')')[-1].split()[1])
            names[int(stat.parent.name)] = (stat.parent / 'cmdline').read_bytes()
        except (OSError, IndexError): continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    below, todo = [], [pid]
    while todo: below += (more := children.get(todo.pop(), [])); todo += more
    return [p for p in below if any(b'_child' in names.get(c, b'') for c in children.get(p, []))]


def metrics(runs: Path) -> dict[str, bytes]:
    return {str(p.relative_to(runs)): p.read_bytes() for p in sorted(runs.rglob('metrics.json'))}


@pytest.fixture
def cluster(tmp_path) -> Iterator[Callable]:
    "Starts a scheduler or a worker as a process of its own."
    started = []
    def start(*arguments: str, **env: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, '-m', 'distributed.cli.' + arguments[0], *arguments[1:],
                                         '--no-dashboard'], cwd=tmp_path,
                                        env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True))
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.wait()


def address() -> str:
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return f'tcp://127.0.0.1:{s.getsockname()[1]}'


def scheduler_at(cluster: Callable, where: str) -> subprocess.Popen:
    return cluster('dask_scheduler', '--host', '127.0.0.1', '--port', where.rsplit(':')[-1])


def worker_at(cluster: Callable, where: str, *more: str, **env: str) -> subprocess.Popen:
    return cluster('dask_worker', where, '--host', '127.0.0.1', '--nthreads', '1', '--no-nanny', *more, **env)


def test_failures_hangs_and_a_full_disk_do_not_hold_up_the_rest(notebook, tmp_path, capfd):
    sets = [dict(seed=0), dict(seed=1, work="raise ValueError('no part in the picture')"),
            dict(seed=2, work='time.sleep(600)'),
            dict(seed=3, work="import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
                 "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); Path(run_dir, "
                 "'big').write_bytes(bytes(2000))"),
            dict(seed=4, work='os.kill(os.getpid(), signal.SIGKILL)')]
    environment = dict(os.environ)
    found = run_many(sets, tmp_path / 'runs', notebook, scheduler='local', workers=2, threads=1, time_limit=45)
    assert dict(os.environ) == environment          # what runs here afterwards has its own number of threads
    assert list(found.status) == ['complete', *['failed'] * 4] and found.image_auroc[0] == 0.5
    for text, says in zip(found.error[1:], ('no part in the picture', 'past its limit of 45 s', 'File too large',
                                            'the kernel died')):
        assert says in text
    err = capfd.readouterr().err
    for row in found.run_dir[1:3]:
        assert (f'{row}/report.failed.ipynb' in err and Path(row, 'report.failed.ipynb').exists()
                and not Path(row, 'metrics.json').exists())
    # What failed runs again, what is complete does not.
    again = run_many([sets[0], dict(seed=1)], tmp_path / 'runs', notebook, scheduler='local', workers=1)
    assert list(again.status) == ['complete'] * 2 and Path(found.run_dir[0], 'begun').read_text() == 'x'


def test_a_killed_worker_costs_nothing_that_was_saved(notebook, tmp_path, monkeypatch):
    sets = [dict(seed=s, steps=12) for s in (0, 1)]
    (temporary := tmp_path / 't').mkdir()
    monkeypatch.setenv('TMPDIR', str(temporary))
    process = command(sets, tmp_path / 'runs', notebook, workers=2, threads=1)
    until(lambda: len(list((tmp_path / 'runs').glob('*/checkpoint.pt'))) == 2)
    victim = workers_of(process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    begun = sorted(len(p.read_text()) for p in (tmp_path / 'runs').glob('*/begun'))
    assert begun == [1, 2]                # one run went on from where it was
    assert sorted(json.loads(m)['image']['auroc'] for m in metrics(tmp_path / 'runs').values()) == [0.5, 0.6]
    assert 'its worker is gone; it goes on at tcp://' in out
    assert not list(temporary.iterdir())        # nor is anything left of it


def test_ctrl_c_and_a_second_command(notebook, tmp_path):
    sets = [dict(seed=s, steps=10) for s in (0, 1)]
    process = command(sets, tmp_path / 'runs', notebook, workers=1)
    until(lambda: list((tmp_path / 'runs').glob('*/checkpoint.pt')))
    # Another command on the folder of the runs, or on the run, is refused while this one lives; nothing is written.
    with pytest.raises(ValueError, match=rf'runs is in use by another command \(process {process.pid} on'):
        run_many(sets, tmp_path / 'runs', notebook)
    run_dir = runs.default_folder(notebook, sets[0], tmp_path / 'runs')
    with pytest.raises(ValueError, match='is in use by another command'): run_report(notebook, sets[0], run_dir)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode != 0
    done = int((run_dir / 'checkpoint.pt').read_text())
    # waits for what is still saving, goes on from there
    found = run_many(sets, tmp_path / 'runs', notebook, scheduler='local', workers=2)
    assert list(found.status) == ['complete'] * 2 and done >= 1 and not list((tmp_path / 'runs').rglob('.run*.lock'))


def test_workers_without_a_shared_disk_and_a_scheduler_that_is_restarted(notebook, tmp_path, cluster):
    where = address()
    scheduler = scheduler_at(cluster, where)
    workers = [worker_at(cluster, where, DRAEM_NB_WORK=str(tmp_path / f'disk{i}'), DRAEM_NB_THREADS='1')
               for i in (0, 1)]
    sets = [dict(seed=s, steps=8) for s in range(2)]
    process = command(sets, tmp_path / 'runs', notebook, scheduler=where, patience=100.)
    until(lambda: list(tmp_path.glob('disk*/*/checkpoint.pt')))
    for p in (scheduler, *workers): p.kill(); p.wait()
    scheduler_at(cluster, where)
    for i in (0, 1): worker_at(cluster, where, DRAEM_NB_WORK=str(tmp_path / f'disk{i}'), DRAEM_NB_THREADS='1')
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert (len(metrics(tmp_path / 'runs')) == 2 and 'the scheduler is gone' in out
            and re.search(r'brick-demo-seed\d-\w+: step \d of 8', out))
    for run in (tmp_path / 'runs').glob('brick*'):
        assert {'metrics.json', 'parameters.json', 'report.html', 'report.ipynb', 'timing.json',
                'checkpoint.pt'} <= {p.name for p in run.iterdir()}
    # The other workers' data lie elsewhere: a worker that lacks them says so at once, and so
    # does the GPU that nobody offers.
    (good := tmp_path / 'here' / 'screw' / 'train' / 'good').mkdir(parents=True)
    # a class without an image is refused before its run begins
    Image.new('L', (8, 8)).save(good / '000.png')
    with pytest.raises(ValueError, match='worker tcp.*the data folder .*there.* set DRAEM_NB_DATA_ROOT on that worker'):
        run_many([dict(category='screw', data_root=str(tmp_path / 'there'))], tmp_path / 'runs', notebook,
                 scheduler=where)
    with pytest.raises(ValueError, match='no worker of .* offers a GPU'):
        run_many([dict(device='cuda')], tmp_path / 'gpu', notebook, scheduler=where)
    # One that comes later is sent away, and its run goes to another one.
    sets = [dict(category='screw', data_root=str(tmp_path / 'here'), seed=s, steps=12) for s in range(3)]
    before = len(list(tmp_path.glob('disk*/*/begun')))
    process = command(sets, tmp_path / 'late', notebook, scheduler=where)
    until(lambda: len(list(tmp_path.glob('disk*/*/begun'))) > before)
    late = worker_at(cluster, where, DRAEM_NB_WORK=str(tmp_path / 'disk2'), DRAEM_NB_DATA_ROOT=str(tmp_path / 'there'))
    out, _ = process.communicate(timeout=600)
    assert (process.returncode == 0 and 'is sent away: the data folder' in out and late.wait(60) == 0
            and len(metrics(tmp_path / 'late')) == 3), out


@pytest.mark.parametrize('code, says', [
    ("import draem_nb; draem_nb.__version__ = '0.0.1'", 'has draem_nb 0.0.1, here it is'),
    ("import sys; sys.modules['draem_nb'] = None", 'has draem_nb none that answers, here it is')])
def test_a_worker_of_another_version_is_refused(notebook, tmp_path, cluster, code, says):
    scheduler_at(cluster, where := address())
    (tmp_path / 'sitecustomize.py').write_text(code)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])])
    worker_at(cluster, where, PYTHONPATH=path)
    with pytest.raises(ValueError, match=rf'^worker tcp://\S+ {says} .*; install the same on both'):
        run_many([dict(seed=0)], tmp_path / 'runs', notebook, scheduler=where)
    assert not list((tmp_path / 'runs').rglob('parameters.json'))


def test_local_workers_listen_on_loopback_alone_and_each_gets_a_gpu_of_its_own(monkeypatch):
    for given, seen in ((None, {'0', '1'}), ('3,5', {'3', '5'})):
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES',
                           raising=False) if given is None else monkeypatch.setenv('CUDA_VISIBLE_DEVICES', given)
        with fanout._cluster_client('local', 2, 2, 60.) as client:
            client.wait_for_workers(2)
            assert set(client.run(os.getenv, 'CUDA_VISIBLE_DEVICES').values()) == seen
            about = client.scheduler_info()
            addresses = [about['address'], *about['workers'], *(w['nanny'] for w in about['workers'].values())]
            assert len(addresses) == 5 and all(a.startswith('tcp://127.0.0.1:') for a in addresses)


def test_no_scheduler_and_no_worker_are_sentences(notebook, tmp_path, cluster):
    where = address()
    with pytest.raises(ValueError, match='no scheduler answers at'):
        run_many([{}], tmp_path / 'runs', notebook, scheduler=where, patience=1.)
    scheduler_at(cluster, where)
    with pytest.raises(ValueError, match='has no worker after 2 s; start some with'):
        until(lambda: _tried(lambda: run_many([{}], tmp_path / 'runs', notebook, scheduler=where, patience=2.)))


def _tried(call: Callable) -> None:
    "Nothing while the scheduler is still starting."
    try: call()
    except ValueError as e:
        if 'no scheduler answers' not in str(e): raise


def test_the_lock_ends_with_its_process(tmp_path):
    code = (f'import time; from draem_nb.runs import locked\nwith locked({str(tmp_path / "run")!r}): print("held", '
            'flush=True); time.sleep(600)')
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    with pytest.raises(ValueError, match=f'process {process.pid} on'), locked(tmp_path / 'run'): pass
    process.kill()
    process.wait()
    with locked(tmp_path / 'run'): pass


def test_a_full_disk_here_leaves_no_half_run(tmp_path):
    small = tmp_path / 'small'
    small.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', small], capture_output=True).returncode:
        pytest.skip('a small file system can be mounted by root only')
    try:
        (tmp_path / 'sent').mkdir()
        (tmp_path / 'sent' / 'checkpoint.pt').write_bytes(os.urandom(200_000))
        (tmp_path / 'sent' / 'metrics.json').write_text('{}')
        job = dict(run_dir=str(small / 'run'), asked={}, run='run')
        row = fanout._received_row(job, dict(status='complete', packed=fanout._pack_run(tmp_path / 'sent', True)),
                               fanout._Board(1))
        assert (row['status'] == 'failed' and 'No space left on device' in row['error']
                and not (small / 'run' / 'metrics.json').exists())
        assert not [p for p in (small / 'run').rglob('*') if p.is_file()]
    finally: subprocess.run(['umount', small], check=True)


TINY = '{"size": 64, "base_width": 8, "base_channels": 4, "steps": 60, "checkpoint_every": 20, "precision": "float32"}'


def test_a_table_with_a_killed_worker_is_the_table_of_an_undisturbed_run(tmp_path):
    arguments = ['--categories', 'brick', '--seeds', '0,1', '--overrides', TINY, '--workers', '2', '--threads', '1']
    def start(runs: str) -> subprocess.Popen:
        return subprocess.Popen([Path(sys.executable).parent / 'draem_nb', 'table', *arguments, '--runs-dir',
                                 tmp_path / runs], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    disturbed = start('a')
    until(lambda: list((tmp_path / 'a').glob('*/checkpoint.pt')))
    victims = workers_of(disturbed.pid)
    os.kill(victims[0], signal.SIGKILL)
    out, _ = disturbed.communicate(timeout=600)
    assert disturbed.returncode == 0 and '2 of 2 runs complete' in out, out
    undisturbed = start('b')
    text, _ = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, text
    # two runs and the summary
    assert metrics(tmp_path / 'a') == metrics(tmp_path / 'b') and len(metrics(tmp_path / 'a')) == 3
    tables = [{p.name: p.read_bytes() for p in (tmp_path / runs / 'summary').glob('*.csv') if p.name != 'costs.csv'}
              for runs in 'ab']
    assert tables[0] == tables[1] and tables[0]


def test_what_killed_workers_left_goes_also_where_nothing_is_to_run(tmp_path, monkeypatch):
    (tmp_path / f'.{fanout._WORKERS}.0123abcd.tmp').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    fanout._run_jobs({}, {}, 'local', 1, 0, 1., fanout._Board(0))
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_killed_leaves_no_complete_summary_of_fewer_runs(tmp_path, monkeypatch):
    reports.finish(tmp_path / 'summary', dict(runs=1))
    def killed(*_: object, **__: object) -> None:
        assert not (tmp_path / 'summary' / 'metrics.json').exists()
        raise KeyboardInterrupt
    monkeypatch.setattr(fanout, 'fan_out', killed)
    arguments = ['table', '--categories', 'brick', '--runs-dir', str(tmp_path)]
    assert cli.main([*arguments, '--dry-run']) == 0 and (tmp_path / 'summary' / 'metrics.json').exists()
    assert cli.main(arguments) == 130


def test_the_plan_names_what_is_missing(tmp_path, capsys, monkeypatch):
    for seed in (0, 1):
        run = tmp_path / f'brick-demo-seed{seed}'
        reports.finish(run, dict(image=dict(auroc=0.5)))
        shutil.copy(run / 'metrics.json', run / 'report.html')
        _, asked = runs.asked_parameters('category', dict(category='brick', recipe='demo', seed=seed))
        (run / 'parameters.json').write_text(json.dumps(asked))
        (run / 'timing.json').write_text(json.dumps(dict(seconds=600)))
    monkeypatch.setattr(fanout, 'local_size', lambda n: (2, 1, 0))
    assert cli.main(['table', '--dry-run', '--categories', 'brick,grass', '--seeds', '0,1', '--runs-dir',
                         str(tmp_path)]) == 0
    assert '2 to run, 2 complete, 0 refused; about 10 min on 2 workers, by complete runs' in capsys.readouterr().out
    assert cli.main(['table', '--dry-run', '--categories', 'brick', '--seeds', '5', '--methods', 'memory',
                         '--runs-dir', str(tmp_path)]) == 0
    assert 'no estimate: for some there is no complete run of the same' in capsys.readouterr().out     # not 10 min
    # The recipe was changed in the library: the old run is named, not taken.
    recipe = dict(vars(recipes.demo()), lr=1.)
    (tmp_path / 'brick-demo-seed0' / 'run.json').write_text(json.dumps(dict(recipe=recipe)))
    assert cli.main(['table', '--dry-run', '--categories', 'brick', '--runs-dir', str(tmp_path)]) == 1
    assert 'another recipe (lr 1.0 there' in capsys.readouterr().out
    assert (cli.main(['table', '--recipes', 'demmo', '--runs-dir', str(tmp_path)]) == 1
            and "unknown recipe 'demmo'" in capsys.readouterr().err)
    assert (cli.main(['table', '--methods', 'memory,magic', '--runs-dir', str(tmp_path)]) == 1
            and "unknown method 'magic'" in capsys.readouterr().err)
    assert (cli.main(['table', '--methods', 'draem,memory', '--recipes', 'official', '--runs-dir', str(tmp_path)])
            == 1 and 'a memory has: demo' in capsys.readouterr().err)
    assert cli.main(['table', '--dry-run', '--methods', 'draem,memory', '--categories', 'grass', '--seeds', '0,1',
                         '--runs-dir', str(tmp_path)]) == 0
    # each with its own demo recipe, in folders of its own
    out = capsys.readouterr().out
    assert '4 to run' in out and all(str(tmp_path / name) in out
                                     for name in ('grass-demo-seed0', 'memory-grass-demo-seed1'))
    assert (cli.main(['table', '--categories', 'brik', '--runs-dir', str(tmp_path)]) == 1 and 'there is no class '
            'brik in the built-in ones; there are: brick, grass, gravel' in capsys.readouterr().err)


def test_workers_that_die_at_their_start_are_one_sentence(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(fanout, '_PRELOAD', 'import os; os._exit(1)')
    with pytest.raises(ValueError, match=r'^the workers on this machine do not start \(.*\); .* try fewer, WORKERS=1$'):
        run_many([dict(seed=0)], tmp_path / 'runs', notebook, scheduler='local', workers=1)
    assert not list((tmp_path / 'runs').rglob('metrics.json'))


@pytest.mark.skipif(not shutil.which('openssl'), reason='openssl is not installed')
def test_a_cluster_with_certificates_lets_in_nobody_else(notebook, tmp_path, cluster):
    "The commands and settings of docs/SECURITY.md."
    text = (Path(__file__).resolve().parent.parent / 'docs' / 'SECURITY.md').read_text()
    setup = re.search(r'```sh\nmkdir -p ~/.config/dask(.*?)```', text, re.S)[1].removeprefix(' && cd ~/.config/dask')
    (settings := tmp_path / 'dask').mkdir()
    subprocess.run(['sh', '-ec', setup.replace('rsa:3072', 'rsa:2048')], cwd=settings, check=True, capture_output=True)
    assert (settings / 'draem_nb-key.pem').stat().st_mode & 0o777 == 0o600
    where = address().replace('tcp://', 'tls://')
    port, env = where.rsplit(':')[-1], dict(DASK_CONFIG=str(settings))
    cluster('dask_scheduler', '--protocol', 'tls', '--host', '127.0.0.1', '--port', port, **env)
    cluster('dask_worker', where, '--nthreads', '1', '--no-nanny', **env)
    plain = where.replace('tls', 'tcp')
    for wrong, says in ((where, 'no certificate is set here; docs/SECURITY.md'), (plain, 'no scheduler answers')):
        with pytest.raises(ValueError, match=says):
            run_many([dict(seed=0)], tmp_path / 'runs', notebook, scheduler=wrong, patience=5.)
    code = ('import sys; from draem_nb.reports import run_many; '
            f'found = run_many([dict(seed=0)], {str(tmp_path / "runs")!r}, {str(notebook)!r}, scheduler={where!r}); '
            'sys.exit(int((found.status != "complete").any()))')
    done = subprocess.run([sys.executable, '-c', code], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_address_that_is_not_encrypted_is_told(capsys, monkeypatch):
    class Nobody:
        def __init__(self, address: str, **how: object) -> None: raise OSError
    monkeypatch.setattr('distributed.Client', Nobody)
    for where, told in (('tcp://10.0.0.7:8786', True), ('tcp://127.0.0.1:8786', False), ('tcp://localhost:8786', False),
                        ('tls://10.0.0.7:8786', False)):
        with pytest.raises(ValueError, match='no scheduler answers at .* `dask scheduler --host 127.0.0.1`'):
            fanout._connect_client(where, 1.)
        assert ('is not encrypted' in capsys.readouterr().err) == told
