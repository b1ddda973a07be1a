"draem_nb.data: formats, bad input, the cache, the downloads, the demo classes."
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from draem_nb import data, demo, download
from draem_nb.data import (check_size, download_dtd, download_mvtec, find_categories, load_category, load_images,
                           read_image)
from draem_nb.demo import DEMO_CATEGORIES, demo_category
from draem_nb.layouts import find_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / 'cache'
    monkeypatch.setenv('DRAEM_NB_CACHE', str(folder))
    return folder


def picture(seed=0, size=(40, 30)):
    "Gray noise as an image of the given (width, height)."
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    "A data folder with one class, 'part': 3 to train, 1 good and 2 dented to test."
    folder = tmp_path / 'data'
    for i in range(3): save(picture(i), folder / 'part/train/good' / f'{i}.png')
    save(picture(3), folder / 'part/test/good/0.png')
    for i in range(2):
        save(picture(4 + i), folder / 'part/test/dent' / f'{i}.png')
        mask = Image.new('L', (40, 30))
        mask.paste(255, (10, 10, 20, 20))
        save(mask, folder / 'part/ground_truth/dent' / f'{i}_mask.png')
    return folder


# --- formats

GRAY = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
COLOR = np.stack([GRAY, GRAY[::-1], GRAY.T], -1)


def expect(path, values, tolerance=0):
    got = np.asarray(read_image(path), int)
    assert got.shape == values.shape and np.abs(got - values).max() <= tolerance
    loaded = load_images([path], size=values.shape[:2])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(loaded - (values if values.ndim == 3 else values[..., None])).max() <= tolerance


@pytest.mark.parametrize('suffix', ['png', 'bmp', 'tif', 'TIFF', 'jpg', 'JPEG'])
def test_gray_and_rgb_in_every_format(tmp_path, suffix):
    tolerance = 40 if suffix.lower().startswith('j') else 0   # JPEG loses colour detail; smooth images less
    expect(save(Image.fromarray(GRAY), tmp_path / f'gray.{suffix}'), GRAY, min(tolerance, 8))
    expect(save(Image.fromarray(COLOR), tmp_path / f'color.{suffix}',
                **({'subsampling': 0, 'quality': 100} if tolerance else {})), COLOR, tolerance)


def test_alpha_is_dropped(tmp_path):
    alpha = Image.fromarray(np.full((16, 16), 3, np.uint8))
    image = Image.fromarray(COLOR)
    image.putalpha(alpha)
    expect(save(image, tmp_path / 'rgba.png'), COLOR)
    expect(save(Image.merge('LA', [Image.fromarray(GRAY), alpha]), tmp_path / 'la.png'), GRAY)


def test_palette_and_one_bit(tmp_path):
    palette = Image.new('P', (2, 2))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2, 1])
    expect(save(palette, tmp_path / 'palette.png'), np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]))
    save(palette, tmp_path / 'transparent.png', transparency=0)
    assert read_image(tmp_path / 'transparent.png').getpixel((0, 0)) == (255, 0, 0)
    expect(save(Image.fromarray(GRAY > 99), tmp_path / 'bit.png'), (GRAY > 99) * 255)
    expect(save(Image.fromarray(GRAY > 99), tmp_path / 'bit.bmp'), (GRAY > 99) * 255)
    expect(save(Image.fromarray(GRAY > 99), tmp_path / 'bit.tif'), (GRAY > 99) * 255)


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_gray(tmp_path, suffix):
    deep = GRAY.astype(np.uint16) * 257
    expect(save(Image.fromarray(deep), tmp_path / f'deep.{suffix}'), GRAY)
    expect(save(Image.fromarray(np.array([[0, 128, 129, 65406, 65407]], np.uint16)), tmp_path / f'ends.{suffix}'),
           np.array([[0, 0, 1, 254, 255]]))
    dark = Image.fromarray(np.full((4, 4), 4095, np.uint16))   # 12 bits in 16: not stretched
    expect(save(dark, tmp_path / f'dark.{suffix}'), np.full((4, 4), 16))


def test_16_bit_big_endian_tiff(tmp_path):
    tifffile = pytest.importorskip('tifffile')
    tifffile.imwrite(tmp_path / 'big.tif', GRAY.astype(np.uint16) * 257, byteorder='>')
    expect(tmp_path / 'big.tif', GRAY)


def test_16_bit_rgb(tmp_path):
    tifffile = pytest.importorskip('tifffile')
    tifffile.imwrite(tmp_path / 'deep.tif', COLOR.astype(np.uint16) * 257, photometric='rgb')
    expect(tmp_path / 'deep.tif', COLOR, 1)
    (tmp_path / 'deep.png').write_bytes(png_16_bit_rgb(COLOR.astype(np.uint16) * 257))
    expect(tmp_path / 'deep.png', COLOR, 1)


