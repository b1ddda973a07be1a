"""The project as a whole: what is generated agrees with its source, and what is installed is complete."""

import ast
import io
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tokenize
import zipfile
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from draem_nb.parameters import folder_rule, report_names, report_parameters

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def settings() -> dict:
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini')
    return parser['DEFAULT']


def test_every_module_has_its_notebook():
    exported = {m[1] for p in NOTEBOOKS for m in re.finditer(r'#\| default_exp (\w+)', p.read_text())}
    modules = {p.stem for p in (ROOT / 'draem_nb').glob('*.py') if not p.stem.startswith('_')}
    assert modules == exported


def test_readme_is_made_from_the_index():
    sys.path.insert(0, str(ROOT / 'nbs'))
    from make_readme import make_readme
    for path, content in make_readme().items():
        assert path.read_bytes() == content, f'{path.name} is out of date: make readme'


def test_notebooks_lead_to_each_other():
    sys.path.insert(0, str(ROOT / 'nbs'))
    from make_links import link_lines, with_line
    for path, line in link_lines().items():
        assert path.read_text() == with_line(path.read_text(), line), f'{path.name}: make readme'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_links_of_notebooks_lead_somewhere(notebook):
    for cell in json.loads(notebook.read_text())['cells']:
        if cell['cell_type'] != 'markdown': continue
        text = re.sub(r'```.*?```|`[^`\n]+`', '', ''.join(cell['source']), flags=re.DOTALL)
        for link in re.findall(r'\]\((?!https?:|#)([^)#\s]+)', text): assert (notebook.parent / link).exists(), link


def test_every_notebook_has_its_place_on_the_site():
    assert '12c_runs' in runpy.run_path(str(ROOT / 'site' / 'build.py'))['toctrees']()   # SystemExit names one without


def test_readme_names_what_is_there():
    text = (ROOT / 'README.md').read_text()
    for link in re.findall(r'\]\((?!https?:|#)([^)#]+)', text): assert (ROOT / link).exists(), link
    makefile = (ROOT / 'Makefile').read_text()
    for target in set(re.findall(r'(?:^|`)make ([a-z]+)', text, re.M)):
        assert re.search(rf'^{target}:', makefile, re.M), target


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_small_and_without_errors(notebook):
    assert notebook.stat().st_size < 1_000_000
    cells = json.loads(notebook.read_text())['cells']
    assert not [o for c in cells for o in c.get('outputs', []) if o['output_type'] == 'error']
    # a doubled backslash in an equation is a line break, and the command behind it a word
    assert not [c for c in cells if c['cell_type'] == 'markdown'
                and re.search(r'\$[^$]*\\\\[a-z]+', ''.join(c['source']))]
    # a directory of the machine where it was executed helps nobody
    assert not re.search(r'/(home|root|work)/', json.dumps([c.get('outputs') for c in cells]))
    # a widget would make a page of the site load its program from the network
    assert 'jupyter.widget' not in json.dumps([c.get('outputs') for c in cells])


def test_parameters_tag_survives_cleaning(tmp_path):
    assert 'tags' in settings()['allowed_cell_metadata_keys'].split()
    for report in (ROOT / 'nbs' / 'reports').glob('*.ipynb'):
        tags = [t for c in json.loads(report.read_text())['cells'] for t in c['metadata'].get('tags', [])]
        assert tags.count('parameters') == 1, report


def test_every_report_declares_where_it_goes():
    for name in report_names():
        fields = re.findall('<(?:name of )?(.*?)>', rule := folder_rule(name))
        asked = {key for field in fields for key in field.split(' or ')}
        known = {*report_parameters(name), 'date', 'time', 'run_dir'}
        assert rule.startswith(('runs/', '<')) and asked <= known, f'{name}: {rule}'


def test_constraints_hold_every_requirement():
    pinned = {line.split('==')[0].lower().replace('_', '-')
              for line in (ROOT / 'constraints.txt').read_text().splitlines() if '==' in line}
    needed = {re.split(r'[<>=!]', r)[0].lower().replace('_', '-') for key in settings() if key.endswith('requirements')
              for r in settings()[key].split()}
    assert needed <= pinned, needed - pinned


DISTRIBUTIONS = dict(PIL='pillow', skimage='scikit-image', sklearn='scikit-learn', IPython='ipython', zmq='pyzmq',
                     jupyter_client='jupyter-client')
# torchvision: where it is there; ipykernel: the kernel of the reports, a program of its own
OPTIONAL, STARTED = {'torchvision'}, {'ipykernel'}


