"""Views of somebody else's pictures, against the loader's with the same cutter, painted pictures, and through torch's DataLoader.

The truth for points is where paint is found in the rendered view; for boxes and masks it is whole-pixel counting in numpy.
"""

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from itertools import chain, islice, product
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format

from wherefrom.pipeline import (
    Batch,
    ColorLaw,
    Independent,
    Loader,
    Paired,
    ViewFamily,
    ViewGeometry,
    ViewRecipe,
    make_loader,
    worker_memory,
)
from wherefrom.pipeline.annotations import carry
from wherefrom.pipeline.order import KeyedSampler, Order
from wherefrom.pipeline.transform import Transformed, ViewTransform, collate

MUCH_COLOR = ColorLaw(jitter_prob=0.5, gray_prob=0.3, blur_prob=0.5, solarize_prob=0.3)
RECIPE = ViewRecipe(
    families=(
        ViewFamily(name="pair", views=2, size_px=(48, 48), law=Paired(), mirror="view"),
        ViewFamily(
            name="local", views=3, size_px=(24, 40), law=Independent(area_frac=(0.1, 0.6)), mirror="view", turns=True, color=MUCH_COLOR
        ),
    )
)
SIZES = [(120, 160), (90, 64), (64, 64), (33, 200), (150, 101), (80, 80), (70, 90)]


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, kind, **options)
    return encoded.getvalue()


@pytest.fixture(scope="module")
def files() -> list[tuple[str, bytes]]:
    """(extension, bytes): JPEGs of several sizes, one lying on its side, one gray, a palette and a 16-bit PNG."""
    random = np.random.default_rng(0)
    made = []
    for number, (height, width) in enumerate(SIZES):
        coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if number in (1, 4):
            exif[0x0112] = 6 if number == 1 else 7
        if number == 5:
            made.append(("png", encode(picture.quantize(16))))
        elif number == 6:
            made.append(("png", encode(Image.fromarray(np.asarray(picture)[..., 0].astype(np.uint16) * 251 + 77))))
        else:
            made.append(("jpg", encode(picture.convert("L") if number == 3 else picture, "JPEG", quality=92, exif=exif)))
    return made


@pytest.fixture
def open_loader(files: list[tuple[str, bytes]], make_shard: Callable[..., Path], tmp_path: Path) -> Callable[..., Loader]:
    """`open_loader(seed=5, global_batch=3, renderer="auto") -> Loader` over those files, the sample id being the number in the list."""
    shard = make_shard(tmp_path / "pictures-000000.tar", [(f"{n:04d}", {kind: data}) for n, (kind, data) in enumerate(files)])

    def opened(*, seed: int = 5, global_batch: int = 3, renderer: str = "auto") -> Loader:
        return make_loader(str(shard), RECIPE, seed=seed, global_batch=global_batch, renderer=renderer, threads=0)

    return opened


def assert_same(one: object, other: object) -> None:
    """Compare two containers of views, every tensor bit for bit and every number."""
    for field in fields(one):  # type: ignore[arg-type]
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, Tensor):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), field.name
        elif field.name in ("views", "carried"):
            assert len(mine) == len(theirs)
            for part, counterpart in zip(mine, theirs, strict=True):
                assert_same(part, counterpart)
        elif field.name in ("batch", "geometry", "photometric"):
            assert_same(mine, theirs)
        elif isinstance(mine, tuple) and mine and isinstance(mine[0], Tensor):
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), field.name
        else:
            assert mine == theirs, field.name


def opened(file: tuple[str, bytes]) -> Image.Image:
    return Image.open(io.BytesIO(file[1]))


def annotations(sample: int, source_hw: tuple[int, int]) -> dict[str, Any]:
    """What a picture is annotated with: every third one with nothing, the others with points, and boxes or masks."""
    if sample % 3 == 0:
        return {}
    rows = {"points": [[sample, 7.5]] * sample}
    return rows | ({"boxes": [[1, 2, 9, 8]]} if sample % 3 == 1 else {"masks": np.arange(np.prod(source_hw)).reshape(source_hw)})


