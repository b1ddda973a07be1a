"""Names and files that come from somebody else: shown as they are, never executed, never the end of the whole."""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import CHROMIUM, Browser

from draem_nb import cli, execution, reports, runs
from draem_nb.cli import main
from draem_nb.files import as_markdown, shown
from draem_nb.layouts import find_files, list_files
from draem_nb.reports import run_report

ATTACKS = ('<svg onload=window.ran=1>', '<img src=x onerror=window.ran=1>', '[a](javascript:window.ran=1)')


class Scripts(HTMLParser):
    "Collects all that a browser would execute; the first is the script of the report itself (tests/test_gallery.py)."
    def __init__(self) -> None: super().__init__(); self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag in ('script', 'iframe', 'object', 'embed'): self.found.append(tag)
        self.found += [f'{tag} {name}' for name, value in attributes if name.startswith('on')
                       or 'javascript:' in (value or '').lower()]


def scripts(page: str) -> list[str]:
    parser = Scripts()
    parser.feed(page)
    return parser.found


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    "A run of the built-in class, twenty steps, calibrated."
    from draem_nb.data import demo_category, load_category
    from draem_nb.detector import Detector
    from draem_nb.recipes import demo
    from draem_nb.textures import load_textures
    from draem_nb.training import train
    root, run = demo_category('brick'), tmp_path_factory.mktemp('run')
    tiny = demo().replace(size=64, base_width=4, base_channels=4, steps=4, score_window=5, precision='float32')
    train(load_category(root.parent, 'brick', 64), load_textures(size=64), tiny, run, 'cpu')
    Detector.load(run, 'cpu').calibrate(root / 'test' / 'good').save_calibration(run)
    return run


NAMES = ('$x_$.png', 'a"b\'c.png', 'line\nbreak.png', '가나다.png', '🔩 bolt.png', '=cmd|calc.png',
         ATTACKS[0] + '.png', ATTACKS[1] + '.png', '<script>window.ran=1.png', 'n' * 251 + '.png',
         os.fsdecode(b'caf\xe9.png'))


def test_one_name_or_one_file_does_not_end_an_inspection(trained, tmp_path, capfd):
    from draem_nb.data import demo_category
    image, photos = demo_category('brick') / 'test' / 'good' / '000.png', tmp_path / 'photos'
    photos.mkdir()
    for name in NAMES: shutil.copy(image, photos / name)
    (photos / 'broken.jpg').write_bytes(image.read_bytes()[:500])
    for name in ('IMG_0001.HEIC', 'b.heic'): shutil.copy(image, photos / name)
    assert main(['inspect', '--run-dir', str(trained), '--images', str(photos), '--out-dir',
                 str(tmp_path / 'seen')]) == 3
    said = capfd.readouterr().out
    assert ('2 files not looked at: IMG_0001.HEIC, b.heic; save pictures as png or jpg.' in said
            and 'unreadable: ' in said and 'broken.jpg' in said)
    rows = list(csv.DictReader(io.StringIO((tmp_path / 'seen' / 'verdicts.csv').read_text(encoding='utf-8'))))
    assert (len(rows) == len(NAMES) + 1 and rows[0]['verdict'].startswith('unreadable: ')
            and rows[0]['file'] == str(photos / 'broken.jpg'))
    assert {row['file'] for row in rows[1:]} == {shown(photos / name) for name in NAMES}
    assert all(row['verdict'] in ('normal', 'anomalous') and float(row['margin'])
               == pytest.approx(float(row['score']) - float(row['threshold']), abs=2e-6) for row in rows[1:])
    assert all(row['defect_pixels'].isdecimal() for row in rows[1:])         # whole numbers, not 7.000000
    metrics = json.loads((tmp_path / 'seen' / 'metrics.json').read_text())
    assert (metrics['images'], metrics['unreadable'], metrics['not_looked_at']) == (len(NAMES) + 1, 1, 2)
    page = (tmp_path / 'seen' / 'report.html').read_text()
    assert ('가나다.png' in page and '🔩 bolt.png' in page and r'line\nbreak.png' in page and r'caf\xe9.png' in page
            and '2 files not looked at' in page and '&lt;script&gt;window.ran=1.png' in page)
    assert len(list((tmp_path / 'seen' / 'overlays').iterdir())) == len(NAMES) and scripts(page) == ['script']


