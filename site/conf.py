"""Sphinx settings of the site. `make site` copies this file beside the pages that `build.py` prepares."""
import inspect
import re
import shutil
from configparser import ConfigParser
from importlib.resources import files
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[2]
parser = ConfigParser(delimiters=['='])
parser.read(ROOT / 'settings.ini')
settings = parser['DEFAULT']

project, author, release = settings['lib_name'], settings['author'], settings['version']
copyright = settings['copyright']
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax']
exclude_patterns = ['reports_html']
nb_execution_mode = 'off'                                   # outputs are shown as they were committed
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 4
mathjax_path = 'mathjax/tex-chtml.js'                        # of the package sphinx-mathjax-offline, no network
html_theme = 'sphinx_book_theme'
html_title = settings['lib_name']
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_context = {'default_mode': 'auto'}                      # light or dark as the reader's system says
html_extra_path = ['reports_html']
html_copy_source = False
html_theme_options = {'use_download_button': False, 'home_page_in_toc': True, 'show_navbar_depth': 1,
                      'navbar_persistent': [], 'navigation_with_keys': False}
autodoc_default_options = {'members': True, 'member-order': 'bysource'}
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = 'hide'


def as_rst(text: str) -> str:
    "A docstring is plain text with code between single backticks: what RST would read otherwise is escaped."
    parts = re.split(r'(`[^`\n]+`)', text)
    return ''.join(f'`{part}`' if i % 2 else re.sub(r'([\\*|_`])', r'\\\1', part) for i, part in enumerate(parts))


def with_lists(lines: list[str]) -> list[str]:
    "The sections `Args:` and `Returns:` of a docstring as lists of RST."
    section, found = '', []
    for line in lines:
        if line in ('Args:', 'Returns:'):
            section = line
            found += ['', '**Arguments**' if section == 'Args:' else '**Returns**', '']
        elif section and line.startswith('        '): found.append('  ' + as_rst(line.strip()))     # goes on
        elif section and line.strip():
            name, text = line.strip().split(': ', 1) if section == 'Args:' else ('', line.strip())
            found.append('* ' + f'``{name}``: ' * bool(name) + as_rst(text))
        else: found.append(as_rst(line))
    return found


def describe(app, what, name, obj, options, lines) -> None:
    "Docstrings as RST, and the comments beside the fields of a record as a list of parameters."
    lines[:] = with_lists([line for line in lines if not line.startswith('Alias for field number')])
    if not inspect.isclass(obj): return
    about = {key: comment for key, comment in docments(obj).items() if comment and key not in ('self', 'return')}
    lines += [''] + [f':param {key}: {as_rst(" ".join(comment.split()))}' for key, comment in about.items()]


def skip(app, what, name, obj, skip, options) -> bool | None:
    """No `load = SomeDetector.load` of a module, which its class has already: Sphinx, told to preserve defaults, takes
    one argument from a bound method each time that it meets one."""
    return True if what == 'module' and inspect.ismethod(obj) else None


def copy_mathjax(app, exception) -> None:
    "The two parts of MathJax that the pages load: the script and its fonts."
    if exception: return
    source = Path(str(files('sphinx-mathjax-offline'))) / 'static' / 'mathjax'
    target = Path(app.outdir) / '_static' / 'mathjax'
    shutil.copytree(source / 'output' / 'chtml' / 'fonts', target / 'output' / 'chtml' / 'fonts', dirs_exist_ok=True)
    shutil.copy(source / 'tex-chtml.js', target)


def setup(app) -> None:
    app.connect('autodoc-skip-member', skip)
    app.connect('autodoc-process-docstring', describe)
    app.connect('build-finished', copy_mathjax)