@pytest.mark.core
def test_a_batch_is_its_pictures_one_by_one_in_any_order(files: list[tuple[str, bytes]], cutter: str) -> None:
    transform = ViewTransform(RECIPE, seed=5, renderer=cutter)
    upright = [size[::-1] if n in (1, 4) else size for n, size in enumerate(SIZES)]  # two lie on their side
    given_with = [annotations(n, source_hw) for n, source_hw in enumerate(upright)]
    singles = [
        transform(opened(file), sample=n, epoch=2, label=10 + n, **given_with[n]) for n, file in enumerate(files)
    ]  # sizes, modes and EXIF turns differ
    for order in (range(len(files)), [5, 1, 6, 0, 3, 2, 4]):
        whole = transform.batch(
            [opened(files[n]) for n in order],
            keys=[(2, n) for n in order],
            labels=[10 + n for n in order],
            **{name: [given_with[n].get(name) for n in order] for name in ("points", "boxes", "masks")},
        )
        assert_same(whole, collate([singles[n] for n in order]))
    elsewhere = transform.batch([opened(files[0])], keys=[(3, 0)], labels=[10])
    assert not torch.equal(elsewhere.batch.views[1].pixels, singles[0].batch.views[1].pixels)
    assert collate(whole) is whole


@pytest.mark.core
def test_views_are_the_loaders_for_the_same_key(files: list[tuple[str, bytes]], open_loader: Callable[..., Loader], cutter: str) -> None:
    transform = ViewTransform(RECIPE, seed=5, renderer=cutter)
    with open_loader(seed=5, renderer=cutter) as loader, open_loader(seed=6, renderer=cutter) as other_seed:
        for number, file in enumerate(files):
            for epoch in (0, 3):
                made = transform(opened(file), sample=number, epoch=epoch).batch
                assert_same(made, loader.batch([number], epoch=epoch))
                assert not torch.equal(made.views[1].pixels, loader.batch([number], epoch=epoch + 1).views[1].pixels)
                assert not torch.equal(made.views[1].pixels, other_seed.batch([number], epoch=epoch).views[1].pixels)
    turned = [int(transform(opened(file), sample=0, epoch=0).batch.views[0].geometry.stored_orientation) for file in files]
    assert turned == [1, 6, 1, 1, 7, 1, 1]


