"""All that is checked, in one run: clean notebooks, an exported library, style and types, every
notebook executed, then pytest.

`make test` calls this. The last line says `N passed, N failed`; the exit status is not 0 if anything failed."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
N_CORES = len(os.sched_getaffinity(0))


def contents() -> dict[Path, str]:
    "Hash of every file that cleaning and exporting could change."
    found = [*(ROOT / 'nbs').rglob('*.ipynb'), *(ROOT / 'draem_nb').rglob('*.py'), ROOT / 'pyproject.toml']
    return {p.relative_to(ROOT): hashlib.sha256(p.read_bytes()).hexdigest() for p in found if '.ipynb_checkpoints'
            not in p.parts}


def check_clean_and_exported() -> list[str]:
    "Names of the files that nbdev_clean and nbdev_export change: there must be none."
    before = contents()
    for command in ('nbdev_clean', 'nbdev_export'): subprocess.run([BIN / command], cwd=ROOT, check=True)
    after = contents()
    return sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))


def run_notebooks() -> tuple[int, int]:
    """Passed and failed notebooks. nbdev_test exits with 0 when it finds no notebook and prints no
    count, so they are counted here."""
    expected = {p.resolve() for p in (ROOT / 'nbs').rglob('*.ipynb') if not p.name.startswith('_')
                and '.ipynb_checkpoints' not in p.parts}
    # A notebook a core, each with one thread: their networks are too small to keep two threads busy.
    process = subprocess.Popen([BIN / 'nbdev_test', '--do_print', '--n_workers', str(N_CORES), '--timing'],
                               cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '1'})
    completed, failed = set(), set()
    for line in process.stdout:
        print(line, end='', flush=True)
        if found := re.match(r'- Completed (.+\.ipynb)', line): completed.add(Path(found[1]).resolve())
        # "Completed" is printed for failures too; their names stand in a list at the end.
        if found := re.match(r'\t(.+\.ipynb)$', line): failed.add(found[1])
    status = process.wait()
    if missing := sorted(str(p) for p in expected - completed):
        print('notebooks that did not run:', *missing, sep='\n  ')
    n_failed = max(len(failed) + len(missing), int(status != 0))
    return len(expected) - n_failed, n_failed


def run_pytest() -> tuple[int, int]:
    "Passed and failed tests; errors count as failed, and no test at all is a failure."
    # A worker a core, each with one thread: most of the time goes to processes that the tests start and wait for.
    # A worker that has nothing left takes over tests of another one.
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, 'report.xml')
        command = [BIN / 'pytest', '-q', '-rs', '-p', 'no:cacheprovider', '--durations=12', f'--junitxml={report}',
                   '-n', str(N_CORES), '--dist', 'worksteal', 'tests']
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode
        suite = re.search(r'<testsuite [^>]*>', report.read_text()) if report.exists() else None
    if suite is None: return 0, 1
    count = {key: int(value) for key, value in re.findall(r'(tests|failures|errors|skipped)="(\d+)"', suite[0])}
    failed = count['failures'] + count['errors']
    return count['tests'] - failed - count['skipped'], max(failed, int(status != 0))


def check_style() -> list[tuple[int, int]]:
    "Passed and failed: ruff on all Python files, mypy on the library; both configured in pyproject.toml."
    failed = [subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT).returncode != 0
              for command in (['ruff', 'check'], ['mypy'])]
    return [(int(not bad), int(bad)) for bad in failed]


def main() -> int:
    changed = check_clean_and_exported()
    if changed:
        print('nbdev_clean and nbdev_export changed files that should have been committed clean and exported:',
              *changed, sep='\n  ')
    results = [(int(not changed), int(bool(changed))), *check_style(), run_notebooks(), run_pytest()]
    passed, failed = (sum(column) for column in zip(*results))
    print(f'{passed} passed, {failed} failed', flush=True)
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
