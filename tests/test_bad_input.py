"""Bad input in one table: a name, how it is made, the sentence that is expected.

Every row ends with exit status 1 or 2 and one sentence, without a traceback, and leaves no complete run behind. What a
notebook would say at its start is asked of the functions that say it, since a kernel a row would take minutes."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from draem_nb import (cli, corrections, data, execution, fanout, files, inspection, methods, recipes, reports,
                      runs, training)
from draem_nb.evaluation import read_runs
from draem_nb.layouts import LAYOUTS, find_images, list_files
from draem_nb.textures import load_textures

ROWS: dict[str, tuple[Callable, str]] = {}
TINY = recipes.demo().replace(size=32, base_width=2, base_channels=2, steps=1, batch=2, score_window=3,
                              precision='float32')


@dataclass
class Place:
    "Where a row works."
    folder: Path        # empty, its own
    nut: Path           # a class of ten images with masks, its own copy
    run: Path           # a trained and calibrated run, its own copy

    def image(self) -> Path: return self.nut / 'train' / 'good' / '0.png'

    def json(self, name: str, content: object) -> Path:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.run / name).write_bytes(text)
        return self.run


def row(name: str, says: str) -> Callable:
    "A row of the table: the function makes the bad input and uses it."
    def keep(make: Callable) -> Callable:
        assert name not in ROWS
        ROWS[name] = make, says
        return make
    return keep


def rows(kind: str, table: dict[str, tuple[object, str]], use: Callable) -> None:
    "Rows that differ in a value alone."
    for name, (value, says) in table.items(): row(f'{kind}: {name}', says)(lambda p, value=value: use(p, value))


# ---- images

def with_content(p: Place, content: bytes) -> None:
    (bad := p.folder / 'a.png').write_bytes(content)
    data.read_image(bad)


PNG = b'\x89PNG\r\n\x1a\n'
rows('image', {
    'empty': (b'', 'a.png: the file is empty'), 'text': (b'hello', 'a.png: no known image format'),
    'the head of a PNG alone': (PNG, 'cannot read the image .*a.png'),
    'zeros': (bytes(1000), 'a.png: no known image format'),
    'PostScript': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'a.png: no known image format'),
    'SVG': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'no known image format'),
    'HTML': (b'<!DOCTYPE html><html></html>', 'no known image format'), 'PDF': (b'%PDF-1.4\n', 'no known image format'),
    'a JPEG of two bytes': (b'\xff\xd8', 'cannot read the image .*a.png')}, with_content)


def cut(p: Place, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(whole := p.folder / f'w.{kind}')
    (bad := p.folder / f'a.{kind}').write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    data.read_image(bad)


rows('image cut in half', {kind: (kind, f'cannot read the image .*a.{kind}')
                           for kind in ('png', 'jpg', 'bmp', 'tif', 'webp')}, cut)


@row('image: a pipe', 'pipe.png: it is not a regular file')
def _(p: Place) -> None: os.mkfifo(p.folder / 'pipe.png'); data.read_image(p.folder / 'pipe.png')


@row('image: a device', 'zero.png: it is not a regular file')
def _(p: Place) -> None: os.symlink('/dev/zero', p.folder / 'zero.png'); data.read_image(p.folder / 'zero.png')


@row('image: a folder', 'a.png: it is not a regular file')
def _(p: Place) -> None: (p.folder / 'a.png').mkdir(); data.read_image(p.folder / 'a.png')


@row('image: none', 'the image .*a.png does not exist')
def _(p: Place) -> None: data.read_image(p.folder / 'a.png')


@row('image: a link to nothing', 'the image .*a.png does not exist')
def _(p: Place) -> None: os.symlink('nothing', p.folder / 'a.png'); data.read_image(p.folder / 'a.png')


@row('image: a link to itself', 'a.png')
def _(p: Place) -> None: os.symlink('a.png', p.folder / 'a.png'); data.read_image(p.folder / 'a.png')


@row('image: 40 million pixels more than allowed', 'are more than 1000; set DRAEM_NB_MAX_PIXELS')
def _(p: Place) -> None:
    Image.new('1', (6400, 6400)).save(p.folder / 'a.png')
    data.read_image(p.folder / 'a.png', 1000)


@row('image: values that are neither 8 nor 16 bit', 'its values are not 8 or 16 bit')
def _(p: Place) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(p.folder / 'a.tif')
    data.read_image(p.folder / 'a.tif')


# ---- masks

def with_mask(p: Place, make: Callable) -> None:
    make(p.nut / 'ground_truth' / 'dent' / '0_mask.png')
    data.load_category(p.nut.parent, 'nut', 32)


rows('mask', {
    'another size': (lambda to: Image.new('L', (9, 9)).save(to), 'the mask .*0_mask.png has 9 x 9 pixels'),
    'missing': (lambda to: to.unlink(), 'has no mask; put one at .*0_mask.png'),
    'empty file': (lambda to: to.write_bytes(b''), '0_mask.png: the file is empty'),
    'text': (lambda to: to.write_text('white'), '0_mask.png: no known image format'),
    'a pipe': (lambda to: (to.unlink(), os.mkfifo(to)), '0_mask.png')}, with_mask)


# ---- folders and names

def of_class(p: Place, change: Callable) -> None: change(p.nut); data.load_category(p.nut.parent, 'nut', 32)


rows('folder', {
    'no train': (lambda nut: shutil.rmtree(nut / 'train'), 'nut'),
    'an empty train/good': (lambda nut: [f.unlink() for f in (nut / 'train' / 'good').iterdir()], 'holds no images'),
    'a test image outside of the kinds': (lambda nut: shutil.copy(nut / 'test/good/0.png', nut / 'test/a.png'),
                                          'must lie in test/good or in test/<kind of defect>'),
    'a file in the place of the class': (lambda nut: (shutil.rmtree(nut), nut.write_text('x')), 'nut')}, of_class)


@row('folder: none', 'nowhere')
def _(p: Place) -> None: data.load_category(p.folder / 'nowhere', 'nut', 32)


@row('folder: no class of that name', "unknown class 'bolt'")
def _(p: Place) -> None: data.load_category(p.nut.parent, 'bolt', 32)


@row('folder: of images, none', 'the image folder .*nowhere does not exist')
def _(p: Place) -> None: find_images(p.folder / 'nowhere')


@row('folder: no layout of that name', 'mvtecc')
def _(p: Place) -> None: list_files(p.nut.parent, 'nut', 'mvtecc')


@row('folder: locked', 'locked: the folder cannot be read: Permission denied; allow it')
def _(p: Place) -> None:
    (p.nut / 'train' / 'good' / 'locked').mkdir()
    scan = os.scandir
    def refuse(path: Path) -> object:           # as another user's does; this test may run as root
        if Path(path).name == 'locked': raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'scandir', refuse)
        list_files(p.nut.parent, 'nut')


@row('name: no UTF-8', r'caf\\xe9, which is no UTF-8; rename that folder')
def _(p: Place) -> None: runs.asked_parameters('category', dict(data_root=str(p.folder / os.fsdecode(b'caf\xe9'))))


@row('name: of a demo class', "unknown demo class 'brck'; there are: ")
def _(p: Place) -> None: data.demo_category('brck', p.folder)


# ---- VisA's table

def with_table(p: Place, line: bytes) -> None:
    (p.folder / 'split_csv').mkdir()
    (p.folder / 'cap').mkdir()
    head = b'object,split,label,image,mask\ncap,train,normal,cap/0.png,\n'
    (p.folder / 'split_csv' / '1cls.csv').write_bytes(line if line.startswith(b'=') else head + line + b'\n')
    list_files(p.folder, 'cap', 'visa')


rows('VisA', {
    'a mask outside': (b'cap,test,anomaly,cap/a.png,/etc/passwd', "a row that is none of VisA's"),
    'a mask above': (b'cap,test,anomaly,cap/a.png,cap/../../m.png', "a row that is none of VisA's"),
    'an image of another class': (b'cap,test,anomaly,nut/a.png,cap/m.png', "a row that is none of VisA's"),
    'no image': (b'cap,test,normal,,', "a row that is none of VisA's"),
    'another split': (b'cap,validation,normal,cap/a.png,', "a row that is none of VisA's"),
    'a short row': (b'cap,test', 'line 3: fewer values than columns'),
    'a long row': (b'cap,test,normal,cap/a.png,,more', 'line 3: more values than columns'),
    'no UTF-8': (b'cap,test,normal,cap/caf\xe9.png,', 'not a table of comma-separated values in UTF-8'),
    'a defect without mask': (b'cap,test,anomaly,cap/a.png,', 'has no mask'),
    'an open quote': (b'cap,test,normal,"cap/a.png,', '1cls.csv'),
    'no columns': (b'=', "has no column image, label")}, with_table)


# ---- checkpoints, and the JSON of a run

def checkpoint(p: Place, change: Callable) -> None:
    path = p.run / 'checkpoint.pt'
    state = torch.load(path, weights_only=True)
    if (new := change(state)) is not None: torch.save(new, path)
    methods.load(p.run, 'cpu')


class Payload:
    "What a pickle may execute."
    def __reduce__(self) -> tuple: return os.system, ('touch /tmp/executed-by-a-checkpoint',)


def nan_in(state: dict) -> dict:
    weight = next(iter(state['net'].values()))
    weight[(0,) * weight.ndim] = float('nan')
    return state


def without(key: str) -> Callable: return lambda state: {k: v for k, v in state.items() if k != key}


DAMAGED = 'checkpoint.pt is damaged'
rows('checkpoint', {
    'a program': (lambda state: Payload(), r'checkpoint.pt is not a readable checkpoint \(UnpicklingError\)'),
    'a list': (lambda state: [1], 'checkpoint.pt is no checkpoint: it holds list'),
    'a tensor': (lambda state: state['history'], 'checkpoint.pt is no checkpoint: it holds Tensor'),
    'empty': (lambda state: {}, DAMAGED), 'NaN': (nan_in, DAMAGED + ': a value of net.* is not finite'),
    'no recipe': (without('recipe'), DAMAGED), 'no networks': (without('net'), DAMAGED),
    'a recipe of tomorrow': (lambda state: state | dict(recipe=state['recipe'] | dict(magic=1)), DAMAGED + '.*magic'),
    'a recipe with a wrong value': (lambda state: state | dict(recipe=state['recipe'] | dict(lr='x')),
                                    DAMAGED + '.* lr is'),
    'another width': (lambda state: state | dict(recipe=state['recipe'] | dict(base_width=8)), DAMAGED)}, checkpoint)


def damaged_file(p: Place, change: Callable) -> None:
    path = p.run / 'checkpoint.pt'
    change(path, path.read_bytes())
    methods.load(p.run, 'cpu')


rows('checkpoint file', {
    'missing': (lambda path, b: path.unlink(), 'there is no checkpoint .*; train first'),
    'empty': (lambda path, b: path.write_bytes(b''), 'checkpoint.pt is not a readable checkpoint'),
    'text': (lambda path, b: path.write_text('x'), 'checkpoint.pt is not a readable checkpoint'),
    'cut': (lambda path, b: path.write_bytes(b[:len(b) // 2]), 'checkpoint.pt is not a readable checkpoint'),
    'random bytes in it': (lambda path, b: path.write_bytes(b[:40_000] + os.urandom(2000) + b[42_000:]),
                           'checkpoint.pt is '),
    }, damaged_file)

NOT_JSON = {'empty': b'', 'a list': b'[1]', 'null': b'null', 'text': b'x', 'no UTF-8': b'\xff\xfe', 'cut': b'{"a": ',
            'deep': b'[' * 100_000}
for name in ('run.json', 'threshold.json', 'held_out.json'):
    says = 'run.json is damaged' if name == 'run.json' else f'{name} is damaged or not ours: it must hold'
    rows(name, {kind: (content, says) for kind, content in NOT_JSON.items()},
         lambda p, content, name=name: methods.load(p.json(name, content), 'cpu'))
for name in ('parameters.json', 'metrics.json'):
    rows(name, {kind: (content, f'{name} is damaged: ') for kind, content in NOT_JSON.items()},
         lambda p, content, name=name: runs.is_complete(p.json(name, content), dict(report='category')))



def train_nut(p: Place) -> None:
    training.train(data.load_category(p.nut.parent, 'nut', 32), load_textures(size=32)[:2], TINY, p.run, 'cpu')


def resumed(p: Place, content: object) -> None:
    p.json('run.json', content)
    train_nut(p)


rows('training with a run.json', {kind: (content, 'run.json is damaged') for kind, content in NOT_JSON.items()}
     | {'without a recipe': ({}, 'run.json is damaged: it names no recipe; delete '),
        'whose recipe is a list': (dict(recipe=[1]), 'run.json is damaged: it names no recipe')}, resumed)
rows('fitting with a run.json', {kind: (content, 'run.json is damaged') for kind, content in NOT_JSON.items()},
     lambda p, content: training.refuse_another(p.json('run.json', content), {}))

GOOD_THRESHOLD = dict(threshold=0.5, pixel_threshold=0.5, quantile=0.99, held_out_scores=[0.1])
rows('threshold.json', {
    'NaN': (b'{"threshold": NaN, "pixel_threshold": 1, "quantile": 1, "held_out_scores": []}', 'all of them finite'),
    'another key': (GOOD_THRESHOLD | dict(device='x'), 'and nothing else'),
    'text for a number': (GOOD_THRESHOLD | dict(threshold='0.5'), 'threshold.json is damaged'),
    'true for a number': (GOOD_THRESHOLD | dict(threshold=True), 'threshold.json is damaged'),
    'a missing key': ({'threshold': 0.5}, 'it must hold threshold')},
    lambda p, content: methods.load(p.json('threshold.json', content), 'cpu'))
rows('run.json', {'no such method': (dict(method='magic'), "unknown method 'magic'"),
                  'a number as method': (dict(method=3), "run.json is damaged: method is 3|unknown method '3'")},
     lambda p, content: methods.load(p.json('run.json', content), 'cpu'))


# ---- what would be read for ever

def through_pipe(p: Place, name: str) -> None:
    (path := p.run / name).unlink(missing_ok=True)
    os.mkfifo(path)
    def too_late(*_: object) -> None: raise TimeoutError(f'{name} is read for ever')
    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        if name == 'verdicts.csv': corrections.read_corrections(path)
        elif name in ('metrics.json', 'parameters.json'): runs.is_complete(p.run, dict(report='category'))
        else: methods.load(p.run, 'cpu')
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


rows('a pipe in the place of', {
    **{name: (name, f'{name} is not a regular file') for name in ('checkpoint.pt', 'verdicts.csv')},
    **{name: (name, f'{name} is damaged: .*not a regular file') for name in ('run.json', 'metrics.json',
                                                                            'parameters.json')},
    **{name: (name, f'{name} is damaged or not ours') for name in ('threshold.json', 'held_out.json')}}, through_pipe)


@row('a device in the place of: checkpoint.pt', 'checkpoint.pt is not a regular file')
def _(p: Place) -> None:
    (p.run / 'checkpoint.pt').unlink()
    os.symlink('/dev/null', p.run / 'checkpoint.pt')
    methods.load(p.run, 'cpu')


# ---- complete runs that lack something

def complete(p: Place, results: object) -> None:
    files.write_json(runs.asked_parameters('category', dict(category='brick'))[1], p.run / 'parameters.json')
    sys.exit(cli.main(['category', '--category', 'brick', '--run-dir', str(p.json('metrics.json', results))]))


FINE = dict(image=dict(auroc=.9), pixel=dict(auroc=.9),
            conditions=dict(category='nut', size=[32, 32], mask_rule='half'))
rows('complete run', {'image is a number': (dict(image=3), 'metrics.json is damaged: image, pixel and kinds must hold'),
                      'a word as AUROC': (dict(image=dict(auroc='high')), 'metrics.json is damaged: image, pixel and'),
                      'kinds are a list': (dict(kinds=[1]), 'metrics.json is damaged: image, pixel and kinds must'),
                      'a kind without numbers': (dict(kinds=dict(dent=3)), 'metrics.json is damaged: image, pixel and'),
                      'its report is gone': (FINE, 'report.html is missing; open report.ipynb in that folder, or')},
     complete)


def summary(p: Place, change: tuple[str, object]) -> None:
    p.json('metrics.json', FINE)
    files.write_json(dict(device='cpu'), p.run / 'run.json')
    runs, bad = read_runs(p.run.parent)
    assert len(runs) == 1 and not bad
    where, value = change
    if where == 'run.json': p.json(where, value)
    else: p.json('metrics.json', {k: v for k, v in (FINE | {where: value}).items() if v is not None})
    runs, bad = read_runs(p.run.parent)
    if not runs: raise ValueError(*bad)


CONDITIONS = FINE['conditions']
rows('summary', {
    'no pixel metrics': (('pixel', None), 'metrics.json is damaged: pixel: Field required; remove that folder'),
    'no image metrics': (('image', None), 'metrics.json is damaged: image: Field required'),
    'image is a list': (('image', [1]), 'metrics.json is damaged: image: '),
    'no class': (('conditions', CONDITIONS | dict(category=None)), 'metrics.json is damaged: conditions.category: '),
    'no size': (('conditions', dict(category='nut', mask_rule='half')), 'conditions.size: Field required'),
    'a size of one number': (('conditions', CONDITIONS | dict(size=[32])), 'damaged: conditions.size: '),
    'conditions are a list': (('conditions', [1]), 'metrics.json is damaged: conditions: '),
    'a word as AUROC': (('image', dict(auroc='high')), 'metrics.json is damaged: image.auroc: '),
    'run.json with a number as device': (('run.json', dict(device=3)), 'run.json is damaged: device: '),
    'run.json is a list': (('run.json', [1]), 'run.json is damaged: it holds list')}, summary)

# ---- parameters of the command line; exit status 2 where the option is wrong, 1 where its value is

def command(p: Place, words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(p.folder)
        places = dict(run=p.run, nut=p.nut, root=p.nut.parent, here=p.folder)
        if status := cli.main([word.format(**places) for word in words.split(' ')]): sys.exit(status)


rows('command', {
    'none': ('', 'invalid choice'), 'mistyped': ('categry', 'did you mean category'),
    'an option that there is not': ('category --stepz 3', 'unrecognized arguments: --stepz'),
    'a seed that is no number': ('category --seed x', 'seed must be a value like 0'),
    'kinds that are no list': ('category --kinds spot', 'kinds must be a value like'),
    'kinds cut': ('category --kinds ["spot"', 'kinds must be a value like'),
    'overrides that are a list': ('category --overrides [1]', 'overrides must be a value like'),
    'overrides cut': ('category --overrides {{"lr":', 'overrides must be a value like'),
    'inspect without a run': ('inspect --images {nut}', 'inspect needs run_dir'),
    'inspect without images': ('inspect --run-dir {run}', r'and images \(an image, or a folder'),
    'calibrate without images': ('calibrate --run-dir {run}', 'calibrate needs run_dir'),
    'compare with one run': ('compare --first {run}', 'compare needs first'),
    'a class that there is not': ('table --categories brik', 'there is no class brik'),
    'no seeds': ('table --dry-run --seeds ,', '--seeds names none'),
    'a negative seed': ('table --dry-run --seeds -1', "not a whole number of at least 0|expected one argument"),
    'a seed of letters': ('table --seeds a', "'a' is not a whole number of at least 0"),
    'no workers': ('table --workers 0', "'0' is not a whole number of at least 1"),
    'no time': ('table --time-limit 0', 'is not a number of at least 1'),
    'a method that there is not': ('table --categories brick --methods magic', "unknown method 'magic'"),
    'a recipe that there is not': ('table --categories brick --recipes magic', "unknown recipe 'magic'"),
    'a field that there is not': ('table --categories brick --overrides {{"magic":1}}', 'unknown recipe field magic'),
    'a value that cannot be': ('table --categories brick --overrides {{"lr":"x"}}', "recipe field lr is 'x'"),
    'a folder of classes that there is not': ('table --data-root {here}/none --categories a', 'none'),
    'a run folder that is a file': ('category --data-root {root} --category nut --run-dir {nut}/train/good/0.png',
                                    'cannot write to run folder'),
    'a run folder below a file': ('category --data-root {root} --category nut --run-dir {nut}/train/good/0.png/a',
                                  'cannot write to run folder'),
    'a folder with a report': ('inspect --run-dir {run} --images {nut} --out-dir {run}', 'holds a report already')},
    command)

rows('recipe', {
    f'{field}={value!r}'[:60]: ({field: value}, f'recipe field {field} is ') for field, value in
    [('lr', 'x'), ('lr', float('nan')), ('lr', 0.), ('steps', True), ('steps', 0), ('size', 1e8), ('size', [64]),
     ('batch', 2.5), ('reconstructive', 'false'), ('match_gray', 'no'), ('perlin_threshold', None),
     ('score_window', -3), ('lr_decay', 1e30), ('n_augmentations', 100), ('seed', -1), ('holdout', 1.),
     ('color', 'hsv'), ('precision', 'float8'),
     ('opacity', [1., 0.])]},
    lambda p, fields: recipes.demo().replace(**fields))


# ---- devices, predictions, calibration

rows('device', {'a GPU that there is not': ('cuda:7', "device='cuda:7'"), 'no device': ('gpu', "device='gpu' is no"),
                'meta': ('meta', "device='meta' is no"), 'a colon': ('cuda:', "device='cuda:' is no")},
     lambda p, device: training.pick_device(device))
rows('images to predict', {
    'of objects': (np.array([None, 'x'], object), 'images must be'),
    'of five channels': (np.zeros((4, 4, 5), np.uint8), 'three channels'),
    'of 16 bits': (np.zeros((4, 4, 3), np.uint16), 'images must be uint8'),
    'above 1': (np.full((4, 4, 3), 7.), 'float in 7 .. 7'),
    'NaN': (np.full((4, 4, 3), np.nan), 'images must be uint8, or float in 0..1'),
    'an empty list': ([], 'there are no images to predict'),
    'a number': (3, 'images must be paths'), 'of complex numbers': (np.zeros((4, 4, 3), complex), 'images must be'),
    'of letters': (np.array([['a']]), 'images must be'),
    'without pixels': (np.zeros((0, 0, 3), np.uint8), 'images must')},
    lambda p, images: methods.load(p.run, 'cpu').predict(images))
rows('batch', {repr(batch): (batch, f'batch is {re.escape(repr(batch))}; it must be a whole number')
               for batch in (0, -1, 2.5, None, True)},
     lambda p, batch: methods.load(p.run, 'cpu').predict(p.image(), batch=batch))
rows('quantile', {repr(q): (q, 'quantile is .*; it must be between 0 and 1') for q in (5., -1., float('nan'), 'x')},
     lambda p, q: methods.load(p.run, 'cpu').calibrate([p.image()], quantile=q))
rows('false alarms', {
    'none': (0., 'false_alarms is 0.0; it must be a share'), 'percent': (5., 'false_alarms is 5.0; it must be a share'),
    'fewer than can be promised': (0.001, 'cannot promise'), 'NaN': (float('nan'), 'false_alarms is nan')},
    lambda p, share: inspection.threshold_for([0.1] * 10, share))


@row('threshold: infinite', 'threshold is inf; it must be a finite number')
def _(p: Place) -> None: inspection.choose_threshold(methods.load(p.run, 'cpu'), threshold=float('inf'))


# ---- archives and addresses

rows('address', {url: (url, 'is no address of a server; it must begin with https') for url in
                 ('file:///etc/passwd', 'ftp://example.org/x', 'dtd.tar.gz', '')},
     lambda p, url: data.download_dtd(p.folder, url))
rows('archive', {
    'another': (b'no archive', 'is not the published archive'), 'empty': (b'', 'is not the published archive')},
    lambda p, content: ((p.folder / 'dtd-r1.0.1.tar.gz').write_bytes(content), data.download_dtd(p.folder)))


# ---- file systems and environment

def failing(error: OSError) -> Callable:
    def fails(*_: object, **__: object) -> None: raise error
    return fails


def writes(p: Place, error: OSError) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, 'replace', failing(error))
        files.write_json({}, p.folder / 'a.json')


rows('disk', {'full': (OSError(errno.ENOSPC, 'No space left on device'), 'the disk is full at .*; make room there'),
              'quota': (OSError(errno.EDQUOT, 'Disk quota exceeded'), 'the disk is full at .*; make room there')},
     writes)


def runs_where(p: Place, error: OSError) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, '_lock_file', failing(error))
        reports.run_report('category', dict(category='brick'), p.folder / 'run')


rows('run folder', {reason: (OSError(number, reason), f'cannot write to run folder .*{reason}') for number, reason in
                    ((errno.EROFS, 'Read-only file system'), (errno.EACCES, 'Permission denied'))}, runs_where)


@row('run folder: another command is at work in it', r'is in use by another command \(process \d+ on')
def _(p: Place) -> None:
    with runs.locked(p.folder), runs.locked(p.folder): pass


@row('environment: no temporary folder with a short path', 'is too long for the sockets of a kernel; set TMPDIR to')
def _(p: Place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'access', lambda *of: False)
        execution._socket_folder()


@row('environment: DRAEM_NB_MAX_PIXELS is no number', 'DRAEM_NB_MAX_PIXELS')
def _(p: Place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DRAEM_NB_MAX_PIXELS', 'many')
        data.read_image(p.image())


@row('cluster: nobody answers', 'no scheduler answers at tcp://127.0.0.1:9')
def _(p: Place) -> None: fanout.fan_out([dict(category='brick')], p.folder, scheduler='tcp://127.0.0.1:9', patience=1.)


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Place:
    "What the rows get copies of."
    place = Place(tmp_path_factory.mktemp('made'), *(tmp_path_factory.mktemp(name) / name for name in ('nut', 'run')))
    rng = np.random.default_rng(0)
    for name in (*(f'train/good/{i}.png' for i in range(6)), 'test/good/0.png', 'test/dent/0.png'):
        (to := place.nut / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(to)
    (mask := place.nut / 'ground_truth' / 'dent' / '0_mask.png').parent.mkdir(parents=True)
    Image.fromarray(np.uint8(np.arange(1600).reshape(40, 40) < 200) * 255).save(mask)
    train_nut(place)
    methods.load(place.run, 'cpu').calibrate([place.image()]).save_calibration(place.run)
    for name in ('metrics', 'parameters'): (place.run / f'{name}.json').write_text('{}')
    return place


@pytest.fixture
def place(made, tmp_path) -> Place:
    (tmp_path / 'here').mkdir()
    return Place(tmp_path / 'here', shutil.copytree(made.nut, tmp_path / 'nuts' / 'nut'),
                 shutil.copytree(made.run, tmp_path / 'run'))


@pytest.mark.parametrize('name', ROWS)
def test_bad_input_is_one_sentence(name, place, capfd):
    make, says = ROWS[name]
    def files() -> set:
        return {str(p) for p in place.folder.parent.rglob('*') if p.name.endswith('.tmp') or p.name == 'metrics.json'}
    before = files()
    try: make(place)
    except SystemExit as e: status, said = e.code, capfd.readouterr().err
    except (ValueError, OSError, reports.RunFailed) as e:      # which the command line prints as they are
        status, said = 1, f'draem_nb: {e}'
    else: pytest.fail('it was accepted')
    assert status in (1, 2) and 'Traceback' not in said
    *_, last = said.strip().splitlines()
    assert re.search(says, said), said
    assert status == 2 or (last.startswith('draem_nb: ') and len(said.strip().splitlines()) <= 2), said
    assert files() == before and not os.path.exists('/tmp/executed-by-a-checkpoint')


def test_the_table_is_as_long_as_promised():
    assert len(ROWS) >= 80


# ---- readers under random input: an error is one that the command line prints

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = ['threshold', 'pixel_threshold', 'quantile', 'held_out_scores', 'method', 'recipe', 'brightness', 'a']
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
json_values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(
    st.sampled_from(KEYS), v, max_size=5), max_leaves=12)
CELLS = ['cap', 'train', 'test', 'normal', 'anomaly', 'cap/a.png', '../x', '/etc/passwd', '', '"', '\n']
tables = st.lists(st.lists(st.sampled_from(CELLS), max_size=7), max_size=4).map(
    lambda rows: '\n'.join(['object,split,label,image,mask', *map(','.join, rows)]).encode())


def tried(call: Callable) -> None:
    try: call()
    except (ValueError, OSError) as e: assert str(e).strip()


@FUZZ
@given(st.binary(max_size=200) | tables)
def test_any_table_of_visa(tmp_path, content):
    for name in ('split_csv', 'cap'): (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / 'split_csv' / '1cls.csv').write_bytes(content)
    def read() -> None:
        found = list_files(tmp_path, 'cap', 'visa')
        for path in (*found.train, *found.test, *sum(found.masks, [])):
            assert path.resolve().is_relative_to(tmp_path / 'cap')
    tried(read)


@FUZZ
@given(st.sampled_from(['run.json', 'threshold.json', 'held_out.json']), json_values)
def test_any_json_of_a_run(made, name, value):
    kept = (made.run / name).read_bytes()
    try:
        (made.run / name).write_text(json.dumps(value))
        tried(lambda: methods.load(made.run, 'cpu'))
    finally: (made.run / name).write_bytes(kept)


@FUZZ
@given(st.sampled_from(['parameters.json', 'metrics.json']), json_values)
def test_any_json_of_a_complete_run(made, name, value):
    kept = (made.run / name).read_bytes()
    try:
        (made.run / name).write_text(json.dumps(value))
        tried(lambda: runs.is_complete(made.run, dict(report='category', recipe='demo')))
    finally: (made.run / name).write_bytes(kept)


@FUZZ
@given(st.dictionaries(st.sampled_from(list(recipes.Recipe.__dataclass_fields__)), json_values, min_size=1, max_size=3))
def test_any_field_of_a_recipe(fields): tried(lambda: recipes.demo().replace(**fields))


@FUZZ
@given(st.binary(max_size=300), st.sampled_from([b'', PNG, b'\xff\xd8\xff\xe0', b'BM', b'II*\0', b'RIFF']))
def test_any_mask(made, tmp_path, content, head):
    (bad := tmp_path / 'm.png').write_bytes(head + content)
    tried(lambda: data.read_mask(bad, made.image()))


def test_a_checkpoint_cut_at_every_kilobyte(made, tmp_path):
    whole = (made.run / 'checkpoint.pt').read_bytes()
    for n in range(0, len(whole), 1024):
        (tmp_path / 'checkpoint.pt').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='checkpoint.pt is not a readable checkpoint') as refused:
            training.load_checkpoint(tmp_path / 'checkpoint.pt')
        assert '\n' not in str(refused.value)


def test_a_table_of_verdicts_holds_no_formula():
    names = ['=x.png', '+x.png', '-x.png', '@x.png', '\t=x.png', '\r=x.png']
    table = pd.DataFrame(dict(file=[*names, '/photos/=x.png'], score=-0.5, verdict='=1+1'))
    lines = reports.as_csv(table, index=False).splitlines()
    assert lines[1] == "'=x.png,-0.5,'=1+1" and lines[-1].startswith('/photos/=x.png,')
    assert all(line.startswith("'") for line in lines[1:-1]) and len(lines) == len(table) + 1


# ---- the environment, and another user

@pytest.mark.parametrize('change', [dict(HOME=None), dict(LANG='C', LC_ALL='C'), dict(LANG=None, LC_ALL=None),
                                    dict(TZ='Asia/Kathmandu'), dict(TZ='no/where'), dict(HOME='/proc/none')], ids=str)
def test_the_environment_changes_no_word(made, tmp_path, change):
    shutil.copytree(made.run, tmp_path / 'runs' / 'é 가 나')
    base = os.environ | dict(HOME=str(tmp_path), LANG='C.UTF-8', LC_ALL='C.UTF-8', TZ='UTC')
    def said(changed: dict) -> tuple[int, bytes, bytes]:
        env = {key: value for key, value in (base | changed).items() if value is not None}
        done = subprocess.run([sys.executable, '-m', 'draem_nb', 'list', '--data-root', str(made.nut.parent),
                               '--runs-dir', 'runs'], cwd=tmp_path, env=env, capture_output=True)
        return done.returncode, done.stdout, done.stderr
    now = said(change)
    # Matplotlib says where it writes instead of a home that cannot be written.
    assert now[0] == 0 and (b'Traceback' not in now[2] if change == dict(HOME='/proc/none') else now[2] == b'')
    assert 'é 가 나: complete' in now[1].decode() and 'nut (mvtec)' in now[1].decode()
    if change == dict(HOME=None): assert said({}) == now


AS_NOBODY = """
import json, os, sys
from draem_nb import cli, execution, methods, reports, training   # now: nobody may not read where Python lies
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for argv in json.loads(sys.argv[1]): print('status', cli.main(argv), file=sys.stderr)"""


@pytest.mark.skipif(os.getuid() != 0, reason='only root can become another user')
def test_another_user_is_refused_in_one_sentence(made):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for of in ('open', 'locked', 'class', 'deep'): shutil.copytree(made.nut, root / of / 'nut')
        (root / 'locked').chmod(0o700)
        (root / 'class' / 'nut').chmod(0o700)
        (root / 'deep' / 'nut' / 'train' / 'good').chmod(0o700)
        (root / 'mine').mkdir()
        category = ['category', '--category', 'nut', '--data-root']
        calls = {'locked': [*category, str(root / 'locked'), '--run-dir', '/tmp/none'],
                 'class/nut': [*category, str(root / 'class'), '--run-dir', '/tmp/none'],
                 'good': [*category, str(root / 'deep'), '--run-dir', '/tmp/none'],
                 'mine': [*category, str(root / 'open'), '--run-dir', str(root / 'mine')],
                 'mine/new': [*category, str(root / 'open'), '--run-dir', str(root / 'mine' / 'new')]}
        done = subprocess.run([sys.executable, '-c', AS_NOBODY, json.dumps([*calls.values()])], cwd='/tmp', text=True,
                              capture_output=True)
        said = done.stderr.splitlines()
        assert len(said) == 2 * len(calls) and said[1::2] == ['status 1'] * len(calls), done.stderr
        for where, sentence in zip(calls, said[::2]):
            assert re.fullmatch(rf'draem_nb: [^[].*{where}.*Permission denied\)?; .*', sentence), sentence
        assert not any((root / 'mine').iterdir()) and not Path('/tmp/none').exists()


def test_every_layout_on_an_empty_folder(tmp_path):
    for layout in LAYOUTS: tried(lambda layout=layout: list_files(tmp_path, tmp_path.name, layout))


def test_a_training_that_went_on_under_other_circumstances_tells_it(place):
    before = json.loads((place.run / 'run.json').read_text())
    assert 'earlier' not in before and before['threads'] == torch.get_num_threads()
    place.json('run.json', before | dict(threads=7))                    # as if begun on a larger machine
    train_nut(place)
    now = json.loads((place.run / 'run.json').read_text())
    assert now == before | dict(earlier=[dict(threads=7)])


def test_ctrl_c_before_a_report_starts_is_one_word(monkeypatch, capsys):
    def interrupted(argv): raise KeyboardInterrupt
    monkeypatch.setattr(cli, '_run_argv', interrupted)
    assert cli.main(['category']) == 130 and capsys.readouterr().err == 'stopped\n'
