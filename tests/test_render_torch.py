"""The torch renderer: against torchvision's own crop and resize bit for bit, color in float64 NumPy and SciPy, Pillow's decoding."""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.torch_cutter import TorchRenderer
from wherefrom.pipeline.shards.picture_headers import examine_picture
from wherefrom.pipeline.view_recipe import ColorLaw, PixelType, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Photometric, Record, ViewGeometry

pytestmark = pytest.mark.core

functional = pytest.importorskip("torchvision.transforms.v2.functional")

Records = Sequence[Record]
LAW = ColorLaw(jitter_prob=1.0, gray_prob=0.3, blur_prob=0.6, blur_sigma_px=(0.1, 3.0), solarize_prob=0.3)
SMALL = ViewFamily(name="small", views=6, size_px=(20, 28), mirror="view", turns=True, min_side_px=1)
LARGE = ViewFamily(name="large", views=2, size_px=(90, 70), mirror="view", min_side_px=1)
LEVELS = ViewRecipe(families=(SMALL, LARGE), pixels="uint8")


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> NDArray[np.uint8]:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def png(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return encode(Image.fromarray(picture), "PNG")


def records_for(recipe: ViewRecipe, files: Sequence[NDArray[np.uint8]], seed: int = 0) -> Records:
    """Records for files, sized and turned as their headers say."""
    headers = [examine_picture(file.tobytes()) for file in files]
    ids = np.arange(len(files))
    return draw_records(
        recipe,
        seed=seed,
        epoch=0,
        drawn_for=ids,
        source_size=np.array([(header.height, header.width) for header in headers], np.int32).reshape(-1, 2),
        stored_orientation=np.array([header.orientation for header in headers], np.uint8),
    )


def render(
    recipe: ViewRecipe, files: Sequence[NDArray[np.uint8]], records: Records | None = None, threads: int = 0
) -> tuple[torch.Tensor, ...]:
    """All pixels of files that decode, in memory of their own."""
    renderer = TorchRenderer(recipe, threads=threads)
    rendered = renderer.render(files, records_for(recipe, files) if records is None else records)
    renderer.close()
    assert rendered.failed == {}
    return tuple(pixels.clone() for pixels in rendered.pixels)


def cut_by_torchvision(picture: NDArray[np.uint8], record: ViewGeometry, position: int, view: int, shift: int = 0) -> torch.Tensor:
    """A view as torchvision's crop and resize, then torch's flip and rot90, make it; `shift` moves the box."""
    x0, y0, x1, y1 = record.boxes[position, view].int().tolist()
    turns, size = int(record.quarter_turns[position, view]), list(record.size_px)
    crop = functional.crop(torch.from_numpy(picture).permute(2, 0, 1), y0, x0 + shift, y1 - y0, x1 - x0)
    made = functional.resize(crop, size[::-1] if turns % 2 else size, antialias=True)
    if record.flipped[position, view]:
        made = functional.horizontal_flip(made)
    return torch.rot90(made, turns, (-2, -1))


@pytest.mark.parametrize("size", [(60, 80), (257, 63), (33, 190)])
def test_views_are_torchvisions_crop_and_resize_pixel_for_pixel(size: tuple[int, int]) -> None:
    pictures = [noise(*size, seed) for seed in range(3)]
    files = [png(picture) for picture in pictures]
    records = records_for(LEVELS, files)
    orientations, shifted = set(), 0
    for pixels, record in zip(render(LEVELS, files, records), [each.geometry for each in records], strict=True):
        for position, view in product(range(3), range(record.boxes.shape[1])):
            assert torch.equal(pixels[position, view], cut_by_torchvision(pictures[position], record, position, view))
            shifted += torch.equal(pixels[position, view], cut_by_torchvision(pictures[position], record, position, view, shift=1))
            orientations.add((bool(record.flipped[position, view]), int(record.quarter_turns[position, view])))
    assert len(orientations) == 8 and not shifted  # one source pixel aside would show


@pytest.mark.parametrize("kind", ["uint8", "float16", "float32"])
def test_pixels_are_normalized_once_and_cast_once(kind: PixelType) -> None:
    recipe = dataclasses.replace(LEVELS, pixels=kind, mean=(0.1, 0.5, 0.7), std=(0.2, 0.25, 0.5))
    files = [png(noise(70, 60))]
    for got, levels in zip(render(recipe, files), render(LEVELS, files), strict=True):
        assert got.dtype == getattr(torch, kind)
        if kind == "uint8":
            assert torch.equal(got, levels)
            continue
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (recipe.mean, recipe.std))
        exact = (levels.double() / 255 - mean) / std
        error = (got.double() - exact).abs().max().item()
        assert error <= {"float32": 2e-6, "float16": 2**-9}[kind]
        assert ((levels.double() / 255 - mean.flip(0)) / std - exact).abs().max() > 1  # channels the other way round would show


