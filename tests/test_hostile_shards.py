"""Shards and pictures that lie, end early or change under the reader: each costs one clear line or one sample, never a crash or a hang.

The judges are the documented errors (OSError, ValueError in one line) and, for what counts as valid, Pillow and DALI's rules.
"""

import io
import os
import random
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.shards.index import BrokenShardError, ShardIndex
from wherefrom.pipeline.shards.pattern import expand_pattern
from wherefrom.pipeline.shards.picture_headers import examine_picture, exif_orientation
from wherefrom.pipeline.shards.reader import ShardChangedError, ShardReader
from wherefrom.pipeline.shards.store import file_beside
from wherefrom.pipeline.shards.table import scan_shard
from wherefrom.tools.index import index_command

pytestmark = pytest.mark.core

SAME_FOLDER = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
END = b"\xff\xd9"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def encode(kind: str, height: int = 24, width: int = 31, **options: object) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(noise(height, width)).save(encoded, kind, **options)
    return encoded.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def webp_chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def riff(chunks: bytes) -> bytes:
    return b"RIFF" + (4 + len(chunks)).to_bytes(4, "little") + b"WEBP" + chunks


def assert_one_line(error: BaseException, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert all(word in text for word in words), text


def two_samples(make_shard: Callable[..., Path], path: Path) -> Path:
    return make_shard(path, [("a", {"jpg": encode("JPEG"), "cls": b"1"}), ("b", {"png": encode("PNG"), "cls": b"2"})])


def rewrite_member(path: Path, member: int, change: Callable[[tarfile.TarInfo], None]) -> None:
    """Change one header of a tar in place, checksum and all."""
    with tarfile.open(path) as tar:
        header = tar.getmembers()[member]
    change(header)
    raw = bytearray(path.read_bytes())
    raw[header.offset : header.offset + 512] = header.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{tmp}/none.tar", ("none.tar", "no such file")),
        ("{tmp}/train-{{000..003}}.tar", ("train-000.tar", "3 others of the 4")),
        ("{tmp}/*.tar", ("*.tar", "no file matches")),
        ("", ("empty",)),
        ("{tmp}/a.tar::", ("empty",)),
        ("pipe:cat {tmp}/a.tar", ("pipe:", "URL")),
        ("https://example.org/a.tar", ("https:", "URL")),
        ("s3://bucket/a.tar", ("s3:", "URL")),
        ("{tmp}/a.tar::gs:bucket/a.tar", ("gs:", "URL")),
        ("{tmp}/train-{{000..", ("unbalanced braces",)),
        ("{tmp}/{{0..9}}{{0..9}}{{0..9}}{{0..9}}{{0..9}}{{0..1}}.tar", ("more than 100000",)),
        ("{tmp}/{{0..999999999999}}.tar", ("more than 100000",)),
    ],
)
def test_a_pattern_without_shards_gets_one_line(tmp_path: Path, pattern: str, words: tuple[str, ...]) -> None:
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        expand_pattern(pattern.format(tmp=tmp_path))
    assert_one_line(caught.value, *words)


@pytest.mark.parametrize("kind", ["a broken link, to gone.tar", "neither a file nor a folder"])
def test_what_is_no_shard_among_shards_is_named_and_not_left_out(tmp_path: Path, make_shard: Callable[..., Path], kind: str) -> None:
    two_samples(make_shard, tmp_path / "a.tar")
    odd = tmp_path / "b.tar"
    if "link" in kind:
        odd.symlink_to("gone.tar")
    else:
        os.mkfifo(odd)
    for pattern in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/{{a,b}}.tar", odd):
        with pytest.raises(FileNotFoundError) as caught:
            expand_pattern(pattern)
        assert_one_line(caught.value, f"{odd}: is {kind}; mend it")
    (tmp_path / "c.tar").symlink_to("gone.tar")
    with pytest.raises(FileNotFoundError, match=r"b.tar: is .* \(nor 1 others of the 3 named\); mend it"):
        expand_pattern(tmp_path)
    for name in ("b.tar", "c.tar"):
        (tmp_path / name).unlink()
    odd.symlink_to("a.tar")
    assert expand_pattern(odd) == [str(odd)]