def tiff(orientation: int, kind: int = 3, order: str = "<", padding: int = 0) -> bytes:
    """A TIFF block of one directory, `padding` bytes behind its head."""
    code = {1: "B3x", 3: "H2x", 4: "I"}[kind]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + padding)
    return head + bytes(padding) + struct.pack(f"{order}HHHI{code}I", 1, 0x0112, kind, 1, orientation, 0)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def odd_exif() -> dict[str, tuple[str, bytes, int]]:
    """Return name -> (extension, file, the orientation that it has)."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8))
    jpeg, png = encode(picture, "JPEG"), encode(picture)
    webp = encode(picture, "WEBP", lossless=True, exif=b"Exif\0\0" + tiff(6))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    profile = b"\nexif\n%8d\n%s\n" % (len(tiff(6)), tiff(6).hex().encode())

    def app1(*bodies: bytes) -> bytes:
        return jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body for body in bodies) + jpeg[2:]

    exif = [b"Exif\0\0" + tiff(value) for value in (6, 3)]
    cut = tiff(6, padding=50)
    once = png[:33] + png_chunk(b"eXIf", tiff(3)) + png[33:-12]
    lying = bytearray(tiff(6))
    lying[8:10] = b"\xff\xff"
    return {
        "JPEG": ("jpg", app1(exif[0]), 6),
        "XMP names another": ("jpg", app1(xmp), 1),
        "three prefixes": ("jpg", app1(b"Exif\0\0" * 2 + exif[0]), 6),
        "PNG with two prefixes": ("png", png[:33] + png_chunk(b"eXIf", b"Exif\0\0" + exif[0]) + png[33:], 6),
        "two EXIF segments": ("jpg", app1(*exif), 6),
        "EXIF that goes on in a second segment": ("jpg", app1(b"Exif\0\0" + cut[:20], b"Exif\0\0" + cut[20:]), 6),
        "a number of 32 bits, big end first": ("jpg", app1(b"Exif\0\0" + tiff(6, kind=4, order=">")), 6),
        "a number of 8 bits": ("jpg", app1(b"Exif\0\0" + tiff(6, kind=1)), 6),
        "more entries than there are": ("jpg", app1(b"Exif\0\0" + bytes(lying)), 6),
        "TIFF cut short": ("jpg", app1(b"Exif\0\0" + tiff(6)[:15]), 1),
        "out of range": ("jpg", app1(b"Exif\0\0" + tiff(9)), 1),
        "PNG": ("png", png[:33] + png_chunk(b"eXIf", tiff(6)) + png[33:], 6),
        "PNG with a JPEG's prefix": ("png", png[:33] + png_chunk(b"eXIf", exif[0]) + png[33:], 6),
        "PNG behind its pixels": ("png", png[:-12] + png_chunk(b"eXIf", tiff(6)) + png[-12:], 6),
        "PNG twice": ("png", once + png_chunk(b"eXIf", tiff(6)) + png[-12:], 6),
        "PNG as text": ("png", png[:33] + png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)) + png[33:], 1),
        "WebP with a JPEG's prefix": ("webp", webp, 6),
        "WebP": ("webp", encode(picture, "WEBP", lossless=True, exif=tiff(6)), 6),
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow, looking for a resolution
def test_loader_and_transform_read_every_exif_alike(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    cases = list(odd_exif().items())
    shard = make_shard(tmp_path / "odd.tar", [(f"{n:02d}", {kind: data}) for n, (_, (kind, data, _)) in enumerate(cases)])
    transform = ViewTransform(RECIPE, seed=5)
    with make_loader(str(shard), RECIPE, seed=5, global_batch=1, threads=0) as loader:
        assert loader.index.invalid_count == 0
        for number, (name, (_, data, orientation)) in enumerate(cases):
            made, theirs = transform(Image.open(io.BytesIO(data)), sample=number, epoch=0).batch, loader.batch([number])
            told = [int(batch.views[0].geometry.stored_orientation) for batch in (made, theirs)]
            assert told == [orientation, orientation], name
            assert_same(made, theirs)


def test_inks_give_the_loaders_views(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    inks = Image.frombytes("CMYK", (9, 8), random.bytes(8 * 9 * 4)).resize((72, 64), Image.Resampling.BICUBIC)
    file = encode(inks, "JPEG", quality=95)
    shard = make_shard(tmp_path / "inks.tar", [("0", {"jpg": file})])
    with make_loader(str(shard), RECIPE, seed=5, global_batch=1, threads=0) as loader:
        assert_same(ViewTransform(RECIPE, seed=5)(Image.open(io.BytesIO(file)), sample=0, epoch=0).batch, loader.batch([0]))


def test_arrays_and_tensors_give_the_views_of_the_picture(files: list[tuple[str, bytes]]) -> None:
    transform = ViewTransform(RECIPE)
    picture = opened(files[0]).convert("RGB")
    picture.getexif().clear()
    array = np.asarray(picture)
    planar = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = transform(picture, sample=4, epoch=1).batch
    backwards = np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    for given_as in (array, backwards, planar, planar.contiguous(), tv_tensors.Image(planar)):
        assert_same(transform(given_as, sample=4, epoch=1).batch, expected)


def test_a_third_call_leaves_the_records_of_the_second(files: list[tuple[str, bytes]]) -> None:
    transform = ViewTransform(RECIPE)
    pictures = [opened(file).convert("RGB") for file in files[:3]]
    kept = [transform(picture, sample=n, epoch=0, points=[[1, 2]]) for n, picture in enumerate(pictures)]
    fresh = [ViewTransform(RECIPE)(picture, sample=n, epoch=0, points=[[1, 2]]) for n, picture in reversed(list(enumerate(pictures)))]
    for one, other in zip(kept, reversed(fresh), strict=True):
        assert_same(one.batch, other.batch)
        assert torch.equal(one.carried[1].points[0], other.carried[1].points[0])


def test_pictures_are_left_as_they_were() -> None:
    array = np.random.default_rng(1).integers(0, 256, (50, 60, 3), np.uint8)
    array.flags.writeable = False
    planar = torch.from_numpy(array.copy()).permute(2, 0, 1)
    before = planar.clone()
    ViewTransform(RECIPE)(array, sample=0, epoch=0)
    ViewTransform(RECIPE)(planar, sample=0, epoch=0)
    assert torch.equal(planar, before)


PLAIN = np.zeros((50, 60, 3), np.uint8)


@pytest.mark.core
@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "missing 2 required keyword-only arguments: 'sample' and 'epoch'", {}),
        (TypeError, "missing 1 required keyword-only argument: 'epoch'", {"sample": 3}),
        (TypeError, "sample is None, expected an integer", {"sample": None, "epoch": 0}),
        (TypeError, "epoch is 0.5, expected an integer", {"sample": 0, "epoch": 0.5}),
        (TypeError, "sample is True, expected an integer", {"sample": True, "epoch": 0}),
        (ValueError, r"sample from -1 to -1: needs 0 <= sample < 2\*\*40", {"sample": -1, "epoch": 0}),
        (ValueError, r"epoch=16777216: needs 0 <= epoch < 2\*\*24", {"sample": 0, "epoch": 1 << 24}),
        (ValueError, r"points has shape \(2,\), expected \(N, 2\)", {"points": [1, 2]}),
        (ValueError, r"boxes has shape \(1, 5\), expected \(N, 4\)", {"boxes": np.zeros((1, 5))}),
        (ValueError, r"boxes\[1\] is \[9.0, 2.0, 3.0, 4.0\], expected x0 <= x1", {"boxes": [[0, 0, 1, 1], [9, 2, 3, 4]]}),
        (ValueError, r"boxes\[0\] is \[0.0, nan, 1.0, 1.0\], expected x0 <= x1", {"boxes": [[0, float("nan"), 1, 1]]}),
        (ValueError, r"masks have shape \(60, 50\), expected \(N, 50, 60\)", {"masks": np.zeros((60, 50))}),
        (
            ValueError,
            r"boxes have canvas_size=\(60, 50\), the picture is \(50, 60\)",
            {"boxes": tv_tensors.BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=(60, 50))},  # type: ignore[call-overload]
        ),
        (TypeError, "picture is bytes, expected a PIL image", {"picture": b"no"}),
        (ValueError, r"picture has shape \(50, 60\) and is uint8, expected \(H, W, 3\)", {"picture": PLAIN[..., 0]}),
        (ValueError, r"picture has shape \(50, 60, 3\) .*, expected \(3, H, W\)", {"picture": torch.from_numpy(PLAIN)}),
        (ValueError, r"is float32, expected \(H, W, 3\) of uint8", {"picture": PLAIN.astype(np.float32)}),
        (ValueError, r"picture has shape \(0, 60, 3\)", {"picture": PLAIN[:0]}),
        (ValueError, "picture has Pillow mode 'F'", {"picture": Image.new("F", (8, 8))}),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(error: type[Exception], words: str, arguments: dict[str, object]) -> None:
    picture = arguments.pop("picture", PLAIN)
    key = {"sample": 0, "epoch": 0} if not {"sample", "epoch"} & arguments.keys() and "missing" not in words else {}
    with pytest.raises(error, match=words) as raised:
        ViewTransform(RECIPE)(picture, **key, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("keys are of epochs 0 and 1, a batch has one", {"keys": [(0, 0), (1, 1)]}),
        ("1 keys came with 2 pictures; give one for each", {"keys": [(0, 0)]}),
        ("3 labels came with 2 pictures", {"labels": [1, 2, 3]}),
        ("1 points came with 2 pictures", {"points": [[[1, 2]]]}),
        ("1 boxes came with 2 pictures", {"boxes": [[[1, 2, 3, 4]]]}),
        ("0 masks came with 2 pictures", {"masks": []}),
        ("no pictures to transform", {"pictures": [], "keys": []}),
    ],
)
def test_batches_that_do_not_fit_are_refused_in_one_line(words: str, arguments: dict[str, Any]) -> None:
    fitting: dict[str, Any] = {"pictures": [PLAIN, PLAIN], "keys": [(0, 0), (0, 1)]}
    with pytest.raises(ValueError, match=words) as raised:
        ViewTransform(RECIPE).batch(**fitting | arguments)
    assert "\n" not in str(raised.value)


def test_half_pixel_boxes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="family 'fine' has snap='none'"):
        ViewTransform(ViewRecipe(families=(ViewFamily(name="fine", views=1, size_px=(8, 8), snap="none"),)), renderer="torch")


def oriented(seed: int, size_px: tuple[int, int] = (56, 72)) -> ViewRecipe:
    """One view of a tenth to all of the picture, mirrored and turned; uint8, so that pixels are levels."""
    family = ViewFamily(name=f"seen-{seed % 7}", views=1, size_px=size_px, law=Independent(area_frac=(0.15, 1)), mirror="view", turns=True)
    return ViewRecipe(families=(family,), pixels="uint8")


def assert_paint_is_where_the_point_went(pixels: Tensor, record: ViewGeometry, point: NDArray[np.float64]) -> None:
    """Find the paint's center in a view (h, w) and compare it, in source pixels, with where the record carries the point."""
    weight = pixels.double()
    rows, cols = torch.meshgrid(*(torch.arange(side) + 0.5 for side in weight.shape), indexing="ij")
    found = torch.stack([(weight * cols).sum(), (weight * rows).sum()]) / weight.sum()
    source_px_per_view_px = record.view_to_source[0, 0, :, :2].abs().sum(0)
    off = ((found - carry(record, points=point[None]).points[0][0, 0]) * source_px_per_view_px).abs()
    assert off.max() <= 0.2, f"{off.tolist()} source pixels off"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(60, 160), st.integers(60, 160), st.floats(0.25, 0.75), st.floats(0.25, 0.75))
