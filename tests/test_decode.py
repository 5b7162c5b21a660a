"""Decoding is exact or refused: against arrays that were encoded here (PNG), Pillow (JPEG, WebP, inks), and planted damage of every kind.

Nothing damaged may come out as a picture, least of all as what the reused memory held before.
"""

import io
import itertools
import struct
import tracemalloc
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture, nearest_byte
from wherefrom.pipeline.shards.picture_headers import examine_picture

pytestmark = pytest.mark.core

ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16), (6, 8), (6, 16)]
DEEP = [0, 2, 4, 6]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def filtered(lines: NDArray[np.uint8], step: int, rng: np.random.Generator) -> bytes:
    """Filter lines of bytes as PNG does, each by a filter of its own, written from the standard; pixels are `step` bytes wide."""
    out, above = b"", np.zeros(lines.shape[1], int)
    for line in lines.astype(int):
        left = np.concatenate([np.zeros(step, int), line])[: len(line)]
        corner = np.concatenate([np.zeros(step, int), above])[: len(line)]
        guess = left + above - corner
        nearest = np.argmin([abs(guess - left), abs(guess - above), abs(guess - corner)], 0)  # the first of equals
        predicted = [0 * line, left, above, (left + above) // 2, np.choose(nearest, [left, above, corner])]
        kind = int(rng.integers(5))
        out += bytes([kind]) + ((line - predicted[kind]) % 256).astype(np.uint8).tobytes()
        above = line
    return out


def png_lines(values: NDArray[np.uint16], depth: int, interlaced: bool, rng: np.random.Generator) -> bytes:
    """Filter an (H, W, C) picture of values below 2**depth."""
    out = b""
    for x, y, along, down in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = values[y::down, x::along]
        if part.size:
            bits = (part.reshape(len(part), -1, 1) >> np.arange(depth)[::-1]) & 1
            lines = np.packbits(bits.reshape(len(part), -1).astype(np.uint8), axis=1)
            out += filtered(lines, max(1, depth * part.shape[2] // 8), rng)
    return out


def png_file(
    size: tuple[int, int], depth: int, color: int, interlaced: bool, stream: bytes, extra: bytes = b"", palette: bytes | None = None
) -> bytes:
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, color, 0, 0, interlaced)
    plte = chunk(b"PLTE", palette) if palette is not None else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + plte + extra + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def random_png(
    size: tuple[int, int], depth: int, color: int, interlaced: bool, rng: np.random.Generator
) -> tuple[bytes, NDArray[np.uint8]]:
    """Return a file and its picture, (H, W, 3): every sample its share of the full range, alpha left aside."""
    values = rng.integers(0, 2**depth, (*size, CHANNELS[color]), np.uint16)
    palette = rng.integers(0, 256, (2**depth, 3), np.uint8) if color == 3 else None
    stream = zlib.compress(png_lines(values, depth, interlaced, rng))
    file = png_file(size, depth, color, interlaced, stream, palette=None if palette is None else palette.tobytes())
    if palette is not None:
        return file, palette[values[..., 0]]
    levels = np.rint(values[..., : 3 if color in (2, 6) else 1] * (255 / (2**depth - 1))).astype(np.uint8)
    return file, np.broadcast_to(levels, (*size, 3))


def decoded(file: bytes, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    return decode_picture(np.frombuffer(file, np.uint8), buffer=buffer)


def refuses(file: bytes) -> bool:
    """Return whether a file is refused, by what its header says or by the decoder, in one line."""
    if reason := examine_picture(file).reason:
        return "\n" not in reason
    try:
        decoded(file)
    except DECODE_ERRORS as error:
        return "\n" not in str(error) and bool(str(error))
    return False


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("color", "depth"), PNG_KINDS)
def test_every_kind_of_png_is_exact_and_16_bits_become_the_nearest_level(color: int, depth: int, interlaced: bool) -> None:
    rng = np.random.default_rng(depth)
    for size in ((1, 1), (5, 7), (17, 33), (9, 3), (40, 1)):
        file, picture = random_png(size, depth, color, interlaced, rng)
        assert examine_picture(file).reason == ""
        np.testing.assert_array_equal(decoded(file), picture)


def test_16_bits_are_rounded_and_not_cut() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    file = png_file((256, 256), 16, 0, False, zlib.compress(png_lines(values, 16, False, np.random.default_rng(0))))
    got = decoded(file)[..., 0]
    np.testing.assert_array_equal(got, np.rint(values[..., 0] / 257).astype(np.uint8))
    assert (got != values[..., 0] >> 8).mean() > 0.2


def damaged_streams(lines: bytes) -> Iterator[bytes]:
    """Yield zlib streams that do not hold `lines`, behind checksums of chunks that hold."""
    stream = zlib.compress(lines)
    yield b""
    for at in (0, 1, 2, len(stream) // 3, len(stream) // 2, len(stream) - 4):
        yield stream[:at]  # cut
        yield stream[:at] + bytes([stream[at] ^ 0x5A]) + stream[at + 1 :]  # damaged
    yield stream[: len(stream) // 2] + bytes(64) + stream[len(stream) // 2 + 64 :]
    yield zlib.compress(lines[:-1])  # not all of the last line
    yield zlib.compress(lines + bytes(9))  # more lines than the header names
    yield zlib.compress(b"\x07" + lines[1:])  # a filter that there is not
    yield zlib.compress(bytes(2**22))  # a bomb


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("color", "depth"), [(0, 1), (3, 8), (2, 8), (6, 8), *((color, 16) for color in DEEP)])
def test_a_png_with_a_damaged_stream_is_refused_and_crashes_nothing(color: int, depth: int, interlaced: bool) -> None:
    rng = np.random.default_rng(3)
    lines = png_lines(rng.integers(0, 2**depth, (20, 30, CHANNELS[color]), np.uint16), depth, interlaced, rng)
    palette = rng.bytes(768) if color == 3 else None
    assert not refuses(png_file((20, 30), depth, color, interlaced, zlib.compress(lines), palette=palette))
    for stream in damaged_streams(lines):
        assert refuses(png_file((20, 30), depth, color, interlaced, stream, palette=palette))
    for size in ((21, 30), (20, 60), (19, 30), (60_000, 60_000)):
        assert refuses(png_file(size, depth, color, interlaced, zlib.compress(lines), palette=palette))


def test_a_png_of_chunks_that_no_decoder_may_pass_over_is_refused() -> None:
    rng = np.random.default_rng(4)
    stream = zlib.compress(png_lines(rng.integers(0, 256, (8, 9, 1), np.uint16), 8, False, rng))
    size = (8, 9)
    plain = png_file(size, 8, 0, False, stream)
    entries = rng.bytes(768)
    assert not refuses(plain)
    assert not refuses(png_file(size, 8, 3, False, stream, palette=entries))
    assert not refuses(png_file(size, 8, 0, False, stream, extra=chunk(b"heLp", b"may be left out")))
    wrong = {
        "no PLTE chunk": png_file(size, 8, 3, False, stream),
        "PLTE chunk that does not fit": png_file(size, 8, 3, False, stream, palette=entries[:-1]),
        "a PLTE chunk": png_file(size, 8, 0, False, stream, palette=entries),
        "has a PLTE chunk": png_file(size, 8, 3, False, stream, palette=entries + b"abc"),
        "critical chunk b'HELP'": png_file(size, 8, 0, False, stream, extra=chunk(b"HELP", b"")),
        "two IHDR": png_file(size, 8, 0, False, stream, extra=plain[8:33]),
        "of the name": png_file(size, 8, 0, False, stream, extra=chunk(b"he\0p", b"")),
        "between its IDAT": plain[:33] + chunk(b"IDAT", stream[:5]) + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", stream[5:]) + plain[-12:],
    }
    for reason, file in wrong.items():
        assert reason in examine_picture(file).reason
        assert refuses(file)
        with pytest.raises(ValueError, match="has "):
            decoded(file)
    parted = plain[:33] + chunk(b"IDAT", stream[:5]) + chunk(b"IDAT", b"") + chunk(b"IDAT", stream[5:]) + plain[-12:]
    np.testing.assert_array_equal(decoded(parted), decoded(plain))


def test_what_lies_beside_a_pngs_picture_can_do_it_no_harm() -> None:
    """Bombs of 64 MB in text and color profile, which Pillow refuses to open, are passed over, not even inflated."""
    rng = np.random.default_rng(5)
    lines = png_lines(rng.integers(0, 256, (8, 9, 3), np.uint16), 8, False, rng)
    plain = png_file((8, 9), 8, 2, False, zlib.compress(lines))
    bomb = zlib.compress(bytes(2**26))
    for extra in (chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iCCP", b"a\0\0" + bomb), chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)):
        loaded = png_file((8, 9), 8, 2, False, zlib.compress(lines), extra=extra)
        np.testing.assert_array_equal(decoded(loaded), decoded(plain))


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **({"quality": 90} | options))  # type: ignore[arg-type]
    return file.getvalue()


def damaged_jpegs(valid: bytes) -> dict[str, bytes]:
    """Files with valid headers, lengths and end markers that do not hold the picture that they name."""
    scan = valid.index(b"\xff\xda") + 20
    frame = next(at for marker in (b"\xff\xc0", b"\xff\xc2") if (at := valid.find(marker)) > 0)
    height = struct.unpack(">H", valid[frame + 5 : frame + 7])[0]
    taller = valid[: frame + 5] + struct.pack(">H", 2 * height) + valid[frame + 7 :]
    middle = (scan + len(valid)) // 2
    return {
        "cut, with an end marker": valid[:middle] + b"\xff\xd9",
        "twice as high as its scans": taller,
        "a block of zeros": valid[:middle] + bytes(512) + valid[middle + 512 :],
        "a table that is not there": valid.replace(b"\xff\xdb\x00\x43\x00", b"\xff\xdb\x00\x43\x03"),
    }


@pytest.mark.parametrize(
    ("damage", "progressive"),
    [
        (damage, progressive)
        for damage in damaged_jpegs(jpeg(smooth(160, 240)))
        for progressive in (False, True)
        if (damage, progressive) != ("a block of zeros", False)  # that may be codes like any other: no decoder can tell
    ],
)
def test_a_jpeg_whose_data_is_damaged_is_refused(damage: str, progressive: bool) -> None:
    valid = jpeg(smooth(160, 240), progressive=progressive)
    assert not refuses(valid)
    file = damaged_jpegs(valid)[damage]
    assert examine_picture(file).reason == ""
    assert refuses(file)
    if damage != "a table that is not there":  # which no decoder forgives; the others are what leniency shows
        assert simplejpeg.decode_jpeg(file, "RGB", strict=False).shape[2] == 3


def test_a_jpeg_of_channels_that_are_no_colors_is_refused() -> None:
    valid = jpeg(smooth(16, 16), subsampling=0)
    frame, scan = valid.index(b"\xff\xc0"), valid.index(b"\xff\xda")
    two = b"\xff\xc0\0\x0e" + valid[frame + 4 : frame + 9] + b"\2" + valid[frame + 10 : frame + 16]
    file = valid[:frame] + two + valid[frame + 19 : scan] + b"\xff\xda\0\x0a\2\1\0\2\x11\0\x3f\0" + valid[scan + 14 :]
    with pytest.raises(DECODE_ERRORS):
        decoded(file)


def test_a_reused_buffer_never_shows_what_it_held_before() -> None:
    """Whatever comes out is the same over memory of zeros and of ones; decoded leniently, some of these show the memory itself."""
    rng = np.random.default_rng(6)
    valid = [jpeg(smooth(96, 128, seed), progressive=seed % 2 == 1) for seed in range(4)]
    zeros, ones = (np.full(2 * 96 * 128 * 3, fill, np.uint8) for fill in (0, 255))
    shown = remains = 0
    for trial in range(400):
        file = bytearray(valid[trial % 4])
        at = int(rng.integers(150, len(file) - 2))
        file[at : at + 64 * (trial % 3) + 1] = bytes(64 * (trial % 3) + 1) if trial % 2 else rng.bytes(64 * (trial % 3) + 1)
        zeros[:], ones[:] = 0, 255
        try:
            one = decoded(bytes(file), zeros).copy()
        except DECODE_ERRORS:
            with pytest.raises(DECODE_ERRORS):
                decoded(bytes(file), ones)
            try:
                lenient = [
                    simplejpeg.decode_jpeg(bytes(file), "RGB", strict=False, buffer=np.full(2 * 96 * 128 * 3, fill, np.uint8)).copy()
                    for fill in (0, 255)
                ]
            except ValueError:
                continue
            remains += not np.array_equal(*lenient)
            continue
        shown += 1
        np.testing.assert_array_equal(one, decoded(bytes(file), ones))
    assert shown > 20 and remains > 0


@pytest.mark.parametrize("black", [False, True])
def test_inks_become_the_colors_that_pillow_makes_of_them(black: bool) -> None:
    inks = smooth(60, 70).convert("CMYK")
    if black:  # Pillow's own conversion to CMYK uses none
        inks = Image.merge("CMYK", [*inks.split()[:3], smooth(60, 70, 1).convert("L")])
    file = jpeg(inks, quality=95)
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    np.testing.assert_array_equal(decoded(file), expected)
    if black:
        assert (simplejpeg.decode_jpeg(file, "RGB") != expected).any()  # libjpeg-turbo's way differs


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_cut_or_damaged_in_its_lengths_is_refused(lossless: bool) -> None:
    file = io.BytesIO()
    smooth(64, 80).save(file, "WEBP", lossless=lossless)
    valid = file.getvalue()
    assert not refuses(valid)
    for length, at in itertools.product((0, 3, 30, len(valid) // 2), (4, 16)):
        assert refuses(valid[:length])
        assert refuses(valid[:at] + struct.pack("<I", length) + valid[at + 4 :])


def test_sixteen_bits_become_the_nearest_of_256_levels() -> None:
    deep = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(nearest_byte(deep), np.rint(deep / 257).astype(np.uint8))
    assert np.array_equal(nearest_byte(deep.astype(">u2")), nearest_byte(deep))


@pytest.mark.parametrize(("depth", "allowed"), [(8, 6.2), (16, 10)])
def test_a_png_takes_few_times_the_memory_of_its_picture(depth: int, allowed: float) -> None:
    side = 800
    stream = zlib.compress(bytes(side * (1 + 3 * side * depth // 8)), 1)
    encoded = np.frombuffer(png_file((side, side), depth, 2, False, stream), np.uint8)
    tracemalloc.start()
    try:
        picture = decode_picture(encoded)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert picture.nbytes < peak < allowed * picture.nbytes
