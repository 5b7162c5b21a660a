"""What a picture's bytes say before anybody decodes them.

Here: format, upright size, EXIF orientation and validity of JPEG, PNG and WebP bytes, and what a PNG's chunks hold.
Not here: decoding (decode.py), tar files (tar_members.py, table.py).
Convention: sizes are (height, width) of the upright picture; orientation is the EXIF value as stored, 1 to 8.
The bytes are hostile until shown otherwise: every loop is bounded, and nothing but `InvalidPictureError` is raised.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "FORMATS",
    "MAX_ENCODED_BYTES",
    "InvalidPictureError",
    "PictureHeader",
    "PngParts",
    "examine_picture",
    "exif_orientation",
    "read_png",
]

FORMATS = ("unknown", "jpeg", "png", "webp")  # the code of a format is its place here
MAX_ENCODED_BYTES = 2**29  # a longer member is not read at all

_MAX_PARTS = 2**20  # segments or chunks of one picture
_MAX_SCANS = 200  # a progressive JPEG has about ten; thousands are a decoder's denial of service
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit
_ORIENTATION_TAG = 0x0112
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I"}  # BYTE, SHORT, LONG
_EXIF_PREFIXES = re.compile(rb"(?:Exif\0\0)*")  # a JPEG's belongs there; PNG and WebP writers put it there too, and Pillow adds one
_PNG_CHUNKS_START = 33  # behind the signature and IHDR
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by color type

_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_MARKER_IN_SCAN = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # not a stuffed zero, a restart or a fill byte
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; Huffman-coded
_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_END, _SCAN, _APP1 = 0xD9, 0xDA, 0xE1
_SKIPPED_SEGMENTS = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # DHT, DAC, DQT, DNL, DRI, COM, APPn


class InvalidPictureError(ValueError):
    """The bytes are not a valid picture; the message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureHeader:
    """What the bytes of one picture say. An invalid one has a reason, and a size only where it could be trusted."""

    format: int  # place in FORMATS
    height: int = 0  # upright
    width: int = 0
    orientation: int = 1
    reason: str = ""  # empty: valid


def examine_picture(data: bytes) -> PictureHeader:
    """Read the header of a JPEG, PNG or WebP and judge whether it is valid, without decoding it.

    Valid means: a readable header, a start marker, lengths that do not lie, and an end after the last scan (JPEG: its end marker, bytes
    after it are fine; PNG: IEND; WebP: the RIFF length). The bytes tell the format, never a file's name.
    Source: ITU-T T.81, PNG 3rd edition, RFC 9649 (WebP), Exif 3.0.
    """
    if data.startswith(b"\xff\xd8\xff"):
        kind, scan = "jpeg", _scan_jpeg
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind, scan = "png", _scan_png
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind, scan = "webp", _scan_webp
    else:
        return PictureHeader(format=0, reason="is empty" if not data else "is not a JPEG, PNG or WebP")
    code = FORMATS.index(kind)
    try:
        height, width, orientation = scan(data)
    except InvalidPictureError as verdict:
        return PictureHeader(format=code, reason=str(verdict))
    if orientation > 4:  # 5 to 8 turn by a quarter
        height, width = width, height
    return PictureHeader(format=code, height=height, width=width, orientation=orientation)


@dataclass(frozen=True, kw_only=True, slots=True)
class PngParts:
    """What a PNG's chunks hold that a decoder needs, every length and checksum of theirs verified."""

    height: int  # as stored
    width: int
    depth: int  # bits a channel
    color: int  # color type: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA
    interlaced: bool
    palette: bytes  # RGB after RGB, for color type 3
    compressed: bytes  # one zlib stream
    exif: bytes