def test_points_go_where_paint_goes(sample: int, height: int, width: int, across: float, down: float) -> None:
    transform = ViewTransform(oriented(sample))
    seen = transform(np.zeros((height, width, 3), np.uint8), sample=sample, epoch=0)
    x0, y0, x1, y1 = (int(edge) for edge in seen.batch.views[0].geometry.boxes[0, 0])
    x, y = int(x0 + across * (x1 - x0)), int(y0 + down * (y1 - y0))
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y - 1 : y + 2, x - 1 : x + 2] = 255  # 3 x 3 pixels around the center of pixel (x, y)
    views = transform(picture, sample=sample, epoch=0).batch.views[0]
    point = np.array([x + 0.5, y + 0.5])
    assert_paint_is_where_the_point_went(views.pixels[0, 0, 0], views.geometry, point)

    wrong = replace(views.geometry, quarter_turns=(views.geometry.quarter_turns + 1) % 4)
    shifted = replace(views.geometry, boxes=views.geometry.boxes + 0.5)
    for record in (wrong, shifted):
        if record is shifted or (abs(across - 0.5) > 0.1 and abs(down - 0.5) > 0.1):
            with pytest.raises(AssertionError, match="source pixels off"):
                assert_paint_is_where_the_point_went(views.pixels[0, 0, 0], record, point)


