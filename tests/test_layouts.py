"""draem_nb.layouts: every published layout, on a small tree of its own, down to names and mask values; data.check;
classes without exact masks."""
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from draem_nb.check import check
from draem_nb.cli import main
from draem_nb.data import find_categories, load_category
from draem_nb.evaluation import evaluate
from draem_nb.layouts import LAYOUTS, _names_by_tile, detect_layout, find_classes, list_files
from draem_nb.recipes import demo
from draem_nb.training import split_held_out

BOX = (8, 8, 24, 24)    # where the defects are: a quarter of 32 x 32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv('DRAEM_NB_CACHE', str(tmp_path / 'cache'))


class Tree:
    "Writes images, each of its own noise, and masks that are `value` in BOX and 0 elsewhere."
    def __init__(self, root): self.root, self.n = root, 0

    def image(self, *paths):
        for path in paths:
            self.n += 1
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(self.n).integers(0, 256, (32, 32),
                                                                   dtype=np.uint8)).save(self.root / path)

    def mask(self, path, value=255, box=BOX, mode='L'):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.new(mode, (32, 32))
        if box: image.paste(value, box)
        image.save(self.root / path)


@pytest.fixture
def tree(tmp_path): return Tree(tmp_path / 'data')


def names(paths, root): return [Path(p).relative_to(root).as_posix() for p in paths]


def loaded(tree, name, layout, **how):
    "The class, after checks that hold for each: found, detected, right masks in both rules."
    root = how.pop('root', tree.root)
    assert name in find_categories(root) and find_classes(root)[name][1] == layout
    files, category = list_files(root, name), load_category(root, name, 32)
    assert (files.layout == layout and category.kinds == files.kinds and category.train_paths == files.train
            and category.paths == files.test)
    assert len(category.train) == len(files.train) and len(category.test) == len(files.test) == len(files.masks)
    assert category.labels.tolist() == [kind != 'good' for kind in category.kinds] and len(category.fingerprint) == 64
    box = torch.zeros(1, 32, 32, dtype=torch.bool)
    box[:, BOX[1]:BOX[3], BOX[0]:BOX[2]] = True
    if category.masks_known:
        for mask, official, label in zip(category.masks, category.masks_official, category.labels):
            assert torch.equal(mask, box if label else torch.zeros_like(box)) and torch.equal(official, mask)
    return files, category


def test_mvtec_and_mpdd(tree):
    for name in ('bracket_black', 'tubes'):
        tree.image(f'{name}/train/good/000.png', f'{name}/train/good/001.png', f'{name}/test/good/000.png',
                   f'{name}/test/scratches/000.png')
        tree.mask(f'{name}/ground_truth/scratches/000_mask.png')
    files, _ = loaded(tree, 'tubes', 'mvtec')
    assert (names(files.test, tree.root) == ['tubes/test/good/000.png', 'tubes/test/scratches/000.png']
            and files.kinds == ['good', 'scratches'])
    assert find_categories(tree.root) == ['bracket_black', 'tubes'] and files.notes == ()


def test_mvtec_loco(tree):
    tree.image(*(f'screw_bag/{part}/good/{i:03}.png' for part in ('train', 'validation', 'test') for i in range(2)),
               'screw_bag/test/logical_anomalies/000.png', 'screw_bag/test/structural_anomalies/000.png')
    # several masks an image, whose gray value numbers the kind of defect; bright and dark ones
    for kind, values in dict(logical_anomalies=(234, 60), structural_anomalies=(200,)).items():
        for i, value in enumerate(values):
            half = ((BOX[0], BOX[1], 16, BOX[3]) if i == 0 and len(values)
                    == 2 else (16, BOX[1], BOX[2], BOX[3]) if len(values) == 2 else BOX)
            tree.mask(f'screw_bag/ground_truth/{kind}/000/{i:03}.png', value, half)
    files, category = loaded(tree, 'screw_bag', 'mvtec_loco')
    assert [len(m) for m in files.masks] == [0, 0, 2, 1] and files.kinds == ['good', 'good', 'logical_anomalies',
                                                                             'structural_anomalies']
    assert ('out of reach' in category.notes[0] and 'sPRO' in category.notes[1] and 'The 2 normal images in validation'
            in category.notes[2])
    (tree.root / 'screw_bag/ground_truth/structural_anomalies/000/000.png').unlink()
    with pytest.raises(FileNotFoundError,
                       match='structural_anomalies/000.png has no mask; put one at .*structural_anomalies/000/000.png'):
        list_files(tree.root, 'screw_bag')


