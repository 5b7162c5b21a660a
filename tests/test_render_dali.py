"""The `dali` renderer on the CPU against the float64 reference (pictures decoded by Pillow), against itself, and against hostile bytes."""

import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.proof.level_errors import LevelErrors, away_from_borders, level_errors, levels, reference_levels
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.dali_decode import installed
from wherefrom.pipeline.render.dali_renderer import DaliRenderer
from wherefrom.pipeline.view_recipe import ColorLaw, Independent, PixelType, Snap, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Photometric, Record, ViewGeometry

Mistake = Callable[[ViewGeometry, Photometric], tuple[ViewGeometry, Photometric]]

pytestmark = pytest.mark.core

needs_dali = pytest.mark.skipif(not installed(), reason="NVIDIA DALI is not installed")
Bytes = NDArray[np.uint8]
ALL_COLOR = ColorLaw(blur_prob=0.5, solarize_prob=0.3)
MEAN_BAR = 0.02  # levels of 255


def recipe_of(color: ColorLaw | None = None, *, turns: bool = True, pixels: PixelType = "float32", snap: Snap = "none") -> ViewRecipe:
    return ViewRecipe(
        families=(
            ViewFamily(
                name="large", views=2, size_px=(112, 112), law=Independent(area_frac=(0.4, 1)), mirror="view", color=color, snap=snap
            ),
            ViewFamily(
                name="small",
                views=3,
                size_px=(48, 40),
                law=Independent(area_frac=(0.02, 0.4)),
                mirror="view",
                turns=turns,
                color=color,
                snap=snap,
            ),
        ),
        pixels=pixels,
    )


def records_for(recipe: ViewRecipe, source_size: Sequence[tuple[int, int]], orientations: Sequence[int] | None = None) -> list[Record]:
    ids = np.arange(len(source_size))
    stored = None if orientations is None else np.array(orientations, np.uint8)
    sizes = np.array(source_size, np.int32).reshape(-1, 2)
    return draw_records(recipe, seed=5, epoch=0, drawn_for=ids, source_size=sizes, stored_orientation=stored)


def as_bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def stored_pixels(file: Bytes) -> Bytes:
    return np.asarray(Image.open(io.BytesIO(file.tobytes())).convert("RGB"))


def png(array: NDArray[np.generic]) -> Bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return as_bytes(file.getvalue())


def noise(height: int, width: int, channels: int = 3) -> Bytes:
    return np.random.Generator(np.random.Philox(3)).integers(0, 256, (height, width, channels), np.uint8)


@pytest.fixture(scope="module")
def noisy() -> list[Bytes]:
    return [png(noise(height, width)) for height, width in ((90, 120), (131, 77), (64, 200), (48, 40))]


def errors_against_reference(
    recipe: ViewRecipe, files: Sequence[Bytes], records: Sequence[Record], strict: bool | None = None
) -> list[LevelErrors]:
    rendered = DaliRenderer(recipe, threads=2, strict=strict).render(files, records)
    assert rendered.failed == {}
    return [
        level_errors(levels(pixels, recipe), reference_levels([stored_pixels(file) for file in files], record), away_from_borders(record))
        for pixels, record in zip(rendered.pixels, records, strict=True)
    ]


