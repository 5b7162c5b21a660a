"""The shard index and reader on good shards: against Python's tarfile, webdataset's reader, Pillow, and brute force."""

import errno
import io
import json
import logging
import os
import shutil
import sys
import tarfile
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load, save
from webdataset.tariterators import group_by_keys

from wherefrom.pipeline.shards import store
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.labels import LabelRule
from wherefrom.pipeline.shards.pattern import expand_pattern
from wherefrom.pipeline.shards.picture_headers import FORMATS, examine_picture
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.shards.storage import LocalStorage
from wherefrom.pipeline.shards.store import file_beside, load_table, stored_tables
from wherefrom.pipeline.shards.table import ShardTable, scan_shard, stamp_of
from wherefrom.pipeline.shards.tar_members import walk_tar
from wherefrom.tools.index import index_command

pytestmark = pytest.mark.core

SAME_FOLDER = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TAR_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder for one test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("WHEREFROM_CACHE", str(folder))
    return folder


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encode(picture: Image.Image, kind: str, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    picture.save(encoded, kind, exif=exif.tobytes() if orientation != 1 else b"", **options)
    return encoded.getvalue()


@pytest.fixture
def shards(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> list[Path]:
    """Three shards of 4, 0 and 3 pictures with classes 0 to 6 and a side that tells the sample."""
    (tmp_path / "data").mkdir()
    pictures = [jpeg_bytes(noise(16 + sample, 24, seed=sample)) for sample in range(7)]
    samples = [(f"picture{sample}", {"jpg": picture, "cls": b"%d" % sample}) for sample, picture in enumerate(pictures)]
    parts = [samples[:4], [("note", {"txt": b"no picture"})], samples[4:]]
    return [make_shard(tmp_path / "data" / f"train-{number:06d}.tar", part) for number, part in enumerate(parts)]


def synthetic_table(valid: NDArray[np.bool_], size: int = 1 << 30) -> ShardTable:
    """A table as a scan would make it, of samples that are nowhere."""
    n, invalid = len(valid), np.flatnonzero(~valid)
    keys = b"".join(b"%08d" % row for row in range(n))
    return ShardTable(
        stamp=np.array([1, size, 0]),
        audited=np.array([False]),
        offset=np.arange(n),
        length=np.ones(n, np.int64),
        label=np.full(n, -1),
        source_size=np.full((n, 2), 8, np.int32),
        orientation=np.ones(n, np.uint8),
        format=np.ones(n, np.uint8),
        keys=np.frombuffer(keys, np.uint8),
        key_ends=8 * np.arange(1, n + 1),
        invalid=invalid,
        reasons=np.frombuffer(b"x" * len(invalid), np.uint8),
        undecodable=np.empty(0, np.int64),
        reason_ends=np.arange(1, len(invalid) + 1),
        extensions=np.empty(0, np.uint8),
        extension_ends=np.empty(0, np.int64),
        extension_counts=np.empty(0, np.int64),
    )


def synthetic_index(*tables: ShardTable) -> ShardIndex:
    return ShardIndex([f"{shard}.tar" for shard in range(len(tables))], tables, files=[None] * len(tables))


# a name without NUL, and no trailing slash: tarfile itself changes those
member_names = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=90).map(
        lambda name: name.rstrip("/") or "x"
    )
    | st.sampled_from(["d/" * 70 + "deep.jpg", "long" * 60 + ".jpg", "é" * 80 + ".png", "./a.jpg"]),
    max_size=6,
)


@SAME_FOLDER
@given(names=member_names, kind=st.sampled_from(["gnu", "pax"]), data=st.data())
def test_members_lie_where_tarfile_says(tmp_path: Path, names: list[str], kind: str, data: st.DataObject) -> None:
    path = tmp_path / "any.tar"
    with tarfile.open(path, "w", format=TAR_FORMATS[kind]) as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.type = data.draw(st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE]))
            header.mtime = 1.5  # makes a PAX header of its own
            header.linkname = "elsewhere" * data.draw(st.integers(1, 20)) if header.issym() else ""
            header.size = data.draw(st.sampled_from([0, 1, 511, 512, 513])) if header.isreg() else 0
            tar.addfile(header, io.BytesIO(bytes(header.size)))
    with tarfile.open(path) as tar:
        expected = [(member.name.rstrip("/"), member.offset_data, member.size, member.isreg()) for member in tar]
    found = list(walk_tar(LocalStorage().open(str(path)), path.stat().st_size))
    # tarfile says nothing of use about where the empty content of a link or a folder lies
    seen = [(os.fsdecode(member.name).rstrip("/"), member.offset, member.length, member.kind == "file") for member in found]
    assert [one[:1] + one[2:] for one in seen] == [one[:1] + one[2:] for one in expected]
    assert [one[1] for one in seen if one[3]] == [one[1] for one in expected if one[3]]


