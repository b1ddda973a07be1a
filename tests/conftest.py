"""What several test files need: a built-in class, generators, classes made of given images, a browser."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from draem_nb.data import CategoryData, demo_category

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@pytest.fixture(scope='module')
def root(request, tmp_path_factory) -> Path:
    "A data folder with one built-in class: the one that the test file names as CLASS."
    return demo_category(request.module.CLASS, tmp_path_factory.mktemp('demo')).parent


def gen(seed=0): return torch.Generator().manual_seed(seed)


def class_of(train: torch.Tensor) -> CategoryData:
    "A class of these training images (N, 3, H, W) uint8; the first two are its test images, both good."
    masks = torch.zeros(2, 1, *train.shape[2:], dtype=torch.bool)
    paths = [Path('made') / f'{i}.png' for i in range(len(train))]
    return CategoryData('made', Path(), tuple(train.shape[2:]), train, train[:2], masks, masks, masks.flatten(1).any(1),
                        ['good'] * 2, paths[:2], paths)


class Browser:
    "One page in Chromium, spoken to by the DevTools protocol."
    def __init__(self, page: Path, folder: Path) -> None:
        websocket = pytest.importorskip('websocket')
        self.process = subprocess.Popen([CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu',
                                         '--remote-debugging-port=0', f'--user-data-dir={folder}',
                                         '--window-size=1200,900', page.as_uri()], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while not (port := folder / 'DevToolsActivePort').exists() and time.monotonic() < until: time.sleep(0.2)
        fetch = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        address = f'http://127.0.0.1:{port.read_text().split()[0]}/json'
        while (not (pages := [of for of in json.load(fetch(address)) if of['type'] == 'page'])
               and time.monotonic() < until):
            time.sleep(0.2)
        self.socket, self.n = websocket.create_connection(pages[0]['webSocketDebuggerUrl'], suppress_origin=True,
                                                          timeout=60), 0
        while self('location.protocol + document.readyState') != 'file:complete' and time.monotonic() < until:
            time.sleep(0.2)

    def send(self, method: str, **params: object) -> dict:
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (answer := json.loads(self.socket.recv())).get('id') != self.n: pass
        return answer['result']

    def __call__(self, script: str) -> object:
        answer = self.send('Runtime.evaluate', expression=script, returnByValue=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def screenshot(self, to: Path) -> None:
        to.write_bytes(base64.b64decode(self.send('Page.captureScreenshot')['data']))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