def png_16_bit_rgb(values):
    "A 48-bit PNG, written by hand because Pillow cannot."
    import struct
    import zlib
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    h, w, _ = values.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def test_values_beyond_16_bit_are_refused(tmp_path):
    save(Image.fromarray(np.full((4, 4), 0.5, np.float32)), tmp_path / 'float.tif')
    save(Image.fromarray(np.full((4, 4), 70000, np.int32)), tmp_path / 'long.tif')
    for name in ('float.tif', 'long.tif'):
        with pytest.raises(ValueError, match=f'{name}.*not 8 or 16 bit'): read_image(tmp_path / name)


def test_orientation_of_photographs_is_applied(tmp_path, root):
    exif = Image.Exif()
    exif[0x0112] = 6   # turned by 90 degrees
    photo = save(picture(9, (30, 40)), root / 'part/test/dent/2.jpg', exif=exif)
    assert read_image(photo).size == (40, 30)
    # 40 x 30, as seen
    shutil.copy(root / 'part/ground_truth/dent/0_mask.png', root / 'part/ground_truth/dent/2_mask.png')
    assert load_category(root, 'part', 32).masks[2].any()


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    small = load_images([save(Image.fromarray(stripes), tmp_path / 'stripes.png')], 32)
    assert (small[..., 1:-1].int() - 127).abs().max() <= 1


# --- load_images, find_images, check_size

def test_find_images(tmp_path):
    for name in ('b.png', 'a/c.JPG', 'a/b.tiff', '._b.png', 'notes.txt', 'x.bmp', 'x.gif'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == ['a/b.tiff', 'a/c.JPG',
                                                                                   'b.png', 'x.bmp']
    assert find_images(str(tmp_path)) == find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match='image folder .*nowhere does not exist'):
        find_images(tmp_path / 'nowhere')


