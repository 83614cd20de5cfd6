"""Photometric changes are those of Pillow and torchvision, drawn as they draw, and the same in every world."""

from __future__ import annotations

import io
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from pretrain.order import SampleOrder
from pretrain.philox import uniforms
from pretrain.reader import Batch, Reader
from pretrain.shards.source import Source, open_source
from pretrain.views import operations
from pretrain.views.geometry import UNIFORMS as CROP_UNIFORMS
from pretrain.views.geometry import crop_box, random_resized_crop
from pretrain.views.photometric import UNIFORMS, Draws, _together, apply, draw, draws_from
from pretrain.views.spec import Blur, ImageView, Jitter

SWAV = ImageView(
    "swav",
    96,
    scale=(0.14, 1.0),
    flip=0.5,
    interpolation="bilinear",
    jitter=Jitter(0.8, 0.8, 0.8, 0.2),
    grey=0.2,
    blur=Blur(),
)
FULL = replace(SWAV, solarize=0.3)


def smooth(size: int, seed: int) -> Image.Image:
    """Colours that change slowly, about as strong as a photograph's, and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = 0.4 * rng.integers(0, 256, (7, 7, 3)) + 0.6 * rng.integers(0, 256, (7, 7, 1))
    large = np.array(Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.BICUBIC))
    return Image.fromarray((large + rng.integers(-6, 7, (size, size, 3))).clip(0, 255).astype(np.uint8))


def photographs(folder: Path, count: int) -> list[Image.Image]:
    files = sorted((folder / "imagenet-sample-250").rglob("*.JPEG")) or sorted(folder.rglob("*.jpg"))
    assert len(files) >= count
    return [Image.open(file).convert("RGB") for file in files[:: len(files) // count][:count]]


def crops_of(images: list[Image.Image], size: int) -> list[Image.Image]:
    random_crop = transforms.RandomResizedCrop(size)
    torch.manual_seed(0)
    return [random_crop(image) for image in images]


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()


def apart(ours: torch.Tensor, theirs: Image.Image) -> float:
    return (ours.float() - tensor(theirs).float()).abs().mean().item()


def gaussian(image: Image.Image, sigma: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


# operation on floats with a number, Pillow's, the numbers, the bound on the mean difference of one image. Some are
# wide for what Pillow does: a contrast's level is whole, its hue is, and it rounds six times in a blur, so that
# small weights come to nothing
OPERATIONS = {
    "brightness": (operations.brightness, TF.adjust_brightness, (0.0, 0.2, 0.7, 1.0, 1.3, 1.8), 0.05),
    "contrast": (operations.contrast, TF.adjust_contrast, (0.0, 0.2, 0.7, 1.0, 1.3, 1.8), 1.01),
    "saturation": (operations.saturation, TF.adjust_saturation, (0.0, 0.2, 0.7, 1.0, 1.3, 1.8), 0.65),
    "hue": (operations.hue, TF.adjust_hue, (-127 / 255, -50 / 255, -1 / 255, 0.0, 30 / 255, 51 / 255, 127 / 255), 1.0),
    "grey": (lambda x, _: operations.grey(x).expand_as(x), lambda i, _: TF.to_grayscale(i, 3), (0.0,), 0.01),
    "blur": (lambda x, s: operations.blur(x, [operations.box(s)]), gaussian, (0.1, 0.4, 0.9, 1.3, 1.5, 2.0, 4.0), 0.9),
    "solarize": (lambda x, _: operations.solarize(x), lambda i, _: ImageOps.solarize(i, 128), (0.0,), 0.01),
}


def check_operation(name: str, images: list[Image.Image]) -> None:
    ours, theirs, numbers, bound = OPERATIONS[name]
    for number in numbers:
        gaps = [apart((ours(tensor(i).float(), number) + 0.5).floor(), theirs(i, number)) for i in images]
        assert max(gaps) <= bound, (name, number)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [224, 96, 57, 12])
def test_operation_equals_pillow(name, size):
    check_operation(name, [smooth(size, seed) for seed in range(3)])


@pytest.mark.real
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_pillow_on_photographs(name, real_data: Path):
    check_operation(name, crops_of(photographs(real_data, 12), 224))


def test_blur_repeats_the_edges_as_pillow_does():
    image = smooth(64, 1)
    ours = operations.blur(tensor(image).float(), [operations.box(2.0)]).round() - tensor(gaussian(image, 2.0)).float()
    assert max(e.abs().mean() for e in (ours[..., :4, :], ours[..., -4:, :], ours[..., :4], ours[..., -4:])) <= 0.8


def pillow_chain(image: Image.Image, draws: Draws, row: int) -> Image.Image:
    """The row's changes, made by torchvision and Pillow."""
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for number in draws.order[row]:
        image = adjust[number](image, float(draws.strength[row, number])) if number >= 0 else image
    image = TF.to_grayscale(image, 3) if draws.grey[row] else image
    image = gaussian(image, float(draws.sigma[row])) if draws.sigma[row] else image
    return ImageOps.solarize(image, 128) if draws.solarize[row] else image