def cut_nearest(labels: NDArray[np.int64], record: ViewGeometry) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Cut one view out of labels (H, W) by exact fractions: what each view pixel's center lies on, and where that is no edge."""
    x0, y0, x1, y1 = (int(edge) for edge in record.boxes[0, 0])
    turns = int(record.quarter_turns[0, 0])
    height, width = record.size_px if turns % 2 == 0 else record.size_px[::-1]
    at_y = [y0 + Fraction((2 * row + 1) * (y1 - y0), 2 * height) for row in range(height)]
    at_x = [x0 + Fraction((2 * col + 1) * (x1 - x0), 2 * width) for col in range(width)]
    sure = np.logical_and.outer([at.denominator > 1 for at in at_y], [at.denominator > 1 for at in at_x])
    cut = labels[np.ix_([int(at) for at in at_y], [int(at) for at in at_x])]
    if record.flipped[0, 0]:
        cut, sure = cut[:, ::-1], sure[:, ::-1]
    return np.rot90(cut, turns), np.rot90(sure, turns)


@pytest.mark.core
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(20, 90), st.integers(20, 90), st.integers(5, 40), st.integers(5, 40))
def test_masks_show_the_source_pixel_under_each_view_pixel(sample: int, height: int, width: int, high: int, wide: int) -> None:
    labels = np.arange(height * width).reshape(height, width)
    masks = np.stack([labels, -labels])
    seen = ViewTransform(oriented(sample, (high, wide)))(np.zeros((height, width, 3), np.uint8), sample=sample, epoch=2, masks=masks)
    record, carried = seen.batch.views[0].geometry, seen.carried_into(seen.batch.views[0].geometry.family).masks[0]
    expected, sure = cut_nearest(labels, record)
    assume(sure.any())
    assert carried.shape == (1, 2, high, wide) and carried.dtype == torch.int64
    assert np.array_equal(carried[0, 0].numpy()[sure], expected[sure])
    assert torch.equal(carried[0, 1], -carried[0, 0])


@pytest.mark.core
def test_masks_keep_their_type_and_may_stand_alone() -> None:
    transform = ViewTransform(oriented(0))
    alone = np.random.default_rng(0).random((50, 60)) < 0.5
    whole = transform(PLAIN, sample=0, epoch=0, masks=torch.from_numpy(alone)).carried[0].masks[0]
    assert whole.dtype == torch.bool and whole.shape == (1, 1, 56, 72)
    assert torch.equal(whole, transform(PLAIN, sample=0, epoch=0, masks=tv_tensors.Mask(alone)).carried[0].masks[0])
    assert type(whole) is Tensor


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.tuples(*[st.integers(0, 60)] * 4), min_size=1, max_size=6))
def test_visible_parts_are_those_of_counted_pixels(sample: int, corners: list[tuple[int, int, int, int]]) -> None:
    boxes = np.array([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners])
    seen = ViewTransform(oriented(sample))(np.zeros((50, 60, 3), np.uint8), sample=sample, epoch=0, boxes=boxes, points=boxes[:, :2])
    record, carried = seen.batch.views[0].geometry, seen.carried[0]
    inside = np.zeros((61, 61), bool)
    cut = record.boxes[0, 0].int().tolist()
    inside[cut[1] : cut[3], cut[0] : cut[2]] = True
    for n, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        counted = inside[y0:y1, x0:x1]
        assert float(carried.boxes_visible[0][0, n]) == (counted.mean() if counted.size else 0)
        assert bool(carried.points_visible[0][0, n]) == inside[y0, x0]

    to_view = record.source_to_view[0, 0]
    corner = torch.tensor(boxes, dtype=torch.float64).unflatten(-1, (2, 2)) @ to_view[:, :2].T + to_view[:, 2]  # (N, 2, 2)
    exact = torch.cat([corner.amin(1), corner.amax(1)], -1)
    torch.testing.assert_close(carried.boxes[0][0], exact, rtol=0, atol=1e-9)
    height, width = record.size_px
    clamped = carried.clamped_boxes(0)[0]
    assert (clamped >= 0).all() and (clamped <= torch.tensor([width, height, width, height])).all()
    view_area = (clamped[:, 2] - clamped[:, 0]) * (clamped[:, 3] - clamped[:, 1])
    box_area = (exact[:, 2] - exact[:, 0]) * (exact[:, 3] - exact[:, 1])
    torch.testing.assert_close(view_area, carried.boxes_visible[0][0] * box_area, rtol=1e-9, atol=1e-6)