def test_a_url_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="URL"):
        ShardIndex.open(f"pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


def test_a_shard_named_twice_is_refused(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    with pytest.raises(ValueError, match="named twice"):
        ShardIndex.open([path, f"{tmp_path}/../{tmp_path.name}/s.tar"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty (0 bytes)",)),
        (b"x", ("is cut short",)),
        (b"not a tar, " * 100, ("is not an uncompressed tar",)),
        (zlib.compress(bytes(10_000), wbits=31).ljust(600, b"\0"), ("is not an uncompressed tar",)),
        (bytes(10_240), ("no pictures",)),
        (bytes(512), ("no pictures",)),
    ],
)
def test_what_is_no_tar_of_pictures_gets_one_line(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    for opened in (lambda: ShardIndex.open(path), lambda: index_command(str(path))):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  assert_one_line looks at the words
            opened()
        assert_one_line(caught.value, "s.tar", *words)


def test_a_tar_without_pictures_says_what_it_holds(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    path = make_shard(tmp_path / "s.tar", [("a", {"pkl": b"\x80\x04.", "txt": b"hello"}), ("b", {"txt": b"hello"})])
    with pytest.raises(ValueError, match=r"no pictures \(2 \.txt, 1 \.pkl\); a picture is"):
        ShardIndex.open(path)


def test_a_tar_cut_short_anywhere_is_refused_or_lost_nothing(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    """At every tenth, and at every block and member border: only the padding behind the end mark may go."""
    samples = [(f"k{number}", {"jpg": encode("JPEG", 40, 20 + number), "cls": b"%d" % number}) for number in range(10)]
    whole = make_shard(tmp_path / "whole.tar", samples)
    expected, raw = ShardIndex.open(whole), whole.read_bytes()
    with tarfile.open(whole) as tar:
        last = max(-(-(member.offset_data + member.size) // 512) * 512 for member in tar)
    cuts = (
        {len(raw) * tenth // 10 for tenth in range(1, 10)}
        | set(range(0, len(raw), 512))
        | {last - 1, last, last + 511, last + 512, last + 513}
    )
    cut = tmp_path / "cut.tar"
    refused = 0
    for size in sorted(cuts):
        cut.write_bytes(raw[:size])
        try:
            index = ShardIndex.open(cut)
        except BrokenShardError as error:
            refused += 1
            kept = sum(end <= size for end in expected.offset + expected.length)
            assert_one_line(error, str(cut), "is empty" if size == 0 else "is cut short", f"{kept} whole samples", "fetch or pack it again")
        else:
            assert (len(index), index.label.tolist()) == (10, list(range(10)))
    assert refused == sum(size < last + 512 for size in cuts)  # without a whole block of the end mark


def test_of_many_broken_shards_the_first_is_named_and_whole_ones_are_kept(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    paths = [two_samples(make_shard, tmp_path / f"{number}.tar") for number in range(4)]
    for path in paths[1:3]:
        path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(BrokenShardError) as caught:
        ShardIndex.open(tmp_path)
    assert_one_line(caught.value, "1.tar", "1 more shards are broken too")
    assert ShardIndex.open([paths[0], paths[3]]).reused == 2


def test_two_tars_joined_are_refused(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    one, two = (two_samples(make_shard, tmp_path / name).read_bytes() for name in ("1.tar", "2.tar"))
    (tmp_path / "both.tar").write_bytes(one + two)
    with pytest.raises(BrokenShardError, match="goes on with another tar"):
        ShardIndex.open(tmp_path / "both.tar")
    (tmp_path / "padded.tar").write_bytes(one + bytes(20_000))
    assert len(ShardIndex.open(tmp_path / "padded.tar")) == 2


@pytest.mark.parametrize("size", [10**9, 8**11 - 1])
def test_a_member_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path, make_shard: Callable[..., Path], size: int) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    rewrite_member(path, 2, lambda header: setattr(header, "size", size))
    with pytest.raises(BrokenShardError, match="is cut short"):
        ShardIndex.open(path)


def test_a_member_that_claims_less_than_it_has_is_refused(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    rewrite_member(path, 0, lambda header: setattr(header, "size", 3))
    with pytest.raises(BrokenShardError, match="has a damaged header at byte 1024"):
        ShardIndex.open(path)


@pytest.mark.parametrize("field", [b"\xff" * 12, b"-0000000001\0", b"0x000000010\0", b"00000009999\0"])
def test_a_size_that_is_no_number_is_refused(tmp_path: Path, make_shard: Callable[..., Path], field: bytes) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    raw = bytearray(path.read_bytes())
    raw[124:136] = field
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    with pytest.raises(BrokenShardError, match="has a damaged header at byte 0"):
        ShardIndex.open(path)


@pytest.mark.parametrize(
    "records",
    [
        b"11 size=-5\n",
        b"12 size=1e99\n",
        b"99999 path=a\n",
        b"0 path=a\n",
        b"3 \n",
        b"12 path=a.jpg",
        b"x path=a\n",
        b"30 size=99999999999999999999999\n",
        b"22 GNU.sparse.major=1\n",
    ],
)
def test_pax_records_that_lie_are_refused(tmp_path: Path, records: bytes) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for kind, content in ((tarfile.XHDTYPE, records), (tarfile.REGTYPE, encode("JPEG"))):
            header = tarfile.TarInfo("a.jpg")
            header.type, header.size = kind, len(content)
            tar.addfile(header, io.BytesIO(content))
    with pytest.raises(BrokenShardError, match=r"damaged PAX header|sparse member|cut short"):
        scan_shard(path)


def test_links_devices_and_escaping_names_cost_one_sample_each(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    path = tmp_path / "s.tar"
    secret = make_shard(tmp_path / "secret.tar", [])
    good = encode("JPEG")
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE}
    with tarfile.open(path, "w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE) -> None:
            header = tarfile.TarInfo(name)
            header.type, header.linkname, header.size = kind, str(secret), len(good) if kind == tarfile.REGTYPE else 0
            tar.addfile(header, io.BytesIO(good))

        for name, kind in kinds.items():
            add(f"{name}.jpg", kind)
        add("../up.jpg")
        add("a/../../b.jpg")
        add("/etc/absolute.jpg")
        add("..still..fine/x.jpg")
        add("twice.jpg")
        add("between.jpg")
        add("twice.jpg")
    index = ShardIndex.open(path)
    reasons = {entry.id: entry.reason for entry in index.quarantine()}
    assert reasons == {
        0: "is a link in the tar",
        1: "is a link in the tar",
        2: "is a device in the tar",
        3: "is a device in the tar",
        4: "is a device in the tar",
        5: "has a name that leaves its folder",
        6: "has a name that leaves its folder",
        7: "has a name that leaves its folder",
        11: "has the key of an earlier sample of its shard",
    }
    assert index.replacement(np.arange(12)).tolist() == [8, 8, 8, 8, 8, 8, 8, 8, 8, 9, 10, 8]


def test_the_same_name_twice_in_a_row_is_two_samples_one_invalid(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    good = encode("JPEG")
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            header = tarfile.TarInfo("a.jpg")
            header.size = len(good)
            tar.addfile(header, io.BytesIO(good))
    assert ShardIndex.open(path).valid.tolist() == [True, False]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_cut_short_at_every_tenth_is_invalid(kind: str) -> None:
    data = encode(kind)
    assert examine_picture(data).reason == ""
    for tenth in range(10):
        header = examine_picture(data[: len(data) * tenth // 10])
        assert header.reason != ""
        assert (header.height, header.width) == (0, 0)
    assert examine_picture(data[:-2]).reason != ""


def jpeg_with(*segments: bytes, progressive: bool = False) -> bytes:
    whole = encode("JPEG", progressive=progressive)
    return whole[:2] + b"".join(segments) + whole[2:]


def exif_thumbnail() -> bytes:
    """An EXIF segment that ends with a whole small JPEG, as cameras write them."""
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 1, 0, 0)
    return segment(0xE1, b"Exif\0\0" + tiff + encode("JPEG", 8, 8))


def test_only_an_end_marker_behind_the_last_scan_counts() -> None:
    with_thumbnail = jpeg_with(exif_thumbnail())
    assert with_thumbnail.count(END) >= 2
    assert examine_picture(with_thumbnail).reason == ""
    assert examine_picture(with_thumbnail[:-2]).reason == "has no end marker after its last scan"
    progressive = jpeg_with(progressive=True)
    scans = [at for at in range(len(progressive)) if progressive.startswith(b"\xff\xda", at)]
    assert len(scans) > 5
    comment = segment(0xFE, END * 3)
    assert examine_picture(progressive[: scans[3]] + comment + progressive[scans[3] :]).reason == ""
    assert examine_picture(progressive[: scans[3]] + comment).reason == "has no end marker after its last scan"


invalid_jpegs = {
    "empty": (b"", "is empty"),
    "garbage": (b"\x93\xff\xd8garbage" * 50, "is not a JPEG, PNG or WebP"),
    "a picture of another format": (encode("GIF"), "is not a JPEG, PNG or WebP"),
    "start only": (b"\xff\xd8\xff", "has no marker"),
    "no scan": (b"\xff\xd8" + segment(0xC0, struct.pack(">BHHB", 8, 9, 9, 1) + b"abc") + END, "ends before its first scan"),
    "scan without frame": (b"\xff\xd8" + segment(0xDA, b"abc") + END, "has a scan before its frame"),
    "bytes between segments": (jpeg_with(segment(0xFE, b"") + b"\0\1"), "has no marker"),
    "segment past the end": (b"\xff\xd8\xff\xe1\xff\xff", "is cut short in segment FFE1"),
    "segment shorter than its length": (jpeg_with(b"\xff\xe1\0\1"), "is cut short in segment FFE1"),
    "two frames": (jpeg_with(segment(0xC0, struct.pack(">BHHB", 8, 9, 9, 1) + b"abc")), "has two frame headers"),
    "no height": (jpeg_with(segment(0xC0, struct.pack(">BHHB", 8, 0, 9, 1) + b"abc")), "names a size of 0 x 9"),
    "too wide for libjpeg": (jpeg_with(segment(0xC0, struct.pack(">BHHB", 8, 9, 65501, 1) + b"abc")), "names a size of 9 x 65501"),
    "12 bits": (jpeg_with(segment(0xC1, struct.pack(">BHHB", 12, 9, 9, 1) + b"abc")), "1 components of 12 bits"),
    "two components": (jpeg_with(segment(0xC0, struct.pack(">BHHB", 8, 9, 9, 2) + b"abcabc")), "2 components of 8 bits"),
    "frame of a wrong length": (jpeg_with(segment(0xC0, b"abc")), "wrong length"),
    "lossless": (jpeg_with(segment(0xC3, struct.pack(">BHHB", 8, 9, 9, 1) + b"abc")), "JPEG process 3"),
    "arithmetic": (jpeg_with(segment(0xC9, struct.pack(">BHHB", 8, 9, 9, 1) + b"abc")), "JPEG process 9"),
    "unknown marker": (jpeg_with(segment(0x37, b"abc")), "stray marker FF37"),
    "second start": (encode("JPEG")[:-2] + b"\xff\xd8\0\2" + END, "stray marker FFD8"),
    "thousands of scans": (encode("JPEG")[:-2] + segment(0xDA, b"") * 5000 + END, "more than 200 scans"),
    "fill bytes only": (b"\xff\xd8" + b"\xff" * 100_000, "has no marker"),
}
png = encode("PNG")
webp = encode("WEBP", lossless=True)
invalid_others = {
    "png without IHDR": (png[:8] + png[33:], "has no IHDR"),
    "png whose size was changed": (png[:16] + b"\0\0\0\1" + png[20:], "wrong checksum"),
    "png of no pixels": (png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 9, 8, 2, 0, 0, 0)) + png[33:], "names a size of 9 x 0"),
    "png of 7 bits": (png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 7, 2, 0, 0, 0)) + png[33:], "names no PNG format"),
    "png without IDAT": (png[:33] + chunk(b"IEND", b""), "has no IDAT"),
    "png chunk past the end": (png[:33] + b"\x7f\xff\xff\xffIDAT" + png[41:], "is cut short before its IEND"),
    "webp whose length lies": (webp[:4] + b"\xff\xff\xff\x7f" + webp[8:], "is cut short"),
    "webp chunk past the end": (riff(webp[12:16] + b"\xff\xff\0\0" + webp[20:]), "is cut short in chunk"),
    "webp without frame": (riff(webp_chunk(b"EXIF", b"abc")), "has no frame"),
    "webp of two sizes": (riff(webp_chunk(b"VP8X", bytes(10)) + webp[12:]), "on a canvas of (1, 1)"),
    "webp frame of garbage": (riff(webp_chunk(b"VP8L", b"garbage")), "frame header that cannot be read"),
    "animated webp": (encode("WEBP", save_all=True, append_images=[Image.fromarray(noise(23, 31)).resize((31, 24))]), "is animated"),
}


@pytest.mark.parametrize("name", invalid_jpegs | invalid_others)
def test_an_invalid_picture_is_told_why(name: str) -> None:
    data, reason = (invalid_jpegs | invalid_others)[name]
    header = examine_picture(data)
    assert reason in header.reason
    assert "\n" not in header.reason


def test_too_many_pixels_are_quarantined_before_anything_decodes_them(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    bomb = png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + png[33:]
    path = make_shard(tmp_path / "s.tar", [("bomb", {"png": bomb}), ("fine", {"png": png})])
    index = ShardIndex.open(path, decode=True)
    assert index.valid.tolist() == [False, True]
    assert index.reason(0) == "has 60000 x 60000 pixels; the limit is 64000000"


def test_exif_loops_and_garbage_cost_nothing_and_turn_nothing() -> None:
    loop = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 8)  # both pointers lead back to the start
    many = b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 0x0100, 4, 1, 0) * 5000
    outside = b"MM\0*\xff\xff\xff\xff"
    for tiff in (loop, many, outside, b"", b"II*\0", b"II*\0\x08\0\0\0", b"\0" * 100, os.urandom(60)):
        assert exif_orientation(tiff) is None
        assert examine_picture(jpeg_with(segment(0xE1, b"Exif\0\0" + tiff))).orientation == 1
    nine = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 9, 0)
    assert exif_orientation(nine) == 1


@pytest.mark.parametrize("prefix", [b"Exif\0\0" * times for times in (0, 1, 2, 3, 1000)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_one_whole_number_of_any_width_names_an_orientation_and_nothing_else_does(order: str, prefix: bytes) -> None:
    head = prefix + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 1)
    for kind, code, expected in ((1, "B3x", 6), (3, "H2x", 6), (4, "I", 6), (2, "B3x", None), (8, "H2x", None), (11, "I", None)):
        assert exif_orientation(head + struct.pack(f"{order}HHI{code}", 0x0112, kind, 1, 6)) == expected
        assert exif_orientation(head + struct.pack(f"{order}HHI{code}", 0x0112, kind, 2, 6)) is None
    assert exif_orientation(head + struct.pack(f"{order}HHII", 0x0112, 4, 1, 2**31)) == 1


corpus = [
    encode("JPEG"),
    jpeg_with(exif_thumbnail()),
    encode("JPEG", progressive=True),
    png,
    encode("PNG", exif=Image.Exif()),
    webp,
    encode("WEBP"),
]


@SAME_FOLDER
@given(
    picture=st.sampled_from(corpus),
    flips=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 5000),
)
@example(picture=b"", flips=[], cut=0)
def test_flipped_bytes_give_a_verdict_and_nothing_else(picture: bytes, flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(picture)
    for at, value in flips:
        data[at % max(len(data), 1) : at % max(len(data), 1) + 1] = bytes([value])
    header = examine_picture(bytes(data[: len(data) - cut] if cut < len(data) else data))
    if header.reason:
        assert "\n" not in header.reason
    else:
        assert min(header.height, header.width) > 0
        assert 1 <= header.orientation <= 8


@SAME_FOLDER
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 30),
    where=st.sampled_from(["first header", "any header", "anywhere"]),
    kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_flipped_bytes_in_a_tar_give_an_index_or_one_line(tmp_path: Path, seed: int, count: int, where: str, kind: int) -> None:
    path, draw = tmp_path / "s.tar", random.Random(seed)
    picture = encode("JPEG", 8, 8)
    with tarfile.open(path, "w", format=kind) as tar:
        for name in ("a.jpg", "a.cls", "é" * 70 + ".jpg" if kind != tarfile.USTAR_FORMAT else "b.jpg", "c.jpg"):
            header = tarfile.TarInfo(name)
            header.size = len(picture)
            tar.addfile(header, io.BytesIO(picture))
    raw = bytearray(path.read_bytes())
    headers = [at for at in range(0, len(raw), 512) if raw[at + 257 : at + 262] == b"ustar"]
    for _ in range(count):
        start = {"first header": 0, "any header": draw.choice(headers), "anywhere": draw.randrange(0, len(raw), 512)}[where]
        raw[start + draw.randrange(512)] = draw.randrange(256)
    for at in headers:  # a checksum that fits lets the damage through to what lies behind it
        if draw.random() < 0.7:
            raw[at + 148 : at + 156] = b" " * 8
            raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    path.write_bytes(raw)
    try:
        index = ShardIndex.open(path, beside=False)
    except ValueError as error:
        assert_one_line(error, "s.tar")
    else:
        assert (index.offset + index.length <= len(raw)).all()
        assert len(index.quarantine()) == index.invalid_count


@settings(SAME_FOLDER, max_examples=50)
@given(content=st.binary(max_size=3000))
def test_any_bytes_as_index_file_or_metadata_are_passed_over(tmp_path: Path, make_shard: Callable[..., Path], content: bytes) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    (tmp_path / ".wherefrom").mkdir(exist_ok=True)
    for name in (".wherefrom/s.tar.index", "s.idx", "_info.json"):
        (tmp_path / name).write_bytes(content)
    index = ShardIndex.open(path)
    assert (len(index), index.reused) == (2, 0)


def at_once(work: Callable[[], object], pipe: Path) -> object:
    """Return what `work` returns or raises; fail if it waits for somebody to write into the pipe."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except (OSError, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    waits = thread.is_alive()
    writer = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # lets it go
    thread.join(20)
    os.close(writer)
    assert not waits, f"waits at {pipe}"
    return outcome[0]


@pytest.mark.parametrize("name", ["_info.json", "info.json", "s.idx", ".wherefrom/s.tar.index", ".wherefrom"])
def test_a_pipe_in_the_place_of_metadata_or_an_index_keeps_nobody_waiting(
    tmp_path: Path, make_shard: Callable[..., Path], name: str
) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    pipe = tmp_path / name
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    index = at_once(lambda: ShardIndex.open(path), pipe)
    assert isinstance(index, ShardIndex) and (len(index), index.reused) == (2, 0)


def test_a_pipe_in_the_place_of_a_shard_is_one_line(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    index = ShardIndex.open(path)
    path.unlink()
    os.mkfifo(path)
    error = at_once(lambda: ShardReader(index).read(1), path)
    assert isinstance(error, ShardChangedError)
    assert_one_line(error, "s.tar", "not a regular file")
    error = at_once(lambda: scan_shard(path), path)
    assert isinstance(error, OSError)
    assert_one_line(error, "s.tar", "not a regular file")


def test_an_index_file_that_points_outside_the_shard_is_not_believed(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    table = scan_shard(two_samples(make_shard, tmp_path / "s.tar"))
    arrays = {name: getattr(table, name).copy() for name in table.__slots__}
    for name, value in (
        ("offset", -1),
        ("offset", 2**62),
        ("length", 2**63 - 1),
        ("source_size", 0),
        ("orientation", 9),
        ("key_ends", 99),
        ("format", 8),
    ):
        changed = arrays[name].copy()
        changed[-1] = value
        with pytest.raises(ValueError, match="fit"):
            type(table)(**(arrays | {name: changed}))
    with pytest.raises(ValueError, match="label is int64"):
        type(table)(**(arrays | {"label": np.zeros(3, np.int64)}))


def change_while_open(path: Path, how: str) -> None:
    raw, status = path.read_bytes(), path.stat()
    if how == "cut short":
        os.truncate(path, len(raw) // 3)
    elif how == "deleted":
        path.unlink()
    elif how == "rewritten":
        path.write_bytes(raw[::-1])
    elif how == "replaced":
        (path.parent / "new").write_bytes(raw + bytes(512))
        os.replace(path.parent / "new", path)
    elif how == "touched":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))


@pytest.mark.parametrize("how", ["cut short", "deleted", "rewritten", "replaced", "touched"])
def test_a_shard_that_changes_before_it_is_opened_is_a_named_error(tmp_path: Path, make_shard: Callable[..., Path], how: str) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    index = ShardIndex.open(path)
    change_while_open(path, how)
    with ShardReader(index) as reader, pytest.raises(ShardChangedError) as caught:
        reader.read(1)
    assert_one_line(caught.value, f"{path}:b", "wherefrom index PATTERN --rebuild")


def test_the_error_names_a_number_where_the_key_cannot_be_looked_up_any_more(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    index = ShardIndex.open(path)
    change_while_open(path, "cut short")
    file_beside(path).unlink()
    with ShardReader(index) as reader, pytest.raises(ShardChangedError, match=r"s\.tar:sample 1: the shard has"):
        reader.read(1)


@pytest.mark.parametrize("how", ["cut short", "rewritten", "touched"])
def test_a_shard_that_changes_while_it_is_open_is_a_named_error(tmp_path: Path, make_shard: Callable[..., Path], how: str) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    index = ShardIndex.open(path)
    with ShardReader(index) as reader:
        reader.read(1)
        change_while_open(path, how)
        with pytest.raises(ShardChangedError):
            reader.read(1)


def test_a_shard_deleted_or_replaced_while_it_is_open_still_gives_its_old_bytes(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    for how in ("deleted", "replaced"):
        path = two_samples(make_shard, tmp_path / f"{how}.tar")
        with ShardReader(ShardIndex.open(path)) as reader:
            before = reader.read(1).tobytes()
            change_while_open(path, how)
            assert reader.read(1).tobytes() == before


def test_threads_that_read_while_a_shard_is_cut_get_bytes_or_the_error(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    pictures = [encode("JPEG", 60, 60 + number) for number in range(30)]
    path = make_shard(tmp_path / "s.tar", [(f"k{number:02d}", {"jpg": picture}) for number, picture in enumerate(pictures)])
    index = ShardIndex.open(path)
    outcomes: list[str] = []

    def read_on() -> None:
        for sample in list(range(30)) * 20:
            try:
                fits = reader.read(sample).tobytes() == pictures[sample]
            except ShardChangedError:
                outcomes.append("named error")
                return
            outcomes.append("bytes" if fits else "wrong bytes")

    with ShardReader(index) as reader:
        threads = [threading.Thread(target=read_on) for _ in range(4)]
        for thread in threads:
            thread.start()
        os.truncate(path, 5000)
        for thread in threads:
            thread.join()
        with pytest.raises(ShardChangedError):
            reader.read(29)
    assert set(outcomes) <= {"bytes", "named error"}


def test_nothing_is_written_beside_a_shard_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"not a tar " * 200)
    with pytest.raises(BrokenShardError):
        ShardIndex.open(tmp_path / "s.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_settings_out_of_range_are_refused(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    path = two_samples(make_shard, tmp_path / "s.tar")
    with pytest.raises(ValueError, match="max_pixels=0"):
        ShardIndex.open(path, max_pixels=0)
    for setting, wrong in (("max_pixels", "5"), ("max_pixels", None), ("workers", "2")):
        with pytest.raises(ValueError, match=f"^{setting}={wrong!r}: needs a whole number"):
            ShardIndex.open(path, **{setting: wrong})
    with pytest.raises(TypeError, match=r"^cache=3: needs a folder, or None for the user's cache folder$"):
        ShardIndex.open(path, cache=3)
    with pytest.raises(ValueError, match="workers=0"):
        ShardIndex.open(path, workers=0)
    with pytest.raises(ValueError, match="max_open=0"):
        ShardReader(ShardIndex.open(path), max_open=0)
