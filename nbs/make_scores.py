"""The tables in data/scores: scores of good images that 14_inspection shows, and the runs that 23b_real_classes shows.

    python nbs/make_scores.py parts --seed 0 /data     # parts.csv: Magnetic Tile, held out by tile and by photo
    python nbs/make_scores.py few --draws 0 7 /data    # few.csv: few parts, a tenth held out, or cross-fitted
    python nbs/make_scores.py good --seed 0 /data      # good.csv: good images that were not learned, in five lights
    python nbs/make_scores.py methods runs             # methods.csv: the complete runs below a folder

/data holds the classes `magnetic_tile` (Huang et al., 2018) and `visa/capsules` (Zou et al., 2022). A part of a table
that is made again replaces the rows of before; seeds and draws may be made one after another."""
import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from draem_nb import evaluation, inspection, memory
from draem_nb.data import CategoryData, load_category
from draem_nb.layouts import groups_of
from draem_nb.training import split_held_out

SCORES = Path(__file__).resolve().parents[1] / 'data' / 'scores'


def table_of(of: str, parts: list[str] | tuple[str, ...], scores: torch.Tensor) -> pd.DataFrame:
    return pd.DataFrame({'of': of, 'part': parts, 'score': np.round(scores.numpy().astype(float), 2)})


def parts(root: Path, seed: int) -> pd.DataFrame:
    "Held-out, good and defective photos of Magnetic Tile, by a memory of the others; one part a tile, or one a photo."
    recipe, rows = memory.MemoryRecipe(seed=seed), []
    for by, pattern in (('image', '(.+)'), ('tile', None)):
        data = load_category(root, 'magnetic_tile', recipe.size, groups=pattern)
        detector = memory.fit(data, recipe, 'cpu')
        held_out = split_held_out(len(data.train), recipe, data.groups)[1].tolist()
        tiles, good = groups_of(data.train_paths, data.root), [p for p, bad in zip(data.paths, data.labels) if not bad]
        scores = detector.predict(data.test).scores
        found = [table_of('held out', [tiles[i] for i in held_out], torch.tensor(detector.held_out_scores)),
                 table_of('defect', [''] * int(data.labels.sum()), scores[data.labels]),
                 table_of('good', groups_of(good, data.root), scores[~data.labels])]
        rows += [table.assign(method='memory', by=by, seed=seed) for table in found]
    table = pd.concat(rows)
    names = {name: f't{i}' for i, name in enumerate(dict.fromkeys(table.part[table.part != '']), 1)}
    return table.assign(part=table.part.map(names).fillna(''))[['method', 'by', 'seed', 'of', 'part', 'score']]


def drawn(data: CategoryData, n: int, g: np.random.Generator) -> tuple[CategoryData, np.ndarray]:
    "A class of the training images of n parts, and the places of a hundred images of other parts."
    groups = np.array(data.groups or np.arange(len(data.train)).astype(str))
    order = g.permutation(np.unique(groups))
    kept, rest = (np.flatnonzero(np.isin(groups, of)) for of in (order[:n], order[n:]))
    some = dataclasses.replace(data, train=data.train[kept], train_paths=[data.train_paths[i] for i in kept],
                               groups=tuple(groups[kept]) if data.groups else ())
    return some, g.permutation(rest)[:100]


def few(root: Path, draw: int) -> pd.DataFrame:
    "Few parts: scores by holding out a tenth, by five folds, and of new images; small images, a small memory."
    recipe, rows = memory.MemoryRecipe(size=128, pieces=1000, candidates=20_000), []
    whole = dataclasses.replace(recipe, holdout=0)
    for folder, name, n in ((root / 'visa', 'capsules', 30), (root, 'magnetic_tile', 15)):
        data = load_category(folder, name, recipe.size)
        some, new = drawn(data, n, np.random.default_rng([draw, 4]))
        holding, all_of_it = (memory.fit(some, of, 'cpu') for of in (recipe, whole))
        folds = inspection.folds_of(len(some.train), 5, some.groups)
        across, _ = inspection.cross_fit(some, lambda of: memory.fit(of, whole, 'cpu'), folds)
        none, tomorrow = [''] * len(new), data.train[new]
        found = [table_of('held out', holding.held_out_groups or [''] * holding.n_held_out,
                          torch.tensor(holding.held_out_scores)),
                 table_of('cross-fitted', some.groups or [''] * n, across),
                 table_of('new, a tenth held out', none, holding.predict(tomorrow).scores),
                 table_of('new, all learned', none, all_of_it.predict(tomorrow).scores)]
        rows += [table.assign(**{'class': name, 'draw': draw}) for table in found]
    return pd.concat(rows)[['class', 'draw', 'of', 'part', 'score']]


