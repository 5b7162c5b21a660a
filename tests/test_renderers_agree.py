"""`dali` and `torch` against one another: the same records give nearly the same pixels, and the same files fail in both.

They differ where the design lets them: torch rounds to 8 bits after resizing, and its filter stops at the box, so borders differ more.
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.proof.level_errors import LevelErrors, away_from_borders, level_errors, levels
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.dali_decode import installed
from wherefrom.pipeline.render.dali_renderer import DaliRenderer
from wherefrom.pipeline.render.torch_cutter import TorchRenderer
from wherefrom.pipeline.shards.picture_headers import examine_picture
from wherefrom.pipeline.view_recipe import ColorLaw, Independent, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Photometric, Record, ViewGeometry

Mistake = Callable[[ViewGeometry, Photometric], tuple[ViewGeometry, Photometric]]

pytestmark = pytest.mark.skipif(not installed(), reason="NVIDIA DALI is not installed")
Bytes = NDArray[np.uint8]
ALL_COLOR = ColorLaw(blur_prob=0.3, solarize_prob=0.2)
INSIDE_MEAN = {False: 0.5, True: 1.0}  # levels of 255, without and with photometrics
BORDER_MEAN = 2.0


def recipe_of(color: ColorLaw | None) -> ViewRecipe:
    large, small = Independent(area_frac=(0.4, 1)), Independent(area_frac=(0.05, 0.4))
    return ViewRecipe(
        families=(
            ViewFamily(name="global", views=2, size_px=(224, 224), law=large, mirror="view", color=color),
            ViewFamily(name="local", views=8, size_px=(96, 96), law=small, mirror="view", turns=True, color=color),
        )
    )


def records_for(recipe: ViewRecipe, files: list[Bytes]) -> Sequence[Record]:
    headers, ids = [examine_picture(file.tobytes()) for file in files], np.arange(len(files))
    size = np.array([(header.height, header.width) for header in headers], np.int32)
    stored = np.array([header.orientation for header in headers], np.uint8)
    return draw_records(recipe, seed=2, epoch=0, drawn_for=ids, source_size=size, stored_orientation=stored)


def differences(folder: Path, color: ColorLaw | None, count: int) -> Iterator[list[LevelErrors]]:
    """Yield the differences of both families, ten photographs at a time."""
    with tarfile.open(folder / "imagenet-sample" / "imagenet-sample-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:count]
        photographs = [np.frombuffer(tar.extractfile(member).read(), np.uint8) for member in members]  # type: ignore[union-attr]
    recipe = recipe_of(color)
    dali, stock = DaliRenderer(recipe, threads=2), TorchRenderer(recipe, threads=2)
    for start in range(0, len(photographs), 10):
        files = photographs[start : start + 10]
        records = records_for(recipe, files)
        both = zip(dali.render(files, records).pixels, stock.render(files, records).pixels, records, strict=True)
        yield [level_errors(levels(a, recipe), levels(b, recipe), away_from_borders(record)) for a, b, record in both]


def assert_agree(errors: list[list[LevelErrors]], colored: bool) -> None:
    inside = [error.inside_mean for batch in errors for error in batch]
    border = [error.border_mean for batch in errors for error in batch]
    assert max(inside) <= INSIDE_MEAN[colored]
    assert max(border) <= BORDER_MEAN
    assert np.mean(border) > np.mean(inside)  # the departure is where the design says it is


@pytest.mark.parametrize("color", [None, ALL_COLOR], ids=["geometry", "all photometrics"])
def test_photographs_look_alike_in_both_renderers(photographs: Path, color: ColorLaw | None) -> None:
    assert_agree(list(differences(photographs, color, 20)), color is not None)


@pytest.mark.slow
@pytest.mark.parametrize("color", [None, ALL_COLOR], ids=["geometry", "all photometrics"])
def test_all_photographs_look_alike_in_both_renderers(photographs: Path, color: ColorLaw | None) -> None:
    assert_agree(list(differences(photographs, color, 250)), color is not None)


@pytest.mark.core
@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda g, p: (replace(g, boxes=g.boxes + torch.tensor([0.0, 0, -1, 0])), p), id="a box narrower by a pixel"),
        pytest.param(lambda g, p: (g, replace(p, brightness=p.brightness * 1.02)), id="brighter by a fiftieth"),
    ],
)
def test_the_bars_between_renderers_see_small_mistakes(photographs: Path, mistake: Mistake) -> None:
    with tarfile.open(photographs / "imagenet-sample" / "imagenet-sample-000000.tar") as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
        files = [np.frombuffer(tar.extractfile(member).read(), np.uint8)]  # type: ignore[union-attr]
    recipe = recipe_of(ALL_COLOR)
    records = records_for(recipe, files)
    wrong = [Record.of(*mistake(record.geometry, record.photometric)) for record in records]
    both = zip(DaliRenderer(recipe).render(files, wrong).pixels, TorchRenderer(recipe).render(files, records).pixels, records, strict=True)
    errors = [level_errors(levels(a, recipe), levels(b, recipe), away_from_borders(record)).inside_mean for a, b, record in both]
    assert max(errors) > INSIDE_MEAN[True]


def damaged_files(format: str, count: int) -> list[Bytes]:
    """Return pictures of which one stretch of bytes was overwritten, so far as their headers still pass for sound."""
    random = np.random.Generator(np.random.Philox(7))
    y, x = np.mgrid[:60, :80]
    smooth = np.stack([x * 3, y * 4, (x + y) * 2], -1).astype(np.uint8)
    picture = smooth ^ random.integers(0, 8, smooth.shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format)
    whole = np.frombuffer(file.getvalue(), np.uint8)
    found: list[Bytes] = []
    for _ in range(count):
        damaged = whole.copy()
        place, length = int(random.integers(2, len(whole) - 2)), int(random.integers(1, 40))
        damaged[place : place + length] = random.integers(0, 256, len(damaged[place : place + length]), np.uint8)
        header = examine_picture(damaged.tobytes())
        if not header.reason and header.height * header.width <= 1_000_000:
            found.append(damaged)
    return found


@pytest.mark.core
def test_damage_to_a_png_shows_in_its_checksums_before_anybody_decodes_it() -> None:
    assert damaged_files("PNG", 150) == []


@pytest.mark.core
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_the_same_damaged_files_fail_in_both_renderers(format: str) -> None:
    files = damaged_files(format, 150)
    recipe = ViewRecipe(families=(ViewFamily(name="one", views=1, size_px=(16, 16)),))
    records = records_for(recipe, files)
    dali, stock = (
        DaliRenderer(recipe, threads=2).render(files, records).failed,
        TorchRenderer(recipe, threads=2).render(files, records).failed,
    )
    assert len(files) >= 10
    assert sorted(dali) == sorted(stock)