def test_load_images(tmp_path):
    paths = [save(picture(i).convert('RGB'), tmp_path / f'{i}.png') for i in range(5)]
    images = load_images([str(p) for p in paths], (64, 32))
    assert images.shape == (5, 3, 64, 32) and images.dtype == torch.uint8
    alone = np.asarray(picture(3).resize((32, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(images[3, 0].numpy(), alone)   # in the order of the paths
    assert load_images([], (64, 32)).shape == (0, 3, 64, 32) == load_images([], (64, 32), cache=True).shape
    with pytest.raises(FileNotFoundError, match='gone.png does not exist'): load_images([tmp_path / 'gone.png'])
    with pytest.raises(ValueError, match="color is 'hsv'"): load_images(paths, color='hsv')


def test_bgr_flips_the_channels(root):
    Image.new('RGB', (8, 8), (1, 2, 3)).save(root / 'part/train/good/0.png')
    rgb, bgr = (load_category(root, 'part', 32, color) for color in ('rgb', 'bgr'))
    assert rgb.train[0, :, 0, 0].tolist() == [1, 2, 3] and bgr.train[0, :, 0, 0].tolist() == [3, 2, 1]
    assert torch.equal(rgb.train, bgr.train.flip(1)) and torch.equal(rgb.test, bgr.test.flip(1))


@pytest.mark.parametrize('size', [0, -32, 2.5, True, (64,), (64, 64, 64), (64, '64'), 'big', None])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match='give a number of pixels or a pair'): check_size(size)


def test_sizes_that_cannot_be_halved(root):
    assert check_size([64, 96]) == (64, 96) and check_size(np.int64(32)) == (32, 32)
    with pytest.raises(ValueError, match='size 250 x 250 cannot be halved .* height 224 or 256, width 224 or 256'):
        check_size(250)
    with pytest.raises(ValueError, match='height 32, width 64'): check_size((5, 64))
    with pytest.raises(ValueError, match='cannot be halved'): load_category(root, 'part', 100)


# --- a class

def test_load_category(root):
    part = load_category(root, 'part', (32, 64))
    assert part.name == 'part' and part.size == (32, 64) and find_categories(root) == ['part']
    assert part.train.shape == (3, 3, 32, 64) and part.test.shape == (3, 3, 32,
                                                                      64) and part.masks.shape == (3, 1, 32, 64)
    assert part.kinds == ['dent', 'dent', 'good'] and part.labels.tolist() == [True, True, False]
    assert [p.name for p in part.paths] == ['0.png', '1.png', '0.png'] and len(part.train_paths) == 3
    assert part.masks.dtype == part.masks_official.dtype == part.labels.dtype == torch.bool
    assert part.masks[:2].flatten(1).any(1).all() and not part.masks[2].any() and not part.masks_official[2].any()
    assert 'part, 32 x 64: 3 train, 3 test (2 dent, 1 good)' in repr(part)


def test_train_good_alone_is_enough(root):
    shutil.rmtree(root / 'part/test')
    part = load_category(root, 'part', 32)
    assert part.test.shape == (0, 3, 32, 32) and part.masks.shape == part.masks_official.shape == (0, 1, 32, 32)
    assert part.labels.shape == (0,) and part.labels.dtype == torch.bool and part.kinds == [] == part.paths
    assert len(part.fingerprint) == 64


def test_only_good_test_images_need_no_masks(root):
    shutil.rmtree(root / 'part/test/dent')
    shutil.rmtree(root / 'part/ground_truth')
    assert load_category(root, 'part', 32).kinds == ['good']


def test_subset(root):
    save(picture(9), root / 'part/test/hole/0.png')
    save(Image.new('L', (40, 30), 255), root / 'part/ground_truth/hole/0.png')   # named without _mask
    part = load_category(root, 'part', 32)
    hole = part.subset(['hole'])
    assert hole.kinds == ['good', 'hole'] and torch.equal(hole.test, part.test[2:]) and hole.masks[1].all()
    assert (hole.fingerprint != part.fingerprint and torch.equal(hole.train, part.train)
            and hole.labels.tolist() == [False, True])
    with pytest.raises(ValueError, match='no test images of kind crack; there are: dent, good, hole'):
        part.subset(['crack'])


def test_fingerprint(root, tmp_path):
    first = load_category(root, 'part', 32).fingerprint
    shutil.copytree(root, tmp_path / 'moved')
    assert load_category(tmp_path / 'moved', 'part', 32).fingerprint == first == load_category(str(root), 'part',
                                                                                               32).fingerprint
    seen = {first, load_category(root, 'part', 64).fingerprint}
    (root / 'part/train/good/2.png').rename(root / 'part/train/good/9.png')
    seen.add(load_category(root, 'part', 32).fingerprint)
    save(Image.new('L', (40, 30), 255), root / 'part/ground_truth/dent/0_mask.png')
    seen.add(load_category(root, 'part', 32).fingerprint)
    save(picture(77), root / 'part/test/good/0.png')
    seen.add(load_category(root, 'part', 32).fingerprint)
    assert len(seen) == 5


# --- masks

def test_mask_values_and_names(root):
    masks = root / 'part/ground_truth/dent'
    drawn = load_category(root, 'part', (32, 64)).masks[0]
    zero_one = np.zeros((30, 40), np.uint8)
    zero_one[10:20, 10:20] = 1
    for image, name in ((Image.fromarray(zero_one), '0_mask.png'), (Image.fromarray(zero_one * 3), '0.png'),
                        (Image.fromarray(zero_one > 0), '0.PNG'),
                        (Image.fromarray(zero_one * 255).convert('RGB'), '0_mask.bmp')):
        for old in masks.glob('0*'): old.unlink()
        save(image, masks / name)
        assert torch.equal(load_category(root, 'part', (32, 64)).masks[0], drawn)
    (masks / '0_mask.bmp').unlink()
    save(palette_mask(zero_one), masks / '0_mask.png')   # red on black
    assert torch.equal(load_category(root, 'part', (32, 64)).masks[0], drawn)


def palette_mask(values):
    image = Image.fromarray(values).convert('P')
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.putdata(values.ravel().tolist())
    return image


def official_by_hand(mask, h, w):
    "Bilinear interpolation between the four nearest pixel centres, in numpy; white where the rounded byte is 255."
    H, W = mask.shape
    def axis(n, N):
        at = np.clip((np.arange(n) + 0.5) * N / n - 0.5, 0, N - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, N - 1), at - low
    y0, y1, fy = axis(h, H)
    x0, x1, fx = axis(w, W)
    m = mask.astype(float)
    top, bottom = (m[y][:, x0] * (1 - fx) + m[y][:, x1] * fx for y in (y0, y1))
    return np.floor(top * (1 - fy)[:, None] + bottom * fy[:, None] + 0.5) == 255


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (160, 128), (224, 32)])
def test_both_mask_rules(root, size):
    rng = np.random.default_rng(1)
    drawing = np.asarray(Image.fromarray((rng.random((12, 15)) > 0.6).astype(np.uint8)
                                         * 255).resize((150, 120), Image.Resampling.NEAREST))
    save(Image.fromarray(drawing), root / 'part/ground_truth/dent/0_mask.png')
    save(picture(1, (150, 120)), root / 'part/test/dent/0.png')
    part = load_category(root, 'part', size)
    assert np.array_equal(part.masks_official[0, 0].numpy(), official_by_hand(drawing, *size))
    smooth = torch.nn.functional.interpolate(torch.from_numpy(drawing / 255.)[None, None], size, mode='bilinear',
                                             antialias=True)[0]
    sure = (smooth - 0.5).abs() > 1e-3
    assert torch.equal(part.masks[0][sure], (smooth >= 0.5)[sure])