def check_chain(images: list[Image.Image], view: ImageView) -> None:
    draws = draws_from(view, np.random.default_rng(0).random((len(images), UNIFORMS)))
    pixels = torch.cat([tensor(image) for image in images])
    before = pixels.clone()
    ours = apply(pixels, draws)
    assert torch.equal(pixels, before), "the crops themselves are left alone"
    gaps = [apart(ours[i : i + 1], pillow_chain(image, draws, i)) for i, image in enumerate(images)]
    assert np.mean(gaps) <= 1.0
    assert np.median(gaps) <= 1.0
    assert np.mean([apart(ours[i : i + 1], image) for i, image in enumerate(images)]) > 20, "something was changed"


@pytest.mark.parametrize("view", [SWAV, FULL], ids=["swav", "with solarise"])
def test_chain_equals_pillow(view):
    check_chain([smooth(view.size, seed) for seed in range(60)], view)


@pytest.mark.real
@pytest.mark.parametrize("view", [SWAV, FULL], ids=["swav", "with solarise"])
def test_chain_equals_pillow_on_photographs(view, real_data: Path):
    check_chain(crops_of(photographs(real_data, 60), view.size), view)


def test_no_row_depends_on_the_others():
    for size in (57, 96):
        pixels = torch.cat([tensor(smooth(size, seed)) for seed in range(24)])
        draws = draws_from(FULL, np.random.default_rng(1).random((24, UNIFORMS)))
        whole = apply(pixels, draws)
        shuffled = np.random.default_rng(2).permutation(24)
        assert torch.equal(apply(pixels[shuffled], draws[shuffled]), whole[shuffled])
        for row in range(24):
            assert torch.equal(apply(pixels[row : row + 1], draws[row : row + 1]), whole[row : row + 1])


def test_rows_together_are_the_rows_one_by_one():
    """The way a GPU takes, here on the CPU: the same pixels but for roundings that fall the other way."""
    pixels = torch.cat([tensor(smooth(64, seed)) for seed in range(48)])
    draws = draws_from(FULL, np.random.default_rng(3).random((48, UNIFORMS)))
    gap = (_together(pixels, draws).int() - apply(pixels, draws).int()).abs()
    assert (gap > 0).float().mean() <= 0.002
    assert gap.float().mean((1, 2, 3)).max() <= 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_pixels_of_the_cpu():
    pixels = torch.cat([tensor(smooth(64, seed)) for seed in range(48)])
    draws = draws_from(FULL, np.random.default_rng(3).random((48, UNIFORMS)))
    gap = (apply(pixels.cuda(), draws).cpu().int() - apply(pixels, draws).int()).abs().float()
    assert gap.mean((1, 2, 3)).max() <= 0.1