def test_mvtec_ad_2(tree):
    tree.image('can/train/good/000_regular.png', 'can/train/good/001_overexposed.png',
               'can/validation/good/000_regular.png',
               'can/test_public/good/000_regular.png', 'can/test_public/bad/000_regular.png',
               'can/test_private/000_regular.png')
    tree.mask('can/test_public/ground_truth/bad/000_regular_mask.png')
    files, category = loaded(tree, 'can', 'mvtec_ad_2')
    assert names(files.test, tree.root) == ['can/test_public/bad/000_regular.png',
                                            'can/test_public/good/000_regular.png'] and files.kinds == ['bad', 'good']
    assert 'not published' in category.notes[0] and 'The 1 normal images' in category.notes[1]


def test_btad(tree):
    tree.image('01/train/ok/0000.bmp', '01/train/ok/0001.bmp', '01/test/ok/0000.bmp', '01/test/ko/0000.bmp',
               '03/train/ok/0.bmp', '03/test/ko/1.bmp')
    tree.mask('01/ground_truth/ko/0000.png')
    tree.mask('03/ground_truth/ko/1.bmp')
    files, _ = loaded(tree, '01', 'btad')
    assert files.kinds == ['ko', 'good'] and names(files.train,
                                                   tree.root) == ['01/train/ok/0000.bmp', '01/train/ok/0001.bmp']
    assert loaded(tree, '03', 'btad')[0].kinds == ['ko'] and find_categories(tree.root) == ['01', '03']


def test_visa(tree):
    rows = ['object,split,label,image,mask']
    for name, value in (('candle', 1), ('pcb1', 3)):
        for i, (split, label) in enumerate([('train', 'normal')] * 2 + [('test', 'normal'), ('test', 'anomaly')]):
            image = f'{name}/Data/Images/{label.capitalize()}/{i:04}.JPG'
            tree.image(image)
            mask = f'{name}/Data/Masks/Anomaly/{i:04}.png' if label == 'anomaly' else ''
            if mask: tree.mask(mask, value)           # VisA numbers the kinds of defect
            rows.append(f'{name},{split},{label},{image},{mask}')
    (tree.root / 'split_csv').mkdir()
    (tree.root / 'split_csv/1cls.csv').write_text('\r\n'.join(rows) + '\r\n')
    files, _ = loaded(tree, 'candle', 'visa')
    assert find_categories(tree.root) == ['candle', 'pcb1'] and files.kinds == ['good', 'anomaly']
    assert names(files.test, tree.root) == ['candle/Data/Images/Normal/0002.JPG', 'candle/Data/Images/Anomaly/0003.JPG']
    loaded(tree, 'pcb1', 'visa')
    (tree.root / 'candle/Data/Images/Normal/0000.JPG').unlink()
    with pytest.raises(FileNotFoundError, match='Normal/0000.JPG does not exist'):
        load_category(tree.root, 'candle', 32)
    (tree.root / 'split_csv/1cls.csv').write_text('\n'.join([*rows, 'pcb1,test,anomaly,candle/../../x.png,y.png']))
    with pytest.raises(ValueError, match="a row that is none of VisA's"): list_files(tree.root, 'pcb1')
    (tree.root / 'split_csv/1cls.csv').write_text('object,split,image\n')
    with pytest.raises(ValueError, match='has no column label, mask'): find_categories(tree.root)