def test_missing_mask_is_named(root):
    (root / 'part/ground_truth/dent/1_mask.png').unlink()
    with pytest.raises(FileNotFoundError,
                       match=r'test/dent/1.png has no mask; put one at .*ground_truth/dent/1_mask.png'):
        load_category(root, 'part', 32)
    shutil.rmtree(root / 'part/ground_truth')
    with pytest.raises(FileNotFoundError,
                       match=r'test/dent/0.png has no mask; put one at .*ground_truth/dent/0_mask.png'):
        load_category(root, 'part', 32)


def test_mask_of_another_size_is_named(root):
    save(Image.new('L', (30, 40)), root / 'part/ground_truth/dent/1_mask.png')
    with pytest.raises(ValueError, match=r'1_mask.png has 30 x 40 pixels .*dent/1.png has 40 x 30'):
        load_category(root, 'part', 32)


# --- bad folders, bad files

def test_folders_that_are_not_there(root, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere does not exist; give the folder that holds the classes'):
        load_category(tmp_path / 'nowhere', 'part')
    (root / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='empty has no train/good; put images of good parts there'):
        load_category(root, 'empty')
    (root / 'empty/train/good').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='empty/train/good holds no images'): load_category(root, 'empty')
    with pytest.raises(ValueError, match="unknown class 'crew' in .*; there are: empty, part"):
        load_category(root, 'crew')
    for name in ('', '..', 'part/train'):
        with pytest.raises((ValueError, FileNotFoundError), match='unknown class|has no train/good'):
            load_category(root, name)
    with pytest.raises(ValueError, match='there are: none'): load_category(root / 'part/train', 'part')
    with pytest.raises(ValueError, match="is itself a class; give the folder that holds it as root and 'part'"):
        load_category(root / 'part', 'part')


def test_test_image_outside_of_a_kind(root):
    stray = save(picture(), root / 'part/test/stray.png')
    with pytest.raises(ValueError, match='stray.png must lie in test/good or in test/<kind of defect>'):
        load_category(root, 'part', 32)
    assert stray.exists()