def imported() -> set[str]:
    "The distributions that the library and its reports import, somewhere."
    trees = [ast.parse(p.read_text()) for p in (ROOT / 'draem_nb').glob('*.py')]
    for notebook in (ROOT / 'nbs' / 'reports').glob('*.ipynb'):
        cells = json.loads(notebook.read_text())['cells']
        trees += [ast.parse(''.join(c['source'])) for c in cells if c['cell_type'] == 'code']
    names = {name.split('.')[0] for tree in trees for node in ast.walk(tree)
             for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                          [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])}
    return {DISTRIBUTIONS.get(name, name) for name in names - set(sys.stdlib_module_names) - {'draem_nb'}}


def test_the_runtime_requirements_are_what_the_library_imports():
    parts = {key: {re.split(r'[<>=!]', r)[0] for r in text.split()} for key, text in settings().items()
             if key.endswith('requirements')}
    extras = parts['cluster_requirements'] | parts['export_requirements'] | parts['explore_requirements']
    assert parts['requirements'] == (imported() - extras - OPTIONAL) | STARTED
    # what `make` installs as well
    assert {'nbdev', 'fastcore', 'execnb', 'ghapi', 'jupyterlab'} <= parts['dev_requirements']


def test_every_pinned_package_has_hashes_and_no_index_is_named():
    text = (ROOT / 'requirements-hashed.txt').read_text()
    hashed = dict(re.findall(r'(?m)^([\w.-]+)==(\S+?)(?: ;[^\\]*)? \\\n    --hash=sha256:[0-9a-f]{64}', text))
    assert len(hashed) == len(re.findall('(?m)^[^ #]', text))
    assert not re.search('://|--(extra-)?index|--find-links', text)
    pinned = {re.sub('[-_.]+', '-', name).lower(): version for name, version in
              (line.split('==') for line in (ROOT / 'constraints.txt').read_text().splitlines() if '==' in line)}
    assert {name: version for name, version in hashed.items() if name in pinned} == {
        name: pinned[name] for name in hashed if name in pinned}
    needed = {re.split('[<>=!]', r)[0].lower() for key in settings() if key.endswith('requirements')
              for r in settings()[key].split()}
    assert needed <= set(hashed), needed - set(hashed)


def test_conda_environment_installs_what_settings_say():
    text = (ROOT / 'environment.yml').read_text()
    assert f'python>={settings()["min_python"]}' in text and '-e .[dev]' in text and '-c constraints.txt' in text


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> Path:
    "The wheel, unpacked elsewhere."
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir',
                    folder, ROOT], check=True, capture_output=True)
    wheel, = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(folder / 'site')
    return folder / 'site'


def test_installed_library_finds_its_reports_and_tables(installed, tmp_path):
    code = ('import draem_nb, draem_nb.parameters as p, draem_nb.reports, draem_nb.evaluation as e; '
            'print(draem_nb.__file__); assert {"category", "inspect", "summary"} <= set(p.report_names()); '
            '[e.paper_table(t) for t in ("detection", "localization", "ablation", "cutpaste", "dagm")]; '
            'print(p.report_notebook("category"))')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={'PYTHONPATH': str(installed), 'PATH': ''},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(installed)) == 2          # both came from the wheel, not from the repository


def test_licence_and_citation_are_there_and_make_alone_is_help():
    assert 'Apache License' in (ROOT / 'LICENSE').read_text() and settings()['license'] == 'apache2'
    citation = (ROOT / 'CITATION.cff').read_text()
    assert f"version: {settings()['version']}\n" in citation and 'license: Apache-2.0' in citation
    for arguments in ([], ['help']):
        # of `make test` itself
        outer = {name: value for name, value in os.environ.items() if not name.startswith('MAKE')}
        done = subprocess.run(['make', *arguments], cwd=ROOT, capture_output=True, text=True, env=outer)
        assert (done.returncode == 0 and done.stdout.startswith('make report ') and 'make test ' in done.stdout
                and '.venv/bin' not in done.stdout)


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, '-m', 'draem_nb', '--version'], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"draem_nb {settings()['version']}\n", done.stderr


# Exported cells of more than 25 lines, each with its reason; recipes, which have a line for every choice, are excepted.
LONG_CELLS = {
    'gallery.SCRIPT': 'a program in another language',
    'data.CategoryData': 'a record with a line for each of its 17 fields',
    'detector.AnomalyDetector': 'the class that a method of one\'s own is written against, in one piece',
    'watch.Listener': 'a thread with its queue and what it has lost, one state',
}


