"""The lowest versions that settings.ini allows, tried out: `make lowest`, or
`python3.11 tests/lowest.py FOLDER [pytest arguments]`.

Makes an environment in FOLDER with exactly the lower bound of every requirement, installs the project
into it and runs the tests there.
Not part of `make test`: a torch of that age comes with CUDA, some 6 GB on the disk. Without more arguments it runs
all tests but the ten kills."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lowest() -> list[str]:
    "'name==version' for each requirement of settings.ini."
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini')
    keys = [f'{part}requirements' for part in ('', 'dev_', 'pretrained_', 'cluster_', 'export_', 'explore_')]
    needed = [r for key in keys for r in parser['DEFAULT'][key].split()]
    return ['{}=={}'.format(*re.match(r'([\w-]+)>=([\d.]+)', r).groups()) for r in needed]


def main(folder: str, *arguments: str) -> int:
    python = Path(folder).absolute() / 'bin' / 'python'
    if not python.exists(): subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', *lowest()], check=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '--editable', ROOT],
                   check=True)
    return subprocess.run([python, '-m', 'pytest', '-q', *(arguments or ('-k', 'not ten_random_moments', 'tests'))],
                          cwd=ROOT).returncode


if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