def test_ustar_prefixes_and_base_256_sizes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "any.tar"
    name = "folder/" * 20 + "picture.jpg"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        header = tarfile.TarInfo(name)
        header.size = 700
        tar.addfile(header, io.BytesIO(bytes(700)))
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\x80" + (700).to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    (member,) = walk_tar(LocalStorage().open(str(path)), len(raw))
    assert (member.name.decode(), member.offset, member.length) == (name, 512, 700)


extensions = st.sampled_from(["jpg", "JPEG", "png", "cls", "json", "left.jpg", "seg.png", ""])
sample_names = st.tuples(st.sampled_from(["a", "b", "dir/a", "x.y/a", "__meta__", ".hidden", "."]), extensions).map(".".join)


@SAME_FOLDER
@given(names=st.lists(sample_names, max_size=12, unique=True))
def test_samples_are_those_of_webdataset(tmp_path: Path, jpeg_bytes: Callable[..., bytes], names: list[str]) -> None:
    """Also where keys hold dots and folders; where a key comes twice, both list it twice."""
    path = tmp_path / "any.tar"
    picture = jpeg_bytes(noise(8, 8))
    with tarfile.open(path, "w") as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = len(picture)
            tar.addfile(header, io.BytesIO(picture))
    files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": path.open("rb")}])
    theirs = [sample["__key__"] for sample in group_by_keys(files) if {"jpg", "jpeg", "png", "webp"} & sample.keys()]
    table = scan_shard(path)
    assert [table.key(row) for row in range(len(table))] == theirs


def test_bytes_and_classes_are_those_that_webdataset_wrote(tmp_path: Path, jpeg_bytes: Callable[..., bytes]) -> None:
    pictures = [jpeg_bytes(noise(9 + sample, 11, seed=sample)) for sample in range(10)]
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=4, verbose=0) as writer:
        for sample, picture in enumerate(pictures):
            writer.write({"__key__": f"n{sample:04d}", "jpg": picture, "cls": sample % 3, "json": {"n": sample}})
    index = ShardIndex.open(tmp_path)
    assert [index.key(sample) for sample in range(10)] == [f"n{sample:04d}" for sample in range(10)]
    assert index.label.tolist() == [sample % 3 for sample in range(10)]
    assert index.shard_lengths.tolist() == [4, 4, 2]
    assert index.unread_members == {"json": 10}
    with ShardReader(index) as reader:
        assert [reader.read(sample).tobytes() for sample in range(10)] == pictures