def exported_cells() -> dict[str, str]:
    "The exported cells of the library by module and first name."
    cells = {}
    for path in sorted((ROOT / 'draem_nb').glob('[a-z]*.py')):
        for cell in re.split(r'(?m)^# %% ', path.read_text())[1:]:
            body = cell.partition('\n')[2].strip('\n')
            name = re.search(r'(?m)^(?:class |def )?(\w+)', re.sub(r'(?m)^[@#].*\n', '', body))
            if not cell.startswith('auto') and name: cells[f'{path.stem}.{name[1]}'] = body
    return cells


def test_exported_cells_are_short():
    long = {name for name, body in exported_cells().items()
            if len(body.split('\n')) > 25 and not body.startswith('@as_recipe')}
    assert long == set(LONG_CELLS), f'over 25 lines: {long - set(LONG_CELLS)}; no longer: {set(LONG_CELLS) - long}'
    lengths = [len(body.split('\n')) for body in exported_cells().values()]
    assert statistics.median(lengths) <= 10


def test_arguments_are_explained_where_help_shows_them():
    for path in sorted((ROOT / 'draem_nb').glob('[a-z]*.py')):
        text = path.read_text()
        comments = {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                    if token.type == tokenize.COMMENT and not token.string.startswith(('# type:', '# noqa'))}
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef): continue
            lines = [argument.end_lineno for argument in ast.walk(node.args) if isinstance(argument, ast.arg)]
            beside = [comments[line] for line in lines if line in comments and line < node.body[0].lineno]
            assert not beside, f'{path.stem}.{node.name}: {beside}'


def test_every_temporary_folder_is_one_that_the_next_run_sweeps():
    "A folder of `tempfile` stays for ever where its process is killed; `files.temporary_folder` knows its own again."
    made = {p.stem: re.findall(r'TemporaryDirectory|mkdtemp|mkstemp', p.read_text())
            for p in (ROOT / 'draem_nb').glob('*.py')}
    assert not any(made.values()), made


def test_no_module_takes_a_private_name_of_another():
    modules = {path.stem for path in (ROOT / 'draem_nb').glob('[a-z]*.py')}
    for path in [*(ROOT / 'draem_nb').glob('[a-z]*.py'), *NOTEBOOKS]:
        text = path.read_text()
        others = modules - {path.stem, *re.findall(r'#\| default_exp (\w+)', text)}
        taken = re.findall(r'from (?:draem_nb)?\.(\w+) import [^\n]*\b(_\w+)', text)
        taken += re.findall(r'(?<![\w.])(\w+)\.(_[a-z]\w*)', text)
        taken = [f'{module}.{name}' for module, name in taken if module in others and name != '_replace']
        assert not taken, f'{path.name} takes {taken}; make that public, or move it'


def floors() -> list[list[str]]:
    "The modules of each floor of the library, from the ground up, as CONTRIBUTING.md shows them."
    rows = re.findall(r'(?m)^\| \*\*\w+\*\* \| (.*?) \|', (ROOT / 'CONTRIBUTING.md').read_text())
    return [re.findall(r'`(\w+)`', modules) for modules in reversed(rows)]


def arrows() -> dict[str, set[str]]:
    "What each module of the library imports of the library, at its head or inside its functions."
    found = {path.stem: ast.walk(ast.parse(path.read_text())) for path in (ROOT / 'draem_nb').glob('[a-z]*.py')}
    def imported(node: ast.AST) -> set[str]:
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or '').startswith('draem_nb')):
            return set()
        module = (node.module or '').removeprefix('draem_nb').lstrip('.')
        return {module} if module else {alias.name for alias in node.names} & set(found)
    return {name: set().union(*map(imported, nodes)) for name, nodes in found.items()}


def test_a_module_looks_at_its_own_floor_and_those_below():
    floor_of = {module: i for i, modules in enumerate(floors()) for module in modules}
    assert len(floors()) == 7 and sorted(sum(floors(), [])) == sorted(arrows())         # each on one floor
    upward = [f'{name} imports {other}' for name, others in arrows().items() for other in others
              if floor_of[other] > floor_of[name]]
    assert not upward, f'{upward}: move what is shared to the lower floor'


def test_modules_form_no_circle():
    assert sum(map(len, arrows().values())) > 200           # the search finds them
    list(TopologicalSorter(arrows()).static_order())        # CycleError names the circle


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_every_name_that_it_uses(notebook, tmp_path):
    "Cells that the tests skip as well."
    cells = json.loads(notebook.read_text())['cells']
    code = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    lines = '\n\n'.join(source for source in code if not source.startswith('%%')).splitlines()
    (tmp_path / 'cells.py').write_text('\n'.join('pass' if line.lstrip()[:1] in {'%', '!'} else line for line in lines))
    command = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--quiet', '--select', 'F821']
    found = subprocess.run([*command, tmp_path / 'cells.py'], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