@pytest.mark.core
def test_bounding_boxes_of_any_upright_format_come_back_as_xyxy_unclamped() -> None:
    whole = tv_tensors.BoundingBoxes([[-5, 10, 30, 45], [0, 0, 60, 50]], format="XYXY", canvas_size=(50, 60), dtype=torch.float32)  # type: ignore[call-overload]
    transform = ViewTransform(RECIPE)
    plain = transform(PLAIN, sample=2, epoch=0, boxes=whole.as_subclass(Tensor)).carried_into("local")
    for name in ("XYXY", "XYWH", "CXCYWH"):
        given_as = convert_bounding_box_format(whole, new_format=name)
        carried = transform(PLAIN, sample=2, epoch=0, boxes=given_as).carried_into("local")
        for view in range(3):
            back = carried.bounding_boxes(0, view)
            assert isinstance(back, tv_tensors.BoundingBoxes)
            assert (back.format.value, back.canvas_size) == ("XYXY", (24, 40))
            torch.testing.assert_close(back.as_subclass(Tensor), plain.boxes[0][view], rtol=0, atol=1e-9)
    assert (plain.boxes[0] < 0).any() and (plain.boxes_visible[0] < 1).any()
    turned = tv_tensors.BoundingBoxes([[10, 10, 5, 5, 30]], format="CXCYWHR", canvas_size=(50, 60), dtype=torch.float32)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="boxes have format CXCYWHR, expected one of"):
        transform(PLAIN, sample=0, epoch=0, boxes=turned)


def test_annotations_can_be_carried_into_a_loaders_batch(open_loader: Callable[..., Loader], files: list[tuple[str, bytes]]) -> None:
    with open_loader() as loader:
        record = loader.batch([2, 4], epoch=1).family("local").geometry
    later = carry(record[1], points=[[20, 30]])
    then = ViewTransform(RECIPE, seed=5)(opened(files[4]), sample=4, epoch=1, points=[[20, 30]]).carried_into("local")
    assert torch.equal(later.points[0], then.points[0])
    with pytest.raises(ValueError, match="record holds 2 pictures, annotations belong to one"):
        carry(record, points=[[20, 30]])


def test_a_record_on_another_device_carries_what_lies_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of a GPU: the record lies on no real device until it is moved to the CPU, where the annotations are."""
    here = ViewTransform(RECIPE, seed=5)(PLAIN, sample=2, epoch=0).batch.family("local").geometry
    away, moved = here.to("meta"), list[torch.device]()

    def to(record: ViewGeometry, device: torch.device) -> ViewGeometry:
        moved.append(device)
        return here

    monkeypatch.setattr(ViewGeometry, "to", to)
    given: dict[str, Any] = {"points": [[20, 30]], "boxes": torch.tensor([[2, 3, 20, 30]]), "masks": np.eye(50, 60, dtype=np.uint8)}
    for some in (given, *({name: value} for name, value in given.items())):
        expected, carried = carry(here, **some), carry(away, **some)
        for name in ("points", "points_visible", "boxes", "boxes_visible", "masks"):
            assert torch.equal(getattr(carried, name)[0], getattr(expected, name)[0])
    assert moved == [torch.device("cpu")] * 4


class Pictures(Dataset[Transformed]):
    """A dataset as somebody else would write it: encoded files, indexed by keys."""

    def __init__(self, files: list[tuple[str, bytes]], transform: ViewTransform) -> None:
        self.files = files
        self.transform = transform

    def __getitem__(self, key: tuple[int, int]) -> Transformed:
        epoch, sample = key
        return self.transform(opened(self.files[sample]), sample=sample, epoch=epoch, points=[[sample, epoch]] * sample)


@pytest.mark.core
def test_persistent_workers_give_the_loaders_batches_in_every_epoch(
    files: list[tuple[str, bytes]], open_loader: Callable[..., Loader]
) -> None:
    order = Order(samples=len(files), global_batch=3, seed=5)
    sampler = KeyedSampler(order)
    transformed = DataLoader(
        Pictures(files, ViewTransform(RECIPE, seed=5)),
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=2,
        persistent_workers=True,
        collate_fn=collate,
        multiprocessing_context="fork",
    )
    assert len(transformed) == 2
    with open_loader(seed=5, global_batch=3) as loader:
        shown = []
        for epoch in (0, 1):
            sampler.seek(epoch * order.updates_per_epoch)
            for seen, expected in zip(transformed, loader, strict=True):
                assert_same(seen.batch, expected)
                assert all(views.geometry.epoch == epoch for views in seen.batch.views)
                samples = seen.batch.sample.tolist()
                assert [len(points[0]) for points in seen.carried[0].points] == samples
                shown += samples
    assert len(set(shown[:6])) == len(set(shown[6:])) == 6 and shown[:6] != shown[6:]


class Batches(Pictures):
    """The same with a whole batch at once; the label says which of the worker's pieces of memory the pixels lie in, -1: none."""

    def __getitems__(self, keys: list[tuple[int, int]]) -> Transformed:
        pictures = [opened(self.files[sample]) for _, sample in keys]
        made = self.transform.batch(pictures, keys=keys, points=[[[sample, epoch]] * sample for epoch, sample in keys])
        found = worker_memory._slots_of(os.getpid()).find(made.batch.views[1].pixels)
        number = -1 if found is None else found[0].memory.data_ptr()
        return replace(made, batch=replace(made.batch, label=torch.full((len(keys),), number)))


