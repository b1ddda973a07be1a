"""Evaluation with stand-ins for detector and class: what is undefined, what is compared with what, many runs in a
table."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from draem_nb.data import CategoryData
from draem_nb.detector import Detections
from draem_nb.evaluation import (ablation_table, beside_paper, compare, conditions_name, differences,
                                 differing_conditions, evaluate, intervals, mark_best, paper_table, read_runs,
                                 results_table,
                                 runs_table, summary_table, wilson_interval, with_interval)
from draem_nb.metrics import bootstrap_interval, evaluate_maps, evaluate_scores
from draem_nb.recipes import ablations, demo, official

MVTEC = ['bottle', 'cable', 'capsule', 'carpet', 'grid', 'hazelnut', 'leather', 'metal_nut', 'pill', 'screw',
         'tile', 'toothbrush',
         'transistor', 'wood', 'zipper']


def tiny(kinds: list[str], name: str = 'nuts', size: int = 16, small: str = '') -> CategoryData:
    """A class of one test image for each of `kinds`; a defect is a block, which the official rule shrinks, and does not
    see at all on the kind `small`."""
    masks = torch.zeros(2, len(kinds), 1, size, size, dtype=torch.bool)
    for i, kind in enumerate(kinds):
        if kind == 'good': continue
        masks[0, i, :, 4:10, 4:10] = True
        if kind != small: masks[1, i, :, 5:9, 5:9] = True
    images = torch.zeros(len(kinds), 3, size, size, dtype=torch.uint8)
    of = lambda i: SimpleNamespace(relative_to=lambda root: SimpleNamespace(as_posix=lambda: f'test/{i}.png'))
    return CategoryData(name, '.', (size, size), torch.zeros(20, 3, size, size, dtype=torch.uint8), images,
                        masks[0], masks[1],
                        torch.tensor([k != 'good' for k in kinds], dtype=torch.bool), list(kinds),
                        [of(i) for i in range(len(kinds))], [])


def detections(category: CategoryData, seed: int = 0) -> Detections:
    maps = 0.5 * category.masks[:, 0] + 0.6 * torch.rand(category.masks[:, 0].shape,
                                                         generator=torch.Generator().manual_seed(seed))
    return Detections(maps, maps.flatten(1).mean(1), None, None, None, None)


def detector(category: CategoryData, **known: object) -> SimpleNamespace:
    return SimpleNamespace(**dict(dict(predict=lambda images: detections(category), recipe=demo(), threshold=0.32,
                                       pixel_threshold=0.6, quantile=0.995,
                                       held_out_scores=[0.28, 0.3, 0.31, 0.32]), **known))


KINDS = ['good'] * 6 + ['crack'] * 3 + ['hole'] * 2


def test_the_numbers_are_those_of_the_metrics():
    category = tiny(KINDS)
    found = detections(category)
    results = evaluate(detector(category), category)
    assert results == evaluate(detector(category), category, found)
    assert results['image'] == dict(evaluate_scores(found.scores, category.labels), n=11, n_anomalous=5)
    assert results['pixel'] == evaluate_maps(found.maps, category.masks)
    keep = [i for i, kind in enumerate(KINDS) if kind in ('good', 'hole')]
    assert results['kinds']['hole'] == dict(n=2, image=dict(evaluate_scores(found.scores[keep], category.labels[keep]),
                                                            n=8, n_anomalous=2),
                                            pixel=evaluate_maps(found.maps[keep], category.masks[keep]))
    assert list(results['kinds']) == ['crack', 'hole'] and results['notes'] == []
    official_rule = evaluate(detector(category), category, mask_rule='official')
    assert (official_rule['pixel'] == evaluate_maps(found.maps, category.masks_official)
            and official_rule['conditions']['mask_rule'] == 'official')


def test_results_survive_json_and_repeat_to_the_byte():
    category = tiny(KINDS)
    text = [json.dumps(evaluate(detector(category), category, together=['hole', 'crack']), allow_nan=False)
            for _ in range(2)]
    assert text[0] == text[1] and json.loads(text[0]) == evaluate(detector(category), category,
                                                                  together=['hole', 'crack'])
    assert json.loads(text[0])['together']['kinds'] == ['crack', 'hole']


def test_kinds_together_have_intervals_of_their_own():
    category = tiny(KINDS)
    both = evaluate(detector(category), category, together=['hole', 'crack'])
    assert both['together']['intervals'] == both['intervals']       # these two are all there are
    one = evaluate(detector(category), category, together=['hole'])['together']
    low, high = one['intervals']['pixel']['ap']
    assert low <= one['pixel']['ap'] <= high and one['intervals'] != both['intervals']


def test_the_other_mask_rule_stands_beside():
    category = tiny(KINDS)
    found = detections(category)
    half, other = (evaluate(detector(category), category, found, mask_rule=rule) for rule in ('half', 'official'))
    assert half['other_mask_rule'] == dict(mask_rule='official', pixel=other['pixel'])
    assert other['other_mask_rule'] == dict(mask_rule='half', pixel=half['pixel']) and half['pixel'] != other['pixel']


def test_intervals_are_those_of_a_plain_bootstrap():
    """Against drawing the images one by one and computing every metric anew: the same distribution, so limits
    that agree within its noise."""
    category = tiny(['good'] * 20 + ['crack'] * 15)
    found = detections(category)
    found.scores[:] = torch.randn(35, generator=torch.Generator().manual_seed(1)) + category.labels
    got = intervals(found, category.masks[:, 0], category.labels)
    assert (got == intervals(found, category.masks[:, 0], category.labels)
            and got != intervals(found, category.masks[:, 0], category.labels, seed=1))
    plain = dict(image=lambda i: evaluate_scores(found.scores[i], category.labels[i]),
                 pixel=lambda i: evaluate_maps(found.maps[i], category.masks[i]))
    for part, names in dict(image=('auroc', 'ap'), pixel=('auroc', 'ap', 'aupro')).items():
        assert tuple(got[part]) == names
        for name in names:
            low, high = bootstrap_interval(lambda i, part=part, name=name: plain[part](i)[name],
                                           category.labels, draws=400)
            assert got[part][name] == pytest.approx([low, high], abs=0.15 * (high - low) + 1e-4), (part, name)


def test_draws_without_a_defect_pixel_do_not_count():
    """Of four defective images one has a mask; three draws of ten miss it.

    The map is perfect, so every draw that has a value has 1."""
    category = tiny(['good'] * 10 + ['crack'] * 4)
    category.masks[11:] = False
    maps = category.masks[:, 0].float()
    perfect, blind = (Detections(m, category.labels.float(), None, None, None, None)
                      for m in (maps, torch.zeros_like(maps)))
    got = intervals(perfect, category.masks[:, 0], category.labels)['pixel']
    assert got == dict(auroc=[1., 1.], ap=[1., 1.], aupro=[1., 1.])
    row = compare(blind, perfect, category.masks[:, 0], category.labels).loc['AUPRO']
    # a constant map has the area under the diagonal up to 0.3, of 0.3
    assert row.difference == row.low == row.high == pytest.approx(0.85)
    notes = evaluate(detector(category), category)['notes']
    assert ("3 of 4 defective images have not one defect pixel under the mask rule 'half' at this size: their pixels "
            "count as normal." in notes)


@pytest.mark.parametrize('kinds', [['good'] * 3, ['crack'] * 3, []])
def test_intervals_of_what_is_undefined_are_none(kinds):
    category = tiny(kinds)
    got = intervals(detections(category), category.masks[:, 0], category.labels)
    assert got['image'] == dict(auroc=None, ap=None)
    if kinds != ['crack'] * 3: assert got['pixel'] == dict(auroc=None, ap=None, aupro=None)


def test_a_metric_in_words():
    # one defect: values, no intervals
    results = evaluate(detector(category := tiny(['good'] * 3 + ['crack'])), category)
    assert with_interval(results, 'image', 'auroc') == f"{results['image']['auroc']:.3f}"
    assert with_interval(evaluate(detector(category := tiny(KINDS)), category), 'image', 'auroc').endswith(')')
    assert with_interval(evaluate(detector(category := tiny(['good'] * 3)), category), 'pixel', 'ap') == 'undefined'


def test_compare_is_the_paired_bootstrap():
    category = tiny(['good'] * 20 + ['crack'] * 15)
    a, b = detections(category, 0), detections(category, 1)
    table = compare(a, b, category.masks[:, 0], category.labels)
    assert list(table.index) == ['image AUROC', 'image AP', 'pixel AUROC', 'pixel AP', 'AUPRO']
    assert (table.loc['pixel AP', 'first'] == evaluate_maps(a.maps, category.masks)['ap']
            and table.loc['image AUROC', 'second'] == evaluate_scores(b.scores, category.labels)['auroc'])
    assert np.allclose(table.difference, table.second - table['first'])
    plain = (lambda i: evaluate_maps(b.maps[i], category.masks[i])['ap']
             - evaluate_maps(a.maps[i], category.masks[i])['ap'])
    low, high = bootstrap_interval(plain, category.labels, draws=400)
    assert table.loc['pixel AP', ['low', 'high']].tolist() == pytest.approx([low, high], abs=0.15 * (high - low) + 1e-4)
    turned = compare(b, a, category.masks[:, 0], category.labels)
    assert np.allclose(turned.low, -table.high) and np.allclose(turned.difference, -table.difference)
    good = tiny(['good'] * 3)
    assert compare(detections(good), detections(good, 1), good.masks[:, 0], good.labels).isna().all(axis=None)
    with pytest.raises(ValueError, match='must be of the same images'):
        compare(a, detections(good), category.masks[:, 0], category.labels)


def test_ablation_rows_are_those_of_the_paper():
    assert set(ablations()) <= set(ablation_table({}).index) and list(ablations())[-1] == 'DRAEM'
    category = tiny(KINDS)
    results = evaluate(detector(category), category)
    table = ablation_table({'rectangular masks': results, '10 source textures': results})
    assert (table.loc['rectangular masks', ('ours', 'pixel AP')] == 100 * results['pixel']['ap']
            and table.loc['rectangular masks', ('published', 'pixel AP')] == 65.1)
    assert (table.loc['DRAEM', 'ours'].isna().all() and table.loc['10 source textures', 'published'].isna().all()
            and list(table.index)[-1] == '10 source textures')


def test_operating_point_by_hand():
    category = tiny(['good'] * 4 + ['crack'] * 5)
    # one false alarm, three of five found
    scores = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.2, 0.5, 0.6, 0.7, 0.1])
    found = Detections(detections(category).maps, scores, None, None, None, None)
    point = evaluate(detector(category, threshold=0.3, held_out_scores=[0.1] * 8 + [0.3]), category,
                     found)['operating_point']
    assert (point['false_alarm_rate'], point['precision'], point['recall'], point['f1']) == (1 / 4, 3 / 4, 3 / 5, 2 / 3)
    assert (point['n_held_out'], point['n_good'], point['promised_false_alarm_rate']) == (9, 4, 0.1)
    assert point['false_alarm_interval'] == wilson_interval(1, 4)


@pytest.mark.parametrize('hits, n', [(0, 1), (1, 1), (0, 37), (37, 37), (3, 37), (999, 1000)])
def test_wilson_interval_solves_its_equation(hits, n):
    "Both limits p fulfil (hits / n - p)^2 = z^2 p (1 - p) / n, and hold the rate between them."
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1 and isinstance(low, float)
    for p in (low, high): assert abs((hits / n - p)**2 - 1.959964**2 * p * (1 - p) / n) < 1e-12


@pytest.mark.parametrize('kinds, undefined, says', [
    (['good'] * 3, {'image': ['auroc', 'ap', 'f1_max'], 'pixel': ['auroc', 'ap', 'f1_max', 'aupro']},
     'There are no defects in the test images'),
    (['crack'] * 3, {'image': ['auroc'], 'pixel': []}, 'There are no good test images'),
    (['crack'], {'image': ['auroc'], 'pixel': []}, 'There are no good test images'),
    ([], {'image': ['auroc', 'ap', 'f1_max'], 'pixel': ['auroc', 'ap', 'f1_max', 'aupro']}, 'There are no test images'),
])
def test_what_is_undefined_is_none_and_said(kinds, undefined, says):
    category = tiny(kinds)
    results = evaluate(detector(category), category)
    for part, keys in undefined.items(): assert [k for k, v in results[part].items() if v is None] == keys
    assert any(says in note for note in results['notes'])
    json.dumps(results, allow_nan=False)
    assert len(results_table(results)) == 1 + len(set(kinds) - {'good'})


def test_a_kind_without_a_pixel_under_the_rule_is_said():
    category = tiny(KINDS, small='hole')
    results = evaluate(detector(category), category, mask_rule='official')
    assert (results['kinds']['hole']['pixel'] == dict(auroc=None, ap=None, f1_max=None, aupro=None)
            and results['kinds']['hole']['image']['auroc'] is not None)
    assert results['notes'] == ["Not one pixel is a defect in the images of kind hole under the mask rule 'official': "
                                "its pixel metrics are undefined.",
                                "2 of 5 defective images have not one defect pixel under the mask rule 'official' at "
                                "this size: their pixels count as normal."]


def test_all_defect_and_never_called():
    category = tiny(['crack'] * 2)
    category.masks[:] = True
    results = evaluate(detector(category, threshold=9.), category)
    assert results['pixel'] == dict(auroc=None, ap=1., f1_max=1., aupro=None)
    assert (results['operating_point']['precision'] is None and results['operating_point']['recall'] == 0
            and results['operating_point']['false_alarm_rate'] is None)
    assert {'Every pixel is a defect: pixel AUROC and AUPRO are undefined.', 'No image was called anomalous: precision '
            'at the threshold is undefined.'} <= set(results['notes'])


def test_a_detector_with_nothing_but_predict():
    category = tiny(KINDS)
    results = evaluate(SimpleNamespace(predict=lambda images: detections(category)), category)
    assert results['image'] == evaluate(detector(category), category)['image'] and results['operating_point'] is None
    assert results['conditions'].keys() == {'category', 'size', 'mask_rule', 'n_train', 'fingerprint'}
    assert conditions_name(results) == 'no recipe, 16 x 16, masks half' and len(differing_conditions(results)) == 2
    only_threshold = evaluate(SimpleNamespace(threshold=0.3), category, detections(category))
    assert (only_threshold['operating_point']['promised_false_alarm_rate'] is None
            and only_threshold['operating_point']['n_held_out'] == 0)


@pytest.mark.parametrize('change, says', [
    (dict(mask_rule='three quarters'), "mask_rule is 'three quarters'; choose 'half' or 'official'"),
    (dict(together=['hole', 'craks']), 'class nuts has no test images of kind craks; there are: crack, good, hole'),
    (dict(detections=detections(tiny(KINDS[1:]))), 'detections hold 10 scores and 10 maps, but class nuts has '
     '11 test images'),
    (dict(detections=detections(tiny(KINDS, size=32))), 'maps have shape'),
    (dict(detections=Detections(detections(tiny(KINDS)).maps * np.nan, torch.zeros(11), None, None, None, None)),
     'maps hold'),
])
def test_bad_input_is_one_sentence(change, says):
    category = tiny(KINDS)
    with pytest.raises(ValueError, match=says): evaluate(detector(category), category, **change)


def test_conditions_hold_every_choice_that_matters():
    category = tiny(KINDS)
    conditions = lambda recipe: evaluate(detector(category, recipe=recipe), category)['conditions']
    assert conditions(demo())['changes'] == {} and conditions(official())['changes'] == {}
    assert (conditions(demo().replace(mask_shape='rectangle', opacity=(1., 1.), compile=True, steps=7))['changes']
            == dict(mask_shape='rectangle', opacity=[1., 1.]))
    assert conditions(official().replace(name='mine', lr=1e-3))['changes'] == dict(lr=1e-3)
    # 4 of 20 are held out
    assert conditions(official())['epochs'] == 700 and conditions(official())['steps'] == 700 * 16 / 8
    assert conditions(demo())['epochs'] is None


def test_published_tables():
    for name, rows, columns in (('detection', 16, 7), ('localization', 16, 8), ('ablation', 11, 3), ('cutpaste', 16, 2),
                                ('dagm', 5, 4)):
        table = paper_table(name)
        assert (table.shape == (rows, columns) and (table.dtypes == float).all() and table.notna().all(axis=None)
                and table.max(axis=None) <= 100)
    assert (sorted(paper_table('detection').index.drop('average'))
            == sorted(paper_table('localization').index.drop('average')) == MVTEC)
    averages = (paper_table('detection').loc['average'].round(1).to_dict()
                | paper_table('localization').loc['average'].round(1).to_dict())
    assert averages == {'GANomaly': 78.2, 'DAGAN': 87.3, 'US': 87.7, 'RIAD': 91.7, 'Gaussian-AD': 94.4, 'PaDiM': 95.4,
                        'DRAEM': 98.0, 'US_auroc': 93.9, 'US_ap': 45.5,
                        'RIAD_auroc': 94.2, 'RIAD_ap': 48.2, 'PaDiM_auroc': 97.4, 'PaDiM_ap': 55.0, 'DRAEM_auroc': 97.3,
                        'DRAEM_ap': 68.4}
    with pytest.raises(ValueError, match="unknown table 'tables'; there are: detection, localization"):
        paper_table('tables')
    assert paper_table('detection').DRAEM['bottle'] == 99.2 and paper_table('localization').DRAEM_ap['screw'] == 58.2


def run(category: str, seed: int = 0, auroc: float | None = 0.9, **conditions: object) -> dict:
    made = tiny(KINDS, name=category)
    results = evaluate(detector(made, recipe=demo().replace(seed=seed)), made)
    results['image']['auroc'] = auroc
    results['conditions'] |= conditions
    return results


def test_beside_paper_is_for_the_fifteen_classes():
    assert beside_paper(run('nuts')) is None
    for category in MVTEC:
        table = beside_paper(run(category))
        assert list(table.index) == ['GANomaly', 'DAGAN', 'US', 'RIAD', 'Gaussian-AD', 'PaDiM', 'DRAEM', 'ours']
        assert table.loc['DRAEM', 'image AUROC'] == paper_table('detection').DRAEM[category]
        assert (table.loc['RIAD', 'pixel AP'] == paper_table('localization').RIAD_ap[category]
                and np.isnan(table.loc['DAGAN', 'pixel AP']))
    assert (table.loc['ours', 'image AUROC'] == 90
            and np.isnan(beside_paper(run('screw', auroc=None)).loc['ours', 'image AUROC']))


def test_the_papers_conditions_do_not_differ():
    results = run('screw', size=[256, 256], base_width=128, base_channels=64, batch=8, recipe='paper',
                  steps=700 * 20 // 8, mask_rule='official')
    results['operating_point'] = None
    assert differing_conditions(results) == []
    assert differing_conditions(results | {'conditions': results['conditions']
                                           | {'changes': {'mask_shape': 'rectangle'}}}) == ['mask_shape = rectangle']


def test_mean_and_deviation_over_seeds():
    table = runs_table([run('screw', seed, auroc) for seed, auroc in enumerate((0.7, 0.7, 1.0))]
                       + [run('screw', 2, 1.0), run('nuts')]).set_index('category')
    assert np.allclose(table.loc['screw', ['image AUROC', 'image AUROC sd', 'seeds']].astype(float), [80, 300**0.5, 3])
    assert table.loc['nuts', 'seeds'] == 1 and np.isnan(table.loc['nuts', 'image AUROC sd'])
    assert runs_table([]).empty and np.isnan(runs_table([run('screw', auroc=None)])['image AUROC'][0])


def test_kinds_evaluated_together_are_a_row_and_costs_are_means():
    some = dict(kinds=['crack', 'hole'], image=dict(auroc=0.7), pixel=dict(auroc=0.6, ap=0.5))
    runs = [run('screw', seed) | dict(together=some, cost=dict(training_processor_seconds=seconds))
            for seed, seconds in enumerate((10., 20.))]
    table = runs_table([*runs, run('nuts')]).set_index('category')
    assert table.loc['screw: crack, hole', ['image AUROC', 'pixel AP']].tolist() == [70, 50]
    assert np.isnan(table.loc['screw: crack, hole', 'image AUROC low']) and table.loc['screw', 'image AUROC'] == 90
    assert table.loc['screw', 'training, processor s'] == 15 and np.isnan(table.loc['nuts', 'ms per image'])


def test_an_average_needs_all_fifteen():
    complete, notes = summary_table([run(c, auroc=0.97) for c in MVTEC])
    assert np.isclose(complete.iloc[:, -1]['average'], 97) and notes == []
    lacking, notes = summary_table([run(c) for c in MVTEC if c not in ('screw', 'pill')] + [run('nuts')])
    assert (np.isnan(lacking.iloc[:, -1]['average']) and len(notes) == 1
            and notes[0].endswith('there is no run of pill, screw'))
    assert 'nuts' not in lacking.index and summary_table([run('nuts')])[0].shape == (16, 7)
    undefined, notes = summary_table([run(c, auroc=None if c == 'screw' else 0.9) for c in MVTEC])
    assert np.isnan(undefined.iloc[:, -1]['average']) and 'screw' in notes[0]
    two, _ = summary_table([run(c, size=[s, s]) for c in MVTEC for s in (16, 32)], 'pixel AP')
    assert two.shape == (16, 6) and list(two)[:4] == ['US', 'RIAD', 'PaDiM', 'DRAEM']
    with pytest.raises(ValueError, match="unknown metric 'AUROC'; there are: image AUROC"): summary_table([], 'AUROC')


def test_ours_stands_beside_the_published_column_of_its_method():
    of = lambda method, c='screw': run(c, method=method, recipe=f'{method} demo')
    table, _ = summary_table([of('padim'), of('memory'), of('draem'), of('riad')])
    short = [c.split(',')[0] for c in table]
    assert short == ['GANomaly', 'DAGAN', 'US', 'RIAD', 'ours: riad demo', 'Gaussian-AD', 'PaDiM', 'ours: padim demo',
                     'DRAEM', 'ours: draem demo', 'ours: memory demo']
    assert ([c.split(',')[0] for c in summary_table([of('padim'), of('ganomaly')], 'pixel AP')[0]]
            == ['US', 'RIAD', 'PaDiM', 'ours: padim demo', 'DRAEM', 'ours: ganomaly demo'])
    assert list(summary_table([of('padim')], 'AUPRO')[0]) == [conditions_name(of('padim')).join(['ours: ', ''])]
    complete, notes = summary_table([of('padim', c) for c in MVTEC])
    assert not notes and np.isclose(complete.filter(like='ours').loc['average'].iloc[0], 90)
    # each from its own, and from nothing where there is nothing
    apart = differences([of('padim'), of('memory')])
    assert np.allclose(apart.difference, 90 - paper_table('detection').PaDiM['screw']) and len(apart) == 1


def test_conditions_of_other_methods_are_compared_with_their_own():
    recipe = dict(category='screw', size=[64, 64], mask_rule='official', n_train=20, method='padim',
                  backbone='EfficientNet-Lite0')
    results = run('screw') | dict(conditions=recipe | dict(unlike_published=dict(size=[64, 224])), operating_point=None)
    assert differing_conditions(results) == ['features of EfficientNet-Lite0 instead of WideResNet-50',
                                             'size 64 instead of 224']
    results['conditions'] |= dict(backbone='WideResNet-50', unlike_published={})
    assert differing_conditions(results) == []
    assert list(beside_paper(results).index[-2:]) == ['PaDiM', 'ours'] and 'CutPaste' not in beside_paper(results).index
    results['conditions']['method'] = 'cutpaste'
    assert beside_paper(results).loc['CutPaste', 'image AUROC'] == paper_table('cutpaste').image_auroc_3way['screw']


def test_the_best_are_marked_with_their_ties():
    table = pd.DataFrame(dict(a=[99.96, 50., np.nan], b=[99.98, 49.94, np.nan], c=[99.94, np.nan, np.nan]),
                         index=list('xyz'))
    assert (mark_best(table).values.tolist() == [['**100.0**', '**100.0**', '99.9'], ['**50.0**', '49.9', ''],
                                                ['', '', '']] and mark_best(table[['a']]).values.tolist()
            == [['100.0'], ['50.0'], ['']])


def test_complete_runs_are_read_and_others_named(tmp_path):
    def write(name: str, **files: dict) -> None:
        (tmp_path / name).mkdir(parents=True)
        for file, content in files.items(): (tmp_path / name / f'{file}.json').write_text(json.dumps(content))

    write('b/screw', run=dict(textures_fingerprint='0123456789abcdef'), metrics=run('screw'))
    write('a', run={}, metrics=run('pill'), timing=dict(peak_memory_mib=700, seconds='many'))
    write('c', run={})                                                              # stopped before its end
    write('summary', metrics=dict(runs=2))                                          # a report on runs is not a run
    write('d', run={}, metrics=dict(runs=2))
    runs, incomplete = read_runs(tmp_path)
    assert [r['conditions']['category'] for r in runs] == ['pill', 'screw'] and incomplete == ['c']
    assert runs[1]['conditions']['textures'] == '01234567' and 'textures 01234567' in conditions_name(runs[1])
    assert runs[0] == json.loads(json.dumps(run('pill'))) | dict(cost=dict(peak_memory_mib=700))
    assert runs[1]['cost'] == {}
    with pytest.raises(FileNotFoundError, match='nowhere'): read_runs(tmp_path / 'nowhere')


def test_one_image_of_a_sort_has_no_interval_and_that_is_said():
    for kinds, what in ((['good'] * 5 + ['crack'], 'defective'), (['good'] + ['crack'] * 5, 'good')):
        category = tiny(kinds)
        results = evaluate(detector(category), category)
        assert results['image']['auroc'] is not None and results['pixel']['ap'] is not None
        assert results['intervals'] == dict(image=dict(auroc=None, ap=None),
                                            pixel=dict(auroc=None, ap=None, aupro=None))
        assert (results['operating_point']['precision_interval'] is None
                and results['operating_point']['f1_interval'] is None)
        assert any(f'one {what} test image' in note for note in results['notes'])
        table = compare(detections(category), detections(category, 1), category.masks[:, 0], category.labels)
        assert table.low.isna().all() and table.difference.notna().all()


def test_the_detectors_own_mask_rule_is_taken():
    category = tiny(KINDS)
    assert evaluate(detector(category, mask_rule='official'),
                    category) == evaluate(detector(category), category, mask_rule='official')
    assert evaluate(detector(category, mask_rule='official'), category,
                    mask_rule='half')['conditions']['mask_rule'] == 'half'


def test_differences_are_against_the_published_draem():
    runs = [run('screw', seed, auroc) for seed, auroc in enumerate((0.9, 0.95))] + [run('nuts')]
    for r in runs: r['intervals']['image']['auroc'] = [0.8, 1.0]
    row, = differences(runs).itertuples()
    published = paper_table('detection').DRAEM['screw']
    assert (row.category, len(row.seeds)) == ('screw', 2) and np.allclose([row.difference, row.low, row.high],
                                                                          np.array([92.5, 80, 100]) - published)
    runs[0]['intervals']['image']['auroc'] = None
    assert np.isnan(differences(runs).low[0]) and np.isclose(differences(runs).difference[0], 92.5 - published)
    assert np.isclose(differences(runs, 'pixel AP').difference[0], 100 * runs[0]['pixel']['ap']
                      - paper_table('localization').DRAEM_ap['screw'])


def test_undefined_and_missing_are_told_apart():
    notes = summary_table([run(c, auroc=None if c == 'screw' else 0.9) for c in MVTEC if c != 'pill'])[1]
    assert notes[0].endswith('no average, because the metric is undefined for screw and there is no run of pill')
