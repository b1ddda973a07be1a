"""What is installed, to the byte: `make hashes` and `make sbom`.

- hashes: requirements-hashed.txt from settings.ini and constraints.txt: every package that any of them needs, on every
  system, with its version and the sha256 of its files. `pip install --require-hashes -r requirements-hashed.txt`.
- sbom: the same as a software bill of materials (CycloneDX), sbom.json.

uv and cyclonedx-bom do it, in an environment of their own below .venv."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HASHED, SBOM = ROOT / 'requirements-hashed.txt', ROOT / 'sbom.json'
TOOLS = {'uv': 'uv>=0.9', 'cyclonedx-py': 'cyclonedx-bom>=7.2,<8'}
PYTHON = '3.11.5'       # the first that the pinned versions allow
HEAD = f"""# Made by `make hashes` from settings.ini and constraints.txt; Python {PYTHON} or newer.
#   pip install --require-hashes -r requirements-hashed.txt
#   pip install --no-deps --no-build-isolation --editable .
"""


def tool(name: str) -> Path:
    "The path of a tool, which is installed if it is missing."
    folder = ROOT / '.venv' / 'tools'
    if not (folder / 'bin' / 'pip').exists(): subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    if not (folder / 'bin' / name).exists():
        subprocess.run([folder / 'bin' / 'pip', 'install', '--quiet', TOOLS[name]], check=True)
    return folder / 'bin' / name


def requirements() -> list[str]:
    "Of the library and of all its extras."
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini')
    fields = parser['DEFAULT']
    return [r for key in fields if key.endswith('requirements') for r in fields[key].split()]


def hashes() -> None:
    "Write requirements-hashed.txt; no address of an index stands in it."
    command = [tool('uv'), 'pip', 'compile', '-', '--constraint', ROOT / 'constraints.txt', '--universal',
               '--generate-hashes', '--python-version', PYTHON, '--no-header', '--no-annotate', '--no-emit-index-url',
               '--no-emit-find-links', '--quiet']
    found = subprocess.run(command, input='\n'.join(requirements()), text=True, check=True, capture_output=True).stdout
    HASHED.write_text(HEAD + found)
    print(f'{HASHED.name}: {len(re.findall("(?m)^[^ #]", found))} packages')


def sbom() -> None:
    "Write sbom.json from requirements-hashed.txt."
    subprocess.run([tool('cyclonedx-py'), 'requirements', HASHED, '--output-reproducible', '--output-format', 'JSON',
                    '--pyproject', ROOT / 'pyproject.toml', '--output-file', SBOM], check=True)
    print(SBOM)


if __name__ == '__main__':
    if sys.argv[1:] not in (['hashes'], ['sbom']): sys.exit(__doc__)
    dict(hashes=hashes, sbom=sbom)[sys.argv[1]]()