BROKEN = {'zero bytes': lambda b: b'', 'cut': lambda b: b[:len(b) * 2 // 3], 'header only': lambda b: b[:40],
          'no image': lambda b: b'<html>log in</html>' * 9}

@pytest.mark.parametrize('suffix', ['png', 'jpg', 'bmp', 'tif'])
@pytest.mark.parametrize('how', BROKEN)
@pytest.mark.parametrize('where', ['train/good', 'test/dent', 'ground_truth/dent'])
def test_unreadable_image_is_named(root, cache, suffix, how, where):
    name = '1_mask' if where.startswith('ground') else '1'
    (root / 'part' / where / f'{name}.png').unlink()
    path = save(picture(5, (200, 200)), root / 'part' / where / f'{name}.{suffix}')
    path.write_bytes(BROKEN[how](path.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match=f'cannot read the image .*{where}/{name}.{suffix}: .'):
            load_category(root, 'part', 32)
    assert not list(cache.glob('*.tmp'))   # nothing half-written


# --- the cache

def count_decodes(monkeypatch):
    read, paths = data.read_image, []
    monkeypatch.setattr(data, 'read_image', lambda path: paths.append(path) or read(path))
    return paths


def test_cache_is_used_and_renewed(root, cache, monkeypatch):
    train = find_images(root / 'part/train')
    first = load_images(train, 64, cache=True)
    decoded = count_decodes(monkeypatch)
    assert torch.equal(load_images(train, 64, cache=True), first) and not decoded
    assert torch.equal(load_images(train, 64, 'bgr', cache=True), first.flip(1)) and not decoded
    load_images(train, 32, cache=True)
    assert len(decoded) == 3
    save(picture(50), train[0])
    os.utime(train[0], ns=(1, 1))   # even a change that keeps the length
    assert not torch.equal(load_images(train, 64, cache=True)[0], first[0]) and len(decoded) == 6
    load_images(train[::-1], 64, cache=True)
    assert len(decoded) == 9
    assert len(list(cache.iterdir())) == 4 and all(p.suffix == '.npy' for p in cache.iterdir())


def test_cache_knows_images_by_their_content(root, tmp_path, monkeypatch):
    train = find_images(root / 'part/train')
    first = load_images(train, 64, cache=True).clone()
    shutil.copytree(root, tmp_path / 'moved')
    decoded = count_decodes(monkeypatch)
    assert torch.equal(load_images(find_images(tmp_path / 'moved/part/train'), 64, cache=True), first) and not decoded
    before = train[0].stat()
    other = bytearray(train[0].read_bytes())
    save(Image.fromarray(255 - np.asarray(picture(0))), train[0])
    train[0].write_bytes(train[0].read_bytes().ljust(len(other), b'\0'))
    # same time; and, as the bytes are noise, about the same length
    os.utime(train[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not torch.equal(load_images(train, 64, cache=True)[0], first[0]) and len(decoded) == 3


def test_two_processes_make_one_cache(root, cache):
    for i in range(40): save(picture(i, (300, 300)), root / 'part/train/good' / f'{i:02}.png')
    code = ("import sys; from draem_nb.data import load_category; sys.stdin.readline(); "
            f"print(load_category({str(root)!r}, 'part', 256).fingerprint)")
    processes = [subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  text=True) for _ in range(2)]
    for process in processes: process.stdin.write('go\n'); process.stdin.flush()
    found = {process.communicate()[0].strip() for process in processes}
    assert found == {load_category(root, 'part', 256).fingerprint}
    assert sorted(p.suffix for p in cache.iterdir()) == ['.npy', '.npy']      # train and test, whole, and nothing else


def test_images_that_are_read_once_are_not_cached(root, cache):
    load_images(find_images(root / 'part/train'), 64)
    assert not cache.exists()


@pytest.mark.parametrize('damage', [b'', b'\x93NUMPY', b'garbage' * 1000, 'cut', 'flip', 'footer', 'grow'])
def test_damaged_cache_is_rebuilt(root, cache, monkeypatch, damage):
    train = find_images(root / 'part/train')
    first = load_images(train, 64, cache=True).clone()
    file, = cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes({'cut': whole[:-100], 'flip': whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:],
                      'footer': whole[:-4] + b'0000', 'grow': whole + b'1'}.get(damage, damage))
    decoded = count_decodes(monkeypatch)
    assert torch.equal(load_images(train, 64, cache=True), first) and len(decoded) == 3
    assert file.read_bytes() == whole


def test_loaded_tensors_may_be_written_to(root):
    train = find_images(root / 'part/train')
    with warnings.catch_warnings():
        warnings.simplefilter('error')   # PyTorch warns of arrays that are read-only
        first = load_images(train, 64, cache=True)
    expected = first.clone()
    first.zero_()
    assert torch.equal(load_images(train, 64, cache=True), expected)


def test_cache_that_cannot_be_written(root, cache, tmp_path):
    cache.write_text('a file where the folder should be')
    train = find_images(root / 'part/train')
    with pytest.warns(UserWarning, match='cannot write the image cache .* set DRAEM_NB_CACHE'):
        images = load_images(train, 64, cache=True)
    assert torch.equal(images, load_images(train, 64))


def test_interrupted_cache_leaves_nothing(root, cache, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(data.os, 'replace', stop)
    with pytest.raises(KeyboardInterrupt): load_images(find_images(root / 'part/train'), 64, cache=True)
    assert not list(cache.iterdir())


# --- downloads

class Site(BaseHTTPRequestHandler):
    """Serves `body`: `ranges` or not; cuts the connection after `cut` bytes of a reply, or falls silent
    there, as often as `cuts` says."""
    body, ranges, cut, cuts, status, asked = b'', True, 0, 0, 200, []
    # silence instead of a cut; bytes by which a range is off; where /moved is redirected to
    stalls, shift, away = False, 0, None

    def do_GET(self):
        site = type(self)
        site.asked.append(self.headers.get('Range'))
        if site.status != 200: return self.send_error(site.status)
        if self.path == '/moved':
            self.send_response(302)
            self.send_header('Location', site.away)
            self.send_header('Content-Length', '0')
            return self.end_headers()
        start = int(self.headers['Range'][6:-1]) if site.ranges and self.headers.get('Range') else 0
        if start and start >= len(site.body): return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            start = max(0, start - site.shift)
            self.send_header('Content-Range', f'bytes {start}-{len(site.body) - 1}/{len(site.body)}')
        self.send_header('Content-Length', str(len(site.body) - start))
        self.end_headers()
        end = len(site.body)
        if site.cuts: end, site.cuts = start + site.cut, site.cuts - 1
        self.wfile.write(site.body[start:end])
        if end < len(site.body) and site.stalls: self.wfile.flush(); site.over.wait(10)

    def log_message(self, *_): pass


ODD = dict(link=tarfile.SYMTYPE, hard=tarfile.LNKTYPE, device=tarfile.CHRTYPE, pipe=tarfile.FIFOTYPE)

def archive(members):
    "A tar.gz in memory; members: {name: content}, and what ODD names is not a plain file."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if name in ODD: info.type, info.linkname, content = ODD[name], '/etc/passwd', b''
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def png():
    out = io.BytesIO()
    picture(1, (90, 90)).save(out, 'png')
    return out.getvalue()


MVTEC = {'readme.txt': b'hello', 'bottle/train/good/000.png': png(), 'bottle/test/good/000.png': png()}
DTD = {'dtd/images/banded/banded_0002.png': png(), 'dtd/labels/x.txt': b'1'}

@pytest.fixture
def site(monkeypatch):
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, '_PAUSE', 0.01)
    handler = type('Handler', (Site,), dict(asked=[], over=threading.Event()))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    handler.url = f'http://127.0.0.1:{server.server_port}/archive'
    def serve(members=MVTEC, body=None, checksum=None, **how):
        handler.body = archive(members) if body is None else body
        for name in ('_MVTEC_SHA256', '_DTD_SHA256'):
            monkeypatch.setattr(download, name, checksum or hashlib.sha256(handler.body).hexdigest())
        for key, value in how.items(): setattr(handler, key, value)
        return handler
    yield serve
    handler.over.set()
    server.shutdown()
    server.server_close()


def names(folder): return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_download_mvtec(site, tmp_path, capsys):
    handler, root = site(), tmp_path / 'new' / 'root'
    folder = download_mvtec(root, handler.url)
    assert 'CC BY-NC-SA 4.0' in capsys.readouterr().out
    assert folder == root / 'mvtec' and find_categories(folder) == ['bottle'] and names(root) == ['mvtec']
    assert load_category(folder, 'bottle', 32).train.shape == (1, 3, 32, 32)
    assert download_mvtec(root, handler.url) == folder and len(handler.asked) == 1   # it is there: nothing is asked


def test_download_dtd(site, tmp_path, capsys):
    handler = site(DTD)
    folder = download_dtd(tmp_path, handler.url)
    assert 'research' in capsys.readouterr().out
    assert folder == tmp_path / 'dtd/images' and [p.name for p in find_images(folder)] == ['banded_0002.png']
    assert names(tmp_path) == ['dtd']
    assert download_dtd(tmp_path, handler.url) == folder and len(handler.asked) == 1


@pytest.mark.parametrize('fetch, archive, sha256', [
    (download_mvtec, 'mvtec_anomaly_detection.tar.xz',
     'cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d'),
    (download_dtd, 'dtd-r1.0.1.tar.gz', 'e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205')])
def test_an_archive_is_checked_against_its_published_checksum(tmp_path, fetch, archive, sha256):
    "The checksums are those that anomalib publishes for both (its MVTecAD and its Draem)."
    (tmp_path / archive).write_bytes(b'another file')
    with pytest.raises(ValueError, match=f'is not the published archive .* instead of {sha256}'): fetch(tmp_path)


@pytest.mark.parametrize('ranges', [True, False])
def test_download_goes_on_after_cuts(site, tmp_path, ranges):
    handler = site(ranges=ranges, cut=1000, cuts=5 if ranges else 2)
    assert find_categories(download_mvtec(tmp_path, handler.url)) == ['bottle']
    expected = [None] + [f'bytes={1000 * i}-' for i in range(1, 6)] if ranges else [None, 'bytes=1000-', 'bytes=1000-']
    assert handler.asked == expected and names(tmp_path) == ['mvtec']


def test_download_resumes_in_a_later_call(site, tmp_path):
    handler = site(cut=2000, cuts=1)
    (tmp_path / 'mvtec_anomaly_detection.tar.xz.part').write_bytes(handler.body[:700])
    download_mvtec(tmp_path, handler.url)
    assert handler.asked == ['bytes=700-', 'bytes=2700-']


def test_download_that_had_all_but_the_unpacking(site, tmp_path):
    handler = site()
    (tmp_path / 'mvtec_anomaly_detection.tar.xz.part').write_bytes(handler.body)
    assert download_mvtec(tmp_path, handler.url).is_dir()


def test_server_that_falls_silent(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, '_STALL', 0.2)
    handler = site(cut=1000, cuts=2, stalls=True)
    assert (find_categories(download_mvtec(tmp_path, handler.url)) == ['bottle']
            and handler.asked == [None, 'bytes=1000-', 'bytes=2000-'])
    handler.cut, handler.cuts = 0, 99
    shutil.rmtree(tmp_path / 'mvtec')
    with pytest.raises(ConnectionError, match='timed out.*put it at'): download_mvtec(tmp_path, handler.url)


def test_server_that_sends_another_range(site, tmp_path):
    handler = site(cut=1000, cuts=1, shift=10)
    assert (find_categories(download_mvtec(tmp_path, handler.url)) == ['bottle']
            and handler.asked == [None, 'bytes=1000-', None])


def test_redirects_are_followed(site, tmp_path):
    handler = site(cut=1000, cuts=1)
    handler.away = handler.url
    assert find_categories(download_mvtec(tmp_path, handler.url.replace('archive', 'moved'))) == ['bottle']
    # the range is asked for at the new address too
    assert handler.asked == [None, None, 'bytes=1000-', 'bytes=1000-']
    handler.away = 'file:///etc/passwd'
    with pytest.raises(ConnectionError, match='cannot download'):
        download_mvtec(tmp_path / 'other', handler.url.replace('archive', 'moved'))
    handler.away = handler.url.replace('archive', 'moved')                  # to itself
    with pytest.raises(ConnectionError, match='redirect'): download_mvtec(tmp_path / 'third', handler.away)
    assert names(tmp_path / 'other') == names(tmp_path / 'third') == []


def test_licence_is_shown_before_anything_is_asked_for(site, tmp_path, monkeypatch, capsys):
    shown = []
    def fetch(*_): shown.append(capsys.readouterr().out); raise ConnectionError('stop')
    monkeypatch.setattr(download, '_download_file', fetch)
    for fetch_all in (download_mvtec, download_dtd):
        with pytest.raises(ConnectionError, match='stop'): fetch_all(tmp_path)
    assert 'CC BY-NC-SA 4.0' in shown[0] and 'for research use' in shown[1]


def test_proxy_that_is_down(site, tmp_path, monkeypatch):
    for name in ('http_proxy', 'HTTP_PROXY'): monkeypatch.setenv(name, 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download.urllib.request, '_opener', None)      # it asks for the proxies once a process
    with pytest.raises(ConnectionError, match='Connection refused.*check the network, the proxy or the address.*put it '
                       'at .*mvtec_anomaly_detection.tar.xz'):
        download_mvtec(tmp_path, 'http://nowhere.invalid/mvtec.tar.xz')


def test_server_that_always_cuts(site, tmp_path):
    handler = site(cut=0, cuts=99)
    with pytest.raises(ConnectionError, match='cannot download http.*it continues where it stopped.*or fetch the file '
                       'in another way and put it at .*tar.xz'):
        download_mvtec(tmp_path, handler.url)
    assert len(handler.asked) == 3 and not (tmp_path / 'mvtec').exists()


def test_wrong_bytes(site, tmp_path):
    handler = site(checksum='0' * 64)
    with pytest.raises(ValueError, match='is not the published archive .* it was removed and get it again'):
        download_mvtec(tmp_path, handler.url)
    assert names(tmp_path) == []


@pytest.mark.parametrize('status, requests', [(404, 1), (403, 1), (503, 3)])
def test_server_that_refuses(site, tmp_path, status, requests):
    handler = site(status=status)
    with pytest.raises(ConnectionError, match=f'HTTP Error {status}.*check the network, the proxy or the address'):
        download_mvtec(tmp_path, handler.url)
    assert len(handler.asked) == requests and names(tmp_path) == []


def test_no_network(site, tmp_path):
    with pytest.raises(ConnectionError, match='cannot download .*Connection refused.*put it at'):
        download_mvtec(tmp_path, 'http://127.0.0.1:9/x')


def test_archive_put_there_by_hand(site, tmp_path):
    handler = site(DTD)
    (tmp_path / 'dtd-r1.0.1.tar.gz').write_bytes(handler.body)
    assert find_images(download_dtd(tmp_path, handler.url))
    assert handler.asked == [] and names(tmp_path) == ['dtd', 'dtd-r1.0.1.tar.gz']   # it is the user's: it stays
    shutil.rmtree(tmp_path / 'dtd')
    (tmp_path / 'dtd-r1.0.1.tar.gz').write_bytes(handler.body[:-1])
    with pytest.raises(ValueError, match='tar.gz is not the published archive .* remove it and get it again'):
        download_dtd(tmp_path, handler.url)
    assert names(tmp_path) == ['dtd-r1.0.1.tar.gz']


@pytest.mark.parametrize('name', ['../evil', '/tmp/evil', 'a/../../evil', *ODD])
def test_unsafe_archives_are_refused(site, tmp_path, name):
    handler = site({**MVTEC, name: b'x'})
    with pytest.raises(ValueError, match=f'not safe to unpack: {name!r}'): download_mvtec(tmp_path / 'in', handler.url)
    assert (not (tmp_path / 'in/mvtec').exists() and not (tmp_path / 'evil').exists()
            and not list((tmp_path / 'in').glob('.*')))


# --- the demo classes

def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.mark.parametrize('name', DEMO_CATEGORIES)
def test_demo_classes(tmp_path, name):
    folder = demo_category(name, tmp_path)
    assert folder == tmp_path / name and find_categories(tmp_path) == [name] and names(tmp_path) == [name]
    part = load_category(tmp_path, name, 128)
    assert (len(part.train) == 200 and part.kinds.count('good') == 24 and len(set(part.kinds)) == 7
            and len(part.kinds) == 72)
    assert torch.equal(part.masks, part.masks_official)   # at their own size
    for path in find_images(folder):
        with Image.open(path) as image:
            assert image.mode == 'L' and image.size == (128, 128) and path.suffix == '.png'
            if 'ground_truth' in path.parts: assert set(np.unique(np.asarray(image))) == {0, 255}
    shares = part.masks[part.labels].float().mean((1, 2, 3))
    assert shares.min() > 0.003 and shares.max() < 0.2
    again = demo_category(name, tmp_path / 'again')
    assert tree(again) == tree(folder)
    other = demo_category(name, tmp_path / 'other', seed=1)
    assert all(tree(other)[f] != b for f, b in tree(folder).items())


def test_train_and_test_crops_share_no_pixel(tmp_path, monkeypatch):
    "In a photograph whose left part is black and whose right part is white, so are the crops."
    photo = np.zeros((512, 512), np.uint8)
    photo[:, slice(*demo._TEST)] = 200
    monkeypatch.setattr(demo.skimage.data, 'brick', lambda: photo)
    part = load_category(demo_category('brick', tmp_path).parent, 'brick', 128)
    good = [i for i, kind in enumerate(part.kinds) if kind == 'good']
    assert part.train.max() == 0 and part.test[good].min() >= 180


def test_demo_defects_change_the_picture_where_the_mask_says():
    photo = np.full((128, 128), 110.)
    for defect in demo._DEFECTS.values():
        for seed in range(20):
            paint, cover = defect(photo.copy(), np.random.default_rng(seed))
            assert cover.shape == photo.shape and cover.min() >= 0 and cover.max() <= 1 and (cover >= 0.5).sum() > 50
            change = np.abs(cover * (paint - photo))
            assert change[cover >= 0.5].mean() > 4 * change[cover < 0.5].mean()


def test_demo_is_made_once(tmp_path):
    folder = demo_category('grass', tmp_path)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
    assert demo_category('grass', tmp_path) == folder and {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before


def test_demo_that_is_not_whole_is_made_again(tmp_path):
    folder = demo_category('grass', tmp_path)
    whole = tree(folder)
    (folder / 'test/good/003.png').unlink()
    assert tree(demo_category('grass', tmp_path)) == whole and names(tmp_path) == ['grass']
    assert tree(demo_category('grass', tmp_path, seed=5)) != whole
    assert tree(demo_category('grass', tmp_path)) == whole


def test_demo_never_touches_a_folder_of_others(root):
    (root / 'part').rename(root / 'brick')
    mine = tree(root / 'brick')
    with pytest.raises(ValueError, match='brick exists and is not a demo class; choose another root'):
        demo_category('brick', root)
    assert tree(root / 'brick') == mine


def test_interrupted_demo_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setitem(demo._DEFECTS, 'stain', stop)
    with pytest.raises(KeyboardInterrupt): demo_category('brick', tmp_path)
    assert names(tmp_path) == []


def test_unknown_demo_class(tmp_path):
    with pytest.raises(ValueError, match="unknown demo class 'marble'; there are: brick, gravel, grass"):
        demo_category('marble', tmp_path)


def test_where_the_demo_goes(tmp_path, monkeypatch):
    (tmp_path / 'project/nbs').mkdir(parents=True)
    (tmp_path / 'project/settings.ini').touch()
    monkeypatch.chdir(tmp_path / 'project/nbs')
    assert demo_category('brick') == tmp_path / 'project/data/demo/brick'
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert demo_category('brick') == tmp_path / 'elsewhere/data/demo/brick'


def test_several_processes_may_ask_for_one_demo_class(tmp_path):
    code = f"from draem_nb.data import demo_category; demo_category('gravel', {str(tmp_path)!r})"
    processes = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    assert names(tmp_path) == ['gravel'] and len(find_images(tmp_path)) == 320


# --- real images

@pytest.mark.skipif('DRAEM_NB_REAL_DATA' not in os.environ, reason='DRAEM_NB_REAL_DATA is not set')
def test_magnetic_tile():
    tile = load_category(os.environ['DRAEM_NB_REAL_DATA'], 'magnetic_tile', (160, 96))
    assert len(tile.train) == 758 and len(tile.test) == 582 and int(tile.labels.sum()) == 388
    assert tile.masks[tile.labels].flatten(1).any(1).float().mean() > 0.99
    assert tile.train.float().std() > 10
