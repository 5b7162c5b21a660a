"""Every renderer gives the same verdict on damaged files, and what it shows is the picture of that very file.

The truth is one strict decode into fresh memory. `dali` is tried in both of its ways, the second being a GPU's, on the CPU.
"""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.choose import make_renderer
from wherefrom.pipeline.render.dali_decode import DaliDecoder, installed
from wherefrom.pipeline.render.dali_renderer import DaliRenderer
from wherefrom.pipeline.render.renderer import Rendered, Renderer
from wherefrom.pipeline.shards.picture_headers import examine_picture
from wherefrom.pipeline.view_recipe import Independent, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Record

Bytes = NDArray[np.uint8]
SIZE = (40, 56)
RECIPE = ViewRecipe(families=(ViewFamily(name="whole", views=1, size_px=SIZE, law=Independent(area_frac=(1, 1), aspect=(1.4, 1.4))),))
ROUNDING = 1.0  # levels: of a whole picture resized to its own size


def encoded(seed: int, kind: str, **options: object) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (SIZE[0] // 8, SIZE[1] // 8, 3), np.uint8)
    picture = Image.fromarray(small).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.convert(str(options.pop("mode", "RGB"))).save(file, kind, **options)
    return file.getvalue()


def deep_png(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 65536, SIZE, np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def valid_files() -> list[bytes]:
    return [
        encoded(0, "JPEG", quality=90),
        encoded(1, "JPEG", quality=80, progressive=True),
        encoded(2, "JPEG", quality=90, mode="CMYK"),
        encoded(3, "JPEG", quality=90, mode="L"),
        encoded(4, "PNG"),
        encoded(5, "PNG", mode="P"),
        deep_png(6),
        encoded(7, "WEBP", quality=90),
        encoded(8, "WEBP", lossless=True),
    ]


def resealed(file: bytes) -> bytes:
    """Give every chunk of a PNG a checksum that holds, as far as its lengths lead."""
    out, at = bytearray(file), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def mutations(count: int) -> list[Bytes]:
    """Return damaged copies of the valid files whose headers are still valid: only these reach a renderer."""
    rng, valid, kept = np.random.default_rng(11), valid_files(), []
    while len(kept) < count:
        file = bytearray(valid[len(kept) % len(valid)])
        at, length = int(rng.integers(12, len(file) - 2)), int(rng.choice([1, 1, 2, 16, 100]))
        how = rng.integers(4)
        if how == 0:
            file[at : at + length] = rng.bytes(length)
        elif how == 1:
            file[at : at + length] = bytes(len(file[at : at + length]))
        elif how == 2:
            del file[at : at + length]
        else:
            file[at] ^= 1 << int(rng.integers(8))
        if file[:4] == b"RIFF":
            file[4:8] = struct.pack("<I", len(file) - 8)
        data = resealed(bytes(file)) if file[:4] == b"\x89PNG" else bytes(file)
        header = examine_picture(data)
        if not header.reason and (header.height, header.width) == SIZE:
            kept.append(np.frombuffer(data, np.uint8))
    return kept


def whole_records(count: int) -> Sequence[Record]:
    ids = np.arange(count)
    drawn = draw_records(RECIPE, seed=0, epoch=0, drawn_for=ids, source_size=np.tile(np.array(SIZE, np.int32), (count, 1)))
    assert drawn[0].geometry.boxes.eq(torch.tensor([0.0, 0, SIZE[1], SIZE[0]])).all()
    return drawn


def renderers() -> dict[str, Renderer]:
    made: dict[str, Renderer] = {"torch": make_renderer(RECIPE, "torch", threads=2)}
    if native_missing() is None:
        made["native"] = make_renderer(RECIPE, "native", threads=2)
    if installed():
        made["dali"] = DaliRenderer(RECIPE, threads=2)
    return made


def shown(rendered: Rendered, position: int) -> NDArray[np.float64]:
    """A view's levels, (H, W, 3), before mean and standard deviation."""
    pixels = rendered.pixels[0][position, 0].double().cpu()
    if pixels.max() <= 30:  # normalized floats
        mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (RECIPE.mean, RECIPE.std))
        pixels = (pixels * std + mean) * 255
    return pixels.permute(1, 2, 0).numpy()


def truth(file: Bytes) -> Bytes | None:
    try:
        picture = decode_picture(file)
    except DECODE_ERRORS:
        return None
    return picture if picture.shape[:2] == SIZE else None


def assert_alike(files: Sequence[Bytes], batch: int) -> tuple[int, int]:
    """Render files, `batch` at a time, with every renderer; return how many were shown and how many refused."""
    pictures = [truth(file) for file in files]
    for name, renderer in renderers().items():
        for start in range(0, len(files), batch):
            some = files[start : start + batch]
            records = whole_records(len(some))
            flipped = records[0].geometry.flipped[:, 0].tolist()
            rendered = renderer.render(some, records)
            for position, expected in enumerate(pictures[start : start + batch]):
                assert (position in rendered.failed) == (expected is None), (name, start + position)
                if expected is not None:
                    upright = expected[:, ::-1] if flipped[position] else expected
                    assert np.abs(shown(rendered, position) - upright).max() <= ROUNDING, (name, start + position)
        renderer.close()
    return sum(picture is not None for picture in pictures), sum(picture is None for picture in pictures)


@pytest.mark.core
def test_renderers_refuse_the_same_damaged_files_and_show_every_other_as_it_is() -> None:
    kept, refused = assert_alike(mutations(90), batch=15)
    assert kept > 10 and refused > 30


@pytest.mark.slow
def test_renderers_refuse_the_same_of_a_thousand_damaged_files() -> None:
    kept, refused = assert_alike(mutations(1000), batch=25)
    assert kept > 100 and refused > 300


@pytest.mark.core
def test_the_bar_sees_another_picture_of_the_same_size() -> None:
    one, other = (truth(np.frombuffer(encoded(seed, "JPEG", quality=90), np.uint8)) for seed in (0, 1))
    assert one is not None and other is not None
    assert np.abs(one.astype(int) - other).max() > 20 * ROUNDING


@pytest.mark.core
@pytest.mark.skipif(not installed(), reason="NVIDIA DALI is not installed")
def test_where_dali_decodes_jpegs_itself_everything_else_is_judged_strictly_all_the_same() -> None:
    """As on a GPU: of damaged JPEGs some may be shown, valid ones never refused; PNG and WebP are as everywhere."""
    files = mutations(90)
    renderer = DaliRenderer(RECIPE, threads=2, strict=False)
    rendered = [renderer.render([file], whole_records(1)) for file in files]
    of_triton = DaliDecoder(device=torch.device("cpu"), threads=2)
    lenient = 0
    for file, one in zip(files, rendered, strict=True):
        expected = truth(file)
        decoded = of_triton.decode([file])
        assert bool(decoded.failed) == bool(one.failed) or tuple(decoded.sizes[0]) != SIZE
        if file[:2].tobytes() == b"\xff\xd8" and expected is None:
            lenient += not one.failed
        else:
            assert bool(one.failed) == (expected is None)
    assert lenient > 0