@pytest.mark.parametrize('given', ['itself', 'parent'])
def test_kolektor(tree, given):
    home = 'KolektorSDD2'
    for part, defects in (('train', (10001,)), ('test', (20001,))):
        for number in range(10000, 10003) if part == 'train' else range(20000, 20002):
            tree.image(f'{home}/{part}/{number}.png')
            tree.mask(f'{home}/{part}/{number}_GT.png', box=BOX if number in defects else None)
    tree.image(f'{home}/train/10301 (copy).png')                      # the published archive has these two
    tree.mask(f'{home}/train/10301_GT (copy).png')
    files, category = loaded(tree, home, 'kolektor', root=tree.root / home if given == 'itself' else tree.root)
    assert [p.name for p in files.train] == ['10000.png', '10002.png'] and files.kinds == ['good', 'defect']
    assert category.notes == ('1 of 3 training images show a defect and are left out.',)
    (tree.root / home / 'test/20001_GT.png').unlink()
    with pytest.raises(FileNotFoundError, match='20001.png has no mask'): list_files(tree.root, home)


def dagm(tree):
    for part in ('Train', 'Test'):
        tree.image(*(f'Class1/{part}/{i:04}.PNG' for i in range(1, 5)))
        tree.mask(f'Class1/{part}/Label/0002_label.PNG')
        (tree.root / f'Class1/{part}/Label/Labels.txt').write_text('1\n')


def test_dagm(tree):
    dagm(tree)
    files, category = loaded(tree, 'Class1', 'dagm')
    assert ([p.name for p in files.train] == ['0001.PNG', '0003.PNG', '0004.PNG']
            and files.kinds == ['good', 'defect', 'good', 'good'])
    assert not category.masks_known and not category.masks.any() and not category.masks_official.any()
    assert category.weak_masks.flatten(1).sum(1).tolist() == [0, 256, 0,
                                                              0] and torch.equal(category.outlines, category.weak_masks)
    assert 'only surround' in category.notes[-1] and torch.equal(category.subset(['defect']).weak_masks,
                                                                 category.weak_masks)


def test_magnetic_tile(tree):
    home = 'Magnetic-tile-defect-datasets'
    for tile in range(10):
        for exposure in range(1, 7):
            stem = f'{home}/MT_Free/Imgs/exp{exposure}_num_{1000 * tile + 20 * exposure}'
            tree.image(f'{stem}.jpg')
            tree.mask(f'{stem}.png', box=None)
    for kind in ('Blowhole', 'Fray'):
        tree.image(f'{home}/MT_{kind}/Imgs/exp1_num_108719.jpg')
        tree.mask(f'{home}/MT_{kind}/Imgs/exp1_num_108719.png', 1 if kind == 'Fray' else 255)
    for root in (tree.root, tree.root / home):
        files, category = loaded(tree, home, 'magnetic_tile', root=root)
        tile = lambda path: int(re.search(r'num_(\d+)', path.name)[1]) // 1000
        train, good = {tile(p) for p in files.train}, {tile(p) for p, kind in zip(files.test, files.kinds)
                                                       if kind == 'good'}
        assert len(train) == 8 and len(good) == 2 and not train & good and len(files.train) == 48
        assert sorted(set(files.kinds)) == ['blowhole', 'fray',
                                            'good'] and all(p.suffix == '.jpg' for p in files.train + files.test)
        assert '(8 and 2 groups)' in category.notes[0]
        assert category.notes[-1] == 'Training images are held out part by part: 48 show 8 parts.'
        held_out = split_held_out(48, demo(), category.groups)[1].tolist()
        # one whole tile, not five photographs
        assert len(held_out) == 6 and len({category.groups[i] for i in held_out}) == 1


def plain(tree, masks=''):
    tree.image(*(f'cup/good/{i:02}.png' for i in range(20)), 'cup/bad/0.png', 'cup/bad/chip/0.jpg')
    if masks == 'beside':
        tree.mask('cup/bad/0_mask.png')
        tree.mask('cup/bad/chip/0_mask.bmp', 1)
    elif masks:
        tree.mask(f'cup/{masks}/0.png')
        tree.mask(f'cup/{masks}/chip/0_mask.png')