def largest_gap(a: np.ndarray, b: np.ndarray) -> float:
    at = np.unique(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def test_parameters_have_the_distribution_of_torchvision():
    n = 4000
    draws = draws_from(FULL, uniforms(0, 0, 0, np.arange(n), "test", UNIFORMS))
    bounds = ((0.2, 1.8),) * 3 + ((-0.2, 0.2),)
    torch.manual_seed(0)
    params = [transforms.ColorJitter.get_params(*bounds) for _ in range(n)]
    limit = 1.95 * np.sqrt(2 / n)
    for number in range(4):
        theirs = np.array([p[1 + number] for p in params])
        theirs = np.trunc(theirs * 255) / 255 if number == 3 else theirs
        assert largest_gap(draws.strength[:, number], theirs) < limit, "Kolmogorov-Smirnov, p = 0.001"
    jittered = draws.order[draws.order[:, 0] >= 0]
    permutations, counts = np.unique(jittered, axis=0, return_counts=True)
    assert len(permutations) == 24
    assert ((counts - len(jittered) / 24) ** 2 / (len(jittered) / 24)).sum() < 49.7, "chi square, p = 0.001"
    shares = {"jitter": len(jittered) / n, "grey": draws.grey.mean(), "blur": (draws.sigma > 0).mean()}
    shares["solarize"] = draws.solarize.mean()
    for (name, share), expected in zip(shares.items(), (0.8, 0.2, 0.5, 0.3)):
        assert abs(share - expected) < 0.025, name
    sigma = draws.sigma[draws.sigma > 0]
    assert largest_gap(sigma, np.linspace(0.1, 2.0, n)) < 1.95 * np.sqrt(1 / len(sigma))
    columns = np.column_stack([draws.strength, draws.grey, draws.sigma, draws.solarize, draws.order[:, 0] >= 0])
    off_diagonal = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(off_diagonal).max() < 0.065, "drawn independently"


def test_strengths_that_are_zero_are_left_out():
    draws = draws_from(replace(SWAV, jitter=Jitter(contrast=0.5, p=1.0)), np.random.default_rng(0).random((50, 13)))
    assert set(draws.order.ravel().tolist()) == {-1, 1}
    assert ((draws.order == 1).sum(1) == 1).all()
    wide = draws_from(replace(SWAV, jitter=Jitter(brightness=2.0, p=1.0)), np.random.default_rng(0).random((500, 13)))
    assert 0 <= wide.strength[:, 0].min() < 0.1
    assert 2.9 < wide.strength[:, 0].max() <= 3


FIGURES = [f"{what} {c}" for what in ("mean", "contrast") for c in "RGB"] + ["colour", "grey", "sharpness"]


def figures(pixels: torch.Tensor) -> np.ndarray:
    """(n, 9): what each view looks like, as FIGURES names it."""
    x = pixels.float()
    chroma = x.amax(1) - x.amin(1)
    sharp = x.diff(dim=-1).abs().mean((1, 2, 3)) + x.diff(dim=-2).abs().mean((1, 2, 3))
    others = [chroma.mean((1, 2)), (chroma.amax((1, 2)) == 0).float(), sharp]
    return torch.cat([x.mean((2, 3)), x.std((2, 3)), torch.stack(others, 1)], 1).numpy()


@pytest.mark.real
def test_views_look_like_the_official_ones(real_data: Path):
    """Mean and spread of every figure of 1,600 views are within four standard errors of the official pipeline's."""
    images, view, n = photographs(real_data, 50), replace(SWAV, size=48), 1600
    for image in images:
        image.thumbnail((200, 200))
    official = transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, scale=view.scale),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            lambda image: gaussian(image, random.uniform(0.1, 2)) if random.random() < 0.5 else image,
        ]
    )
    torch.manual_seed(0)
    random.seed(0)
    theirs = figures(torch.cat([tensor(official(images[i % len(images)])) for i in range(n)]))
    arrays, ids = [np.array(image) for image in images], np.arange(n)
    u = uniforms(0, 0, 0, ids, view.name, CROP_UNIFORMS)
    crops = torch.stack([random_resized_crop(arrays[i % len(images)], view, u[i]) for i in range(n)])
    ours = figures(apply(crops, draw(view, 0, 0, 0, ids)))
    rng = np.random.default_rng(0)
    again = [theirs[rng.integers(0, n, n)] for _ in range(100)]
    for what in (np.mean, np.std):
        error = np.sqrt(2) * np.std([what(a, axis=0) for a in again], axis=0)
        off = np.abs(what(ours, axis=0) - what(theirs, axis=0)) / error
        assert (off < 4).all(), dict(zip(FIGURES, off.round(2)))
    plain = figures(crops)
    off = np.abs(plain.mean(0) - theirs.mean(0)) / error
    assert (off[3:] > 4).all(), "crops without the changes are told apart"


