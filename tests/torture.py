"""Kills, load, and the same bits: `make torture`, or
`python tests/torture.py [kills] [load] [same] [workers] [--seed N]`.

- kills: `category`, `inspect`, `calibrate` and `table` are ended at random moments by SIGKILL, SIGTERM or SIGINT, now
  and then one of their processes alone, and started again until they are complete. metrics.json must be that of an
  undisturbed run, to the byte; after ten seconds no process may be left; at the end no temporary file, no lock and no
  shared memory of this user.
- load: 3,000 files inspected, 2,000 single predictions, 2,000 planned runs, a class of 5,000 images, one image of
  12,000 x 9,000 pixels in tiles; seconds and memory.
- same: one class, trained with other locales, time zones, folders, numbers of threads, and stopped and resumed. Narrow
  networks have the same bytes in all of these; wide ones may have others with other threads, and tell their number.
- workers: a table with one and with two workers.

Not part of `make test`, which has a few of the kills. Linux only: processes are found by a word in their environment.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from draem_nb import methods
from draem_nb.data import demo_category, load_category
from draem_nb.runs import default_folder

TINY = dict(size=64, base_width=4, base_channels=4, steps=40, batch=4, checkpoint_every=5, precision='float32')
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WORD = 'DRAEM_NB_TORTURE'


def processes(word: str) -> list[int]:
    "All living processes that were started with this word in their environment."
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if f'{WORD}={word}\0'.encode() in (entry / 'environ').read_bytes(): found.append(int(entry.name))
    return found


def gone(word: str, seconds: float = 10.) -> bool:
    "Whether all of them are gone by then."
    until = time.monotonic() + seconds
    while alive := processes(word):
        if time.monotonic() > until:
            for pid in alive:
                with contextlib.suppress(OSError): os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.1)
    return True


@dataclass
class Job:
    "One command in a folder of its own."
    name: str
    folder: Path
    arguments: list[str]
    metrics: list[Path]                 # there when it is complete
    word: str = field(default_factory=lambda: os.urandom(8).hex())
    killed: bool = False                # the last time it was started

    def start(self, **more: str) -> subprocess.Popen:
        "Temporary files go into a folder of its own, so that what is left can be seen."
        (self.folder / 'tmp').mkdir(exist_ok=True)
        env = os.environ | {WORD: self.word, 'TMPDIR': str(self.folder / 'tmp'), 'OMP_NUM_THREADS': '1'} | more
        return subprocess.Popen([sys.executable, '-m', 'draem_nb', *self.arguments], env=env, text=True,
                                errors='replace', stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))

    def complete(self) -> bool: return all(path.exists() for path in self.metrics)

    def results(self) -> list[bytes]: return [path.read_bytes() for path in self.metrics]

    def leftovers(self) -> list[str]:
        "Temporary files, temporary folders and locks below its folder."
        return [str(p.relative_to(self.folder)) for p in self.folder.rglob('*')
                if p.name.endswith(('.tmp', '.lock')) or '.tmp.' in p.name or p.parent == self.folder / 'tmp']


@dataclass
class Maker:
    "Makes jobs; what they start from is made once."
    root: Path
    data: Path = field(init=False)
    trained: Path = field(init=False)

    def __post_init__(self) -> None:
        "A class of 24 images, and a run of it."
        source = demo_category('brick', self.root / 'demo')
        self.data, self.trained = self.root / 'data', self.root / 'trained'
        for path in source.rglob('*.png'):
            if int(path.stem.split('_')[0]) >= 12: continue
            (to := self.data / path.relative_to(source.parent)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
        recipe = methods.recipe_of('draem', **TINY)
        methods.fit('draem', load_category(self.data, 'brick', recipe.size), recipe, 'cpu', run_dir=self.trained)

    def folder(self, name: str) -> Path:
        path = self.root / f'{name}-{os.urandom(3).hex()}'
        path.mkdir()
        return path

    def category(self, run_dir: Path, **fields: object) -> list[str]:
        return ['category', '--category', 'brick', '--data-root', str(self.data), '--overrides',
                json.dumps(TINY | fields), '--run-dir', str(run_dir)]

    def table(self, folder: Path, workers: int = 1) -> Job:
        runs, overrides = folder / 'runs', TINY | dict(steps=20)
        sets = [dict(category='brick', method='draem', recipe='demo', seed=seed, data_root=str(self.data),
                     overrides=overrides) for seed in (0, 1)]
        metrics = [default_folder('category', s, runs) / 'metrics.json' for s in sets]
        arguments = ['table', '--categories', 'brick', '--data-root', str(self.data), '--seeds', '0,1', '--overrides',
                     json.dumps(overrides), '--workers', str(workers), '--threads', '1', '--runs-dir', str(runs)]
        return Job('table', folder, arguments, [*metrics, runs / 'summary' / 'metrics.json'])

    def job(self, name: str) -> Job:
        folder = self.folder(name)
        if name == 'table': return self.table(folder)
        if name == 'category':
            return Job(name, folder, self.category(folder / 'run'), [folder / 'run' / 'metrics.json'])
        shutil.copytree(self.trained, folder / 'run')
        images = self.data / 'brick' / 'test' / ('good' if name == 'calibrate' else '')
        return Job(name, folder, [name, '--run-dir', str(folder / 'run'), '--images', str(images), '--out-dir',
                                  str(folder / 'out')], [folder / 'out' / 'metrics.json'])


def shared_memory() -> set[str]:
    "Segments of this user that no living process has mapped."
    mapped, found = '', set()
    for maps in Path('/proc').glob('[0-9]*/maps'):
        with contextlib.suppress(OSError): mapped += maps.read_text(errors='replace')
    for path in Path('/dev/shm').glob('*'):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid() and str(path) not in mapped: found.add(path.name)
    return found


def kill(job: Job, process: subprocess.Popen, moment: float, rng: random.Random, counts: Counter) -> list[str]:
    "Send a signal after so many seconds, to the command or, one time in seven, to one of its processes; the faults."
    try: process.wait(moment)
    except subprocess.TimeoutExpired: pass
    else: return []
    how, others = rng.choice(SIGNALS), [pid for pid in processes(job.word) if pid != process.pid]
    alone = bool(others) and rng.random() < 1 / 7
    with contextlib.suppress(OSError): os.kill(rng.choice(others) if alone else process.pid, how)
    job.killed, faults, said = True, [], f'{job.name}, {how.name} after {moment:.2f} s'
    counts[job.name, how.name + ' to one of its processes' * alone] += 1
    try: process.wait(300)
    except subprocess.TimeoutExpired: process.kill(); faults.append(f'{said}: it did not end')
    return faults if gone(job.word) else [*faults, f'{said}: processes were left after 10 s']


def torment(job: Job, seconds: float, rng: random.Random, most: int, counts: Counter) -> list[str]:
    "Kill and start a job until it is complete, at most `most` kills; what did not hold."
    faults, before = [], counts.total()
    while not job.complete():
        process, job.killed, calm = job.start(), False, counts.total() - before >= most
        if not calm: faults += kill(job, process, rng.uniform(0.2, seconds), rng, counts)
        stderr = process.communicate()[1]
        if 'Traceback' in stderr: faults.append(f'{job.name}: a traceback: {stderr[-1500:]}')
        if calm and not job.complete(): return [*faults, f'{job.name}: it does not get complete: {stderr[-1500:]}']
    return faults if gone(job.word) else [*faults, f'{job.name}: processes were left']


def kills(maker: Maker, names: list[str], n: int, seed: int) -> list[str]:
    "`n` kills in all; the faults found."
    rng, faults, counts, before = random.Random(seed), [], Counter(), set(os.listdir('/dev/shm'))
    undisturbed = {}
    for name in dict.fromkeys(names):
        job, began = maker.job(name), time.monotonic()
        if (process := job.start()).wait() or job.leftovers():
            faults.append(f'{name}, undisturbed: {process.stderr.read()[-500:]} {job.leftovers()}')
            return faults
        undisturbed[name] = time.monotonic() - began, job.results()
        print(f'{name}, undisturbed: {undisturbed[name][0]:.1f} s', flush=True)
    completed = 0
    while (done := counts.total()) < n:
        name = names[completed % len(names)]
        job, (seconds, results) = maker.job(name), undisturbed[name]
        found = torment(job, seconds, rng, min(6, n - done), counts)
        if job.complete():
            if job.results() != results: found.append(f'{name}: other results than undisturbed')
            # One that was killed when it was complete is not begun again, and the next command sweeps after it.
            if not job.killed and (left := job.leftovers()): found.append(f'{name}: left behind: {left}')
        completed += 1
        faults += found
        print(f'{counts.total()} kills, {completed} commands brought to their end, {len(faults)} faults', *found,
             sep='\n  ', flush=True)
        shutil.rmtree(job.folder)
    if new := sorted(shared_memory() - before): faults.append(f'shared memory was left behind: {new}')
    for name in undisturbed:
        print(f'{name}: ' + ', '.join(f'{how} {n}' for (of, how), n in sorted(counts.items()) if of == name))
    print(f'seed {seed}: {counts.total()} kills, {completed} commands brought to their end, {len(faults)} faults',
          flush=True)
    return faults


SINGLE = """
import re, sys, time
from pathlib import Path
from draem_nb.methods import load
def resident(): return int(re.search(r'VmRSS:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024
run, n, *files = sys.argv[1:]
detector, began = load(run, 'cpu'), time.monotonic()
for i in range(int(n)):
    detector.predict([files[i % len(files)]])
    if i + 1 == int(n) // 10: early = resident()
print(early, resident(), time.monotonic() - began)"""

LARGE = """
import sys, time
from draem_nb.methods import load
from draem_nb.runs import peak_memory_mib
from draem_nb.tiling import TiledDetector
run, file = sys.argv[1:]
detector, before, began = TiledDetector(load(run, 'cpu'), (8992, 12000)), peak_memory_mib(), time.monotonic()
found = detector.predict([file])
print(len(detector.places()), time.monotonic() - began, before, peak_memory_mib())"""

CLASS = """
import sys, time
from draem_nb.check import check
from draem_nb.data import load_category
from draem_nb.runs import peak_memory_mib
root, name = sys.argv[1:]
began = time.monotonic()
found = check(root, name)
checked = time.monotonic()
print(len(load_category(root, name, 64).train), len(found), checked - began, time.monotonic() - checked,
      peak_memory_mib())"""


def numbers_of(code: str, *arguments: object) -> list[float]:
    "What a program prints, in a process of its own."
    return [float(word) for word in subprocess.check_output([sys.executable, '-c', code, *map(str, arguments)],
                                                            text=True).split()]


def load(maker: Maker, n_files: int = 3000, n_single: int = 2000, n_runs: int = 2000) -> list[str]:
    "A folder of many files, many predictions one by one, a plan of many runs; the faults found."
    faults, sources = [], sorted(map(str, (maker.data / 'brick' / 'test').rglob('*.png')))
    job, photos = maker.job('inspect'), maker.folder('photos')
    for i in range(n_files): os.link(sources[i % len(sources)], photos / f'{i:05}.png')
    job.arguments[job.arguments.index('--images') + 1] = str(photos)
    if (process := job.start()).wait(): return [f'{n_files} files: {process.stderr.read()[-500:]}']
    timing = json.loads((job.folder / 'out' / 'timing.json').read_text())
    page = (job.folder / 'out' / 'report.html').stat().st_size / 2**20
    print(f'{n_files} files inspected: {timing["seconds"]:.0f} s, peak memory {timing["peak_memory_mib"]} MiB, '
          f'report.html {page:.1f} MiB', flush=True)
    early, late, seconds = numbers_of(SINGLE, maker.trained, n_single, *sources)
    print(f'{n_single} single predictions: {seconds:.0f} s, resident memory {early:.0f} MiB after {n_single // 10}, '
          f'{late:.0f} MiB at the end ({late / early - 1:+.1%})', flush=True)
    if late > 1.05 * early: faults.append('single predictions leak memory')
    began, seeds = time.monotonic(), ','.join(map(str, range(n_runs)))
    plan = subprocess.run([sys.executable, '-m', 'draem_nb', 'table', '--dry-run', '--categories', 'brick', '--seeds',
                           seeds, '--runs-dir', str(maker.root / 'none')], capture_output=True, text=True)
    print(f'{n_runs} planned runs: {time.monotonic() - began:.1f} s', flush=True)
    if f'{n_runs} to run' not in plan.stdout: faults.append(f'the plan of {n_runs} runs: {plan.stderr[-500:]}')
    return faults


def large(maker: Maker, n_images: int = 5000, size: tuple[int, int] = (12000, 9000)) -> list[str]:
    "A class of many images: checked, loaded, trained on; one image of 108 million pixels in tiles; the faults found."
    rng, source = np.random.default_rng(0), maker.data / 'brick'
    root = maker.folder('many')
    shutil.copytree(source / 'test', root / 'brick' / 'test')
    shutil.copytree(source / 'ground_truth', root / 'brick' / 'ground_truth')
    (good := root / 'brick' / 'train' / 'good').mkdir(parents=True)
    whole = np.asarray(Image.open(source / 'train' / 'good' / '000.png'))
    for i in range(n_images):
        Image.fromarray(np.roll(whole, rng.integers(0, 200, 2), (0, 1))).save(good / f'{i:05}.png', compress_level=1)
    n, findings, checked, loaded, peak = numbers_of(CLASS, root, 'brick')
    print(f'a class of {n:.0f} images: check {checked:.0f} s, load {loaded:.0f} s, peak memory {peak:.0f} MiB, '
          f'{findings:.0f} findings', flush=True)
    job = maker.job('category')
    job.arguments[job.arguments.index('--data-root') + 1] = str(root)
    if (process := job.start()).wait(): return [f'{n_images} images: {process.stderr.read()[-500:]}']
    timing = json.loads((job.folder / 'run' / 'timing.json').read_text())
    print(f'its report with {TINY["steps"]} steps: {timing["seconds"]:.0f} s, peak memory '
          f'{timing["peak_memory_mib"]} MiB', flush=True)
    n, seconds, before, peak = numbers_of(LARGE, maker.trained, large_image(maker.root / 'large.png', whole, size))
    print(f'{size[0]} x {size[1]} pixels in {n:.0f} tiles of {TINY["size"]}: {seconds:.0f} s, peak memory {peak:.0f} '
          f'MiB, {before:.0f} of them before it', flush=True)
    return [] if peak < 4000 else [f'one image took {peak:.0f} MiB']


def large_image(path: Path, pattern: np.ndarray, size: tuple[int, int]) -> Path:
    "The pattern repeated to an image of so many pixels."
    times = [-(-n // side) for n, side in zip(size[::-1], pattern.shape)] + [1] * (pattern.ndim - 2)
    Image.fromarray(np.tile(pattern, times)[:size[1], :size[0]]).save(path, compress_level=1)
    return path


OTHERS = dict(LANG='C', LC_ALL='C', TZ='Asia/Kathmandu', PYTHONHASHSEED='7')
ELSEWHERE = 'ein Ördner/가 나'
CIRCUMSTANCES = {           # environment, folder of the run, whether it is stopped and resumed
    'as it is': ({}, 'run', False), 'LANG=C': (dict(LANG='C', LC_ALL='C'), 'run', False),
    'TZ=Asia/Kathmandu': (dict(TZ='Asia/Kathmandu'), 'run', False),
    'hash seed': (dict(PYTHONHASHSEED='7'), 'run', False),
    'no home': (dict(HOME='/proc/none'), 'run', False),
    'another folder': ({}, ELSEWHERE, False), 'stopped and resumed': ({}, 'run', True),
    'all': (OTHERS, ELSEWHERE, True),
    'two threads': (dict(OMP_NUM_THREADS='2'), 'run', False),
    'two threads, all': (OTHERS | dict(OMP_NUM_THREADS='2'), ELSEWHERE, True)}


WIDE = dict(base_width=32, base_channels=32, steps=4, batch=2, checkpoint_every=2)       # trained on all threads


def trained_under(maker: Maker, env: dict[str, str], folder: str, stop: bool, **fields: object) -> dict:
    "What a run of the class ends with: metrics and weights as bytes, the threads of run.json, the text of its report."
    home = maker.folder('category')
    run = home / folder
    job = Job('category', home, maker.category(run, **fields), [run / 'metrics.json'])
    if stop:
        process = job.start(**env)
        while not (run / 'checkpoint.pt').exists() and process.poll() is None: time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.wait()
    if (process := job.start(**env)).wait(): raise RuntimeError(process.stderr.read()[-500:])
    weights = torch.load(run / 'checkpoint.pt', weights_only=True)['net'].values()
    return dict(metrics=(run / 'metrics.json').read_bytes(), weights=b''.join(w.numpy().tobytes() for w in weights),
                threads=json.loads((run / 'run.json').read_text())['threads'], report=(run / 'report.html').read_text())


def compared(now: dict, first: dict) -> dict[str, bool]:
    return {what: now[what] == first[what] for what in ('weights', 'metrics')}


def in_words(alike: dict[str, bool]) -> str:
    return ', '.join(f'{what} {"the same" if yes else "OTHER"}' for what, yes in alike.items())


def same(maker: Maker) -> list[str]:
    "The same training under other circumstances: narrow networks, which are trained on one thread; the faults found."
    faults, first = [], None
    for name, circumstances in CIRCUMSTANCES.items():
        now = trained_under(maker, *circumstances)
        first = first or now
        print(f'{name}: threads of run.json {now["threads"]}; {in_words(compared(now, first))}', flush=True)
        if not all(compared(now, first).values()): faults.append(f'{name}: other bits')
        if now['threads'] != 1: faults.append(f'{name}: run.json says {now["threads"]} threads, not 1')
    return faults


def wide_threads(maker: Maker) -> list[str]:
    "Wide networks on one thread, again on one, and on two: the bits of two may be others, and their number is told."
    found, faults = [], []
    for asked in (1, 1, 2):
        now = trained_under(maker, dict(OMP_NUM_THREADS=str(asked)), 'run', False, **WIDE)
        found.append(now)
        print(f'wide networks, OMP_NUM_THREADS={asked}: threads of run.json {now["threads"]}; '
              f'{in_words(compared(now, found[0]))}', flush=True)
        if now['threads'] != asked: faults.append(f'wide networks: run.json says {now["threads"]} threads, not {asked}')
        if f'{asked} threads' not in now['report']: faults.append(f'wide networks: the report lacks {asked} threads')
    if not all(compared(*found[:2]).values()): faults.append('wide networks: other bits with the same threads')
    return faults


def same_with_workers(maker: Maker) -> list[str]:
    "Two runs and their summary, one after the other and side by side: metrics as bytes, and all weights."
    tables = [maker.table(maker.folder('table'), workers) for workers in (1, 2)]
    for job in tables:
        if (process := job.start()).wait(): return [process.stderr.read()[-500:]]
    weights = [[list(torch.load(path.with_name('checkpoint.pt'), weights_only=True)['net'].values())
                for path in job.metrics[:-1]] for job in tables]
    alike = dict(metrics=tables[0].results() == tables[1].results(),
                 weights=all(torch.equal(a, b) for one, two in zip(*weights) for a, b in zip(one, two)))
    print(f'a table with one and with two workers: {in_words(alike)}', flush=True)
    return [] if all(alike.values()) else ['the number of workers changes bits']


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', default=['kills', 'load', 'same', 'workers'],
                        help='kills, load, same, workers (default: all)')
    parser.add_argument('--kills', type=int, default=200, help='how many (default: 200)')
    parser.add_argument('--commands', default='category,inspect,calibrate,table', help='which are killed')
    parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args(argv)
    print(f'seed {options.seed}', flush=True)
    faults = []
    with tempfile.TemporaryDirectory(prefix='torture-') as root:
        maker = Maker(Path(root))
        if 'kills' in options.parts: faults += kills(maker, options.commands.split(','), options.kills, options.seed)
        if 'load' in options.parts: faults += load(maker) + large(maker)
        if 'same' in options.parts: faults += same(maker) + wide_threads(maker)
        if 'workers' in options.parts: faults += same_with_workers(maker)
    print('all of it held' if not faults else '\n  '.join([f'{len(faults)} faults:', *faults]))
    return int(bool(faults))


if __name__ == '__main__':
    sys.exit(main())