@pytest.mark.parametrize('masks', ['beside', 'masks', 'masks/bad', 'ground_truth'])
def test_plain_folder_with_masks(tree, masks):
    plain(tree, masks)
    files, category = loaded(tree, 'cup', 'folder')
    assert len(files.train) == 16 and sorted(files.kinds) == ['bad', 'chip', *['good'] * 4] and category.masks_known
    assert not set(files.train) & set(files.test) and list_files(tree.root / 'cup',
                                                                 'cup').train == [p.resolve() for p in files.train]
    assert '4 of 20 good images were held aside' in category.notes[0]


def test_plain_folder_without_masks(tree):
    plain(tree)
    files, category = loaded(tree, 'cup', 'folder')
    assert (not category.masks_known and category.outlines is None and not category.masks.any()
            and 'have no masks' in category.notes[-1])
    tree.mask('cup/masks/0.png')
    with pytest.raises(FileNotFoundError, match='bad/chip/0.jpg has no mask; put one at .*cup/masks/chip/0.png'):
        list_files(tree.root, 'cup')


def test_plain_folder_of_good_parts_alone(tree):
    tree.image(*(f'cup/good/{i}.png' for i in range(5)))
    assert find_categories(tree.root) == find_categories(tree.root, 'folder') == ['cup']
    category = load_category(tree.root, 'cup', 32)
    assert len(category.train) == 4 and category.kinds == ['good'] and category.masks_known


def test_names_and_errors(tree):
    dagm(tree)
    assert detect_layout(tree.root / 'Class1') == 'dagm' and detect_layout(tree.root) is None
    for layout in LAYOUTS:
        assert find_categories(tree.root, layout) == (['Class1'] if layout == 'dagm' else [])
    with pytest.raises(ValueError, match="unknown layout 'coco'; there are: visa, mvtec_ad_2, mvtec_loco, mvtec"):
        load_category(tree.root, 'Class1', 32, layout='coco')
    with pytest.raises(FileNotFoundError, match="another layout than 'mvtec' fits"):
        load_category(tree.root, 'Class1', 32, layout='mvtec')


@pytest.mark.parametrize('make', [plain, dagm])
def test_without_exact_masks_pixel_metrics_are_undefined_and_it_is_said(tree, make):
    make(tree)
    name, = find_categories(tree.root)
    category = load_category(tree.root, name, 32)
    from draem_nb.detector import Detections
    maps = torch.rand(len(category.test), 32, 32, generator=torch.Generator().manual_seed(0))
    found = Detections(maps, maps.amax((1, 2)), None, None, None, None)
    for rule in ('half', 'official'):
        results = evaluate(None, category, found, rule)
        assert set(results['pixel'].values()) == set(results['other_mask_rule']['pixel'].values()) == {None}
        assert results['image']['auroc'] is not None and all(set(kind['pixel'].values()) == {None}
                                                             for kind in results['kinds'].values())
        assert set(results['intervals']['pixel'].values()) == {None}
        # of a single defective image there is nothing to draw
        assert (results['intervals']['image']['auroc'] is None) == (category.labels.sum() == 1)
        said = ' '.join(results['notes'])
        assert 'pixel metrics are undefined' in said and 'Not one pixel' not in said and category.notes[0] in said


# --- check

