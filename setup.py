"""Packaging from settings.ini, the one place for requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    keywords=cfg['keywords'].split(), url=cfg['git_url'], license='Apache-2.0',
    classifiers=['Programming Language :: Python :: 3', 'Framework :: Jupyter'],
    python_requires=f">={cfg['min_python']}",
    long_description=(here / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    # The report notebooks and the published tables travel inside the wheel, from where they stand in the repository.
    packages=['draem_nb', 'draem_nb.notebooks', 'draem_nb.paper'],
    package_dir={'draem_nb': 'draem_nb', 'draem_nb.notebooks': 'nbs/reports', 'draem_nb.paper': 'data/paper'},
    package_data={'draem_nb.notebooks': ['*.ipynb'], 'draem_nb.paper': ['*.csv']},
    install_requires=cfg['requirements'].split(),
    # `cluster`: reports side by side with dask; `pretrained`: ImageNet weights; `explore`: knobs in JupyterLab;
    # the tests need all three; `site`: `make site`
    extras_require={extra: ' '.join(cfg[f'{part}_requirements'] for part in parts.split()).split()
                    for extra, parts in {'cluster': 'cluster', 'pretrained': 'pretrained', 'export': 'export',
                                         'explore': 'explore', 'site': 'site',
                                         'dev': 'dev cluster pretrained export explore'}.items()},
    entry_points={'console_scripts': ['draem_nb = draem_nb.cli:main']},
)
