"""The native renderer: against the float64 reference and DALI's float pixels, borders included; the same bits in any company; bad files."""

import dataclasses
import io
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.proof.level_errors import away_from_borders, level_errors, levels, reference_levels
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.choose import make_renderer
from wherefrom.pipeline.render.dali_decode import dali_missing
from wherefrom.pipeline.render.dali_renderer import DaliRenderer
from wherefrom.pipeline.render.renderer import PackingRenderer
from wherefrom.pipeline.shards.picture_headers import examine_picture
from wherefrom.pipeline.view_recipe import ColorLaw, PixelType, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Record

pytestmark = [pytest.mark.core, pytest.mark.skipif(native_missing() is not None, reason=str(native_missing()))]

Bytes = NDArray[np.uint8]
Records = Sequence[Record]
LAW = ColorLaw(jitter_prob=1.0, gray_prob=0.3, blur_prob=0.6, blur_sigma_px=(0.1, 3.0), solarize_prob=0.3)
FLOAT_BAR, BYTE_BAR, HALF_BAR = 2e-3, 0.51, 0.08  # levels of 255, worst; half precision of a normalized level
DALI_MEAN_BAR = 0.02


def recipe_of(color: ColorLaw | None = LAW, pixels: PixelType = "float32") -> ViewRecipe:
    large, small = Independent(area_frac=(0.4, 1)), Independent(area_frac=(0.05, 0.4))
    return ViewRecipe(
        families=(
            ViewFamily(name="large", views=2, size_px=(90, 71), law=large, mirror="view", color=color, snap="none", min_side_px=1),
            ViewFamily(name="small", views=5, size_px=(20, 28), law=small, mirror="view", turns=True, color=color, min_side_px=1),
        ),
        pixels=pixels,
    )


def noise(height: int, width: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(picture: Bytes, kind: str = "PNG", orientation: int = 1) -> Bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, exif=exif.tobytes())
    return np.frombuffer(file.getvalue(), np.uint8)


def records_for(recipe: ViewRecipe, files: Sequence[Bytes]) -> Records:
    """Records for files, sized and turned as their headers say."""
    headers, ids = [examine_picture(file.tobytes()) for file in files], np.arange(len(files))
    size = np.array([(header.height, header.width) for header in headers], np.int32).reshape(-1, 2)
    stored = np.array([header.orientation for header in headers], np.uint8)
    return draw_records(recipe, seed=3, epoch=0, drawn_for=ids, source_size=size, stored_orientation=stored)


def render(recipe: ViewRecipe, files: Sequence[Bytes], records: Records, threads: int = 0) -> tuple[torch.Tensor, ...]:
    """All pixels of files that decode, in memory of their own."""
    renderer = make_renderer(recipe, "native", threads=threads)
    rendered = renderer.render(files, records)
    renderer.close()
    assert rendered.failed == {}
    return tuple(pixels.clone() for pixels in rendered.pixels)


def worst_off(recipe: ViewRecipe, files: Sequence[Bytes], records: Records, pixels: Sequence[torch.Tensor]) -> float:
    """Return the largest distance to the reference, in levels, of any pixel of any view."""
    stored = [decode_picture(file) for file in files]
    return max(
        float((levels(one, recipe) - reference_levels(stored, record)).abs().max()) for one, record in zip(pixels, records, strict=True)
    )


@pytest.mark.parametrize(("pixels", "bar"), [("float32", FLOAT_BAR), ("uint8", BYTE_BAR), ("float16", HALF_BAR)])
@pytest.mark.parametrize("color", [None, LAW], ids=["geometry", "all photometrics"])
def test_every_pixel_is_the_references_borders_and_exif_included(pixels: PixelType, bar: float, color: ColorLaw | None) -> None:
    recipe = recipe_of(color, pixels)
    files = [file_of(noise(50 + 9 * k, 120 - 8 * k, k), "PNG" if k % 2 else "JPEG", orientation=1 + k) for k in range(8)]
    records = records_for(recipe, files)
    shown = render(recipe, files, records, threads=2)
    assert worst_off(recipe, files, records, shown) <= bar
    wrong = [Record.of(dataclasses.replace(record.geometry, boxes=record.geometry.boxes + 0.5), record.photometric) for record in records]
    assert worst_off(recipe, files, wrong, shown) > bar  # half a source pixel is seen


