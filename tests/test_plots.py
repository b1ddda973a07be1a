"draem_nb.plots, draem_nb.charts: figures on ordinary and odd input, their words; nothing overlaps or is left behind."
import itertools
import os
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from draem_nb import charts, plots
from draem_nb.detector import Detections

SIZES = [(64, 64), (32, 160), (160, 32), (256, 320)]
LOSSES = pd.DataFrame(dict(step=range(100, 1100, 100), ssim=np.linspace(.9, .5, 10), l2=np.geomspace(.1, 1e-3, 10),
                           focal=.01, lr=[1e-3] * 8 + [1e-4] * 2))
CURVES = dict(fpr=np.array([0, .2, 1]), tpr=np.array([0, .9, 1]), recall=np.array([0, .9, 1]),
              precision=np.array([1, .8, .3]))
METRICS = dict(auroc=.9, ap=.8, f1_max=.7, aupro=.6)


def a_category(size=(64, 64), kinds=('good', 'good', 'crack', 'crack', 'hole'), n_train=3, name='part'):
    g = torch.Generator().manual_seed(0)
    images = lambda n: torch.randint(0, 256, (n, 3, *size), generator=g, dtype=torch.uint8)
    masks = torch.zeros(len(kinds), 1, *size, dtype=torch.bool)
    for i, kind in enumerate(kinds):
        if kind != 'good': masks[i, :, size[0] // 2:, :4 + 2 * i] = True
    return SimpleNamespace(name=name, train=images(n_train), test=images(len(kinds)), masks=masks,
                           outlines=masks, kinds=list(kinds), size=size,
                           labels=torch.tensor([kind != 'good' for kind in kinds], dtype=torch.bool))


def found(category, threshold=.5, reconstructions=True):
    maps = category.masks[:, 0] * .8
    scores = torch.linspace(0, 1, len(maps))
    calibrated = threshold is not None
    return Detections(maps, scores, maps > .5 if calibrated else None, scores > threshold if calibrated else None,
                      category.test if reconstructions else None, None)


def simulated(category):
    x = category.test.float() / 255
    return SimpleNamespace(target=x, augmented=1 - x, mask=category.masks.float(), is_anomalous=category.labels)


def results(**kinds):
    part = lambda auroc, ap: dict(image=dict(auroc=auroc, n_anomalous=2), pixel=dict(ap=ap))
    return part(.9, .5) | dict(kinds={kind: part(*values) for kind, values in kinds.items()})


def words(fig):
    return ' | '.join(text.get_text() for text in fig.findobj(Text) if text.get_visible() and text.get_text())


def boxes(fig):
    "The words of a figure that are drawn, with the rectangles that they cover."
    fig.canvas.draw()
    ticks = [label for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) if ax.axison and axis.get_visible()
             for tick in axis.get_major_ticks() + axis.get_minor_ticks() if tick not in axis._update_ticks()
             for label in (tick.label1, tick.label2)]
    texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip()
             and not any(t is label for label in ticks)]
    hidden = {id(t) for ax in fig.axes if not ax.axison for axis in (ax.xaxis, ax.yaxis) for t in axis.findobj(Text)}
    return [(t.get_text(), t.get_window_extent()) for t in texts if id(t) not in hidden]


def overlaps(fig):
    return [(a, b) for (a, p), (b, q) in itertools.combinations(boxes(fig), 2)
            if min(p.x1, q.x1) - max(p.x0, q.x0) > 1 and min(p.y1, q.y1) - max(p.y0, q.y0) > 2]


def outside(fig):
    width, height = fig.get_size_inches() * fig.dpi
    return [word for word, box in boxes(fig) if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1]


LONG = ('good', 'manipulated_front', 'glue_strip', 'gray_stroke', 'missing_cable', 'poke_insulation', 'bent_wire',
        'combined', 'cut_outer_insulation')
FIGURES = {
    'overview': lambda size: plots.data_overview(a_category(size)),
    'overview, many kinds': lambda size: plots.data_overview(a_category(size, LONG)),
    'simulated': lambda size: plots.simulated_gallery(simulated(a_category(size)), 4),
    'simulated, with textures': lambda size: plots.simulated_gallery(simulated(a_category(size)), 9,
                                                                     a_category(size).test),
    'gallery': lambda size: plots.detection_gallery((c := a_category(size)).test, found(c), c.masks, c.kinds, [4, 0],
                                                    threshold=.5),
    'gallery, long kinds': lambda size: plots.detection_gallery((c := a_category(size, LONG)).test, found(c), c.masks,
                                                                c.kinds, [8, 1], threshold=.5),
    'gallery, files': lambda size: plots.detection_gallery((c := a_category(size)).test, found(c, None, False),
                                                           None, None, [1],
                                                           titles=['a very long name of a file from a camera.png'] * 5),
    'method': lambda size: plots.method_picture((c := a_category(size)).test[2], c.test[3], c.masks[2, 0].float(),
                                                c.masks[2, 0], c.masks[3]),
}


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('name', FIGURES)
def test_pictures_of_any_shape(name, size):
    fig = FIGURES[name](size)
    assert isinstance(fig, Figure) and fig.dpi == 100 and fig.get_size_inches()[0] <= 1.2 * plots.WIDTH
    assert not overlaps(fig) and not outside(fig)


