"""The site, from nothing: notebooks with their outputs, API reference, gallery of reports. `make site` calls this.

Nothing is executed and nothing is loaded from the network. Ends with an error on a warning of Sphinx, on a link or
picture inside the site that leads nowhere, and on anything that a page would load from elsewhere."""
import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SOURCE, HTML = ROOT / '_docs' / 'source', ROOT / '_docs' / 'html'
REPOSITORY = 'https://github.com/draem_nb/draem_nb/blob/main'

# caption: the notebooks that stand under it, by how their names begin
PARTS = {
    'Begin here': ('000',),
    'Data and simulated anomalies': ('00_', '00a', '00b', '00c', '00d', '00e', '01', '02', '03'),
    'Networks and training': ('04', '05', '06', '07'),
    'Detection and measurement': ('08', '09', '10', '11'), 'Reports and daily use': ('12', '13', '14', '15'),
    'Where methods fail, and why': ('20', '21', '22', '23', '24'), 'Speed': ('3',), 'Other methods': ('4', '5'),
}
PAGES = ('CONTRIBUTING', 'CHANGELOG', 'DATA_LICENCES')
REPORTS = {
    'brick': ('DRAEM on the built-in class `brick`', 'Recipe `demo`, seed 0. Photograph: scikit-image, CC0.',
              'make report CATEGORY=brick'),
}


def api_names() -> dict[str, str]:
    "Full names of the public functions and classes by their short names, where a short name is there only once."
    full: dict[str, list[str]] = {}
    for path in sorted((ROOT / 'draem_nb').glob('[!_]*.py')):
        found = re.search(r'__all__ = \[(.*?)\]', path.read_text(), re.DOTALL)
        for name in re.findall(r"'(\w+)'", found[1] if found else ''):
            full.setdefault(name, []).append(f'draem_nb.{path.stem}.{name}')
    return {name: names[0] for name, names in full.items() if len(names) == 1 and not name.isupper()}


def link_names(text: str, names: dict[str, str]) -> str:
    "Each `name` of the library, outside of code blocks, headings and links, leads to the API reference."
    def link(found: re.Match) -> str:
        full = names.get(found[1].removesuffix('()').split('.')[-1])
        return f'{{py:obj}}`{found[1]} <{full}>`' if full else found[0]
    pieces = re.split(r'(```.*?```|^#.*?$|\[[^\]]*\]\([^)]*\)|<summary>.*?</summary>)', text,
                      flags=re.DOTALL | re.MULTILINE)
    return ''.join(piece if i % 2 else re.sub(r'(?<![`\w}])`([\w.]+(?:\(\))?)`(?!`)', link, piece)
                   for i, piece in enumerate(pieces))


def link_files(text: str, folder: str) -> str:
    "Links to files of the repository that are no pages of the site lead to the repository."
    def link(found: re.Match) -> str:
        path = (ROOT / folder / found[1]).resolve()
        if (path.suffix == '.ipynb' or path.parent.name == 'images' or not path.is_relative_to(ROOT)
            or not path.exists()):
            return found[0]
        if path.stem in PAGES: return f']({"../" if folder == "nbs/reports" else ""}{path.name})'
        return f']({REPOSITORY}/{path.relative_to(ROOT)})'
    return re.sub(r'\]\((?!\w+:|#)([^)#\s]+)\)', link, text)


def is_imports(code: str) -> bool:
    "Whether a cell only imports: it is folded."
    try: body = ast.parse(code).body
    except SyntaxError: return False          # a magic command
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def prepare_notebook(path: Path, names: dict[str, str]) -> None:
    "A copy without nbdev's directives and hidden cells, with links."
    relative = path.relative_to(ROOT / 'nbs')
    nb = json.loads(path.read_text())
    cells = [cell for cell in nb['cells'] if not re.match(r'#\|\s*(hide|default_exp)\b', ''.join(cell['source']))]
    for cell in cells:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            text = link_files(link_names(text, names), f'nbs/{relative.parent}'.removesuffix('/.'))
        else:
            text = re.sub(r'^#\|.*\n?', '', text, flags=re.MULTILINE)
            if is_imports(text):
                cell['metadata']['tags'] = [*cell['metadata'].get('tags', []), 'hide-input']
        cell['source'] = text.splitlines(keepends=True)
        for output in cell.get('outputs', []):           # the picture or the table, not also its text
            data = output.get('data', {})
            if len(data) > 1: data.pop('text/plain', None)
    nb['cells'] = [cell for cell in cells if ''.join(cell['source']).strip()]
    if path.stem == 'index': nb['cells'] += [dict(cell_type='markdown', metadata={}, id='toc00000', source=toctrees())]
    (SOURCE / relative).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / relative).write_text(json.dumps(nb))


