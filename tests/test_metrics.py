"""The metrics beyond the notebook's examples: properties that hold for all scores, and size."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from draem_nb.metrics import (bootstrap_interval, curves, evaluate_maps, evaluate_scores, f1_max, pro_curve,
                              region_weights, tie_groups)

# Few distinct scores, so that ties are the rule; and any float32 at all, denormal and negative ones included.
SCORES = st.one_of(st.sampled_from([0., 0.25, 0.5, 1.]), st.floats(-2.**100, 2.**100, width=32))
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def labelled(draw, both: bool = True) -> tuple[np.ndarray, np.ndarray]:
    "(scores float32, labels bool), with `both` at least one of each label."
    n = draw(st.integers(2 if both else 0, 40))
    scores = draw(arrays.arrays(np.float32, n, elements=SCORES))
    labels = draw(arrays.arrays(bool, n))
    if both: labels[:2] = True, False
    return scores, labels


@st.composite
def maps_and_masks(draw) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)))
    maps, masks = draw(arrays.arrays(np.float32, shape, elements=SCORES)), draw(arrays.arrays(bool, shape))
    masks[0, 0, :2] = True, False
    return maps, masks


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] is None or abs(a[k] - b[k]) < 1e-9 for k in a)


def sklearn_metrics(scores: np.ndarray, labels: np.ndarray) -> dict:
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return dict(auroc=roc_auc_score(labels, scores), ap=average_precision_score(labels, scores), f1_max=f1.max())


@PROPERTY
@given(labelled())
def test_equal_to_sklearn(data):
    assert close(evaluate_scores(*data), sklearn_metrics(*data))


@PROPERTY
@given(maps_and_masks())
def test_pixels_are_equal_to_sklearn(data):
    maps, masks = data
    got = evaluate_maps(maps, masks)
    aupro = got.pop('aupro')
    assert close(got, sklearn_metrics(maps.ravel(), masks.ravel())) and 0 <= aupro <= 1 + 1e-12


@PROPERTY
@given(labelled(), st.randoms(use_true_random=False))
def test_order_does_not_matter(data, random):
    scores, labels = data
    order = random.sample(range(scores.size), scores.size)
    assert close(evaluate_scores(scores[order], labels[order]), evaluate_scores(scores, labels))


@PROPERTY
@given(maps_and_masks())
def test_only_the_order_of_the_scores_matters(data):
    maps, masks = data
    ranks = np.unique(maps, return_inverse=True)[1].reshape(maps.shape)          # a rising map of the scores, ties kept
    for other in (ranks, ranks.astype(np.float64) ** 3 - 7, torch.from_numpy(ranks).to(torch.int32)):
        assert close(evaluate_maps(other, masks), evaluate_maps(maps, masks))


@PROPERTY
@given(maps_and_masks(), st.integers(2, 4))
def test_the_same_images_twice_change_nothing(data, times):
    maps, masks = data
    assert close(evaluate_maps(np.tile(maps, (times, 1, 1)), np.tile(masks, (times, 1, 1))), evaluate_maps(maps, masks))


@PROPERTY
@given(maps_and_masks())
def test_mirrored_images_have_the_same_metrics(data):
    maps, masks = data
    assert close(evaluate_maps(maps[::-1, :, ::-1].swapaxes(1, 2), masks[::-1, :, ::-1].swapaxes(1, 2)),
                 evaluate_maps(maps, masks))


@PROPERTY
@given(labelled(both=False))
def test_bounds_and_what_is_undefined(data):
    scores, labels = data
    got = evaluate_scores(scores, labels)
    assert all(v is None or 0 <= v <= 1 + 1e-12 for v in got.values())
    assert (got['auroc'] is None) == (labels.all() or not labels.any())
    assert (got['ap'] is None) == (got['f1_max'] is None) == (not labels.any())
    if labels.any():
        best, threshold = f1_max(tie_groups(scores, labels))
        called = scores >= threshold
        assert abs(2 * (called & labels).sum() / (called.sum() + labels.sum()) - best) < 1e-12


@PROPERTY
@given(labelled())
def test_reversed_scores_mirror_the_auroc(data):
    scores, labels = data
    assert abs(evaluate_scores(-scores, labels)['auroc'] + evaluate_scores(scores, labels)['auroc'] - 1) < 1e-12


@PROPERTY
@given(labelled(), st.integers(2, 12))
def test_curves_are_exact_points_from_end_to_end(data, points):
    scores, labels = data
    full, thin = curves(scores, labels), curves(scores, labels, points)
    for x, y in (('fpr', 'tpr'), ('recall', 'precision')):
        on_curve = set(zip(full[x], full[y]))
        assert thin[x].size <= points and set(zip(thin[x], thin[y])) <= on_curve
        assert (np.diff(thin[x]) >= 0).all() and thin[x][0] == 0 and thin[x][-1] == 1
    assert abs(np.trapezoid(full['tpr'], full['fpr']) - evaluate_scores(scores, labels)['auroc']) < 1e-9
    assert abs(np.sum(np.diff(full['recall']) * full['precision'][1:]) - evaluate_scores(scores, labels)['ap']) < 1e-9


@PROPERTY
@given(maps_and_masks(), st.floats(0.01, 1))
def test_aupro_is_the_area_under_the_pro_curve(data, limit):
    curve = pro_curve(*data)
    x = np.concatenate([curve['fpr'][curve['fpr'] < limit], [limit]])
    y = np.concatenate([curve['pro'][curve['fpr'] < limit], [0]])
    after = int((curve['fpr'] < limit).sum())                                       # the corner at or behind the limit
    before, share = after - 1, (limit - curve['fpr'][after - 1]) / (curve['fpr'][after] - curve['fpr'][after - 1])
    y[-1] = curve['pro'][before] + share * (curve['pro'][after] - curve['pro'][before])
    assert abs(np.trapezoid(y, x) / limit - evaluate_maps(*data, fpr_limit=limit)['aupro']) < 1e-9


def test_one_pixel_regions_make_aupro_the_auroc():
    masks = np.zeros((1, 20, 20), bool)
    masks[0, ::3, ::3] = True                                                       # no two of them touch
    maps = np.random.default_rng(0).random(masks.shape, dtype=np.float32)
    assert abs(evaluate_maps(maps, masks, fpr_limit=1)['aupro'] - evaluate_maps(maps, masks)['auroc']) < 1e-12


def test_pixels_touch_at_their_corners_too():
    touching = np.array([[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]], bool)       # two pixels, and one
    assert np.allclose(region_weights(touching), [1 / 4, 1 / 4, 1 / 2])
    assert np.allclose(region_weights(np.array([[[1, 0, 1], [0, 0, 0], [1, 0, 0]]], bool)), 1 / 3)
    assert region_weights(np.zeros((2, 4, 4), bool)).size == 0


def test_regions_of_neighbouring_images_do_not_touch():
    masks = np.ones((3, 4, 4), bool)
    masks[:, :, 2:] = False
    assert np.allclose(region_weights(masks), 1 / 3 / 8)


def test_all_forms_of_input_agree():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((4, 8, 6)).astype(np.float32), rng.random((4, 8, 6)) < 0.2
    want = evaluate_maps(maps, masks)
    for m in (maps.astype(np.float64), torch.from_numpy(maps), torch.from_numpy(maps).requires_grad_(),
              torch.from_numpy(maps)[:, None], maps[:, None]):
        for y in (masks, masks.astype(np.uint8), masks.astype(np.float32), torch.from_numpy(masks),
                  torch.from_numpy(masks)[:, None]):
            assert evaluate_maps(m, y) == want
    half = torch.from_numpy(maps).bfloat16()
    assert evaluate_maps(half, masks) == evaluate_maps(half.float(), masks)
    assert evaluate_scores(maps[0, 0].tolist(), masks[0, 0].tolist()) == evaluate_scores(maps[0, 0], masks[0, 0])
    before = maps.copy()
    assert evaluate_maps(maps, masks) == want and (maps == before).all()            # the input is not sorted in place


@pytest.mark.parametrize('scores, labels, says', [
    ([0.1, np.nan, 0.3], [0, 1, 0], 'scores hold 1 values that are NaN or infinite'),
    ([0.1, np.inf, -np.inf], [0, 1, 0], 'scores hold 2 values that are NaN or infinite'),
    ([0.1, np.inf], [0, 1], 'scores hold 1 values'),
    ([0.1, -np.inf], [0, 1], 'scores hold 1 values'),
    ([0.1, 0.2], [0, 1, 1], r'scores have shape \(2,\) and labels \(3,\)'),
    ([0.1, 0.2], [0, 2], 'labels must be bool, or 0 and 1'),
    ([0.1, 0.2], [0., np.nan], 'labels must be bool, or 0 and 1'),
])
def test_bad_scores_are_refused(scores, labels, says):
    with pytest.raises(ValueError, match=says): evaluate_scores(scores, labels)


@pytest.mark.parametrize('maps, masks, limit, says', [
    (np.zeros((2, 4, 4)), np.zeros((2, 4, 5), bool), 0.3, 'maps have shape'),
    (np.zeros((2, 3, 4, 4)), np.zeros((2, 3, 4, 4), bool), 0.3, r'must be \(M, H, W\)'),
    (np.zeros((4, 4)), np.zeros((4, 4), bool), 0.3, r'must be \(M, H, W\)'),
    (np.full((1, 2, 2), np.nan), np.zeros((1, 2, 2), bool), 0.3, 'maps hold 4 values'),
    (np.zeros((1, 2, 2)), np.full((1, 2, 2), 255), 0.3, 'masks must be bool'),
    (np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool), 1.1, 'fpr_limit is 1.1'),
    (np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool), float('nan'), 'fpr_limit is nan'),
])
def test_bad_maps_are_refused(maps, masks, limit, says):
    with pytest.raises(ValueError, match=says): evaluate_maps(maps, masks, limit)


def test_no_image_at_all_is_undefined():
    assert evaluate_scores([], []) == dict(auroc=None, ap=None, f1_max=None)
    assert evaluate_maps(torch.zeros(0, 8, 8), torch.zeros(0, 8, 8, dtype=torch.bool)) == dict(auroc=None, ap=None,
                                                                                               f1_max=None, aupro=None)


@pytest.mark.parametrize('kind', ['uniform', 'saturated', 'constant'])
def test_large_maps_are_exact_within_three_times_the_memory(kind, monkeypatch):
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 128, 128), bool)
    masks[:30, 40:60, 30:70] = True
    maps = rng.random(masks.shape, dtype=np.float32)
    if kind == 'saturated': maps = np.clip(3 * maps - 1.5 + masks, 0, 1)
    if kind == 'constant': maps[:] = 0.5
    tracemalloc.start()
    got = evaluate_maps(maps, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * maps.nbytes
    # the counts are whole numbers: bit for bit
    for threads in (1, 3):
        monkeypatch.setattr(torch, 'get_num_threads', lambda threads=threads: threads)
        assert evaluate_maps(maps, masks) == got
    del got['aupro']
    assert close(got, sklearn_metrics(maps.ravel(), masks.ravel()))


def test_bootstrap_is_its_seed_and_needs_a_metric():
    rng = np.random.default_rng(0)
    labels = np.arange(60) < 20
    scores = rng.standard_normal(60) + labels
    auroc = lambda i: evaluate_scores(scores[i], labels[i])['auroc']
    assert bootstrap_interval(auroc, labels, draws=50, seed=1) == bootstrap_interval(auroc, torch.from_numpy(labels),
                                                                                     draws=50, seed=1)
    assert bootstrap_interval(auroc, labels, draws=50, seed=1) != bootstrap_interval(auroc, labels, draws=50, seed=2)
    narrow, wide = (bootstrap_interval(auroc, labels, draws=200, confidence=c) for c in (0.5, 0.95))
    assert wide[0] < narrow[0] < auroc(np.arange(60)) < narrow[1] < wide[1]
    assert bootstrap_interval(lambda i: None, labels) is None
    # defects and normals are drawn apart: as many of each in every draw
    assert bootstrap_interval(lambda i: float(labels[i].sum()), labels, draws=20) == (20, 20)
    # undefined in some draws
    assert bootstrap_interval(lambda i: None if len(set(i)) < 38 else 1., labels, draws=50) == (1., 1.)
    perfect = bootstrap_interval(lambda i: evaluate_scores(labels[i] * 1., labels[i])['auroc'], labels, draws=20)
    assert perfect == (1, 1)


@settings(PROPERTY, max_examples=60)
@given(maps_and_masks(), st.sampled_from([0.05, 0.3, 1.]))
def test_aupro_is_its_definition(data, limit):
    "Every threshold that occurs, every region by itself, exact fractions."
    maps, masks = data
    regions = [maps[n][label == k] for n, (label, count) in enumerate(ndimage.label(mask, np.ones((3, 3)))
                                                                      for mask in masks) for k in range(1, count + 1)]
    points = [(Fraction(0), Fraction(0))]
    for t in np.unique(maps)[::-1]:
        pro = sum(Fraction(int((r >= t).sum()), r.size) for r in regions) / len(regions)
        points.append((Fraction(int((maps[~masks] >= t).sum()), int((~masks).sum())), pro))
    area, end = Fraction(0), Fraction(limit)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 < end and x1 > x0:
            area += (min(x1, end) - x0) * (2 * y0 + (y1 - y0) * (min(x1, end) - x0) / (x1 - x0)) / 2
    assert abs(evaluate_maps(maps, masks, limit)['aupro'] - float(area / end)) < 1e-9
