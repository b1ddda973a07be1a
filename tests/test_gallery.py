"The gallery of a report, driven in a headless Chromium; without one, what can be said of the page as text."
import base64
import hashlib
import re
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import CHROMIUM, Browser

from draem_nb.gallery import SCRIPT, SCRIPT_HASH, count_in_words, gallery
from draem_nb.execution import to_html

SCORES = [0.1, 0.5, 0.3, 0.7, 0.9, 0.45]
KINDS = ['good', 'good', 'hole', 'crack', 'crack', 'hole']


@pytest.fixture(scope='module')
def page(tmp_path_factory) -> Path:
    "A report whose notebook shows a gallery, and beside it what an attacker would like to run."
    html = gallery(SCORES, ['<b>x</b>', *'bcdef'], lambda i: np.full((24, 32, 3), 40 * i, np.uint8), 0.4, KINDS,
                   photo=lambda i: np.zeros((24, 32, 3), np.uint8))
    html += '<img src=x onerror="window.ran=1"><script>window.ran=2</script>'
    output = nbformat.v4.new_output('display_data', {'text/html': html})
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# A report'),
                                         nbformat.v4.new_code_cell('1', outputs=[output])])
    folder = tmp_path_factory.mktemp('page')
    nbformat.write(nb, folder / 'report.ipynb')
    return to_html(folder / 'report.ipynb', folder / 'report.html', 'a report')


@pytest.fixture
def browser(page, tmp_path):
    if not CHROMIUM: pytest.skip('there is no Chromium')
    browser = Browser(page, tmp_path)
    yield browser
    browser.close()


COUNT = "document.querySelector('.gallery-count').textContent"
SHOWN = "[...document.querySelectorAll('figure')].filter(f => !f.hidden).map(f => f.dataset.score)"


def choose(nth: int, value: str) -> str:
    return (f"(() => {{ const s = document.querySelectorAll('select')[{nth}]; s.value = {value!r}; s.dispatchEvent(new "
            f"Event('change')); }})()")


def slide(share: int) -> str:
    return (f"(() => {{ const s = document.querySelector('input[type=range]'); s.value = {share}; s.dispatchEvent(new "
            f"Event('input')); }})()")


def test_the_slider_counts_and_the_choices_filter_and_sort(browser):
    assert browser(COUNT) == count_in_words(SCORES, [kind == 'good' for kind in KINDS], 0.4)
    assert browser(SHOWN) == ['0.9', '0.7', '0.5', '0.45', '0.3', '0.1']
    for share in (0, 250, 480, 720, 1000):
        browser(slide(share))
        threshold = 0.1 + 0.8 * share / 1000
        assert browser(COUNT) == count_in_words(SCORES, [kind == 'good' for kind in KINDS], threshold)
        assert browser("document.querySelectorAll('figure.alarm').length") == sum(score > threshold for score in SCORES)
    browser("document.querySelector('.gallery button').click()")
    assert browser(COUNT).startswith('At the threshold 0.4:')
    for value, scores in (('misses', ['0.3']), ('false alarms', ['0.5']), ('alarms', ['0.9', '0.7', '0.5', '0.45'])):
        browser(choose(0, value))
        assert browser(SHOWN) == scores
    browser(choose(0, 'all')); browser(choose(1, 'hole'))
    assert browser(SHOWN) == ['0.45', '0.3']
    browser(choose(1, 'all')); browser(choose(2, 'nearest to the threshold'))
    assert browser(SHOWN)[0] == '0.45' and browser(SHOWN)[-1] == '0.9'


def test_click_and_keys_enlarge(browser, tmp_path):
    large = "(f => f && f.dataset.score)(document.querySelector('figure.large'))"
    key = lambda name: browser(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: {name!r}}}))")
    browser("document.querySelector('figure img').click()")
    assert (browser(large) == '0.9' and browser("document.querySelector('figure.large').getBoundingClientRect().width")
            > 900)
    key('ArrowRight'); assert browser(large) == '0.7'
    key('ArrowLeft'); key('ArrowLeft'); assert browser(large) == '0.1'
    top = "document.querySelector('figure.large .layers img + img')"
    assert browser(f'getComputedStyle({top}).opacity') == '1'             # the overlay, with the photo under it
    key('ArrowDown'); key('ArrowDown'); key('ArrowUp')
    assert browser(f'getComputedStyle({top}).opacity') == '0.9'
    browser("(s => { s.value = 30; s.dispatchEvent(new Event('input')); })"
            "(document.querySelector('.gallery-opacity input'))")
    assert browser(f'getComputedStyle({top}).opacity') == '0.3'
    for point in ("document.querySelector('.gallery-opacity input')", top):     # neither is hidden by the other
        assert browser('(e => { const r = e.getBoundingClientRect(); '
                       'return document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2) === e; '
                       f'}})({point})')
    key('Escape'); assert browser(large) is None
    browser("document.querySelector('figure').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))")
    assert browser(large) == '0.9'


def test_no_other_script_runs_and_names_are_text(browser):
    time.sleep(0.5)
    assert browser('window.ran') is None and browser("document.querySelector('figure[data-score=\"0.1\"] "
                                                     "figcaption').textContent").startswith('<b>x</b>')


def test_the_policy_names_the_one_script(page):
    text = page.read_text()
    [policy] = re.findall(r"default-src 'none'[^\"]*", text)
    assert (policy.count('script-src') == 1 and f"script-src '{SCRIPT_HASH}'" in policy
            and 'unsafe-inline' not in policy.split('script-src')[1])
    [script] = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    assert (script == SCRIPT and 'sha256-' + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            == SCRIPT_HASH)


def test_without_a_script_all_is_readable(page):
    text = page.read_text()
    assert (count_in_words(SCORES, [kind == 'good' for kind in KINDS], 0.4) in text and '<select' not in text
            and text.count('<figure') == len(SCORES))
    assert not re.search(r'<figure[^>]*hidden', text) and '&lt;b&gt;x&lt;/b&gt;' in text