def colored(levels: NDArray[np.float64], photometric: Photometric, position: int, view: int) -> NDArray[np.float64]:
    """The color path on (3, h, w) in float64: matrix, clip, blur with the border mirrored about the edge pixel, solarize."""
    matrix = color_matrix(photometric)[position, view].numpy()
    made = np.einsum("rc,chw->rhw", matrix[:, :3], levels) + matrix[:, 3, None, None]
    made = np.clip(made, 0, 255)
    sigma = float(photometric.blur_sigma_px[position, view])
    if sigma > 0:
        radius = math.ceil(3 * sigma)
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        for axis in (1, 2):
            made = ndimage.correlate1d(made, taps / taps.sum(), axis, mode="mirror")
    return np.minimum(made, 255 - made) if photometric.solarized[position, view] else made


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_color_is_the_formula_in_float64(kind: PixelType) -> None:
    tiny = dataclasses.replace(SMALL, name="tiny", size_px=(5, 4), views=8)  # smaller than the widest blur
    recipe = ViewRecipe(
        families=tuple(dataclasses.replace(f, color=LAW) for f in (SMALL, LARGE, tiny)), pixels=kind, mean=(0, 0, 0), std=(1, 1, 1)
    )
    plain = dataclasses.replace(LEVELS, families=(SMALL, LARGE, tiny))
    files = [png(noise(60, 80, seed)) for seed in range(4)]
    records = records_for(recipe, files)
    uncolored = [Record.of(record.geometry) for record in records]
    told_apart = 0
    for got, levels, record in zip(render(recipe, files, records), render(plain, files, uncolored), records, strict=True):
        photometric = record.photometric
        assert photometric.solarized.any() and photometric.gray.any() and (photometric.blur_sigma_px > 1).any()
        for position, view in product(range(4), range(got.shape[1])):
            source = levels[position, view].double().numpy()
            made = got[position, view].double().numpy() * (1 if kind == "uint8" else 255)
            expected = colored(source, photometric, position, view)
            np.testing.assert_allclose(made, expected, atol=0.5 + 1e-3 if kind == "uint8" else 1e-3)
            unsolarized = dataclasses.replace(photometric, solarized=~photometric.solarized)
            told_apart += np.abs(made - colored(source, unsolarized, position, view)).max() > 1
    assert told_apart > 30


def test_color_that_a_record_asks_for_is_applied_though_the_recipe_draws_none() -> None:
    files = [png(noise(60, 80))]
    records = [
        Record.of(each.geometry, dataclasses.replace(each.photometric, solarized=~each.photometric.solarized))
        for each in records_for(LEVELS, files)
    ]
    for got, levels in zip(render(LEVELS, files, records), render(LEVELS, files), strict=True):
        assert torch.equal(got, torch.minimum(levels, 255 - levels))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_undone_as_pillow_undoes_them(orientation: int, jpeg_bytes: Callable[..., bytes]) -> None:
    picture = noise(60, 90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = [
        np.frombuffer(jpeg_bytes(picture, exif_orientation=orientation), np.uint8),
        encode(Image.fromarray(picture), "PNG", exif=exif.tobytes()),
        encode(Image.fromarray(picture), "WEBP", lossless=True, exif=exif.tobytes()),
    ]
    records = records_for(LEVELS, files)
    assert set(records[0].geometry.stored_orientation.tolist()) == {orientation}
    upright = [np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(file.tobytes())))) for file in files]
    for pixels, record in zip(render(LEVELS, files, records), [each.geometry for each in records], strict=True):
        for position, view in product(range(3), range(record.boxes.shape[1])):
            assert torch.equal(pixels[position, view], cut_by_torchvision(upright[position], record, position, view))


