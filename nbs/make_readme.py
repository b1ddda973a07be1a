"""README.md from nbs/index.ipynb with nbdev's own processing, without Quarto.

`make readme` writes it; a test compares."""
import re
from pathlib import Path

import nbformat
from execnb.nbio import read_nb
from nbconvert import MarkdownExporter
from nbdev.frontmatter import FrontmatterProc
from nbdev.processors import FilterDefaults, add_links

ROOT = Path(__file__).resolve().parents[1]


class Page(FilterDefaults):
    """What nbdev does to a page (hidden cells, directives, ...), but the title stays a heading, and names
    are no links to a docs site."""
    def base_procs(self) -> list:
        return [proc for proc in super().base_procs() if proc not in (FrontmatterProc, add_links)]


def make_readme() -> dict[Path, bytes]:
    "The front page's files: README.md, and in nbs/images the figures that stand in the outputs of index.ipynb."
    nb = read_nb(ROOT / 'nbs' / 'index.ipynb')
    Page()(nb)
    text, resources = MarkdownExporter().from_notebook_node(nbformat.from_dict(nb),
                                                            {'unique_key': 'index', 'output_files_dir': 'images'})
    # GitHub shows a style sheet as text
    text = re.sub(r'<style scoped>.*?</style>\n?', '', text, flags=re.DOTALL)
    # links in index.ipynb are seen from nbs/
    text = re.sub(r'(\]\()(?!\w+:|#|/)', r'\1nbs/', text).replace('](nbs/../', '](')
    text = re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    return {ROOT / 'README.md': text.encode()} | {ROOT / 'nbs' / name: data
                                                  for name, data in resources['outputs'].items()}


if __name__ == '__main__':
    for path, content in make_readme().items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        print(path.relative_to(ROOT), len(content), 'bytes')
