"""JPEGs of every kind to decode in part, and files that are not.

Here: encoding. What must hold of them: test_jpeg_parts.py, test_native_safety.py.
"""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
SAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
RESTARTS = {"444": 0, "422": 1, "420": 2}  # as Pillow numbers what it can write restart markers with


def picture_of(rng: np.random.Generator, height: int, width: int) -> Bytes:
    """Noise, or something smooth; (height, width, 3)."""
    if rng.random() < 0.5:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    small = rng.integers(0, 256, (max(1, height // 7), max(1, width // 7), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).copy()


def by_pillow(picture: Bytes, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def jpeg_of(picture: Bytes, sampling: str, quality: int = 85, restart: int = 0) -> bytes:
    """Encode with a chroma sampling; `restart` blocks between restart markers, 0: none."""
    if sampling == "Gray":
        return by_pillow(picture, "L", quality=quality, restart_marker_blocks=restart)
    if restart:
        return by_pillow(picture, quality=quality, subsampling=RESTARTS[sampling], restart_marker_blocks=restart)
    return simplejpeg.encode_jpeg(picture, quality=quality, colorsubsampling=sampling)


def kinds(rng: np.random.Generator) -> dict[str, bytes]:
    picture, inks = picture_of(rng, 150, 170), picture_of(rng, 150, 170)
    png, webp = io.BytesIO(), io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    Image.fromarray(picture).save(webp, "WEBP")
    return {
        "baseline": jpeg_of(picture, "420"),
        "gray": jpeg_of(picture, "Gray"),
        "progressive": by_pillow(picture, progressive=True),
        "inks": by_pillow(inks, "CMYK"),
        "png": png.getvalue(),
        "webp": webp.getvalue(),
    }
