"Regions: what lies outside has no effect, for any method, on the command line and in the metrics."
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from draem_nb import evaluation, fusion, methods, metrics
from draem_nb.cli import main
from draem_nb.data import demo_category, load_category
from draem_nb.execution import RunFailed, run_report
from draem_nb.files import write_json
from draem_nb.parameters import report_names, report_parameters
from draem_nb.runs import input_files

TINY = dict(
    draem=dict(base_width=4, base_channels=4, steps=2), autoencoder=dict(steps=2), padim={}, gaussian_ad={},
    cutpaste=dict(width=8, steps=2, patch=32, stride=16), memory=dict(pieces=20, candidates=500),
    feature_draem=dict(steps=2), riad=dict(width=4, steps=2),
    fusion=dict(steps=2, pieces=20, candidates=500, half_size=64, draem_size=32, draem_steps=2),
    ganomaly=dict(steps=2), dagan=dict(steps=2),
    students=dict(width=4, descriptor=4, patches=32, teacher_steps=2, steps=2, crop=32))
MIDDLE = '32,24,64,80'          # left, top, width, height of photos of 128 x 128


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "The built-in class, fewer images of it."
    root = tmp_path_factory.mktemp('data')
    source = demo_category('brick')
    for path in sorted((source / 'train' / 'good').glob('*.png'))[:20]:
        (to := root / 'brick' / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    for kind in ('good', 'crack', 'hole'):
        for part in ('test', 'ground_truth'):
            if (source / part / kind).exists(): shutil.copytree(source / part / kind, root / 'brick' / part / kind)
    return root


@pytest.mark.parametrize('name', list(methods.METHODS))
def test_what_lies_outside_has_no_effect(name, photos, tmp_path):
    data = load_category(photos, 'brick', 64, region=MIDDLE)
    detector = methods.fit(name, data, methods.recipe_of(name, size=64, **TINY[name]), 'cpu', run_dir=tmp_path)
    clean = data.test[:3].clone()
    dirty = clean.clone()
    dirty[:, :, ~data.region] = torch.randint(256, (int((~data.region).sum()),), dtype=torch.uint8)
    first, second = detector.predict(clean), methods.load(tmp_path, 'cpu').predict(dirty)       # and it is kept
    assert torch.equal(first.maps, second.maps) and torch.equal(first.scores, second.scores)
    assert not first.maps[:, ~data.region].any() and first.maps[:, data.region].any()
    dirty[:, :, 30:34, 30:34] = 255
    assert not torch.equal(detector.predict(dirty).maps, first.maps)        # inside it is looked at


def test_without_the_kept_region_a_method_is_refused(photos, monkeypatch):
    fit = lambda *_: SimpleNamespace(region=None)
    monkeypatch.setitem(methods.METHODS, 'blind', SimpleNamespace(fit=fit))
    with pytest.raises(ValueError, match='does not keep the region'):
        methods.fit('blind', load_category(photos, 'brick', 64, region=MIDDLE), object())


def test_ground_truth_and_metrics_end_at_the_border(photos):
    whole, cut = (load_category(photos, 'brick', 64, region=of) for of in (None, '0,0,40,128'))
    assert whole.region is None and torch.equal(cut.masks, whole.masks & cut.region)
    gone = int((whole.masks.flatten(1).any(1) & ~cut.masks.flatten(1).any(1)).sum())
    assert gone and any(f'{gone} defective images have their whole defect outside' in note for note in cut.notes)
    assert whole.fingerprint != cut.fingerprint and torch.equal(whole.train[..., :20], cut.train[..., :20])
    maps, masks = torch.rand(len(cut.test), 64, 64), cut.masks[:, 0]
    maps[:, ~cut.region] = 0
    inside = metrics.evaluate_maps(maps, masks, region=cut.region)
    pixels = maps[:, cut.region].ravel(), masks[:, cut.region].ravel()
    assert inside['auroc'] == metrics.evaluate_scores(*pixels)['auroc']
    assert inside['auroc'] < metrics.evaluate_maps(maps, masks)['auroc'] - 0.2      # black around is no merit


@pytest.mark.parametrize('region, says', [
    ('0,0,200,10', 'does not lie in the photos, which are 128 x 128'), ('1,2,3', 'left,top,width,height'),
    ('nothing.png', 'does not exist'), ('small.png', 'has 64 x 64 pixels'), ('black.png', 'is empty')])
def test_a_region_that_does_not_fit_is_named(region, says, photos, tmp_path):
    Image.new('L', (64, 64), 255).save(tmp_path / 'small.png')
    Image.new('L', (128, 128)).save(tmp_path / 'black.png')
    if region.endswith('png'): region = str(tmp_path / region)
    with pytest.raises((ValueError, FileNotFoundError), match=says): load_category(photos, 'brick', 64, region=region)


def test_the_command_line_says_so_before_the_training(photos, tmp_path, capsys):
    assert main(['category', '--category', 'brick', '--data-root', str(photos), '--region', '0,0,200,10', '--run-dir',
                 str(tmp_path / 'run'), '--method', 'memory']) == 1
    assert 'does not lie in the photos' in capsys.readouterr().err and not (tmp_path / 'run' / 'checkpoint.pt').exists()


def test_photos_of_two_sizes_have_no_region(photos, tmp_path):
    shutil.copytree(photos / 'brick', tmp_path / 'brick')
    Image.new('L', (128, 100)).save(tmp_path / 'brick' / 'train' / 'good' / 'zzz.png')
    with pytest.raises(ValueError, match='zzz.png has 128 x 100; cut them to one size'):
        load_category(tmp_path, 'brick', 64, region=MIDDLE)


def test_the_region_of_a_class_is_found_noted_and_counts_in_an_inspection(photos, tmp_path):
    shutil.copytree(photos / 'brick', tmp_path / 'brick')
    region = np.zeros((128, 128), np.uint8)
    region[24:104, 32:96] = 255
    Image.fromarray(region).save(tmp_path / 'brick' / 'region.png')
    assert input_files(dict(data_root=tmp_path, category='brick'))['region.png'].is_file()
    data = load_category(tmp_path, 'brick', 64)
    assert any('Only a region is looked at, 31%' in note for note in data.notes)
    recipe = methods.recipe_of('memory', size=64, pieces=200, candidates=5000)
    methods.fit('memory', data, recipe, 'cpu', run_dir=tmp_path / 'run')
    (new := tmp_path / 'new').mkdir()
    for path in data.train_paths[:3]:
        image = np.array(Image.open(path).convert('L'))
        image[:20, :20] = 255                                   # a defect that nobody asked for
        Image.fromarray(image).save(new / path.name)
        shutil.copy(path, new / f'clean-{path.name}')
    assert main(['inspect', '--run-dir', str(tmp_path / 'run'), '--images', str(new), '--out-dir',
                 str(tmp_path / 'out')]) == 0
    rows = [line.split(',') for line in (tmp_path / 'out' / 'verdicts.csv').read_text().splitlines()[1:]]
    scores = {row[0].rsplit('/', 1)[1]: row[1] for row in rows}
    assert len(rows) == 6 and all(scores[path.name] == scores[f'clean-{path.name}'] for path in data.train_paths[:3])
    overlay = np.array(Image.open(next((tmp_path / 'out' / 'overlays').glob('[!c]*.png'))))
    assert overlay[10, 10].tolist() == [127] * 3 and (overlay == 255).all(-1).any()     # darkened, and outlined
    assert 'Only a region is looked at, 31%' in (tmp_path / 'out' / 'report.html').read_text()


def test_a_damaged_region_of_a_run_is_named(photos, tmp_path):
    data = load_category(photos, 'brick', 64, region=MIDDLE)
    methods.fit('padim', data, methods.recipe_of('padim', size=64, holdout=0), 'cpu', run_dir=tmp_path)
    assert torch.equal(methods.load(tmp_path, 'cpu').region, data.region)       # without thresholds as well
    Image.new('L', (32, 32), 255).save(tmp_path / 'region.png')
    with pytest.raises(ValueError, match='region.png is damaged or not ours'): methods.load(tmp_path, 'cpu')


def test_every_parameter_of_every_report_is_explained():
    assert not [(name, key) for name in report_names() for key, (_, text) in report_parameters(name).items()
                if len(text) < 5]


def test_a_comparison_counts_the_pixels_of_the_region(photos, tmp_path):
    for name, region in (('a', MIDDLE), ('b', MIDDLE), ('whole', None)):
        data = load_category(photos, 'brick', 64, region=region)
        recipe = methods.recipe_of('padim', size=64, seed=dict(a=0, b=1, whole=0)[name])
        methods.fit('padim', data, recipe, 'cpu', run_dir=tmp_path / name)
        write_json(dict(region=region), tmp_path / name / 'parameters.json')
    ask = lambda second: run_report('compare', dict(first=str(tmp_path / 'a'), second=str(tmp_path / second),
                                                    data_root=str(photos)), tmp_path / f'with {second}')
    found, data = ask('b').metrics['metrics'], load_category(photos, 'brick', 64, region=MIDDLE)
    for which in ('first', 'second'):
        detector = methods.load(tmp_path / dict(first='a', second='b')[which], 'cpu')
        of = evaluation.evaluate(detector, data)
        assert found['pixel AUROC'][which] == pytest.approx(of['pixel']['auroc'])
        assert found['AUPRO'][which] == pytest.approx(of['pixel']['aupro'])
    with pytest.raises(RunFailed, match='do not look at the same region'): ask('whole')


def test_scales_of_fusion_come_from_the_region_alone():
    class Given(fusion.WitnessesOnOneScale):
        "Its log odds are its images."
        def __init__(self): self.device, self.scales = torch.device('cpu'), []
        def log_odds(self, batch): return batch
    detector, g = Given(), torch.Generator().manual_seed(0)
    detector.region = torch.zeros(8, 8, dtype=torch.bool)
    detector.region[2:6, 2:6] = True
    inside, odds = torch.rand(20, 4, 4, 4, generator=g), torch.full((20, 4, 8, 8), 9.)   # gray around surprises
    odds[:, :, 2:6, 2:6] = inside
    detector.measure(odds)
    scales, highest = detector.scales, detector.highest
    detector.region = None
    detector.measure(inside)
    assert all(torch.equal(a.levels, b.levels) and a.excess == b.excess for a, b in zip(scales, detector.scales))
    assert highest == detector.highest