def odd_pictures() -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]:
    """Name -> (file, its pixels as RGB; None: as Pillow has them)."""
    rgb = Image.fromarray(noise(40, 50))
    rgba, deep = noise(40, 50, channels=4), np.random.default_rng(1).integers(0, 65536, (40, 50), dtype=np.uint16)
    nearest = np.rint(deep / 257).astype(np.uint8)
    return {
        "gray JPEG": (encode(rgb.convert("L"), "JPEG"), None),
        "progressive JPEG": (encode(rgb, "JPEG", progressive=True), None),
        "4:2:0 JPEG": (encode(rgb, "JPEG", subsampling=2), None),
        "gray PNG": (encode(rgb.convert("L"), "PNG"), None),
        "gray PNG with alpha": (encode(rgb.convert("LA"), "PNG"), None),
        "PNG with alpha": (encode(Image.fromarray(rgba), "PNG"), rgba[..., :3]),
        "PNG with a palette": (encode(rgb.convert("P"), "PNG"), None),
        "PNG with a palette and a transparent color": (encode(rgb.convert("P"), "PNG", transparency=3), None),
        "1-bit PNG": (encode(rgb.convert("1"), "PNG"), None),
        "16-bit PNG": (encode(Image.fromarray(deep), "PNG"), np.repeat(nearest[..., None], 3, -1)),
        "lossless WebP": (encode(rgb, "WEBP", lossless=True), np.array(rgb)),
        "lossy WebP": (encode(rgb, "WEBP", quality=80), None),
        "WebP with alpha": (encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), rgba[..., :3]),
        "1 x 1 PNG": (png(noise(1, 1)), None),
        "1 x 1 JPEG": (encode(Image.fromarray(noise(1, 1)), "JPEG"), None),
        "10 x 10,000 PNG": (png(noise(10000, 10)), None),
        "10,000 x 10 JPEG": (encode(Image.fromarray(noise(10, 10000)), "JPEG"), None),
    }


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_are_rendered_like_any_other(name: str) -> None:
    file, picture = odd_pictures()[name]
    if picture is None:
        picture = np.array(Image.open(io.BytesIO(file.tobytes())).convert("RGB"))
    records = records_for(LEVELS, [file])
    for pixels, record in zip(render(LEVELS, [file], records), [each.geometry for each in records], strict=True):
        for view in range(record.boxes.shape[1]):
            assert torch.equal(pixels[0, view], cut_by_torchvision(picture, record, 0, view))


def test_cmyk_keeps_its_colors_within_the_conversions_of_two_libraries() -> None:
    """Inks have no one RGB: libjpeg-turbo and Pillow multiply inks with black alike, inverted inks would be off by half the range."""
    smooth = Image.fromarray(noise(6, 7)).resize((70, 60), Image.Resampling.BICUBIC)
    file = encode(smooth.convert("CMYK"), "JPEG", quality=95)
    decoded = decode_picture(file).astype(int)
    expected = np.asarray(Image.open(io.BytesIO(file.tobytes())).convert("RGB")).astype(int)
    assert np.abs(decoded - expected).mean() < 2
    assert np.abs(255 - decoded - expected).mean() > 40


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_batch_size_slot_and_threads_change_no_bit(threads: int) -> None:
    recipe = ViewRecipe(families=(dataclasses.replace(SMALL, color=LAW), LARGE))
    files = [png(noise(40 + 3 * seed, 90 - 2 * seed, seed)) for seed in range(7)]
    records = records_for(recipe, files)
    together = render(recipe, files, records, threads=threads)
    for position in (0, 3, 6):
        alone = render(recipe, [files[position]], [record[position] for record in records])
        for all_pixels, pixels in zip(together, alone, strict=True):
            assert torch.equal(all_pixels[position], pixels[0])