def without_labels(transformed: Transformed) -> Transformed:
    return replace(transformed, batch=replace(transformed.batch, label=torch.full_like(transformed.batch.label, -1)))


def test_workers_hand_over_what_this_process_makes_and_use_their_memory_again(files: list[tuple[str, bytes]], cutter: str) -> None:
    transform = ViewTransform(RECIPE, seed=5, renderer=cutter)
    epochs = [[[(epoch, n) for n in order] for order in ([0, 1, 2], [3, 4], [5, 6, 0], [2, 6])] for epoch in range(6)]
    batches = list(chain.from_iterable(epochs))
    here = [without_labels(Batches(files, transform).__getitems__(keys)) for keys in batches]
    for keep in (False, True):
        loader = DataLoader(
            Batches(files, transform),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=2,
            collate_fn=collate,
            multiprocessing_context="fork",
        )
        kept, memory = [], []
        for seen, expected in zip(loader, here, strict=True):
            memory.append(int(seen.batch.label[0]))
            assert_same(without_labels(seen), expected)
            kept.append(seen.batch.views[0].pixels if keep else None)  # one tensor is enough to hold a batch's memory
            del seen
        assert -1 not in memory, "pixels lie in no shared memory"
        for worker in (memory[::2], memory[1::2]):
            assert len(set(worker)) == len(worker) if keep else len(set(worker)) < len(worker) / 2
        for pixels, expected in zip(kept, here, strict=True):
            assert pixels is None or torch.equal(pixels, expected.batch.views[0].pixels)


def test_memory_is_written_again_only_when_the_worker_and_every_receiver_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_memory, "get_worker_info", lambda: "a worker's")
    transform = ViewTransform(RECIPE)

    def made() -> Transformed:
        return transform.batch([PLAIN], keys=[(0, 0)])

    def place(transformed: Transformed) -> int:
        found = worker_memory._slots_of(os.getpid()).find(transformed.batch.views[0].pixels)
        assert found is not None
        return found[0].memory.data_ptr()

    first = made()
    where = place(first)
    received = [pickle.loads(ForkingPickler.dumps(first)) for _ in range(2)]
    pixels = received[0].batch.views[1].pixels[0, 0, 1:]  # a view of a part holds the whole
    assert torch.equal(pixels, first.batch.views[1].pixels[0, 0, 1:])
    held = [made()]
    del first
    held.append(made())
    del received[0]
    held.append(made())
    received.clear()
    held.append(made())
    assert where not in map(place, held)
    del pixels
    assert place(made()) == where
    assert place(made()) == where  # dropped unsent


def test_a_worker_lets_go_of_memory_that_a_receiver_kept_and_dropped() -> None:
    slots = worker_memory._Slots()
    held = [slots.take(1000) for _ in range(40)]
    assert len(slots._slots) == 40
    kept = held[:2]
    del held
    for _ in range(3):
        last = slots.take(1000)
    assert len(slots._slots) == len(kept) + len([last]) + worker_memory._KEPT_FREE


def keys_of(order: Order, epoch: int, step: int = 0) -> list[list[tuple[int, int]]]:
    """The keys of an epoch from a step on, a list for each micro-batch, from the order itself."""
    places = product(range(step, order.updates_per_epoch), range(order.accumulation))
    return [[(epoch, int(i)) for i in order.micro_batch(epoch, s, micro)] for s, micro in places]