def exif_orientation(block: bytes) -> int | None:
    """Return the orientation (1 to 8) that a block of EXIF names, 1 for a value out of range, None where it names none.

    The one place that reads it, for files and for Pillow's pictures. A block is a TIFF header and what follows, with or without the
    prefix `Exif`. Only the first directory is read and no pointer is followed, so a block that loops costs nothing; one BYTE, SHORT or
    LONG counts.
    """
    tiff = memoryview(block)[_EXIF_PREFIXES.match(block).end() :]  # type: ignore[union-attr]  # it matches nothing as well
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
    if order is None or len(tiff) < 8:
        return None
    (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
    if directory + 2 > len(tiff):
        return None
    (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
    first = directory + 2
    last_whole = min(first + 12 * entries, len(tiff) - 11)
    for entry in range(first, last_whole, 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, entry)
        if tag == _ORIENTATION_TAG:
            if kind not in _TIFF_INTEGERS or count != 1:
                return None
            (value,) = struct.unpack_from(order + _TIFF_INTEGERS[kind], tiff, entry + 8)
            return value if 1 <= value <= 8 else 1
    return None


def _scan_jpeg(data: bytes) -> tuple[int, int, int]:
    """Walk the segments up to the end marker that follows the last scan; return (height, width, orientation) as stored."""
    at, scans = 2, 0
    exif: list[bytes] = []  # one block, which may go on in further segments
    size: tuple[int, int] | None = None
    for _ in range(_MAX_PARTS):
        match = _MARKER_IN_SCAN.search(data, at) if scans else _MARKER.match(data, at)
        if match is None:
            raise InvalidPictureError("has no end marker after its last scan" if scans else "has no marker where one is due in its header")
        marker, at = match[1][0], match.end()
        if marker == _END:
            if not scans or size is None:
                raise InvalidPictureError("ends before its first scan")
            return *size, exif_orientation(b"".join(exif)) or 1
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            raise InvalidPictureError(f"is cut short in segment FF{marker:02X}")
        body = data[at + 2 : at + length]
        at += length
        if marker == _SCAN:
            scans += 1
            if size is None or scans > _MAX_SCANS:
                raise InvalidPictureError(f"has more than {_MAX_SCANS} scans" if size else "has a scan before its frame header")
        elif marker in _FRAMES:
            if size is not None:
                raise InvalidPictureError("has two frame headers")
            size = _jpeg_frame_size(body)
        elif marker in _OTHER_FRAMES:
            raise InvalidPictureError(f"is of JPEG process {marker - 0xC0}, which not every renderer decodes")
        elif marker not in _SKIPPED_SEGMENTS:
            raise InvalidPictureError(f"has a stray marker FF{marker:02X}")
        elif marker == _APP1 and not scans and body.startswith(b"Exif\0\0"):
            exif.append(body[6:])
    raise InvalidPictureError(f"has more than {_MAX_PARTS} segments")


def _jpeg_frame_size(body: bytes) -> tuple[int, int]:
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise InvalidPictureError("has a frame header of the wrong length")
    bits, height, width, components = struct.unpack_from(">BHHB", body)
    if bits != 8 or components not in (1, 3, 4):
        raise InvalidPictureError(f"has {components} components of {bits} bits; 1, 3 or 4 of 8 bits are decoded")
    if not 0 < height <= _MAX_JPEG_SIDE or not 0 < width <= _MAX_JPEG_SIDE:
        raise InvalidPictureError(f"names a size of {height} x {width}")
    return height, width


def _scan_png(data: bytes) -> tuple[int, int, int]:
    """Return (height, width, orientation) as stored."""
    png = read_png(data)
    return png.height, png.width, exif_orientation(png.exif) or 1


def read_png(data: bytes) -> PngParts:
    """Walk the chunks of a PNG up to IEND and return what they hold; of chunks that a decoder may leave out, only eXIf is looked at.

    Raises: InvalidPictureError for anything but known critical chunks in their order, whole and with checksums that hold.
    Source: PNG 3rd edition, 5.3 and 5.6 (chunks and their order), 11.2 (critical chunks), 11.3.4.5 (eXIf; the last one counts).
    """
    header = _png_header(data)
    exif, before = b"", b"IHDR"
    palette: bytes | None = None
    pixels: list[bytes] = []
    for name, start, end in _png_chunks(data):
        if name == b"IEND":
            break
        if name == b"IDAT":
            if pixels and before != b"IDAT":
                raise InvalidPictureError("has other chunks between its IDAT chunks")
            pixels.append(data[start:end])
        elif name == b"PLTE":
            fits = _fits_palette(end - start, header.depth if header.color == 3 else 8)
            if palette is not None or pixels or header.color in (0, 4) or not fits:
                raise InvalidPictureError("has a PLTE chunk that does not fit its color type, its length or its place")
            palette = data[start:end]
        elif name == b"eXIf":
            exif = data[start:end]
        elif name[:1].isupper():
            reason = f"has a critical chunk {name!r}, which no decoder knows" if name != b"IHDR" else "has two IHDR chunks"
            raise InvalidPictureError(reason)
        before = name
    if not pixels:
        raise InvalidPictureError("has no IDAT chunk")
    if header.color == 3 and palette is None:
        raise InvalidPictureError("has no PLTE chunk, which its color type needs")
    shown_palette = palette if header.color == 3 and palette else b""
    return PngParts(**header._asdict(), palette=shown_palette, compressed=b"".join(pixels), exif=exif)


class _PngHeader(NamedTuple):
    height: int
    width: int
    depth: int
    color: int
    interlaced: bool


def _png_header(data: bytes) -> _PngHeader:
    """Read the IHDR chunk."""
    if len(data) < _PNG_CHUNKS_START or data[8:16] != b"\0\0\0\x0dIHDR":
        raise InvalidPictureError("has no IHDR chunk at its start")
    width, height, depth, color, compression, filtering, interlace, checksum = struct.unpack_from(">IIBBBBBI", data, 16)
    if checksum != zlib.crc32(data[12:29]):
        raise InvalidPictureError("has an IHDR chunk with a wrong checksum")
    if not 0 < height < 2**31 or not 0 < width < 2**31:
        raise InvalidPictureError(f"names a size of {height} x {width}")
    if depth not in _PNG_DEPTHS.get(color, ()) or compression or filtering or interlace > 1:
        raise InvalidPictureError("has an IHDR chunk that names no PNG format")
    return _PngHeader(height, width, depth, color, bool(interlace))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the content of every chunk after IHDR; raise for one that is not whole, or after too many."""
    at = _PNG_CHUNKS_START
    for _ in range(_MAX_PARTS):
        length, name = struct.unpack_from(">I4s", data, at) if at + 12 <= len(data) else (2**32, b"")
        start, end = at + 8, at + 8 + length
        if end + 4 > len(data):
            raise InvalidPictureError("is cut short before its IEND chunk")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise InvalidPictureError(f"has a chunk {name!r} with a wrong checksum")
        if not name.isalpha():
            raise InvalidPictureError(f"has a chunk of the name {name!r}")
        yield name, start, end
        at = end + 4
    raise InvalidPictureError(f"has more than {_MAX_PARTS} chunks")


def _fits_palette(length: int, depth: int) -> bool:
    return length % 3 == 0 and 3 <= length <= 3 * 2**depth


def _scan_webp(data: bytes) -> tuple[int, int, int]:
    """Walk the chunks of a still WebP up to its RIFF length; return (height, width, orientation) as stored."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise InvalidPictureError(f"is cut short: its header names {end} bytes, {len(data)} are there")
    at, flags = 12, 0
    exif: bytes | None = None
    canvas: tuple[int, int] | None = None
    frame: tuple[int, int] | None = None
    for _ in range(_MAX_PARTS):
        if at + 8 > end:
            break
        name, length = struct.unpack_from("<4sI", data, at)
        body_at = at + 8
        if body_at + length > end:
            raise InvalidPictureError(f"is cut short in chunk {name!r}")
        if name == b"VP8X" and length >= 10 and canvas is None:
            flags, width, height = struct.unpack("<B3x3s3s", data[body_at : body_at + 10])
            canvas = 1 + int.from_bytes(height, "little"), 1 + int.from_bytes(width, "little")
        elif name in (b"VP8 ", b"VP8L") and frame is None:
            frame = _webp_frame_size(name, data[body_at : body_at + min(length, 10)])
        elif name in (b"ANIM", b"ANMF"):
            raise InvalidPictureError("is animated")
        elif name == b"EXIF" and flags & 8 and exif is None:
            exif = data[body_at : body_at + length]
        at = body_at + length + length % 2
    if frame is None or (canvas is not None and canvas != frame):
        raise InvalidPictureError("has no frame" if frame is None else f"has a frame of {frame} on a canvas of {canvas}")
    return *frame, exif_orientation(exif or b"") or 1


def _webp_frame_size(name: bytes, body: bytes) -> tuple[int, int]:
    if name == b"VP8 " and len(body) == 10 and body[3:6] == b"\x9d\x01\x2a" and not body[0] & 1:
        width, height = struct.unpack_from("<HH", body, 6)
        height, width = height & 0x3FFF, width & 0x3FFF
    elif name == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        height, width = 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    else:
        raise InvalidPictureError("has a frame header that cannot be read")
    if not height or not width:
        raise InvalidPictureError(f"names a size of {height} x {width}")
    return height, width