CHARTS = {
    'training': lambda: charts.training_curves(LOSSES),
    'scores': lambda: charts.score_histogram(np.linspace(0, 1, 5), a_category().kinds, .5, [.1, .2], .995),
    'scores, many kinds': lambda: charts.score_histogram(np.linspace(0, 1, 9), LONG, .5),
    'curves': lambda: charts.detection_curves(CURVES, CURVES, METRICS, METRICS),
    'kinds': lambda: charts.kind_bars(results(crack=(.8, .4), hole=(1., None))
                                     | dict(together=results() | dict(kinds=['crack', 'hole']))),
    'paper': lambda: charts.against_paper(pd.DataFrame(dict(ours=np.linspace(80, 100, 15),
                                                           published=np.linspace(90, 100, 15)),
                                                      index=[f'class {i}' for i in range(15)])),
}


@pytest.mark.parametrize('name', CHARTS)
def test_charts(name):
    fig = CHARTS[name]()
    assert not overlaps(fig) and not outside(fig)


def test_overlaps_are_seen():
    fig = plt.figure()
    fig.text(.5, .5, 'one'), fig.text(.51, .5, 'other')
    plt.close(fig)
    assert overlaps(fig) == [('one', 'other')] and not outside(fig)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = plt.figure()
    settings, state = dict(matplotlib.rcParams), np.random.get_state()[1].copy()
    for chart in CHARTS.values(): chart()
    for picture in FIGURES.values(): picture((64, 64))
    with pytest.raises(KeyError):
        charts.training_curves(pd.DataFrame(dict(ssim=[1.])))   # fails when its figure is open already
    assert plt.get_fignums() == [mine.number] and dict(matplotlib.rcParams) == settings and not os.listdir(tmp_path)
    assert (np.random.get_state()[1] == state).all()
    plt.close(mine)


def test_style_is_set_on_request():
    with plt.rc_context():
        plots.set_style()
        assert plt.rcParams['figure.dpi'] == 100 and not plt.rcParams['axes.spines.top']


# Nothing to show is a sentence.

def test_only_train_images():
    fig = plots.data_overview(a_category(kinds=(), n_train=1))
    assert 'part: 1 image to learn from, 0 to test on (no normal and no defect test images)' in words(fig)


def test_no_normal_test_images():
    category = a_category(kinds=('hole',))
    assert 'no normal test images' in words(plots.data_overview(category))
    assert 'no good test images' in words(charts.score_histogram([.3], ['hole'], .5))


def test_empty_is_a_sentence():
    category = a_category()
    none = SimpleNamespace(target=category.test[:0], augmented=category.test[:0], mask=category.masks[:0],
                           is_anomalous=category.labels[:0])
    assert 'No simulated samples' in words(plots.simulated_gallery(none))
    assert 'No losses' in words(charts.training_curves(LOSSES[:0]))
    assert 'No test images' in words(charts.score_histogram([], []))
    assert 'such case' in words(plots.detection_gallery(category.test, found(category), category.masks,
                                                        category.kinds, []))
    assert words(plots.detection_gallery(category.test, found(category), None, None, [],
                                         empty='No miss.')) == 'No miss.'
    assert 'No metric' in words(charts.kind_bars(dict(image=dict(auroc=None, n_anomalous=0),
                                                     pixel=dict(ap=None), kinds={})))
    nothing = pd.DataFrame(dict(ours=[np.nan], published=[99.]), index=['screw'])
    assert 'No class' in words(charts.against_paper(nothing))


@pytest.mark.parametrize('curves', [None, dict.fromkeys(CURVES)])
def test_undefined_curves(curves):
    fig = charts.detection_curves(curves, CURVES, None, METRICS | dict(aupro=None))
    assert words(fig).count('images: not defined') == 2


def test_losses_that_a_recipe_lacks():
    fig = charts.training_curves(LOSSES.assign(ssim=0., l2=np.nan))
    assert words(fig).count('not part of this recipe') == 2 and words(fig).count('lr 1e-4') == 1
    assert [ax.get_yscale() for ax in charts.training_curves(LOSSES).axes] == ['linear', 'log', 'linear']


def test_one_of_everything():
    category = a_category(kinds=('good',), n_train=1)
    figures = {
        '1 image to learn from, 1 to test on (no defect test images)': plots.data_overview(category),
        'clean': plots.simulated_gallery(simulated(category)),
        'ends at 0.9': charts.training_curves(LOSSES[:1]),
        'no defect test images, 1 good image |': charts.score_histogram([.2], ['good'], held_out_scores=[.1]),
        '✓ passed': plots.detection_gallery(category.test, found(category), category.masks, category.kinds, [0]),
        '1 of 1 reach the published value': charts.against_paper(
            pd.DataFrame(dict(ours=[99.], published=[98.]), index=['screw']))}
    for said, fig in figures.items(): assert said in words(fig)


# The words are true.