def test_nothing_from_the_data_is_executed(tmp_path, capfd):
    "The three attacks as kinds of defect and as a class, in the report of a class."
    from draem_nb.data import demo_category
    names = [a.replace('/', '') for a in ATTACKS]
    source = demo_category('brick')
    target = tmp_path / names[2]
    shutil.copytree(source / 'train', target / 'train')
    shutil.copytree(source / 'test' / 'good', target / 'test' / 'good')
    for path in target.rglob('*.png'):
        if int(path.stem) > 15: path.unlink()
    for kind, name in zip(('crack', 'hole'), names):
        shutil.copytree(source / 'test' / kind, target / 'test' / name)
        shutil.copytree(source / 'ground_truth' / kind, target / 'ground_truth' / name)
    (target / 'train' / 'good' / (names[0] + '.heic')).touch()
    tiny = dict(size=32, base_width=4, base_channels=4, steps=2, batch=2, score_window=5, perlin_scales=[0, 2],
                precision='float32')
    for method, overrides in (('draem', tiny), ('cutpaste', dict(steps=3, width=4, batch=2, stride=8))):
        page = run_report('category', dict(category=names[2], method=method, data_root=str(tmp_path),
                                           overrides=overrides), tmp_path / method).report.read_text()
        assert '1 file not looked at' in capfd.readouterr().out         # on the console as well
        assert page.index('1 file not looked at') < page.index('The data<')         # and in the headline
        assert scripts(page) == ['script'] and '<svg' not in page and '&lt;svg onload' in page
        policy, refused = 'http-equiv="Content-Security-Policy"', "default-src 'none'"
        assert re.search(f'<meta (content="{refused}[^>]*{policy}|{policy}[^>]*{refused})', page)
    assert '1 file not looked at' in page
    if CHROMIUM:                                # and in a browser
        browser = Browser(tmp_path / 'draem' / 'report.html', tmp_path / 'browser')
        try: assert browser('window.ran') is None and browser('document.body.innerText.includes("onerror")')
        finally: browser.close()


def test_names_are_shown_as_one_line_of_text():
    assert (shown(os.fsdecode(b'caf\xe9')) == r'caf\xe9' and shown('a\nb\u202eb') == r'a\nb\u202eb'
            and shown('가 🔩 é') == '가 🔩 é')
    from nbconvert.filters.markdown_mistune import markdown2html_mistune
    for text in (*ATTACKS, '$x_$', '**a** `b` _c_ https://example.org', 'a|b~c~'):
        page = markdown2html_mistune(f'**{as_markdown(text)}**')
        assert scripts(page) == [] and re.fullmatch(r'<p><strong>[^<]*</strong></p>\s*', page), page


def test_options_that_do_not_parse_are_named(capsys):
    for option, given in (('--kinds', '["crack"'), ('--kinds', 'spot'), ('--overrides', '[1'), ('--overrides', '[1]'),
                          ('--seed', 'null')):
        with pytest.raises(SystemExit) as caught: main(['category', option, given])
        assert caught.value.code == 2 and f'{option[2:]} must be a value like' in capsys.readouterr().err
    assert cli._make_parser().parse_args(['category', '--data-root', '[mvtec]/x']).data_root == '[mvtec]/x'
    assert cli._make_parser().parse_args(['category', '--kinds', '["crack"]']).kinds == ['crack']


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b'caf\xe9')
    folder.mkdir()
    assert main(['category', '--data-root', str(folder), '--run-dir', str(tmp_path / 'run')]) == 1
    assert (r'caf\xe9, which is no UTF-8; rename that folder' in capsys.readouterr().err
            and not (tmp_path / 'run').exists())


