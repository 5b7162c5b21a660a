"""Encoded bytes -> an upright RGB picture, on the CPU.

Here: JPEG by simplejpeg (libjpeg-turbo), everything else by Pillow, 16-bit PNG by torchvision; EXIF orientation undone by indexing.
Not here: deciding whether a picture is sound (shards.py): decoding is as lenient as libjpeg, and only what it refuses fails.
"""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

DECODE_ERRORS = (ValueError, OSError, RuntimeError, SyntaxError, EOFError, Image.DecompressionBombError)


def decode_picture(encoded: NDArray[np.uint8], orientation: int = 1, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Decode a file to its upright picture.

    Shapes: encoded (bytes,) uint8 -> (H, W, 3) uint8, RGB; memory of `buffer` where that is large enough.
    Raises: one of DECODE_ERRORS if the file will not decode.
    """
    if encoded[:2].tobytes() == b"\xff\xd8":
        picture = simplejpeg.decode_jpeg(encoded, "RGB", strict=False, buffer=buffer)
    elif encoded[:8].tobytes() == b"\x89PNG\r\n\x1a\n" and len(encoded) > 24 and encoded[24] == 16:
        picture = _decode_deep_png(encoded)
    else:
        picture = np.asarray(Image.open(io.BytesIO(encoded.tobytes()), formats=("PNG", "WEBP")).convert("RGB"))  # no EPS: it runs a program
    return upright(picture, orientation)


def upright(picture: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation, 1 to 8: a view of the same memory, (H, W, C)."""
    if orientation >= 5:
        picture = picture.transpose(1, 0, 2)
    vertical = orientation in (3, 4, 7, 8)
    horizontal = orientation in (2, 3, 6, 7)
    return picture[:: -1 if vertical else 1, :: -1 if horizontal else 1]


def _decode_deep_png(encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decode a PNG of 16 bits a channel to the nearest of 256 levels, v / 257."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    deep = decode_png(torch.from_numpy(encoded.copy()), mode=ImageReadMode.RGB)
    return ((deep.to(torch.int32) + 128) // 257).to(torch.uint8).permute(1, 2, 0).numpy()