def assert_equal_bits(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


@needs_dali
@pytest.mark.parametrize("color", [None, ALL_COLOR], ids=["geometry", "all photometrics"])
@pytest.mark.parametrize("snap", ["pixel", "none"])
def test_float_pixels_of_noise_equal_the_reference(noisy: list[Bytes], color: ColorLaw | None, snap: Snap) -> None:
    recipe = recipe_of(color, snap=snap)
    records = records_for(recipe, [stored_pixels(file).shape[:2] for file in noisy])
    for error in errors_against_reference(recipe, noisy, records):
        assert max(error.inside_mean, error.border_mean) <= MEAN_BAR
        assert max(error.inside_worst, error.border_worst) <= 0.1


@needs_dali
@pytest.mark.parametrize("color", [None, ALL_COLOR], ids=["geometry", "all photometrics"])
def test_float_pixels_of_photographs_equal_the_reference(photographs: Path, color: ColorLaw | None) -> None:
    files, sizes = some_photographs(photographs, 6)
    recipe = recipe_of(color)
    for error in errors_against_reference(recipe, files, records_for(recipe, sizes)):
        assert max(error.inside_mean, error.border_mean) <= MEAN_BAR
        assert max(error.inside_worst, error.border_worst) <= 0.1


def some_photographs(folder: Path, count: int) -> tuple[list[Bytes], list[tuple[int, int]]]:
    with tarfile.open(folder / "imagenet-sample" / "imagenet-sample-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:count]
        files = [as_bytes(tar.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
    return files, [stored_pixels(file).shape[:2] for file in files]


@needs_dali
@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda g, p: (replace(g, boxes=(g.boxes - 0.25).clamp(min=0)), p), id="a quarter pixel aside"),
        pytest.param(lambda g, p: (replace(g, flipped=~g.flipped), p), id="mirrored"),
        pytest.param(lambda g, p: (g, replace(p, hue_rad=p.hue_rad + 0.01)), id="another hue"),
        pytest.param(lambda g, p: (g, replace(p, blur_sigma_px=p.blur_sigma_px * 1.1)), id="another blur"),
        pytest.param(lambda g, p: (g, replace(p, solarized=~p.solarized)), id="solarized the others"),
        pytest.param(lambda g, p: (g, replace(p, gray=~p.gray)), id="gray the others"),
    ],
)
def test_the_bar_against_the_reference_sees_small_mistakes(noisy: list[Bytes], mistake: Mistake) -> None:
    recipe = recipe_of(ALL_COLOR)
    records = records_for(recipe, [stored_pixels(file).shape[:2] for file in noisy])
    rendered = DaliRenderer(recipe, threads=2).render(noisy, records)
    for pixels, record in zip(rendered.pixels, records, strict=True):
        wrong = reference_levels([stored_pixels(file) for file in noisy], Record.of(*mistake(record.geometry, record.photometric)))
        assert level_errors(levels(pixels, recipe), wrong, away_from_borders(record)).inside_mean > MEAN_BAR


@needs_dali
@pytest.mark.parametrize("color", [None, ALL_COLOR], ids=["geometry", "all photometrics"])
def test_uint8_and_float16_are_the_rounded_float32(noisy: list[Bytes], color: ColorLaw | None) -> None:
    made = {}
    for pixels in ("uint8", "float16", "float32"):
        recipe = recipe_of(color, pixels=pixels)  # type: ignore[arg-type]
        records = records_for(recipe, [stored_pixels(file).shape[:2] for file in noisy])
        made[pixels] = [levels(tensor, recipe) for tensor in DaliRenderer(recipe, threads=2).render(noisy, records).pixels]
    for exact, rounded, half in zip(made["float32"], made["uint8"], made["float16"], strict=True):
        assert (exact - rounded).abs().max() <= 0.501
        assert (exact - half).abs().max() <= 255 * 0.229 * 2.7 * 2**-11 + 0.01


@needs_dali
def test_eight_bits_between_the_steps_round_once_more_and_no_worse(noisy: list[Bytes]) -> None:
    recipe = recipe_of()
    records = records_for(recipe, [stored_pixels(file).shape[:2] for file in noisy])
    exact = DaliRenderer(recipe, threads=2).render(noisy, records).pixels
    rounded = DaliRenderer(recipe, threads=2, exact=False).render(noisy, records).pixels
    for a, b in zip(exact, rounded, strict=True):
        error = (levels(a, recipe) - levels(b, recipe)).abs()
        assert error.max() <= 0.501
        assert error.mean() > MEAN_BAR  # so the bar of the exact path would see it


@needs_dali
@pytest.mark.parametrize("pixels", ["float32", "uint8"])
def test_color_that_a_record_asks_for_is_applied_though_the_recipe_draws_none(noisy: list[Bytes], pixels: PixelType) -> None:
    sizes = [stored_pixels(file).shape[:2] for file in noisy]
    plain_recipe = recipe_of(None, turns=False, pixels=pixels)
    colored, plain = records_for(recipe_of(ALL_COLOR), sizes), records_for(plain_recipe, sizes)
    renderer = DaliRenderer(plain_recipe, threads=2)
    before = renderer.render(noisy, plain).pixels
    for pixels_of_family, record in zip(renderer.render(noisy, colored).pixels, colored, strict=True):
        expected = reference_levels([stored_pixels(file) for file in noisy], record)
        assert (levels(pixels_of_family, plain_recipe) - expected).abs().mean() <= (MEAN_BAR if pixels == "float32" else 0.5)
    assert_equal_bits(renderer.render(noisy, plain).pixels, before)


@needs_dali
def test_a_batch_of_no_pictures_has_no_pixels() -> None:
    recipe = recipe_of(pixels="uint8")
    rendered = DaliRenderer(recipe).render([], records_for(recipe, []))
    assert [(tuple(pixels.shape), pixels.dtype) for pixels in rendered.pixels] == [
        ((0, 2, 3, 112, 112), torch.uint8),
        ((0, 3, 3, 48, 40), torch.uint8),
    ]


STRICT = pytest.mark.parametrize("strict", [True, False], ids=["decoded strictly", "decoded by DALI"])  # the second is a GPU's way


@needs_dali
@STRICT
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_of_jpeg_and_png_are_undone(orientation: int, strict: bool, jpeg_bytes: Callable[..., bytes]) -> None:
    picture = noise(60, 90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", exif=exif.tobytes())
    files = [as_bytes(jpeg_bytes(picture, exif_orientation=orientation)), as_bytes(file.getvalue())]
    recipe = recipe_of()
    records = records_for(recipe, [(90, 60) if orientation >= 5 else (60, 90)] * 2, [orientation] * 2)
    for error in errors_against_reference(recipe, files, records, strict):
        assert error.inside_mean <= MEAN_BAR


@needs_dali
@STRICT
def test_the_record_says_how_a_picture_lies_whatever_its_file_says(strict: bool, jpeg_bytes: Callable[..., bytes]) -> None:
    """One batch of all orientations, each told by the record and contradicted by the file: DALI's own reading of EXIF plays no part."""
    files = [as_bytes(jpeg_bytes(noise(60, 90), exif_orientation=9 - k)) for k in range(1, 9)]
    sizes = [(90, 60) if k >= 5 else (60, 90) for k in range(1, 9)]
    recipe = recipe_of(turns=False)
    for error in errors_against_reference(recipe, files, records_for(recipe, sizes, range(1, 9)), strict):
        assert max(error.inside_mean, error.border_mean) <= MEAN_BAR


def odd_pictures() -> dict[str, tuple[Bytes, Bytes]]:
    """Return name -> (file, its pixels as RGB)."""
    rgb, made = Image.fromarray(noise(40, 50)), {}

    def add(name: str, image: Image.Image, format: str, **options: object) -> None:
        file = io.BytesIO()
        image.save(file, format, **options)
        data = as_bytes(file.getvalue())
        made[name] = (data, stored_pixels(data))

    add("gray JPEG", rgb.convert("L"), "JPEG")
    add("CMYK JPEG", rgb.convert("CMYK"), "JPEG")
    add("progressive JPEG", rgb, "JPEG", progressive=True)
    add("4:2:0 JPEG", rgb, "JPEG", subsampling=2)
    add("gray PNG", rgb.convert("L"), "PNG")
    add("gray PNG with alpha", rgb.convert("LA"), "PNG")
    add("PNG with alpha", Image.fromarray(noise(40, 50, 4)), "PNG")
    add("PNG with a palette", rgb.convert("P"), "PNG")
    add("1-bit PNG", rgb.convert("1"), "PNG")
    add("lossless WebP", rgb, "WEBP", lossless=True)
    add("lossy WebP", rgb, "WEBP", quality=80)
    add("1 x 1 PNG", Image.fromarray(noise(1, 1)), "PNG")
    add("1 x 1 JPEG", Image.fromarray(noise(1, 1)), "JPEG")
    add("10 x 10,000 PNG", Image.fromarray(noise(10000, 10)), "PNG")
    add("10,000 x 10 JPEG", Image.fromarray(noise(10, 10000)), "JPEG")
    deep = np.random.Generator(np.random.Philox(4)).integers(0, 65536, (40, 50), np.uint16)
    made["16-bit PNG"] = (png(deep), np.repeat(np.rint(deep / 257).astype(np.uint8)[..., None], 3, -1))
    return made


@needs_dali
@STRICT
@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_are_rendered_like_any_other(name: str, strict: bool) -> None:
    file, picture = odd_pictures()[name]
    recipe = recipe_of()
    record, *_ = records = records_for(recipe, [picture.shape[:2]])
    rendered = DaliRenderer(recipe, threads=1, strict=strict).render([file], records)
    assert rendered.failed == {}
    got, expected = levels(rendered.pixels[0], recipe), reference_levels([picture], record)
    assert level_errors(got, expected, torch.ones_like(got[:, :, :1], dtype=torch.bool)).inside_mean <= MEAN_BAR


def hostile_files(sound: Bytes) -> dict[str, Bytes]:
    bomb = bytearray(png(noise(2, 2)).tobytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    return {
        "empty": as_bytes(b""),
        "garbage": as_bytes(b"\x00\x01garbage" * 30),
        "header alone": sound[:200],
        "cut at half": sound[: len(sound) // 2],
        "end marker missing": sound[:-2],
        "text": as_bytes(b"<html>not found</html>"),
        "60,000 x 60,000 pixels that are not there": as_bytes(bytes(bomb)),
    }


@needs_dali
@STRICT
def test_undecodable_pictures_are_named_and_the_rest_of_the_batch_is_what_it_was(strict: bool, jpeg_bytes: Callable[..., bytes]) -> None:
    sound = [as_bytes(jpeg_bytes(noise(80, 100)[:, :, [k % 3, 1, 2]])) for k in range(12)]
    recipe = recipe_of(ALL_COLOR)
    records = records_for(recipe, [(80, 100)] * 12)
    renderer = DaliRenderer(recipe, threads=2, strict=strict)
    expected = renderer.render(sound, records)
    batch = list(sound)
    for place, file in zip((1, 3, 4, 6, 8, 9, 11), hostile_files(sound[0]).values(), strict=True):
        batch[place] = file
    rendered = renderer.render(batch, records)
    assert sorted(rendered.failed) == [1, 3, 4, 6, 8, 9, 11]
    assert all(reason and "\n" not in reason for reason in rendered.failed.values())
    assert [tuple(pixels.shape) for pixels in rendered.pixels] == [tuple(pixels.shape) for pixels in expected.pixels]
    kept = [0, 2, 5, 7, 10]
    assert_equal_bits([pixels[kept] for pixels in rendered.pixels], [pixels[kept] for pixels in expected.pixels])
    assert_equal_bits(renderer.render(sound, records).pixels, expected.pixels)


@needs_dali
def test_a_batch_of_nothing_but_garbage_is_survived(noisy: list[Bytes]) -> None:
    recipe = recipe_of()
    renderer = DaliRenderer(recipe, threads=2)
    assert sorted(renderer.render([as_bytes(b"no")] * 3, records_for(recipe, [(64, 64)] * 3)).failed) == [0, 1, 2]
    assert renderer.render(noisy[:1], records_for(recipe, [(90, 120)])).failed == {}


@needs_dali
def test_a_picture_of_another_size_than_its_record_is_named(noisy: list[Bytes]) -> None:
    recipe = recipe_of()
    sizes = [stored_pixels(file).shape[:2] for file in noisy]
    expected = DaliRenderer(recipe, threads=2).render(noisy, records_for(recipe, sizes))
    swapped = [png(noise(1, 1)), noisy[1], png(noise(*sizes[2][::-1])), noisy[3]]
    rendered = DaliRenderer(recipe, threads=2).render(swapped, records_for(recipe, sizes))
    assert rendered.failed == {
        0: "decodes to (height, width) (1, 1), its record says (90, 120); build the index again",
        2: "decodes to (height, width) (200, 64), its record says (64, 200); build the index again",
    }
    assert_equal_bits([pixels[[1, 3]] for pixels in rendered.pixels], [pixels[[1, 3]] for pixels in expected.pixels])


@needs_dali
@pytest.mark.parametrize("right", [121.0, float("nan")])
def test_a_box_outside_its_picture_is_refused(noisy: list[Bytes], right: float) -> None:
    recipe = recipe_of()
    records = records_for(recipe, [(90, 120)])
    geometry = records[1].geometry
    boxes = geometry.boxes.clone()
    boxes[0, 1] = torch.tensor([100.0, 10, right, 20])
    with pytest.raises(ValueError, match=rf"box \[100.0, 10.0, {right}, 20.0\] of family 'small', sample 0, view 1: leaves its picture"):
        DaliRenderer(recipe).render(noisy[:1], [records[0], replace(records[1], geometry=replace(geometry, boxes=boxes))])


@needs_dali
@pytest.mark.parametrize("color", [None, ALL_COLOR], ids=["geometry", "all photometrics"])
def test_batch_size_slot_and_threads_change_no_bit(noisy: list[Bytes], color: ColorLaw | None) -> None:
    recipe = recipe_of(color)
    records = records_for(recipe, [stored_pixels(noisy[0]).shape[:2]])
    alone = DaliRenderer(recipe, threads=1, max_batch=1).render(noisy[:1], records).pixels
    for threads in (1, 2):
        renderer = DaliRenderer(recipe, threads=threads)
        for batch in (1, 2, 5, 3):
            repeated = [record[[0] * batch] for record in records]
            for pixels, one in zip(renderer.render(noisy[:1] * batch, repeated).pixels, alone, strict=True):
                assert torch.equal(pixels, one.expand_as(pixels))


@needs_dali
def test_threads_that_share_a_renderer_get_their_own_pixels_and_keep_them(noisy: list[Bytes]) -> None:
    recipe = recipe_of(ALL_COLOR)
    renderer = DaliRenderer(recipe, threads=2)
    batches = [[noisy[i % 4] for i in range(start, start + 1 + start % 3)] for start in range(8)]
    records = [records_for(recipe, [stored_pixels(file).shape[:2] for file in batch]) for batch in batches]
    expected = [DaliRenderer(recipe, threads=1).render(*work).pixels for work in zip(batches, records, strict=True)]
    kept: dict[int, tuple[torch.Tensor, ...]] = {}

    def work(numbers: Sequence[int]) -> None:
        for number in numbers:
            kept[number] = renderer.render(batches[number], records[number]).pixels

    threads = [threading.Thread(target=work, args=(range(first, 8, 2),)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, pixels in enumerate(expected):
        assert_equal_bits(kept[number], pixels)


@needs_dali
def test_closing_twice_leaves_no_thread(noisy: list[Bytes]) -> None:
    recipe = recipe_of()
    records = records_for(recipe, [stored_pixels(file).shape[:2] for file in noisy])

    def used_and_closed() -> None:
        renderer = DaliRenderer(recipe, threads=2)
        renderer.render(noisy, records)
        renderer.close()
        renderer.close()

    def settled_threads(most: int) -> int:
        for _ in range(50):
            if (count := len(os.listdir("/proc/self/task"))) <= most:
                break
            time.sleep(0.02)
        return count

    used_and_closed()
    before = settled_threads(0)
    for _ in range(4):
        used_and_closed()
    assert settled_threads(before) <= before


def test_without_dali_there_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert not installed()
    with pytest.raises(ValueError, match='needs NVIDIA DALI, not installed here; pip install nvidia-dali-cuda130, or use renderer="torch"'):
        DaliRenderer(recipe_of())


@needs_dali
def test_a_device_that_dali_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"""device='meta': renderer "dali" runs on "cpu" or "cuda"; use renderer="torch\""""):
        DaliRenderer(recipe_of(), device="meta")


def test_importing_the_module_leaves_dali_out() -> None:
    code = "import sys, wherefrom.pipeline.render.dali_renderer; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd="/").returncode == 0