def test_only_regular_files_are_read_and_each_folder_once(tmp_path):
    from PIL import Image
    photos = tmp_path / 'photos'
    (photos / 'a' / 'b').mkdir(parents=True)
    for name in ('1.png', 'a/2.webp', 'a/b/3.jfif', 'a/4.avif'):
        Image.new('L', (8, 8)).save(photos / name, format={'.jfif': 'jpeg'}.get(Path(name).suffix))
    os.mkfifo(photos / 'pipe.png')
    os.symlink('/dev/zero', photos / 'zero.png')
    os.symlink('nowhere', photos / 'broken.png')
    for i, target in enumerate(('.', '.', '..', '../..')): os.symlink(target, photos / 'a' / f'0-link{i}')
    found = find_files(photos)
    assert [p.relative_to(photos).as_posix() for p in found.images] == ['1.png', 'a/2.webp', 'a/4.avif', 'a/b/3.jfif']
    assert ({p.name: reason for p, reason in found.skipped.items()}
            == dict.fromkeys(('pipe.png', 'zero.png', 'broken.png'), 'not a regular file'))
    from draem_nb.data import load_images, read_image
    assert len(load_images(found.images, 8)) == 4
    for name in ('pipe.png', 'zero.png'):
        with pytest.raises(ValueError, match=f'cannot read the image .*{name}: it is not a regular file'):
            read_image(photos / name)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for name in ('train/good/0.png', 'train/good/locked/1.png'):
        (tmp_path / 'nut' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'nut' / name).touch()
    scan = os.scandir
    def refuse(path: Path):         # as another user's folder does; this test may run as root
        if Path(path).name == 'locked': raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError, match='locked: the folder cannot be read: Permission denied; allow it'):
        list_files(tmp_path, 'nut')
    assert (list(find_files(tmp_path).locked) == [tmp_path / 'nut' / 'train' / 'good' / 'locked']
            and len(find_files(tmp_path).images) == 1)


def test_only_a_few_formats_are_opened_and_no_huge_image(tmp_path, monkeypatch):
    from PIL import Image

    from draem_nb.data import read_image
    (tmp_path / 'a.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n')
    with pytest.raises(ValueError, match='a.png: no known image format'): read_image(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1 << 28)
    Image.new('1', (20000, 10000)).save(tmp_path / 'large.png')
    with pytest.raises(ValueError, match='20000 x 10000 pixels are more than 134217728; set DRAEM_NB_MAX_PIXELS'):
        read_image(tmp_path / 'large.png')
    Image.new('1', (200, 100)).save(tmp_path / 'small.png')
    with pytest.raises(ValueError, match='200 x 100 pixels are more than 19999'):
        read_image(tmp_path / 'small.png', 19999)
    assert read_image(tmp_path / 'small.png', 20000).size == (200, 100)
    monkeypatch.setenv('DRAEM_NB_MAX_PIXELS', '5000')
    with pytest.raises(ValueError, match='more than 5000'): read_image(tmp_path / 'small.png')


def test_files_that_are_not_looked_at_are_named_in_training_and_check(tmp_path):
    from draem_nb.check import check
    from draem_nb.data import demo_category
    shutil.copytree(demo_category('brick'), tmp_path / 'nut')
    for i in range(4): (tmp_path / 'nut' / 'train' / 'good' / f'IMG_{i}.HEIC').touch()
    said = '4 files not looked at: IMG_0.HEIC, IMG_1.HEIC, IMG_2.HEIC, ...; save pictures as png or jpg.'
    assert said in list_files(tmp_path, 'nut').notes
    found = check(tmp_path, 'nut')
    assert (list(found.problem) == ['not looked at'] * 4 and found.file[0].endswith('IMG_0.HEIC')
            and 'not a format that is read' in found.detail[0])