@pytest.mark.parametrize("size", [(500, 375), (240, 260), (150, 180), (64, 400), (64, 64), (40, 50)])
def test_bilinear_crop_equals_pillow(size):
    image, view = smooth(500, 0).resize(size), ImageView("a", 64, scale=(0.3, 1.0), interpolation="bilinear")
    for seed in range(4):
        u = np.random.default_rng(seed).random(CROP_UNIFORMS)
        top, left, height, width = crop_box(size[1], size[0], view, u)
        theirs = image.crop((left, top, left + width, top + height)).resize((64, 64), Image.BILINEAR)
        assert apart(random_resized_crop(np.array(image), view, u)[None], theirs) <= 0.01
        assert (
            apart(random_resized_crop(np.array(image), replace(view, interpolation="bicubic"), u)[None], theirs) > 0.02
        )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ImageView("a", 8, interpolation="nearest"),  # type: ignore[arg-type]
        lambda: ImageView("a", 8, grey=1.1),
        lambda: ImageView("a", 8, solarize=-0.1),
        lambda: Jitter(brightness=-0.1),
        lambda: Jitter(hue=0.6),
        lambda: Jitter(p=2.0),
        lambda: Blur(sigma=(0.0, 1.0)),
        lambda: Blur(sigma=(2.0, 1.0)),
        lambda: Blur(p=-1.0),
    ],
)
def test_impossible_changes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"view 'a'|jitter|blur"):
        wrong()


PLAIN = ImageView("plain", 24, scale=(0.3, 1.0), flip=0.5)
CHANGED = replace(FULL, name="changed", size=24)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    """36 samples in one shard; number 5 is damaged."""
    folder = tmp_path_factory.mktemp("photometric")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(36):
            out = io.BytesIO()
            smooth(40, i).save(out, "PNG")
            data = b"no image" if i == 5 else out.getvalue()
            info = tarfile.TarInfo(f"s{i:02d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return open_source(folder)


def read(source: Source, views: list[ImageView], **options) -> Batch:
    order = SampleOrder([source.lengths], seed=3, global_batch=36, block=4, window=8)
    with Reader([source], order, views, (), None, seed=3, **options) as reader:
        return reader.batch(1)


@pytest.mark.parametrize("world", [2, 3])
def test_worlds_and_threads_change_nothing(source, world):
    whole = read(source, [PLAIN, CHANGED]).to("cpu")
    parts = [read(source, [PLAIN, CHANGED], rank=r, world=world, threads=1 + r).to("cpu") for r in range(world)]
    good = whole.weight > 0  # what stands in for a damaged row is of the same rank
    for name in ("plain", "changed"):
        assert torch.equal(torch.cat([part.images[name] for part in parts])[good], whole.images[name][good])


def test_a_damaged_row_shows_the_pixels_of_a_good_one(source):
    batch = read(source, [PLAIN, CHANGED]).to("cpu")
    (row,) = torch.where(batch.weight == 0)[0].tolist()
    for pixels in batch.images.values():
        assert torch.equal(pixels[row], pixels[(row + 1) % 36])


def test_changes_are_made_once_and_rows_keep_theirs(source):
    batch = read(source, [PLAIN, CHANGED])
    assert set(batch.photometric) == {"changed"}
    final = batch.to("cpu")
    assert not final.photometric
    assert torch.equal(final.to("cpu").images["changed"], final.images["changed"])
    assert not torch.equal(final.images["changed"], batch.images["changed"])
    assert torch.equal(batch.to("cpu").images["changed"], final.images["changed"]), "the reader's batch is as it was"
    assert torch.equal(batch.rows(7, 20).to("cpu").images["changed"], final.images["changed"][7:20])


def test_crops_do_not_depend_on_photometrics(source):
    alone = read(source, [PLAIN])
    bare = replace(CHANGED, jitter=None, grey=0.0, blur=None, solarize=0.0)
    beside, without = read(source, [PLAIN, CHANGED]), read(source, [bare])
    assert not alone.photometric
    assert torch.equal(alone.to("cpu").images["plain"], alone.images["plain"])
    assert torch.equal(beside.images["plain"], alone.images["plain"])
    assert torch.equal(beside.images["changed"], without.images["changed"])


def test_every_epoch_and_view_draws_anew():
    ids = np.arange(20)
    draws = [draw(view, 0, epoch, 0, ids).strength for view in (SWAV, replace(SWAV, name="b")) for epoch in (0, 1)]
    assert all(not np.isclose(a, b).all(1).any() for i, a in enumerate(draws) for b in draws[:i])
    assert np.array_equal(draw(SWAV, 0, 0, 0, ids[7:9]).strength, draws[0][7:9])