def good(root: Path, seed: int) -> pd.DataFrame:
    "Scores of the good images that a memory has not learned, as they are and with all values times a factor."
    recipe, rows = memory.MemoryRecipe(seed=seed, holdout=0), []
    for folder, name, n in ((root / 'visa', 'capsules', 100), (root, 'magnetic_tile', 200)):
        data = load_category(folder, name, recipe.size)
        images = torch.cat([data.train, data.test[~data.labels]])
        order = np.random.default_rng([seed, 5]).permutation(len(images))
        learned, others = np.sort(order[:n]), images[np.sort(order[n:])]
        paths = [*data.train_paths, *(p for p, bad in zip(data.paths, data.labels) if not bad)]
        some = dataclasses.replace(data, train=images[learned], train_paths=[paths[i] for i in learned], groups=())
        detector, found = memory.fit(some, recipe, 'cpu'), {'class': name}
        for light in (1, 0.9, 0.95, 1.05, 1.1):
            seen = (others * light).round().clamp(0, 255).byte() if light != 1 else others
            scores = detector.predict(seen).scores.numpy().astype(float)
            found['score' if light == 1 else f'light_{light}'] = np.round(scores, 3)
        rows.append(pd.DataFrame(found))
    return pd.concat(rows)


def methods(runs_dir: Path) -> pd.DataFrame:
    "A row for each complete run, and one more for defect types taken together: metrics, their intervals, costs."
    rows = []
    for run in evaluation.read_runs(runs_dir)[0]:
        about, cost = run['conditions'], run['cost']
        for some in filter(None, (run, run.get('together'))):
            row = {'class': about['category'], 'types': ' '.join(some['kinds']) if some is not run else 'all',
                   'method': about['method'],
                   'recipe': about['recipe'].removeprefix(about['method']).split()[0].strip(','),
                   'backbone': about.get('backbone'), 'size': about['size'][0], 'seed': about['seed'],
                   'steps': about.get('steps')}
            for part, key in (('image', 'auroc'), ('pixel', 'auroc'), ('pixel', 'ap'), ('pixel', 'aupro')):
                low, high = some['intervals'][part][key] or (None, None)
                row |= {f'{part}_{key}': some[part][key], f'{part}_{key}_low': low, f'{part}_{key}_high': high}
            rows.append(row | cost)
    if not rows: raise SystemExit(f'there is no complete run below {runs_dir}')
    return pd.DataFrame(rows).sort_values(['class', 'types', 'method', 'size', 'seed']).round(4)


def keep(made: pd.DataFrame, file: Path, key: str) -> None:
    "Put rows into a table in place of those with the same key."
    if file.exists():
        old = pd.read_csv(file, dtype=dict(part=str), keep_default_na=False)
        made = pd.concat([old[~old[key].isin(made[key])], made])
    made.sort_values(key, kind='stable').to_csv(file, index=False)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=('parts', 'few', 'good', 'methods'))
    parser.add_argument('root', type=Path, help='the data, or for `methods` the runs')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--draws', type=int, nargs=2, default=(0, 7), help='the first one, and the one after the last')
    asked = parser.parse_args()
    if asked.table == 'methods': methods(asked.root).to_csv(SCORES / 'methods.csv', index=False)
    elif asked.table == 'good': good(asked.root, asked.seed).to_csv(SCORES / 'good.csv', index=False)
    elif asked.table == 'parts': keep(parts(asked.root, asked.seed), SCORES / 'parts.csv', 'seed')
    else:
        for draw in range(*asked.draws): keep(few(asked.root, draw), SCORES / 'few.csv', 'draw')