def test_latex_of_the_summary_holds_no_command(tmp_path):
    conditions = dict(category='bottle', recipe=r'\input{/etc/passwd} $x~^{', size=[64, 64], base_width=8,
                      base_channels=4, steps=20, batch=4, seed=0, mask_rule='half')
    (tmp_path / '=run').mkdir()
    (tmp_path / '=run' / 'run.json').write_text('{"device": "=cmd|calc"}')
    (tmp_path / '=run' / 'metrics.json').write_text(json.dumps(dict(image=dict(auroc=.9, f1_max=.9),
                                                                    pixel=dict(auroc=.9, ap=.5, f1_max=.6, aupro=.7),
                                                                    conditions=conditions)))
    run_report('summary', dict(runs_dir=str(tmp_path)), tmp_path / 'summary')
    tex = (tmp_path / 'summary' / 'detection.tex').read_text()
    assert (r'\input' not in tex and r'\textbackslash{}input\{/etc/passwd\} \$x\textasciitilde{}\textasciicircum{}\{'
            in tex)
    assert "'=cmd|calc" in (tmp_path / 'summary' / 'runs.csv').read_text()


def run_of(folder: Path, **held: object) -> Path:
    "A made-up complete run of the class nut."
    folder.mkdir(parents=True)
    asked = runs.asked_parameters('category', dict(category='nut', **held))[1]
    for name, value in dict(parameters=asked, metrics=dict(image=dict(auroc=.9)), timing=dict(seconds=125.),
                            run=dict(recipe={})).items():
        (folder / f'{name}.json').write_text(json.dumps(value))
    (folder / 'report.html').touch()
    return folder


@pytest.fixture
def nut(tmp_path) -> Path:
    "A class of five images; its folder."
    from PIL import Image
    for i in range(5):
        path = tmp_path / 'data' / 'nut' / ('train' if i < 4 else 'test') / 'good' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (40, 40), 50 + i).save(path)
    return tmp_path / 'data' / 'nut'


def test_a_complete_run_says_so_and_refuses_other_images(nut, tmp_path, capsys):
    command = ['category', '--category', 'nut', '--data-root', str(nut.parent), '--run-dir',
               str(run := tmp_path / 'run')]
    run_of(run, data_root=str(nut.parent))
    runs.write_json(runs.file_notes(runs.input_files(
        runs.asked_parameters('category', dict(category='nut', data_root=str(nut.parent)))[1]), {}),
        run / 'inputs.json')
    for path in nut.rglob('*.png'): os.utime(path, (1e9, 1e9))           # copied: another time, the same content
    assert main(command) == 0
    said = capsys.readouterr().out
    assert ('complete since ' in said and f'nothing was run; to run anew, remove {run} or name another folder with '
            '--run-dir' in said and '125 s' not in said)
    (nut / 'train' / 'good' / '0.png').rename(nut / 'train' / 'good' / '9.png')
    shutil.copy(nut / 'train' / 'good' / '1.png', nut / 'train' / 'good' / '2.png')
    assert main(command) == 1
    assert ('files have changed since: train/good/9.png is new, train/good/0.png is gone, train/good/2.png is another; '
            'choose another folder'
            in capsys.readouterr().err)
    shutil.rmtree(nut)                                                  # gone altogether: nothing can be said of it
    assert main(command) == 0


def test_the_seconds_printed_are_those_of_the_user(tmp_path, monkeypatch, capsys):
    def slow(name, params, run_dir):
        time.sleep(1)
        return runs.RunResult(tmp_path, tmp_path / 'report.html', {}, 0.1)       # by the clock of the notebook
    monkeypatch.setattr(reports, 'run_report', slow)
    for name in ('metrics.json', 'report.html'): (tmp_path / name).write_text('{}')
    assert main(['category']) == 0 and re.search(r'^[1-9]\d* s; report', capsys.readouterr().out, re.MULTILINE)


def test_inspections_have_folders_of_their_own(tmp_path, monkeypatch, capsys):
    now = {'%Y%m%d': '20261127', '%H%M%S': '081500'}
    monkeypatch.setattr('time.strftime', lambda how, *at: now[how])
    ask = lambda day: runs.default_folder('inspect',
                                             dict(run_dir=str(tmp_path), images=str(tmp_path / day / 'photos')))
    first = ask('day1')
    assert first == tmp_path / 'inspect-photos-20261127-081500'
    first.mkdir()
    assert ask('day2') == tmp_path / 'inspect-photos-20261127-081500-2'
    (first / 'metrics.json').write_text('{}')
    assert main(['inspect', '--run-dir', str(tmp_path), '--images', str(tmp_path), '--out-dir', str(first)]) == 1
    assert 'holds a report already' in capsys.readouterr().err