def toctrees() -> str:
    "The table of contents at the side."
    stems = sorted(path.stem for path in (ROOT / 'nbs').glob('*.ipynb'))
    tree = lambda caption, pages: f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(pages) + '\n```\n'
    parts = {caption: [stem for stem in stems if stem.startswith(begin)] for caption, begin in PARTS.items()}
    if 'glossary' in stems: parts = {'Words': ['glossary']} | parts
    parts['Report notebooks'] = [f'reports/{path.stem}' for path in sorted((ROOT / 'nbs' / 'reports').glob('*.ipynb'))]
    parts['Reference'] = ['gallery', 'api/index', *PAGES]
    left = set(stems) - {stem for pages in parts.values() for stem in pages} - {'index'}
    if left:
        raise SystemExit(f'no part of the site for the notebooks {sorted(left)}; add them to PARTS in site/build.py')
    return '\n'.join(tree(caption, pages) for caption, pages in parts.items())


def prepare_api() -> None:
    "A page for each module."
    (SOURCE / 'api').mkdir()
    modules = sorted(path.stem for path in (ROOT / 'draem_nb').glob('[!_]*.py'))
    for name in modules:
        (SOURCE / 'api' / f'{name}.rst').write_text(f'{name}\n{"=" * len(name)}\n\n.. automodule:: draem_nb.{name}\n')
    (SOURCE / 'api' / 'index.md').write_text(
        '# API\n\nOne page for each module. Sizes, ranges and units stand beside the '
        'arguments.\n\n```{toctree}\n:maxdepth: 2\n\n'
        + '\n'.join(modules) + '\n```\n')


def prepare_gallery() -> None:
    "The stored reports, each one HTML file, and a page that leads to them."
    shutil.copytree(ROOT / 'site' / 'reports', SOURCE / 'reports_html' / 'gallery')
    text = ['# Gallery of reports\n\nEach report is one HTML file, as a run writes it. They are stored, so they can be '
            'read before anything is trained.']
    for name, (title, source, command) in REPORTS.items():
        text.append(f'## {title}\n\n<a href="gallery/{name}.html"><img src="gallery/{name}.png" alt="The first page of '
                    f'the report {name}" '
                    f'style="border: 1px solid #8888; max-width: 40em; width: 100%"></a>\n\n{source} Made '
                    f'by:\n\n```sh\n{command}\n```\n\n'
                    f'<a href="gallery/{name}.html">Open the report</a>')
    (SOURCE / 'gallery.md').write_text('\n\n'.join(text) + '\n')


def prepare() -> None:
    shutil.rmtree(ROOT / '_docs', ignore_errors=True)
    SOURCE.mkdir(parents=True)
    names = api_names()
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' not in path.parts: prepare_notebook(path, names)
    shutil.copytree(ROOT / 'nbs' / 'images', SOURCE / 'images')
    for name in PAGES:
        text = (ROOT / f'{name}.md').read_text().replace('](nbs/', '](')
        (SOURCE / f'{name}.md').write_text(link_files(text, ''))
    shutil.copytree(ROOT / 'site' / '_static', SOURCE / '_static')
    shutil.copy(ROOT / 'site' / 'conf.py', SOURCE)
    prepare_api()
    prepare_gallery()


class Page(HTMLParser):
    "What a page leads to (hrefs), loads (scripts, pictures, styles) and can be led to (ids)."
    def __init__(self, text: str) -> None:
        super().__init__()
        self.hrefs, self.loads, self.ids = set(), set(), {''}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.ids |= {found[key] for key in ('id', 'name') if found.get(key)}
        if tag == 'a' and found.get('href'): self.hrefs.add(found['href'])
        if tag == 'link' and found.get('href') and found.get('rel') in ('stylesheet', 'icon', 'preload'):
            self.loads.add(found['href'])
        if found.get('src'): self.loads.add(found['src'])


def dead_links(folder: Path) -> list[str]:
    "Links, pictures and scripts that lead nowhere, and what a page would load from the network."
    pages = {path.resolve(): Page(path.read_text()) for path in folder.rglob('*.html') if '_static' not in path.parts}
    wrong = []
    for path, page in pages.items():
        for link in page.hrefs | page.loads:
            parts = urlsplit(link)
            if parts.scheme in ('http', 'https') or parts.netloc:
                if link in page.loads: wrong.append(f'{path.relative_to(folder)} loads {link} from the network')
            elif not parts.scheme:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                if target.is_dir(): target /= 'index.html'
                dead = not target.exists() or target in pages and unquote(parts.fragment) not in pages[target].ids
                if dead: wrong.append(f'{path.relative_to(folder)}: {link[:100]}')
    return sorted(wrong)


def main() -> int:
    prepare()
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-j', 'auto', '-b', 'html',
                           SOURCE, HTML])
    wrong = dead_links(HTML.resolve()) if HTML.exists() else []
    if wrong: print(f'{len(wrong)} dead links or loads from elsewhere:', *wrong, sep='\n  ')
    print(f'{len(list(HTML.rglob("*.html")))} pages in {HTML.relative_to(ROOT)}; open '
          f'{HTML.relative_to(ROOT)}/index.html')
    return int(done.returncode != 0 or bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
