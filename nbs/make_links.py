"""The line previous, index, next at the end of every notebook but the front page, the glossary and the reports.

`make readme` writes it; a test compares. Run it after a notebook came, went or was renamed."""
import hashlib
import json
import re
from pathlib import Path

NBS = Path(__file__).resolve().parent
LINE = re.compile(r'\n*^(Previous: \[.*|\[Index\]\(index\.ipynb\) · .*)\Z', re.MULTILINE)


def link_lines() -> dict[Path, str]:
    "The last line of each notebook, as it should be."
    paths = sorted(path for path in NBS.glob('*.ipynb') if path.stem[:2].isdigit())
    def line(before: Path | None, after: Path | None) -> str:
        parts = [before and f'Previous: [{before.stem}]({before.name})', '[Index](index.ipynb)',
                 after and f'Next: [{after.stem}]({after.name})']
        return ' · '.join(filter(None, parts))
    return {path: line(before, after) for path, before, after in zip(paths, [None, *paths], [*paths[1:], None])}


def with_line(text: str, line: str) -> str:
    "The notebook's JSON with `line` at the end of its last cell, or in a cell of its own after code."
    nb = json.loads(text)
    if nb['cells'][-1]['cell_type'] != 'markdown':
        cell_id = hashlib.sha256(nb['cells'][-1]['id'].encode()).hexdigest()[:8]
        nb['cells'].append(dict(cell_type='markdown', id=cell_id, metadata={}, source=[]))
    last = nb['cells'][-1]
    source = LINE.sub('', ''.join(last['source'])) + '\n\n' + line
    last['source'] = source.lstrip().splitlines(keepends=True)
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'


if __name__ == '__main__':
    for path, line in link_lines().items():
        before = path.read_text()
        if (after := with_line(before, line)) != before: path.write_text(after)