@pytest.mark.parametrize('content, says', [(b'', 'is no JSON'), (b'[1, 2]', 'holds list instead of an object'),
                                           (b'\xff\xfe', 'is no JSON'), (b'null', 'holds NoneType'),
                                           (b'[' * 100_000, 'is no JSON')])
@pytest.mark.parametrize('name', ('run', 'parameters', 'metrics'))
def test_damaged_files_of_a_run_are_named(tmp_path, capsys, name, content, says):
    from draem_nb.evaluation import read_runs
    from draem_nb.fanout import plan
    run = run_of(tmp_path / 'nut-demo-seed0')
    (run / f'{name}.json').write_bytes(content)
    if name == 'run':
        from draem_nb.methods import load
        with pytest.raises(ValueError, match=f'run.json is damaged: it {says}'): load(run)
        planned, = plan([dict(category='nut', recipe='demo')], tmp_path).to_dict('records')
        assert planned['todo'] == 'refused' and 'run.json is damaged' in planned['why']
    else:
        assert main(['category', '--category', 'nut', '--run-dir', str(run)]) == 1
        said = capsys.readouterr().err
        assert f'{name}.json is damaged: it {says}' in said and 'Traceback' not in said
    runs, incomplete = read_runs(tmp_path)
    assert not runs and (name == 'parameters' or f'{name}.json is damaged' in incomplete[0])