def test_scores_in_words():
    fig = charts.score_histogram(torch.tensor([.1, .6, .5, .7, .9]), ['good', 'good', 'crack', 'crack', 'hole'], .5,
                                [.1, .2, .5], .995)
    for sentence in ('2 of 3 defects found, 1 of 2 good images called a defect', '1 of 2 found', '1 of 1 found',
                     '1 false alarm in 2',
                     'the 99.5 % quantile of 3 held-out normal images'):
        assert sentence in words(fig)   # the crack of score .5 is at the threshold, not above it
    assert 'not calibrated' in words(charts.score_histogram([.1, .6], ['good', 'crack']))


def test_verdicts_in_words():
    category = a_category()
    show = lambda i, kinds=category.kinds, **kw: words(plots.detection_gallery(category.test, found(category, **kw),
                                                                               category.masks, kinds, [i],
                                                                               threshold=kw.get('threshold', .5)))
    assert ('✓ passed' in show(0) and '✗ missed' in show(2) and '✓ found' in show(4)
            and '✗ false alarm' in show(1, threshold=.1))
    assert 'called normal' in show(0, kinds=None) and 'score 1.000 > 0.500' in show(4)
    assert 'found' not in (uncalibrated := show(4, threshold=None)) and 'called' not in uncalibrated


def test_columns_follow_what_is_known():
    category = a_category()
    full, least = (words(plots.detection_gallery(category.test, found(category, .5, known), category.masks if known
                                                 else None, None, [0])) for known in (True, False))
    assert all(column in full for column in ('input', 'reconstruction', 'score map', 'ground truth', 'overlay'))
    assert 'reconstruction' not in least and 'ground truth' not in least


def test_cases_are_honest():
    scores, labels = torch.tensor([.9, .8, .1, .2, .3]), torch.tensor([True, False, True, False, True])
    assert plots.pick_cases(scores, labels, scores > .5) == dict(hits=[0], misses=[2, 4], false_alarms=[1])
    assert plots.pick_cases(scores, labels) == dict(hits=[0], misses=[2, 4], false_alarms=[1, 3])
    assert plots.pick_cases(scores, labels, scores > .5, n=1)['misses'] == [2]
    nothing = dict(hits=[], misses=[], false_alarms=[])
    assert (plots.pick_cases(scores[:1], ~labels[:1], scores[:1] > 1) == plots.pick_cases(scores[:1], ~labels[:1])
            == nothing)


# Arrays.

def test_score_maps_share_one_scale():
    category = a_category()
    fig = plots.detection_gallery(category.test, found(category), category.masks, category.kinds, [0, 4])
    scales = {image.get_clim() for ax in fig.axes for image in ax.images if image.get_cmap().name == plots.HEAT}
    assert scales == {(0, 1)}


def test_overlay():
    image, scores = torch.full((3, 40, 60), 100, dtype=torch.uint8), torch.zeros(40, 60)
    assert (plots.overlay(image, scores) == 100).all()    # a normal image stays as it is
    scores[10:20, 10:20] = 1
    heated, outlined = plots.overlay(image, scores), plots.overlay(image, scores, scores > .5)
    assert (heated.shape == (40, 60, 3) and heated.dtype == np.uint8 and (heated[30:] == 100).all()
            and (heated[15, 15] != 100).any())
    changed = (heated != outlined).any(-1)
    assert (changed == plots.outline(scores > .5)).all() and len(np.unique(outlined[changed], axis=0)) == 1
    assert image.eq(100).all()
    with pytest.raises(ValueError, match='40 x 60 and the map 60 x 40'): plots.overlay(image, scores.T)


@pytest.mark.parametrize('size', [(40, 60), (900, 1600)])
def test_outline_surrounds(size):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[5:9, 20:30] = True
    rim = torch.from_numpy(plots.outline(mask))
    width = max(1, round(min(size) / 300))
    assert not (rim & mask).any() and rim.sum() == (4 + 2 * width) * (10 + 2 * width) - 40
    assert (plots.outline(mask[None]) == rim.numpy()).all()


def test_heatmap_is_not_rescaled():
    assert (plots.heatmap(torch.full((2, 2), .3))[0, 0] == plots.heatmap(torch.tensor([[.3, 1.]]))[0, 0]).all()


@pytest.mark.parametrize('limit', [1e-3, .5, 1., 200.])
def test_only_what_exceeds_the_alarm_limit_is_red(limit):
    maps = limit * torch.tensor([[0., .5, .999, 1., 1.001, 1.5, 3.]])
    colours = plots.heatmap(maps, limit)[0].astype(int)
    assert (((colours[:, 0] > colours[:, 2]) == [False] * 4 + [True] * 3).all()
            and (colours == plots.heatmap(maps / limit, 1.)[0]).all())
    gray = torch.full((3, 1, 7), 100, dtype=torch.uint8)
    over = plots.overlay(gray, maps, limit=limit)[0].astype(int)
    assert (over[0] == 100).all() and ((over[:, 0] > over[:, 2]) == [False] * 4 + [True] * 3).all()


def test_a_limit_of_zero_has_a_scale_too():
    assert plots.in_limits(torch.tensor([[-1., 0., 1e-6]]), 0.).tolist() == [[0, 0, 2]]
