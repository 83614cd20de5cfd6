"""Decoding names what is wrong with an image; crops are open_clip's, pixel for pixel but for rounding."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from pretrain.views.decode import DamagedSample, Scratch, decode
from pretrain.views.geometry import UNIFORMS, crop_box, eval_crop, random_resized_crop
from pretrain.views.spec import ImageView


def photo(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth colour and some noise, so that resizing has something to do and JPEG something to keep."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray((rng.random((6, 8, 3)) * 255).astype(np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray((np.asarray(coarse) + rng.integers(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def reference(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


JPEG = encoded(photo(), quality=90)
GOOD = {
    "jpeg": JPEG,
    "progressive jpeg": encoded(photo(), progressive=True),
    "4:4:4 jpeg": encoded(photo(), subsampling=0),
    "grey jpeg": encoded(photo().convert("L")),
    "CMYK jpeg": encoded(photo().convert("CMYK")),
    "jpeg with bytes after its end": JPEG + b"junk",
    "jpeg turned by EXIF": encoded(
        photo(), exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    ),
    "png": encoded(photo(), "PNG"),
    "palette png": encoded(photo().quantize(16), "PNG"),
    "black and white png": encoded(photo().convert("1"), "PNG"),
    "png with alpha": encoded(photo().convert("RGBA"), "PNG"),
    "grey png with alpha": encoded(photo().convert("LA"), "PNG"),
    "gif": encoded(photo().quantize(16), "GIF"),
    "webp": encoded(photo(), "WEBP"),
}


@pytest.mark.parametrize("name", GOOD)
def test_pixels_are_those_of_pillow(name):
    for data in (GOOD[name], memoryview(GOOD[name])):
        pixels = decode(data)
        assert pixels.shape == (40, 60, 3)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - reference(data).astype(int)).mean() <= 0.01


def test_sixteen_bits_keep_their_upper_byte():
    grey = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    pixels = decode(encoded(Image.fromarray(grey), "PNG"))
    assert np.array_equal(pixels, np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    frame = JPEG.index(b"\xff\xc0")
    return JPEG[: frame + 5] + struct.pack(">HH", height, width) + JPEG[frame + 9 :]


BAD = {
    "zero bytes": (b"", "image is empty"),
    "text": (b"<html>404 Not Found</html>", "not an image.*b'<html>40'"),
    "zeros": (bytes(1000), "not an image"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg without its last bytes": (JPEG[:-20], "truncated"),
    "jpeg header alone": (JPEG[:100], "cannot be decoded"),
    "half a png": (GOOD["png"][: len(GOOD["png"]) // 2], "truncated"),
    "half a gif": (GOOD["gif"][: len(GOOD["gif"]) // 2], "cannot be decoded"),
    "png bomb": (png_header(8000, 8000), "image bomb: 8000 x 8000 pixels, more than max_pixels 50,000,000"),
    "jpeg bomb": (jpeg_header(8000, 7000), "image bomb: 8000 x 7000 pixels"),
    "bomb beyond Pillow": (png_header(60000, 60000), "image bomb"),
    "floats": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "image of floats"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:Image size")
def test_bad_image_is_named(name):
    data, reason = BAD[name]
    with pytest.raises(DamagedSample, match=reason) as raised:
        decode(data)
    assert str(raised.value) == raised.value.reason


def test_bomb_limit_is_exact():
    assert decode(JPEG, max_pixels=60 * 40).shape == (40, 60, 3)
    with pytest.raises(DamagedSample, match="60 x 40 pixels, more than max_pixels 2,399"):
        decode(JPEG, max_pixels=60 * 40 - 1)


# sizes on both sides of the pass order, enlarging, tall, wide, and equal to the target
SIZES = [
    (500, 375),
    (375, 500),
    (333, 500),
    (334, 444),
    (300, 310),
    (240, 260),
    (150, 180),
    (64, 400),
    (400, 64),
    (64, 64),
]


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_pillow_with_the_same_box(size):
    image, view = photo(*size), ImageView("image", 64, scale=(0.3, 1.0))
    pixels = np.array(image)
    for seed in range(4):
        u = np.random.default_rng(seed).random(UNIFORMS)
        top, left, height, width = crop_box(*pixels.shape[:2], view, u)
        expected = image.crop((left, top, left + width, top + height)).resize((64, 64), Image.BICUBIC)
        crop = random_resized_crop(pixels, view, u)
        assert crop.shape == (3, 64, 64)
        assert crop.dtype == torch.uint8
        assert crop.is_contiguous()
        assert np.abs(crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)).mean() <= 0.01


@pytest.mark.parametrize("size", [*SIZES, (90, 700), (701, 91)])
def test_eval_crop_equals_open_clip(size):
    theirs = image_transform(64, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(photo(*size)) * 255
    ours = eval_crop(np.array(photo(*size)), 64)
    assert ours.shape == (3, 64, 64)
    assert ours.is_contiguous()
    assert (ours - theirs).abs().mean() <= 0.01


def test_eval_crop_of_a_thread_resizes_its_middle_only():
    thread = np.random.default_rng(0).integers(0, 256, (1, 100_000, 3), dtype=np.uint8)
    assert torch.equal(eval_crop(thread, 64), eval_crop(thread[:, 49_984:50_016], 64))
    assert torch.equal(eval_crop(thread.transpose(1, 0, 2), 64), eval_crop(thread, 64).transpose(1, 2))


@pytest.mark.real
def test_real_photographs_equal_open_clip(real_data: Path):
    files = sorted((real_data / "imagenet-sample-250").rglob("*.JPEG"))[:20] or sorted(real_data.rglob("*.jpg"))[:20]
    evaluation = image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    view, apart = ImageView("image", 224), []
    for seed, file in enumerate(files):
        data = file.read_bytes()
        pixels, image = decode(data), Image.open(file).convert("RGB")
        apart.append((eval_crop(pixels, 224) - evaluation(image) * 255).abs().mean())
        u = np.random.default_rng(seed).random(UNIFORMS)
        top, left, height, width = crop_box(*pixels.shape[:2], view, u)
        expected = np.asarray(image.crop((left, top, left + width, top + height)).resize((224, 224), Image.BICUBIC))
        crop = random_resized_crop(pixels, view, u).permute(1, 2, 0).numpy()
        apart.append(torch.tensor(np.abs(crop.astype(int) - expected.astype(int)).mean()))
    assert len(files) == 20
    assert max(apart) <= 0.02
    assert torch.stack([a.double() for a in apart]).mean() <= 0.01


@pytest.mark.parametrize(
    ("height", "width", "view"),
    [
        (375, 500, ImageView("a", 224)),
        (375, 500, ImageView("a", 224, scale=(0.08, 1.0))),
        (100, 400, ImageView("a", 96, scale=(0.05, 0.6), ratio=(0.5, 2.0))),
    ],
)
def test_boxes_have_the_distribution_of_torchvision(height, width, view):
    rng, n = np.random.default_rng(0), 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(view.scale), list(view.ratio)) for _ in range(n)])
    ours = np.array([crop_box(height, width, view, rng.random(UNIFORMS)) for _ in range(n)])
    for column in range(4):
        assert _largest_gap(ours[:, column], theirs[:, column]) < 1.95 * np.sqrt(2 / n), "Kolmogorov-Smirnov, p = 0.001"


def _largest_gap(a: np.ndarray, b: np.ndarray) -> float:
    at = np.unique(np.concatenate([a, b]))
    return float(
        np.abs(
            np.searchsorted(np.sort(a), at, "right") / len(a) - np.searchsorted(np.sort(b), at, "right") / len(b)
        ).max()
    )


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 500), (500, 1), (1, 1)])
def test_boxes_of_extreme_images_stay_inside(height, width):
    view = ImageView("a", 8)
    for seed in range(50):
        u = np.random.default_rng(seed).random(UNIFORMS)
        top, left, h, w = crop_box(height, width, view, u)
        assert h >= 1
        assert w >= 1
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        assert random_resized_crop(np.zeros((height, width, 3), np.uint8), view, u).shape == (3, 8, 8)


def test_fallback_is_the_centre_crop_of_torchvision():
    view = ImageView("a", 8)
    box = crop_box(100, 1000, view, np.full(UNIFORMS, 0.5))
    assert tuple(box) == tuple(RandomResizedCrop.get_params(torch.empty(3, 100, 1000), [0.9, 1.0], [3 / 4, 4 / 3]))


def test_box_reaches_both_edges():
    view = ImageView("a", 8, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    u = np.zeros(UNIFORMS)
    assert tuple(crop_box(100, 100, view, u)) == (0, 0, 50, 50)
    u[-3:-1] = np.nextafter(1, 0)
    assert tuple(crop_box(100, 100, view, u)) == (50, 50, 50, 50)


def test_flip_mirrors_the_crop():
    pixels, u = np.array(photo()), np.full(UNIFORMS, 0.4)
    straight = random_resized_crop(pixels, ImageView("a", 32, flip=0.4), u)
    mirrored = random_resized_crop(pixels, ImageView("a", 32, flip=0.41), u)
    assert torch.equal(mirrored, straight.flip(-1))
    assert not torch.equal(mirrored, straight)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"scale": (0.0, 1.0)}, {"scale": (0.9, 0.1)}, {"ratio": (2, 1)}, {"flip": 1.5}]
)
def test_impossible_views_are_refused(wrong):
    with pytest.raises(ValueError, match="view 'a'"):
        ImageView(**{"name": "a", "size": 8, **wrong})


def test_scratch_is_used_again_and_gives_the_same_pixels():
    scratch = Scratch()
    for kind in ("jpeg", "grey jpeg", "png", "CMYK jpeg"):
        assert np.array_equal(decode(GOOD[kind], scratch=scratch), decode(GOOD[kind]))
    first, second = decode(JPEG, scratch=scratch), decode(JPEG, scratch=scratch)
    assert np.shares_memory(first, second)
    assert not np.shares_memory(decode(JPEG), decode(JPEG))
    large = decode(encoded(photo(3000, 2000)), scratch=scratch)
    assert large.shape == (2000, 3000, 3)
    assert not np.shares_memory(large, decode(JPEG, scratch=scratch)), "large images are not kept"