def test_threads_that_share_a_renderer_get_their_own_pixels() -> None:
    files = [png(noise(50, 60, seed)) for seed in range(8)]
    expected = render(LEVELS, files)
    renderer = TorchRenderer(LEVELS, threads=2)
    records = records_for(LEVELS, files)
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(lambda _: renderer.render(files, records).pixels, range(12)))
    for pixels in kept:
        assert all(torch.equal(a, b) for a, b in zip(pixels, expected, strict=True))
    renderer.close()
    renderer.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_undecodable_pictures_are_named_and_the_rest_is_what_it_was(threads: int) -> None:
    files = [png(noise(50, 60, seed)) for seed in range(4)]
    records = records_for(LEVELS, files)
    expected = render(LEVELS, files, records)
    jpeg = encode(Image.fromarray(noise(50, 60, 1)), "JPEG").tobytes()
    without_table = jpeg.replace(b"\xff\xdb\x00\x43\x00", b"\xff\xdb\x00\x43\x03")
    for bad in (b"", b"garbage" * 40, files[1].tobytes()[:300], without_table, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 50\n"):
        renderer = TorchRenderer(LEVELS, threads=threads)
        rendered = renderer.render([files[0], np.frombuffer(bad, np.uint8), *files[2:]], records)
        assert list(rendered.failed) == [1] and rendered.failed[1] and "\n" not in rendered.failed[1]
        for pixels, others in zip(rendered.pixels, expected, strict=True):
            assert torch.equal(pixels[[0, 2, 3]], others[[0, 2, 3]])
        renderer.close()


def test_a_picture_of_another_size_than_its_record_is_named() -> None:
    jpegs = [encode(Image.fromarray(noise(*size)), "JPEG") for size in ((60, 50), (500, 600))]
    for other, reason in ((png(noise(50, 61)), "says 60 x 50 .* are 61 x 50"), (jpegs[0], "are 50 x 60"), (jpegs[1], r"\(500, 600, 3\)")):
        renderer = TorchRenderer(LEVELS, threads=0)
        failed = renderer.render([other], records_for(LEVELS, [png(noise(50, 60))])).failed
        assert list(failed) == [0] and re.search(reason, failed[0])


def test_no_format_but_those_of_the_index_is_opened() -> None:
    """Pillow would hand EPS to a program, and knows dozens of formats more."""
    for kind in ("EPS", "BMP", "GIF", "TIFF"):
        with pytest.raises(OSError, match="cannot identify image file"):
            decode_picture(encode(Image.fromarray(noise(4, 5)), kind))


def test_a_batch_of_no_pictures_has_no_pixels() -> None:
    for pixels, family in zip(render(LEVELS, []), LEVELS.families, strict=True):
        assert pixels.shape == (0, family.views, 3, *family.size_px)


def test_parts_of_pixels_are_refused_with_the_mend() -> None:
    family = dataclasses.replace(SMALL, snap="none")
    with pytest.raises(ValueError, match=r"""family 'small' has snap='none', .*use snap="pixel" or renderer="native" or "dali"$"""):
        TorchRenderer(ViewRecipe(families=(LARGE, family)))


@pytest.mark.parametrize(
    "box",
    [
        (0.0, 0.0, float("nan"), 8.0),
        (0.0, 0.0, float("inf"), 8.0),
        (0.5, 0.0, 8.0, 8.0),  # would be cut at 0
        (-3.0, 0.0, 8.0, 8.0),  # slicing would count from the other edge
        (0.0, 0.0, 61.0, 8.0),
        (0.0, 0.0, 8.0, 51.0),
        (4.0, 4.0, 4.0, 8.0),
        (8.0, 8.0, 4.0, 9.0),
    ],
)
def test_a_box_that_cannot_be_cut_as_it_stands_is_refused_by_name(box: tuple[float, ...]) -> None:
    recipe = ViewRecipe(families=(ViewFamily(name="one", views=2, size_px=(8, 8)),))
    files = [png(noise(50, 60))]
    geometry = records_for(recipe, files)[0].geometry
    boxes = geometry.boxes.clone()
    boxes[0, 1] = torch.tensor([0.0, 0, 60, 50])
    edges = dataclasses.replace(geometry, boxes=boxes.clone())
    TorchRenderer(recipe, threads=0).render(files, [Record.of(edges)])  # the whole picture
    boxes[0, 1] = torch.tensor(box)
    with pytest.raises(ValueError, match=r"^box \[.*\] of family 'one', sample 0, view 1: the torch renderer cuts whole pixels") as refused:
        TorchRenderer(recipe, threads=0).render(files, [Record.of(dataclasses.replace(geometry, boxes=boxes))])
    assert "\n" not in str(refused.value)