class Keys:
    """A dataset that gives back what it is indexed by."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


ACCUMULATED = Order(samples=20, global_batch=6, seed=1, rank=1, ranks=2, accumulation=3)


@pytest.mark.core
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}])
def test_every_pass_over_a_dataloader_is_the_next_epoch(workers: dict[str, Any]) -> None:
    sampler = KeyedSampler(ACCUMULATED)
    context = {"multiprocessing_context": "fork"} if workers else {}
    loader: DataLoader[Any] = DataLoader(Keys(), batch_sampler=sampler, collate_fn=list, **workers, **context)  # type: ignore[arg-type]
    for epoch in (0, 1):
        assert len(loader) == 9
        assert list(loader) == keys_of(ACCUMULATED, epoch)
    for taken in (1, 8):  # broken off early and late: with workers all keys are drawn by then, without them not
        assert list(islice(loader, taken)) == keys_of(ACCUMULATED, 2)[:taken]
        assert list(loader) == keys_of(ACCUMULATED, 3)
        sampler.seek(2 * ACCUMULATED.updates_per_epoch)


def test_a_sampler_goes_on_from_where_it_is_told() -> None:
    sampler = KeyedSampler(ACCUMULATED)
    sampler.seek(ACCUMULATED.updates_per_epoch + 2)
    assert len(sampler) == 3
    assert list(sampler) == keys_of(ACCUMULATED, 1, step=2)
    assert len(sampler) == 9
    assert list(sampler) == keys_of(ACCUMULATED, 2)
    sampler.seek(0)
    assert next(iter(sampler)) == keys_of(ACCUMULATED, 0)[0]
    for wrong, message in ((-1, "updates=-1: needs 0 or more"), (True, "updates=True: needs a whole number"), (2.0, "updates=2.0: needs")):
        with pytest.raises(ValueError, match=message):
            sampler.seek(wrong)  # type: ignore[arg-type]


@pytest.mark.core
def test_joined_batches_are_the_batch_and_strangers_are_refused(open_loader: Callable[..., Loader]) -> None:
    with open_loader() as loader:
        whole = loader.batch([3, 0, 5])
        assert_same(Batch.concatenate([whole[:1], whole[1:]]), whole)
        with pytest.raises(ValueError, match="epoch is 0 in one batch and 1 in another"):
            Batch.concatenate([whole, loader.batch([1], epoch=1)])
    with pytest.raises(ValueError, match=r"batches hold \[1, 2\] families"):
        Batch.concatenate([whole, replace(whole, views=whole.views[:1])])
    other = replace(RECIPE, families=(replace(RECIPE.families[0], size_px=(32, 48)), RECIPE.families[1]))
    wider = ViewTransform(other, seed=5)(PLAIN, sample=0, epoch=0).batch
    with pytest.raises(ValueError, match="size_px is"):
        Batch.concatenate([whole, wider])
    with pytest.raises(ValueError, match="no batches to concatenate"):
        Batch.concatenate([])


@pytest.mark.slow
def test_spawned_workers_give_the_views_of_this_process(tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(
        """
import numpy as np
from torch.utils.data import DataLoader
from wherefrom.pipeline import Independent, ViewRecipe, ViewFamily
from wherefrom.pipeline.order import Order
from wherefrom.pipeline.order import KeyedSampler
from wherefrom.pipeline.transform import ViewTransform, collate


class Pictures:
    def __init__(self):
        recipe = ViewRecipe(families=(ViewFamily(name="one", views=2, size_px=(16, 16), law=Independent(), mirror="view"),))
        self.transform = ViewTransform(recipe, seed=3)

    def __getitem__(self, key):
        picture = np.random.default_rng(key[1]).integers(0, 256, (40, 50, 3), np.uint8)
        return self.transform(picture, sample=key[1], epoch=key[0])


if __name__ == "__main__":
    sampler = KeyedSampler(Order(samples=8, global_batch=4))
    loader = DataLoader(Pictures(), batch_sampler=sampler, num_workers=2, persistent_workers=True, collate_fn=collate,
                        multiprocessing_context="spawn")
    here, expected = Pictures(), KeyedSampler(sampler.order)
    for epoch in (0, 1):
        for seen, keys in zip(loader, expected, strict=True):
            own = collate([here[key] for key in keys])
            assert (seen.batch.views[0].pixels == own.batch.views[0].pixels).all()
            assert seen.batch.views[0].geometry.epoch == epoch and seen.batch.sample.tolist() == [key[1] for key in keys]
    print("the same")
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.stdout == "the same\n", done.stderr
