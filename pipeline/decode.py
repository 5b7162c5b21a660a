"""Encoded bytes -> an upright RGB picture, on the CPU: the one decoder whose verdict counts.

Here: JPEG by simplejpeg (libjpeg-turbo), PNG and WebP by Pillow, strictly: whatever is damaged is refused, never shown in part or in the
place of another; inks to RGB; EXIF orientation undone by indexing.
Not here: what may be judged without decoding (shards/picture_headers.py), which pictures are left out (shards/index.py).
"""

import io
import struct
import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.shards.picture_headers import PngParts, read_png

DECODE_ERRORS = (ValueError, OSError, RuntimeError, SyntaxError, EOFError, Image.DecompressionBombError)

_ROWS_AT_ONCE = 32
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, step in x, in y


def decode_picture(encoded: NDArray[np.uint8], orientation: int = 1, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Decode a file to its upright picture.

    Shapes: encoded (bytes,) uint8 -> (H, W, 3) uint8, RGB; memory of `buffer` where that is large enough.
    Raises: one of DECODE_ERRORS if the file will not decode, or not without a decoder's warning.
    """
    if is_jpeg(encoded):
        picture = _decode_jpeg(encoded, buffer)
    elif encoded[:8].tobytes() == _PNG_SIGNATURE:
        picture = _decode_png(encoded.tobytes())
    else:
        picture = np.asarray(Image.open(io.BytesIO(encoded.tobytes()), formats=("WEBP",)).convert("RGB"))  # no EPS: it runs a program
    return upright(picture, orientation)


def upright(picture: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation, 1 to 8: a view of the same memory, (H, W, C)."""
    if orientation >= 5:
        picture = picture.transpose(1, 0, 2)
    vertical = orientation in (3, 4, 7, 8)
    horizontal = orientation in (2, 3, 6, 7)
    return picture[:: -1 if vertical else 1, :: -1 if horizontal else 1]


def decode_or_stand_in(encoded: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
    """Return a file's picture as stored, contiguous (H, W, 3), and ""; or one gray pixel and why the file will not decode."""
    try:
        return np.ascontiguousarray(decode_picture(encoded)), ""
    except DECODE_ERRORS as error:
        return np.full((1, 1, 3), 128, np.uint8), f"{type(error).__name__}: {error}"


def is_jpeg(encoded: NDArray[np.uint8]) -> bool:
    """Return whether a file starts as JPEGs do."""
    return encoded[:2].tobytes() == b"\xff\xd8"


def nearest_byte(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Return 16-bit values as the nearest of 256 levels, v / 257."""
    levels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS_AT_ONCE):  # 32 bits a value for a few rows, not for a picture
        rows = slice(start, start + _ROWS_AT_ONCE)
        levels[rows] = (values[rows].astype(np.int32) + 128) // 257
    return levels


def _decode_jpeg(encoded: NDArray[np.uint8], buffer: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    # not strict, libjpeg-turbo passes over damage, and after a warning over fatal errors too: the buffer then still holds another picture
    try:
        *_, colors, _ = simplejpeg.decode_jpeg_header(encoded, strict=True)
    except KeyError as error:  # simplejpeg 1.9 looks up what libjpeg-turbo has no name for
        raise ValueError("JPEG of channels that are no colors") from error
    if colors not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(encoded, "RGB", strict=True, buffer=buffer)
    inks = simplejpeg.decode_jpeg(encoded, "CMYK", strict=True)  # inverted, as Adobe's programs write them
    return np.asarray(
        Image.frombytes("CMYK", inks.shape[1::-1], (~inks).tobytes()).convert("RGB")
    )  # (255 - ink) (255 - black) / 255, rounded once


def _decode_png(data: bytes) -> NDArray[np.uint8]:
    """Decode a PNG whose pixels are all there.

    Its rows are inflated and counted here, and Pillow is handed a PNG of them alone: no chunk beside the picture can do harm.
    16 bits a channel are two PNGs of 8, for filters work on bytes, each on those of its own channel and significance.
    """
    png = read_png(data)
    lines = _png_lines(png)
    if png.depth < 16:
        return _pillow_rgb(png, lines)
    high, low = (_pillow_rgb(png, [np.concatenate([part[:, :1], part[:, byte::2]], 1) for part in lines]) for byte in (1, 2))
    values = high.astype(np.uint16)
    values <<= 8
    values |= low
    return nearest_byte(values)


def _png_lines(png: PngParts) -> list[NDArray[np.uint8]]:
    """Return the filtered lines of a PNG, (lines, 1 + bytes a line) for each pass of an interlaced one, first their filter.

    Raises: ValueError unless the stream holds exactly the lines that the header names, with filters that there are.
    """
    passes = _ADAM7 if png.interlaced else ((0, 0, 1, 1),)
    bits = png.depth * _PNG_CHANNELS[png.color]
    sizes = [(-(-(png.height - y) // down), -(-(png.width - x) // along)) for x, y, along, down in passes]
    shapes = [(height, 1 + -(-width * bits // 8)) for height, width in sizes if height > 0 and width > 0]
    expected = sum(height * length for height, length in shapes)
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(png.compressed, expected + 1)  # no bomb gets further
    except zlib.error as error:
        raise ValueError(f"PNG whose pixels cannot be inflated: {error}") from error
    if len(inflated) != expected or not inflater.eof:
        actual = "more" if len(inflated) > expected else f"{len(inflated)}" + ("" if inflater.eof else " and no end")
        raise ValueError(f"PNG of {png.height} x {png.width} pixels, which are {expected} bytes: {actual} are there")
    whole, start, lines = np.frombuffer(inflated, np.uint8), 0, []
    for height, length in shapes:
        lines.append(whole[start : start + height * length].reshape(height, length))
        start += height * length
    if max(part[:, 0].max() for part in lines) > 4:
        raise ValueError("PNG with a filter that there is not")
    return lines


def _pillow_rgb(png: PngParts, lines: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Let Pillow undo the filters of lines of at most 8 bits a channel; (H, W, 3)."""
    header = struct.pack(">IIBBBBB", png.width, png.height, min(png.depth, 8), png.color, 0, 0, png.interlaced)
    storing = zlib.compressobj(0)
    chunks = [(b"IHDR", header), (b"PLTE", png.palette)]
    chunks += [(b"IDAT", storing.compress(part.data)) for part in lines]
    chunks += [(b"IDAT", storing.flush()), (b"IEND", b"")]
    pieces = [piece for name, body in chunks if body or name == b"IEND" for piece in _chunk(name, body)]
    file = io.BytesIO(b"".join([_PNG_SIGNATURE, *pieces]))  # the pixels are copied here, nowhere else
    del chunks, pieces
    return np.asarray(Image.open(file, formats=("PNG",)).convert("RGB"))


def _chunk(name: bytes, body: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    return struct.pack(">I", len(body)), name, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))