def test_check(tree):
    tree.image(*(f'a/train/good/{i}.png' for i in range(4)), 'a/test/good/0.png',
               *(f'a/test/dent/{i}.png' for i in range(5)), 'b/good/0.png', 'b/good/1.png', 'b/bad/0.png')
    for i in range(5): tree.mask(f'a/ground_truth/dent/{i}_mask.png')
    tree.mask('b/masks/0.png')
    assert check(tree.root).empty and list(check(tree.root).columns) == ['class', 'problem', 'file', 'detail']
    a = tree.root / 'a'
    (a / 'train/good/1.png').write_bytes(b'')                                                   # unreadable
    # other bytes, the same pixels
    Image.open(a / 'train/good/0.png').save(a / 'test/good/0.png', compress_level=0)
    # another size and mode, and a mask that does not fit
    Image.new('RGB', (40, 32)).save(a / 'test/dent/0.png')
    tree.mask('a/ground_truth/dent/1_mask.png', box=(0, 0, 3, 5))                               # 15 pixels
    tree.mask('a/ground_truth/dent/2_mask.png', box=(0, 0, 4, 4))                               # 16: enough
    (a / 'ground_truth/dent/3_mask.png').write_bytes(b'no image')
    (a / 'test/dent/4.png').write_bytes(b'')                                                    # its mask is not blamed
    found = check(tree.root)
    rows = {(row.problem, row.file.replace(str(tree.root) + '/', '')) for row in found.itertuples()}
    assert rows == {('unreadable', 'a/train/good/1.png'), ('unreadable', 'a/test/dent/4.png'),
                    ('unreadable', 'a/ground_truth/dent/3_mask.png'),
                    ('mixed sizes', ''), ('mixed modes', ''), ('test image is a training image', 'a/test/good/0.png'),
                    ('mask does not fit', 'a/ground_truth/dent/0_mask.png'),
                    ('near-empty mask', 'a/ground_truth/dent/1_mask.png')}
    assert (set(found['class']) == {'a'} and found.set_index('problem').detail['mixed sizes'] == '32 x 32 '
            '(7), 40 x 32 (1)')
    assert (found.set_index('problem').detail['mixed modes'] == 'L (7), RGB (1)'
            and '15 pixels' in found.set_index('problem').detail['near-empty mask'])
    (tree.root / 'b/masks/0.png').unlink(); tree.image('b/bad/1.png'); tree.mask('b/masks/0.png')
    assert (check(tree.root, 'b').problem.tolist() == ['cannot be loaded']
            and check(tree.root, 'b').detail[0].startswith('the defect image'))


@pytest.mark.skipif('DRAEM_NB_REAL_DATA' not in os.environ, reason='DRAEM_NB_REAL_DATA is not set')
def test_real_names_of_magnetic_tile():
    good = list((Path(os.environ['DRAEM_NB_REAL_DATA']) / 'magnetic_tile').glob('t*/good/*.jpg'))
    tiles = _names_by_tile([p.stem for p in good])
    assert len(good) == 952 and len(tiles) == 156 and max(map(len, tiles)) <= 12


# --- what people have

@pytest.mark.parametrize('good, bad', [('OK', 'NG'), ('ok', 'nok'), ('Good', 'Bad'), ('good', 'defect'), ('ok', None)])
def test_good_and_bad_by_other_names(tree, good, bad):
    tree.image(*(f'cup/{good}/{i:02}.png' for i in range(10)))
    if bad: tree.image(*(f'cup/{bad}/{i}.png' for i in range(2)))
    if bad == 'NG':
        for i in range(2): tree.mask(f'cup/masks/{i}.png')
    files, category = loaded(tree, 'cup', 'folder')
    assert len(files.train) == 8 and files.kinds == ['good'] * 2 + ['bad'] * (2 if bad else 0)
    assert ('no image of a defect' in category.notes[1]) if bad is None else category.masks_known == (bad == 'NG')


def test_a_folder_of_images_alone(tree):
    tree.image(*(f'cup/{i:02}.png' for i in range(10)))
    files, _ = loaded(tree, 'cup', 'flat')
    assert len(files.train) == 8 and files.kinds == ['good'] * 2
    assert list_files(tree.root / 'cup', 'cup').layout == 'flat'        # the folder itself may be the root


def test_folders_of_a_class_are_no_classes(tree):
    tree.image('cup/train/good/0.png', 'cup/test/good/0.png', 'mug/train/0.png', 'mug/test/1.png')
    assert find_categories(tree.root) == ['cup'] and find_categories(tree.root / 'cup') == []
    assert find_categories(tree.root / 'mug') == []