def test_the_next_run_sweeps_what_a_killed_one_left(tmp_path):
    from draem_nb.files import remove_leftovers, replacing, temporary_folder
    code = (f"import os, signal; from draem_nb.files import replacing, temporary_folder\n"
            f"with temporary_folder({str(tmp_path)!r}, 'sockets'), replacing({str(tmp_path / 'checkpoint.pt')!r}) as "
            "to: to.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / '.mine.tmp').touch()                                    # of somebody else
    with replacing(tmp_path / 'other') as ours:                         # of a process that lives
        remove_leftovers(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {'.mine.tmp', ours.name}
        runs.begin_run(tmp_path, {})
        assert ours.exists()
    with temporary_folder(tmp_path, 'sockets') as folder: remove_leftovers(tmp_path); assert folder.is_dir()
    assert not folder.exists()


def test_a_folder_swept_away_at_its_making_is_made_again(tmp_path, monkeypatch):
    from draem_nb import files
    lock, swept = fcntl.flock, []
    def late(file: int, how: int) -> None:      # as if another process had swept between making and locking
        if not swept: swept.extend(shutil.rmtree(path) or path for path in tmp_path.iterdir())
        lock(file, how)
    monkeypatch.setattr(fcntl, 'flock', late)
    with files.temporary_folder(tmp_path, 'sockets') as folder: assert swept and folder.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_so_and_where(tmp_path, monkeypatch):
    from draem_nb import files
    def fails(error: Exception) -> None:
        with files.replacing(tmp_path / 'checkpoint.pt'): raise error
    with pytest.raises(OSError, match=f'^the disk is full at {tmp_path}; make room there'):
        fails(OSError(errno.ENOSPC, 'No space left on device'))
    with pytest.raises(RuntimeError, match='^something else$'): fails(RuntimeError('something else'))
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(files.DiskFull):
        fails(RuntimeError('unexpected pos 3040896 vs 3040784'))     # as torch.save says it
    assert not list(tmp_path.iterdir())
    full = OSError(errno.ENOSPC, 'No space left on device', '/runs/a')
    assert execution._reason_of(full) == 'the disk is full: /runs/a'


def test_archives_and_addresses_that_are_not_what_they_should_be(tmp_path, monkeypatch):
    from draem_nb import download
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for i in range(3):
            (member := tarfile.TarInfo(f'dtd/{i}.png')).size = 1 << 16
            tar.addfile(member, io.BytesIO(os.urandom(1 << 16)))
    whole = buffer.getvalue()
    def unpack(content: bytes) -> Path:
        (tmp_path / 'dtd-r1.0.1.tar.gz').write_bytes(content)
        monkeypatch.setattr(download, '_DTD_SHA256', hashlib.sha256(content).hexdigest())
        return download.download_dtd(tmp_path)
    for cut in (whole[:len(whole) // 2], b'', b'no archive'):
        with pytest.raises(ValueError, match='dtd-r1.0.1.tar.gz cannot be unpacked, it is cut short or no archive'):
            unpack(cut)
    monkeypatch.setattr(download, '_UNPACKED', 1 << 17)
    with pytest.raises(ValueError, match='is not safe to unpack: it holds more than'): unpack(whole)
    assert [p.name for p in tmp_path.iterdir()] == ['dtd-r1.0.1.tar.gz']
    (tmp_path / 'dtd-r1.0.1.tar.gz').unlink()
    for url in ('file:///etc/passwd', 'ftp://example.org/x', 'dtd.tar.gz'):
        with pytest.raises(ValueError, match='is no address of a server; it must begin with https'):
            download.download_dtd(tmp_path, url)


def test_the_list_names_classes_and_runs_and_what_is_damaged(nut, tmp_path, capsys):
    run_of(tmp_path / 'runs' / 'nut-demo-seed0')
    run_of(tmp_path / 'runs' / 'nut-demo-seed1').joinpath('metrics.json').unlink()
    run_of(tmp_path / 'runs' / 'nut-demo-seed2').joinpath('metrics.json').write_text('[]')
    assert main(['list', '--data-root', str(nut.parent), '--runs-dir', str(tmp_path / 'runs')]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (said[:2] == [f'1 classes in {nut.parent}', '  nut (mvtec)'] and said[3] == '  nut-demo-seed0: complete, '
            'image AUROC 0.900')
    assert (said[4] == '  nut-demo-seed1: not complete; the same command goes on'
            and 'metrics.json is damaged: it holds list' in said[5])
    assert main(['list', '--runs-dir', str(tmp_path / 'none')]) == 0 and 'brick (built in)' in capsys.readouterr().out


def test_a_server_that_sends_nonsense(tmp_path):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from draem_nb import download
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(416 if self.path == '/416' else 200)
            if self.path != '/416': self.send_header('Content-Length', 'abc')
            self.end_headers()
            if self.path != '/416': self.wfile.write(b'content')
        def log_message(self, *what: object) -> None: pass
    server = HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
        download._download_file(f'{address}/abc', tmp_path / 'part', tmp_path / 'archive')
        assert (tmp_path / 'part').read_bytes() == b'content'
        with pytest.raises(ConnectionError, match='cannot download .*416'):
            download._download_file(f'{address}/416', tmp_path / 'none', tmp_path / 'archive')
    finally: server.shutdown()


STEPS = {'a step far away': lambda state: state | dict(step=10**6),
         'a negative step': lambda state: state | dict(step=-1),
         'a step that is none': lambda state: state | dict(step='x'),
         'no losses': lambda state: {k: v for k, v in state.items() if k != 'history'}}


@pytest.mark.parametrize('damage', STEPS)
def test_no_training_goes_on_from_a_step_that_cannot_be(trained, tmp_path, damage):
    import torch

    from draem_nb.data import demo_category, load_category
    from draem_nb.recipes import Recipe
    from draem_nb.textures import load_textures
    from draem_nb.training import train
    for name in ('checkpoint.pt', 'run.json', 'threshold.json'): shutil.copy(trained / name, tmp_path)
    state = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    recipe = Recipe(**state['recipe'])
    torch.save(STEPS[damage](state), tmp_path / 'checkpoint.pt')
    data = load_category(demo_category('brick').parent, 'brick', 64)
    with pytest.raises(ValueError, match='checkpoint.pt is damaged'):
        train(data, load_textures(size=64), recipe, tmp_path, 'cpu')