@pytest.mark.skipif(dali_missing() is not None, reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("color", [None, LAW], ids=["geometry", "all photometrics"])
def test_photographs_are_dalis_float_pixels(photographs: Path, color: ColorLaw | None) -> None:
    with tarfile.open(photographs / "imagenet-sample" / "imagenet-sample-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:12]
        files = [np.frombuffer(tar.extractfile(member).read(), np.uint8) for member in members]  # type: ignore[union-attr]
    recipe = recipe_of(color)
    records = records_for(recipe, files)
    both = zip(render(recipe, files, records), DaliRenderer(recipe, threads=2).render(files, records).pixels, records, strict=True)
    for ours, theirs, record in both:
        error = level_errors(levels(ours, recipe), levels(theirs, recipe), away_from_borders(record))
        assert error.inside_mean <= DALI_MEAN_BAR and not error.border_mean > DALI_MEAN_BAR
    stock = make_renderer(
        dataclasses.replace(recipe, families=tuple(dataclasses.replace(f, snap="pixel") for f in recipe.families)), "torch"
    )
    eight_bits = stock.render(
        files,
        [dataclasses.replace(each, geometry=dataclasses.replace(each.geometry, boxes=each.geometry.boxes.round())) for each in records],
    ).pixels[0]
    apart = level_errors(levels(eight_bits, recipe), levels(render(recipe, files, records)[0], recipe), away_from_borders(records[0]))
    assert apart.inside_mean > DALI_MEAN_BAR  # rounding to 8 bits and whole pixels is seen


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_batch_size_slot_and_threads_change_no_bit(threads: int) -> None:
    recipe = recipe_of()
    files = [file_of(noise(40 + 3 * seed, 90 - 2 * seed, seed)) for seed in range(7)]
    records = records_for(recipe, files)
    together = render(recipe, files, records, threads=threads)
    for position in (0, 3, 6):
        alone = render(recipe, [files[position]], [record[position] for record in records])
        for all_pixels, pixels in zip(together, alone, strict=True):
            assert torch.equal(all_pixels[position], pixels[0])


@pytest.mark.parametrize("decodable", [True, False])
def test_records_packed_for_many_batches_give_the_pixels_of_each(decodable: bool) -> None:
    recipe = recipe_of(pixels="float16")
    files = [file_of(noise(61, 83, seed), "JPEG", 1 + seed % 8) for seed in range(8)]  # of one size: others' records render as well
    records = records_for(recipe, files)
    renderer = make_renderer(recipe, "native", threads=2)
    assert isinstance(renderer, PackingRenderer)
    packed = renderer.pack(records)
    expected = renderer.render(files, records).pixels
    verdicts = np.full(len(files), decodable)
    for rows, others in ((slice(0, 3), slice(1, 4)), (slice(3, 8), slice(0, 5))):
        part = files[rows], [record[rows] for record in records], verdicts[rows]
        right, wrong = (renderer.render(*part, packed[which]) for which in (rows, others))
        assert right.failed == wrong.failed == {}
        assert all(torch.equal(a, b[rows]) for a, b in zip(right.pixels, expected, strict=True))
        assert not any(torch.equal(a, b[rows]) for a, b in zip(wrong.pixels, expected, strict=True))
    renderer.close()


def test_a_plain_view_among_colored_ones_is_what_it_is_alone() -> None:
    recipe = recipe_of(dataclasses.replace(LAW, jitter_prob=0.5, gray_prob=0.0, solarize_prob=0.0, blur_prob=0.3))
    files = [file_of(noise(60, 70, seed)) for seed in range(12)]
    records = records_for(recipe, files)
    plain = [b for b in range(12) if not records[0].photometric[b].changed.any()]
    assert plain
    together = render(recipe, files, records)[0]
    for b in plain:
        alone = render(recipe, [files[b]], [record[b] for record in records])[0]
        assert torch.equal(together[b], alone[0])


def test_threads_that_share_a_renderer_get_their_own_pixels() -> None:
    recipe = recipe_of(pixels="uint8")
    files = [file_of(noise(50, 60, seed)) for seed in range(8)]
    records = records_for(recipe, files)
    expected = render(recipe, files, records)
    renderer = make_renderer(recipe, "native", threads=2)
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(lambda _: renderer.render(files, records).pixels, range(12)))
    for pixels in kept:
        assert all(torch.equal(a, b) for a, b in zip(pixels, expected, strict=True))
    renderer.close()
    renderer.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_undecodable_pictures_are_named_and_the_rest_is_what_it_was(threads: int) -> None:
    recipe = recipe_of()
    files = [file_of(noise(50, 60, seed)) for seed in range(4)]
    records = records_for(recipe, files)
    expected = render(recipe, files, records)
    for bad in (b"", b"garbage" * 40, files[1].tobytes()[:300], file_of(noise(60, 50)).tobytes()):
        renderer = make_renderer(recipe, "native", threads=threads)
        rendered = renderer.render([files[0], np.frombuffer(bad, np.uint8), *files[2:]], records)
        assert list(rendered.failed) == [1] and rendered.failed[1] and "\n" not in rendered.failed[1]
        for pixels, others in zip(rendered.pixels, expected, strict=True):
            assert torch.equal(pixels[[0, 2, 3]], others[[0, 2, 3]])
        renderer.close()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_a_hostile_record_is_refused_before_a_pixel_moves(number: float) -> None:
    recipe = recipe_of()
    files = [file_of(noise(50, 60))]
    first, *rest = records_for(recipe, files)
    boxes = first.geometry.boxes.clone()
    boxes[0, 1, 2] = number
    with pytest.raises(ValueError, match="box"):
        make_renderer(recipe, "native", threads=0).render(
            files, [Record.of(dataclasses.replace(first.geometry, boxes=boxes), first.photometric), *rest]
        )