def test_what_was_found_and_what_is_expected_and_what_was_meant(tree):
    tree.image('brick/good/0.png', 'brick/good/1.png', 'screw/left/0.png', 'screw/right/0.png', 'screw/right/1.png')
    says = r'screw has no train/good; .*it holds left \(1 images\), right \(2 images\); expected are train/good'
    with pytest.raises(FileNotFoundError, match=says): list_files(tree.root, 'screw')
    with pytest.raises(ValueError, match="unknown class 'Brik' in .*; there are: brick; did you mean brick?"):
        list_files(tree.root, 'Brik')
    tree.image('brick/ok/0.png')
    with pytest.raises(ValueError, match='has good and ok, which mean the same; keep one of them'):
        list_files(tree.root, 'brick')


@pytest.mark.parametrize('argv, says', [
    (['category', '--category', 'brik'], 'did you mean brick?'),
    (['category', '--method', 'memry'], "unknown method 'memry'"),
    (['category', '--recipe', 'fast'], "unknown recipe 'fast'"),
    (['category', '--overrides', '{"size": 100}'], 'multiples of 32'),
    (['category', '--device', 'cuda:99'], "device='cuda:99' was asked for"),
    (['inspect', '--run-dir', 'nothing', '--images', '.'], 'run_dir is nothing, which holds no checkpoint.pt')])
def test_a_failed_start_leaves_no_folder(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1 and says in capsys.readouterr().err
    assert not list(tmp_path.glob('[!c]*'))       # beside the cache of this test


def test_a_start_that_fails_by_its_images_leaves_no_folder(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree.image(*(f'cup/good/{i}.png' for i in range(5)), 'cup/bad/0.png')
    ask = lambda *more: main(['category', '--category', 'cup', '--data-root', 'data', '--method', 'padim',
                              '--overrides', '{"size": 32}', '--run-dir', 'new/folder', *more])
    before = set(tmp_path.rglob('[!c]*')) - set((tmp_path / 'cache').rglob('*'))
    assert ask('--kinds', '["scratch"]') == 1
    assert 'no test images of kind scratch; there are: bad, good' in (said := capsys.readouterr().err)
    assert 'notebook' not in said                               # nothing but its sentence is left of it
    (tree.root / 'cup' / 'good' / '9.png').write_bytes(b'no image')
    assert ask() == 1 and 'cannot read the image data/cup/good/9.png' in capsys.readouterr().err
    (tree.root / 'cup' / 'good' / '9.png').unlink()
    assert set(tmp_path.rglob('[!c]*')) - set((tmp_path / 'cache').rglob('*')) == before
    (tmp_path / 'new' / 'folder').mkdir(parents=True)           # a folder that was there stays
    assert ask('--kinds', '["scratch"]') == 1 and (tmp_path / 'new' / 'folder' / 'report.failed.ipynb').exists()


def test_a_folder_too_low_or_too_high_is_answered_by_the_class_that_was_meant(tree):
    tree.image(*(f'data/cup/good/{i}.png' for i in range(3)))
    cup = tree.root / 'data' / 'cup'
    with pytest.raises(FileNotFoundError, match='is itself a class, did you mean cup?'): list_files(cup, 'good')
    with pytest.raises(ValueError, match='a part of the class cup: give the folder above it'):
        list_files(cup / 'good', 'cup')


def test_the_region_beside_photos_is_no_photo(tree):
    tree.image(*(f'cup/{i:02}.png' for i in range(10)))
    Image.new('L', (32, 32), 255).save(tree.root / 'cup' / 'region.png')
    files = list_files(tree.root, 'cup')
    assert len(files.train) + len(files.test) == 10 and not [p for p in files.train + files.test if p.stem == 'region']
    assert load_category(tree.root, 'cup', 32).region.all()
    (tree.root / 'mug').mkdir()
    Image.new('L', (32, 32), 255).save(tree.root / 'mug' / 'region.png')
    assert find_categories(tree.root) == ['cup']