def assert_examined_as_pillow(data: bytes) -> None:
    header = examine_picture(data)
    with Image.open(io.BytesIO(data)) as picture:
        orientation = picture.getexif().get(0x0112, 1)
        width, height = picture.size
    upright = (width, height) if orientation > 4 else (height, width)
    assert (header.reason, (header.height, header.width), header.orientation) == ("", upright, orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_size_and_orientation_agree_with_pillow(kind: str, orientation: int) -> None:
    data = encode(Image.fromarray(noise(20, 31)), kind, orientation)
    assert_examined_as_pillow(data)
    assert FORMATS[examine_picture(data).format] == kind.lower()


def test_big_endian_exif_and_exif_behind_the_pixels_turn_too() -> None:
    jpeg = encode(Image.fromarray(noise(20, 31)), "JPEG", 6)
    intel, motorola = b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"
    start = jpeg.index(b"Exif\0\0") + 6
    entry = b"\0\x01" + b"\x01\x12" + b"\0\x03" + b"\0\0\0\x01" + b"\0\x06\0\0"
    assert jpeg[start : start + 4] in (intel[:4], motorola[:4])
    length = int.from_bytes(jpeg[start - 8 : start - 6], "big") - 8
    turned = jpeg[:start] + (motorola + entry).ljust(length, b"\0") + jpeg[start + length :]
    assert_examined_as_pillow(turned)
    png = encode(Image.fromarray(noise(20, 31)), "PNG", 6)
    at = png.index(b"eXIf") - 4
    chunk = png[at : at + 12 + int.from_bytes(png[at : at + 4], "big")]
    rest = png.replace(chunk, b"")
    assert_examined_as_pillow(rest[:-12] + chunk + rest[-12:])


ODD_PICTURES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "gray": (Image.fromarray(noise(5, 7, 1)), "JPEG", {}),
    "cmyk": (Image.fromarray(noise(5, 7, 4), "CMYK"), "JPEG", {}),
    "progressive": (Image.fromarray(noise(40, 70)), "JPEG", {"progressive": True}),
    "restarts": (Image.fromarray(noise(40, 70)), "JPEG", {"restart_marker_blocks": 1}),
    "1x1 jpeg": (Image.fromarray(noise(1, 1)), "JPEG", {}),
    "10000x10 jpeg": (Image.fromarray(noise(10, 10000)), "JPEG", {}),
    "10x10000 jpeg": (Image.fromarray(noise(10000, 10)), "JPEG", {}),
    "rgba png": (Image.fromarray(noise(5, 7, 4)), "PNG", {}),
    "gray alpha png": (Image.fromarray(noise(5, 7, 2)), "PNG", {}),
    "palette png": (Image.fromarray(noise(5, 7)).quantize(9), "PNG", {}),
    "1-bit png": (Image.fromarray(noise(5, 7, 1)).convert("1"), "PNG", {}),
    "16-bit png": (Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7)), "PNG", {}),
    "1x1 png": (Image.fromarray(noise(1, 1)), "PNG", {}),
    "10000x10 png": (Image.fromarray(noise(10, 10000)), "PNG", {}),
    "webp": (Image.fromarray(noise(5, 7)), "WEBP", {}),
    "lossless webp": (Image.fromarray(noise(5, 7)), "WEBP", {"lossless": True}),
    "rgba webp": (Image.fromarray(noise(5, 7, 4)), "WEBP", {}),
    "10000x10 webp": (Image.fromarray(noise(10, 10000)), "WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_odd_pictures_are_valid_and_have_pillows_size(name: str) -> None:
    picture, kind, options = ODD_PICTURES[name]
    assert_examined_as_pillow(encode(picture, kind, **options))


def test_bytes_behind_the_end_marker_are_fine(jpeg_bytes: Callable[..., bytes]) -> None:
    assert examine_picture(jpeg_bytes(noise(8, 8)) + b"appended" * 100).reason == ""


def test_the_bytes_tell_the_format_not_the_name(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    png = encode(Image.fromarray(noise(8, 9)), "PNG")
    index = ShardIndex.open(make_shard(tmp_path / "s.tar", [("a", {"jpg": png})]))
    assert index.valid.all()
    assert FORMATS[index.format[0]] == "png"


def test_one_picture_a_key_by_a_fixed_preference(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> None:
    mask, photo = encode(Image.fromarray(noise(8, 9)), "PNG"), jpeg_bytes(noise(8, 9))
    for number, members in enumerate(({"png": mask, "jpg": photo}, {"jpg": photo, "png": mask})):
        index = ShardIndex.open(make_shard(tmp_path / f"{number}.tar", [("a", members)]))
        assert [FORMATS[code] for code in index.format] == ["jpeg"]
        assert index.unread_members == {"png beside jpg": 1}


@pytest.mark.parametrize(
    ("text", "label"), [(b"7", 7), (b" 12\n", 12), (b"-1", -1), (b"cat", -1), (b"9" * 30, -1), (b"", -1), (b"1_0", -1)]
)
def test_a_class_is_a_decimal_number_or_none(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], text: bytes, label: int
) -> None:
    index = ShardIndex.open(make_shard(tmp_path / "s.tar", [("a", {"cls": text, "jpg": jpeg_bytes(noise(8, 8))})]))
    assert index.label.tolist() == [label]
    assert (index.unread_members == {"cls (not a number)": 1}) == (label == -1 and text != b"-1")


def test_photographs_agree_with_pillow(photographs: Path) -> None:
    index = ShardIndex.open(photographs / "imagenet-sample", beside=False)
    assert len(index) == 250
    with ShardReader(index) as reader:
        for sample in range(0, 250, 5):
            with Image.open(io.BytesIO(reader.read(sample).tobytes())) as picture:
                assert tuple(index.source_size[sample].tolist()) == (picture.height, picture.width)


def test_patterns_name_the_same_shards_in_order(shards: list[Path]) -> None:
    folder = shards[0].parent
    expected = [str(path) for path in shards]
    assert expand_pattern(folder) == expected
    assert expand_pattern(f"{folder}/train-{{000000..000002}}.tar") == expected
    assert expand_pattern(f"{folder}/*.tar") == expected
    assert expand_pattern("::".join(expected[::-1])) == expected[::-1]
    assert expand_pattern(f"{folder}/train-{{000002,000000}}.tar") == [expected[2], expected[0]]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    for name in ("a{1..2}.tar", "b[x].tar"):
        (tmp_path / name).touch()
        assert expand_pattern(tmp_path / name) == [str(tmp_path / name)]


def test_ids_are_ordinals_in_the_given_order(shards: list[Path]) -> None:
    index = ShardIndex.open(shards[::-1])
    assert [index.key(sample) for sample in range(7)] == [f"picture{sample}" for sample in (4, 5, 6, 0, 1, 2, 3)]
    assert index.shard.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert index.shard_lengths.tolist() == [3, 0, 4]
    assert index.source_size[:, 0].tolist() == [20, 21, 22, 16, 17, 18, 19]
    with pytest.raises(IndexError, match="sample 7 of 7"):
        index.key(7)
    with pytest.raises(IndexError, match="sample -1 of 7"):
        index.replacement([0, -1])


def test_a_stored_index_is_reused_and_only_missing_ones_are_built(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    scanned: list[str] = []

    def counted(shard: str, labels: LabelRule) -> ShardTable:
        scanned.append(Path(shard).name)
        return scan_shard(shard, labels)

    monkeypatch.setattr(store, "scan_shard", counted)
    first = ShardIndex.open(shards)
    assert sorted(scanned) == [shard.name for shard in shards]
    assert first.files == tuple(file_beside(shard) for shard in shards)
    scanned.clear()
    second = ShardIndex.open(shards)
    assert (scanned, second.reused, second.fingerprint) == ([], 3, first.fingerprint)
    file_beside(shards[2]).unlink()
    assert ShardIndex.open(shards).reused == 2
    assert scanned == [shards[2].name]
    assert ShardIndex.open(shards, rebuild=True).reused == 0


def test_a_changed_shard_is_read_again(shards: list[Path], make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> None:
    before = ShardIndex.open(shards)
    make_shard(shards[2], [("other", {"jpg": jpeg_bytes(noise(50, 60))})])
    index = ShardIndex.open(shards)
    assert (len(index), index.reused, index.key(4)) == (5, 2, "other")
    assert index.fingerprint != before.fingerprint
    status = shards[0].stat()
    os.utime(shards[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert ShardIndex.open(shards).reused == 2


def test_a_rotten_index_file_is_never_believed(shards: list[Path]) -> None:
    """One flipped bit, wherever it is, or a file that ends early costs another scan; nothing of it is used."""
    expected = ShardIndex.open(shards[0])
    file, stamp = file_beside(shards[0]), stamp_of(shards[0])
    whole = file.read_bytes()
    table = load_table(file, stamp)
    assert table is not None
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert load_table(file, stamp) is None
    for size in range(0, len(whole), 31):
        file.write_bytes(whole[:size])
        assert load_table(file, stamp) is None
    index = ShardIndex.open(shards[0])
    assert (index.reused, index.fingerprint) == (0, expected.fingerprint)
    assert file.read_bytes() == whole


def test_an_index_file_of_an_earlier_format_is_built_again(shards: list[Path]) -> None:
    """Format 2 had other names for two arrays; its checksum held."""
    ShardIndex.open(shards[0], decode=True)
    file, stamp = file_beside(shards[0]), stamp_of(shards[0])
    arrays = load(file.read_bytes())
    for checksummed, renamed in ((False, False), (True, False), (True, True)):
        old = {name: array for name, array in arrays.items() if name != "checksum"}
        old["stamp"] = old["stamp"] + [-1, 0, 0]
        if renamed:
            old["unsound"], old["decoded"] = old.pop("invalid"), old.pop("audited")
        old["checksum"] = np.frombuffer(store._checksum(old), np.uint8) if checksummed else arrays["checksum"]
        file.write_bytes(save(old))
        assert load_table(file, stamp) is None
        index = ShardIndex.open(shards[0])
        assert (index.reused, index.audited, len(index)) == (0, False, 4)


def test_a_read_only_folder_falls_back_to_the_cache_and_says_so(shards: list[Path], cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shards[0].parent
    folder.chmod(0o555)
    try:
        with caplog.at_level(logging.WARNING):
            index = ShardIndex.open(shards)
        assert all(file is not None and file.is_relative_to(cache) for file in index.files)
        assert f"nothing can be written beside {shards[0]}: its index lies in {cache / 'indexes'} (3 shards)" in caplog.text
        assert sorted(path.name for path in folder.iterdir()) == [shard.name for shard in shards]
        assert ShardIndex.open(shards).reused == 3
    finally:
        folder.chmod(0o755)


def test_the_cache_may_be_named_by_a_text(shards: list[Path], tmp_path: Path) -> None:
    for reused in (0, 1):
        index = ShardIndex.open(shards[0], cache=str(tmp_path / "named"), beside=False)
        assert index.reused == reused
        assert index.files[0] is not None
        assert index.files[0].parent == tmp_path / "named" / "indexes"


def test_an_index_folder_that_may_not_be_entered_holds_nothing(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user's, whose mode keeps all others out; root enters it, so the system's answer is a stub."""

    def entered_by_nobody(call: Callable[..., Any]) -> Callable[..., Any]:
        def refused(path: Any, *given: Any, **named: Any) -> Any:
            if not isinstance(path, int) and f"{os.sep}.wherefrom{os.sep}" in os.fspath(path):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return call(path, *given, **named)

        return refused

    for name in ("stat", "open"):
        monkeypatch.setattr(os, name, entered_by_nobody(getattr(os, name)))
    assert [(state.stored, state.stale) for state in stored_tables([str(shards[0])])] == [(None, False)]


def test_an_audit_that_had_to_go_to_the_cache_is_found_there(shards: list[Path], cache: Path) -> None:
    folder = shards[0].parent
    assert not ShardIndex.open(shards).audited
    for place in (folder / ".wherefrom", folder):
        place.chmod(0o555)
    try:
        assert ShardIndex.open(shards, decode=True).audited
        again = ShardIndex.open(shards)
        assert again.audited and again.reused == 3
        assert all(file is not None and file.is_relative_to(cache) for file in again.files)
    finally:
        for place in (folder, folder / ".wherefrom"):
            place.chmod(0o755)


@pytest.mark.parametrize("wrong", [None, 3, b"train.tar", ["train.tar", 3], [b"train.tar"]])
def test_what_is_no_path_is_refused_in_one_line(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"^.* names no shards; give a path or a pattern, or several of them in a list$"):
        ShardIndex.open(wrong)  # type: ignore[arg-type]


def test_without_any_place_to_write_the_index_lives_in_memory(
    shards: list[Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards[0].parent.chmod(0o555)
    (tmp_path / "file").touch()
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "file"))
    try:
        index = ShardIndex.open(shards)
    finally:
        shards[0].parent.chmod(0o755)
    assert index.files == (None, None, None)
    assert [index.key(sample) for sample in (0, 6)] == ["picture0", "picture6"]
    assert any("could not be stored" in note for note in index.notes)


def test_many_builders_at_once_agree_and_leave_nothing_half(shards: list[Path]) -> None:
    with ThreadPoolExecutor(8) as pool:
        prints = {index.fingerprint for index in pool.map(lambda _: ShardIndex.open(shards, rebuild=True), range(16))}
    assert len(prints) == 1
    assert sorted(path for path in shards[0].parent.rglob("*") if path.is_file()) == sorted([*shards, *map(file_beside, shards)])


def test_progress_counts_every_shard_once(shards: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    ShardIndex.open(shards, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_index_files_lie_in_one_folder_beside_the_shards(shards: list[Path]) -> None:
    ShardIndex.open(shards)
    folder = shards[0].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted([".wherefrom", *(path.name for path in shards)])
    assert all(file.parent == folder / ".wherefrom" for file in map(file_beside, shards))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"cls": b"dog"}, "3 .cls members hold no whole number, so their samples have no label"),
        ({"json": b"{}"}, "3 of 4 samples have no label, and 3 .json members are not read; --labels json.FIELD does"),
        ({"cls": b"7"}, None),
        ({"cls": b"7", "json": b"{}"}, None),
        ({}, "3 of 4 samples have no label, first SHARD:k1; the others have"),
    ],
)
def test_labels_that_are_not_read_are_counted_where_the_index_opens(
    tmp_path: Path,
    make_shard: Callable[..., Path],
    jpeg_bytes: Callable[..., bytes],
    caplog: pytest.LogCaptureFixture,
    members: dict[str, bytes],
    words: str | None,
) -> None:
    samples = [(f"k{n}", {"jpg": jpeg_bytes(noise(9, 9)), **(members if n else {"cls": b"1"})}) for n in range(4)]
    shard = make_shard(tmp_path / "s.tar", samples)
    for _ in range(2):  # read, and found stored
        caplog.clear()
        ShardIndex.open(shard)
        said = [record.getMessage().removeprefix(f"{shard}: ").replace(str(shard), "SHARD") for record in caplog.records]
        assert [note.split("; --labels cls")[0] for note in said] == ([words] if words else [])


def test_the_digest_of_invalid_samples_tells_what_is_replaced_and_nothing_more(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    good = jpeg_bytes(noise(40, 50))
    cut = good[: len(good) // 2] + b"\xff\xd9"
    shard = make_shard(tmp_path / "s.tar", [(f"k{n}", {"jpg": cut if n == 2 else good}) for n in range(5)])
    before, audited, small = ShardIndex.open(shard), ShardIndex.open(shard, decode=True), ShardIndex.open(shard, max_pixels=999)
    assert (before.audited, audited.audited, ShardIndex.open(shard).audited) == (False, True, True)
    assert (before.invalid_count, audited.invalid_count, small.invalid_count) == (0, 1, 5)
    as_opened = before.invalid_digest(audit=True)
    before.mark_invalid(2, "found on the way")
    assert {before.invalid_digest(audit=audit) for audit in (False, True)} == {as_opened, audited.invalid_digest(audit=False)}
    assert len({as_opened, audited.invalid_digest(audit=True), small.invalid_digest(audit=False)}) == 3
    assert small.invalid_digest(audit=False) == small.invalid_digest(audit=True)
    assert not ShardIndex.open(shard, max_pixels=10**9).audited  # the audit leaves the largest alone


def test_the_fingerprint_depends_on_the_data_alone(
    shards: list[Path], tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    index = ShardIndex.open(shards)
    copied = shutil.copytree(
        shards[0].parent, tmp_path / "elsewhere", ignore=shutil.ignore_patterns(".wherefrom"), copy_function=shutil.copy
    )
    same = [
        ShardIndex.open(copied),
        ShardIndex.open(shards, max_pixels=1),
        ShardIndex.open(shards, decode=True),
    ]
    same[0].mark_invalid(2, "for the test")
    assert {one.fingerprint for one in same} == {index.fingerprint}
    prints = {index.fingerprint, ShardIndex.open(shards[::-1]).fingerprint, ShardIndex.open(shards[:2]).fingerprint}
    base = {"jpg": jpeg_bytes(noise(8, 8)), "cls": b"1"}
    for number, (key, members) in enumerate(
        [("a", base), ("b", base), ("a", base | {"cls": b"2"}), ("a", base | {"jpg": base["jpg"] + b"x"})]
    ):
        (tmp_path / str(number)).mkdir()
        prints.add(ShardIndex.open(make_shard(tmp_path / str(number) / "s.tar", [(key, members)])).fingerprint)
    assert len(prints) == 7


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any),
    data=st.data(),
)
@settings(deadline=None)
def test_replacement_is_the_next_valid_id_cyclically(lengths: list[int], data: st.DataObject) -> None:
    masks = [np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool) for n in lengths]
    index = synthetic_index(*(synthetic_table(mask) for mask in masks))
    marked = data.draw(st.sets(st.integers(0, len(index) - 1)))
    index.replacement(np.flatnonzero(index.valid))  # whatever it remembers must not survive what follows
    for sample in marked:
        index.mark_invalid(sample, "for the test")
    valid = np.concatenate(masks)
    valid[list(marked)] = False
    ids = np.arange(len(index))
    if not valid.any():
        with pytest.raises(ValueError, match=f"none of the {len(index)} samples is valid"):
            index.replacement(ids)
        return
    expected = [next(other % len(ids) for other in range(i, i + len(ids)) if valid[other % len(ids)]) for i in ids]
    assert index.replacement(ids).tolist() == expected
    assert index.replacement(ids.reshape(1, -1)).tolist() == [expected]
    assert index.invalid_count == np.count_nonzero(~valid)


def test_marking_from_many_threads_loses_nothing_and_moves_nothing() -> None:
    index = synthetic_index(synthetic_table(np.ones(1000, bool)))
    before = (len(index), index.fingerprint, index.source_size.copy())
    news: list[bool] = []

    def mark_all() -> None:
        for sample in range(0, 1000, 2):
            news.append(index.mark_invalid(sample, f"reason {sample}"))
            index.replacement(np.arange(1000))

    threads = [threading.Thread(target=mark_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(news) == 500
    assert [entry.id for entry in index.quarantine()] == list(range(0, 1000, 2))
    assert index.quarantine()[3].reason == "reason 6"
    assert (len(index), index.fingerprint) == before[:2]
    assert np.array_equal(index.source_size, before[2])
    with pytest.raises(ValueError, match="read-only"):
        index.valid[0] = True


def test_the_quarantine_is_listed_written_and_counted_aloud(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    good, large = jpeg_bytes(noise(8, 8)), jpeg_bytes(noise(100, 100))
    shard = make_shard(tmp_path / "s.tar", [("fine", {"jpg": good}), ("cut\n[red]", {"jpg": good[:-2]}), ("large", {"jpg": large})])
    with caplog.at_level(logging.WARNING):
        index = ShardIndex.open(shard, max_pixels=5000)
    assert index.valid.tolist() == [True, False, False]
    assert caplog.text.count("2 of 3 samples are invalid") == 1
    assert [(entry.id, entry.key, entry.reason) for entry in index.quarantine()] == [
        (1, "cut\n[red]", "has no end marker after its last scan"),
        (2, "large", "has 100 x 100 pixels; the limit is 5000"),
    ]
    index.mark_invalid(0, "found on the way")
    index.write_quarantine(tmp_path / "quarantine.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert lines[0] == {"id": 0, "key": "fine", "shard": str(shard), "reason": "found on the way"}
    assert [line["key"] for line in lines] == ["fine", "cut\n[red]", "large"]
    assert [path.name for path in tmp_path.glob(".*.writing")] == []
    assert "\n" not in index.name(1)
    assert ShardIndex.open(shard).valid.tolist() == [True, False, True]


def test_decoding_finds_what_headers_cannot_show_and_is_remembered(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    good = jpeg_bytes(noise(64, 64))
    half = good[: len(good) // 2] + b"\xff\xd9"
    turned = jpeg_bytes(noise(20, 30), exif_orientation=6)
    png = encode(Image.fromarray(noise(30, 30)), "PNG")
    at = png.index(b"IDAT") + 40
    torn = png[:at] + bytes(byte ^ 255 for byte in png[at : at + 20]) + png[at + 20 :]
    idat, iend = torn.index(b"IDAT"), torn.index(b"IEND")
    torn = torn[: iend - 8] + zlib.crc32(torn[idat : iend - 8]).to_bytes(4, "big") + torn[iend - 4 :]  # one IDAT, its checksum right again
    samples = [
        ("good", {"jpg": good}),
        ("half", {"jpg": half}),
        ("turned", {"jpg": turned}),
        ("torn", {"png": torn}),
        ("png", {"png": png}),
    ]
    shard = make_shard(tmp_path / "s.tar", samples)
    assert ShardIndex.open(shard).valid.all()
    audited = ShardIndex.open(shard, decode=True)
    assert audited.valid.tolist() == [True, False, True, False, True]
    assert all(entry.reason.startswith("does not decode") for entry in audited.quarantine())
    again = ShardIndex.open(shard)
    assert again.reused == 1
    assert again.valid.tolist() == audited.valid.tolist()


def test_an_index_of_a_million_samples_is_arrays_alone() -> None:
    tables = [synthetic_table(np.ones(1300, bool)) for _ in range(10)] * 100
    tracemalloc.start()
    try:
        index = synthetic_index(*tables)
        held = tracemalloc.get_traced_memory()[0]
        ids = np.arange(0, len(index), 1000)
        index.replacement(ids)
        assert tracemalloc.get_traced_memory()[0] - held < 8 * len(ids) + 10_000
    finally:
        tracemalloc.stop()
    assert len(index) == 1_300_000
    assert held < 48 * len(index)  # 42 bytes are the arrays; one Python number more a sample would be 28


def test_other_indexes_are_a_cross_check_and_never_the_truth(shards: list[Path]) -> None:
    shards[0].with_suffix(".idx").write_text("v1.2 4\njpg 512 10 a.jpg\n")
    info = {"splits": {"train": {"filenames": [shard.name for shard in shards], "shard_lengths": [4, 0, 3], "num_samples": 7}}}
    (shards[0].parent / "_info.json").write_text(json.dumps(info))
    agreeing = ShardIndex.open(shards)
    assert not [note for note in agreeing.notes if "names" in note]
    shards[0].with_suffix(".idx").write_text("v1.2 5\njpg 512 10 a.jpg\n")
    info["splits"]["train"]["shard_lengths"] = [4, 0, 9]
    (shards[0].parent / "_info.json").write_text(json.dumps(info))
    differing = ShardIndex.open(shards)
    assert len(differing) == 7
    assert [note for note in differing.notes if "names" in note] == [
        f"{shards[0]}: 4 samples with a picture, its DALI index names 5; the shard itself is believed",
        f"{shards[2]}: 3 samples with a picture, _info.json names 9; the shard itself is believed",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"splits": 3}',
        '{"splits": {"a": {"filenames": 1}}}',
        '{"splits": {"a": {"filenames": ["x"], "shard_lengths": [Infinity]}}}',
        "\0" * 100,
    ],
)
def test_damaged_metadata_is_passed_over(shards: list[Path], text: str) -> None:
    (shards[0].parent / "_info.json").write_text(text)
    shards[0].with_suffix(".idx").write_text(text)
    assert len(ShardIndex.open(shards)) == 7


def test_reading_gives_the_bytes_that_tarfile_gives(shards: list[Path]) -> None:
    index = ShardIndex.open(shards)
    expected = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            expected += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    buffer = np.full(int(index.length.max()) + 5, 7, np.uint8)
    with ShardReader(index) as reader:
        for sample, data in enumerate(expected):
            assert reader.read(sample).tobytes() == data
            view = reader.read(sample, buffer)
            assert view.tobytes() == data
            assert np.shares_memory(view, buffer)
        assert buffer[-5:].tolist() == [7] * 5
        with pytest.raises(ValueError, match="buffer holds 3 bytes"):
            reader.read(0, buffer[:3])
        with pytest.raises(IndexError, match="sample 7 of 7"):
            reader.read(7)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_few_descriptors_serve_many_shards_and_threads_and_none_is_left(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    pictures = [jpeg_bytes(noise(8 + number, 8, seed=number)) for number in range(20)]
    index = ShardIndex.open([make_shard(tmp_path / f"{n:02d}.tar", [("a", {"jpg": picture})]) for n, picture in enumerate(pictures)])
    before = open_descriptors()
    reader = ShardReader(index, max_open=3)
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, 20, 2000).tolist()
        read = list(pool.map(lambda sample: reader.read(sample).tobytes() == pictures[sample], order))
    assert all(read)
    assert open_descriptors() - before == 3
    reader.close()
    reader.close()
    assert open_descriptors() == before
    with pytest.raises(ValueError, match="closed"):
        reader.read(0)
    assert open_descriptors() == before


def test_the_command_explains_in_plain_text(shards: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert index_command(str(shards[0].parent), quarantine=tmp_path / "bad.jsonl") == 0
    text = capsys.readouterr().out
    for expected in ("7: 7 valid, 0 quarantined", "16 / 19 / 22 px", "24 px", "7 jpeg", "7, numbered 0 to 6", "1 txt", "0 reused, 3 built"):
        assert expected in text
    assert "\x1b" not in text
    assert (tmp_path / "bad.jsonl").read_text() == ""
    index_command(str(shards[0].parent))
    assert "3 reused, 0 built" in capsys.readouterr().out


def test_the_command_lists_the_quarantine_and_obeys_no_text_from_a_shard(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    good = jpeg_bytes(noise(8, 8))
    bad = [(f"[bold]{number}\x1b[31m", {"jpg": good[:-2]}) for number in range(5)]
    index_command(str(make_shard(tmp_path / "s.tar", [("good", {"jpg": good}), *bad])), list_quarantine=2)
    text = capsys.readouterr().out
    assert "[bold]1\\x1b[31m has no end marker" in text
    assert "[bold]2" not in text
    assert "3 more are quarantined" in text
    assert "\x1b" not in text


def test_parquet_is_answered_by_the_command_that_packs_it(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    for pattern in (tmp_path / "train-0.parquet", f"{tmp_path}/*.parquet"):
        with pytest.raises(ValueError, match=r"train-0\.parquet: .*`wherefrom pack` makes shards of it"):
            ShardIndex.open(pattern)


def test_a_picture_in_place_of_a_shard_is_answered_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "cat.JPG").write_bytes(b"\xff\xd8")
    for pattern in (tmp_path / "cat.JPG", f"{tmp_path}/*.JPG"):
        with pytest.raises(ValueError, match=r"cat\.JPG: is a picture, not a shard; name the folder that it lies in"):
            ShardIndex.open(pattern)
