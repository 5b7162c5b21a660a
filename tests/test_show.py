"""One picture looked up: its place against tarfile's, its pixels against Pillow's, keys against comparing every one of them by hand."""

import hashlib
import io
import re
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wherefrom.pipeline import ShardIndex
from wherefrom.pipeline.shards import index as index_module
from wherefrom.pipeline.shards.key_search import nearest_rows, rows_of_key
from wherefrom.tools.show import show_command

pytestmark = pytest.mark.core


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png_bytes(picture: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def source(make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path) -> Path:
    """Two shards: a.tar with keys cat, dog, 7 and bird, b.tar with dog, 0, link (damaged) and tail (damaged in its pixels)."""
    folder = tmp_path / "shards"
    folder.mkdir()
    turned = jpeg_bytes(noise(40, 60), exif_orientation=6)
    damaged = bytearray(jpeg_bytes(noise(64, 64, 5)))
    scan = damaged.index(b"\xff\xda") + 14
    damaged[scan + 40 : scan + 80] = b"\xff\x00" * 20
    damaged[scan + 80 : scan + 160] = bytes(80)
    make_shard(
        folder / "a.tar",
        [
            ("cat", {"jpg": turned, "cls": b"3"}),
            ("dog", {"jpg": jpeg_bytes(noise(30, 50, 1)), "cls": b"4"}),
            ("7", {"png": png_bytes(noise(20, 24, 2)), "cls": b"3"}),
            ("bird_000123", {"jpg": jpeg_bytes(noise(30, 50, 3))}),
        ],
    )
    make_shard(
        folder / "b.tar",
        [
            ("dog", {"jpg": jpeg_bytes(noise(32, 32, 4))}),
            ("0", {"jpg": jpeg_bytes(noise(33, 33, 4))}),
            ("cut", {"jpg": turned[:-30]}),
            ("tail", {"jpg": bytes(damaged)}),
            ("odd\x1b[31m", {"jpg": jpeg_bytes(noise(32, 32, 6))}),
        ],
    )
    return folder


def facts(printed: str) -> list[dict[str, str]]:
    """Return the blocks of facts that were printed, each by its names."""
    blocks: list[dict[str, str]] = []
    for line in printed.splitlines():
        name, _, words = line.partition(" ")
        if name == "key":
            blocks.append({})
        if blocks:
            blocks[-1][name] = words.strip()
    return blocks


def shown(capsys: pytest.CaptureFixture[str], source: Path, which: str, **options: object) -> dict[str, str]:
    assert show_command(str(source), which, **options) == 0  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    [block] = facts(printed)
    assert max(len(line) for line in printed.splitlines() if "/" not in line) <= 80
    return block


def test_a_picture_is_found_by_key_and_by_number_and_its_bytes_where_they_are_said_to_lie(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = shown(capsys, source, "cat")
    assert block == shown(capsys, source, "+0")
    with tarfile.open(source / "a.tar") as tar:
        member = tar.getmember("cat.jpg")
        content = tar.extractfile(member).read()  # type: ignore[union-attr]
    length, offset = map(int, re.fullmatch(r"(\d+) from byte (\d+) on", block["bytes"]).groups())  # type: ignore[union-attr]
    assert (offset, length) == (member.offset_data, member.size)
    assert Path(block["file"]).read_bytes()[offset : offset + length] == content
    assert block == {
        "key": "cat",
        "number": "0 of 9",
        "file": str(source / "a.tar"),
        "bytes": f"{len(content)} from byte {offset} on",
        "sha256": hashlib.sha256(content).hexdigest(),
        "format": "jpeg",
        "stored": "60 x 40 px (width x height), EXIF orientation 6",
        "upright": "40 x 60 px",
        "label": "3",
        "valid": "yes",
        "decodes": "yes, strictly",
    }
    assert shown(capsys, source, "bird_000123")["label"] == "none"


def test_a_word_that_is_key_and_number_is_the_key_and_said_so(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_command(str(source), "7") == 0
    printed = capsys.readouterr().out
    assert facts(printed)[0]["number"] == "2 of 9"
    assert printed.endswith("7 is a key here; +7 is sample number 7\n")
    assert shown(capsys, source, "+7")["key"] == "tail"
    assert shown(capsys, source, "3")["key"] == "bird_000123"  # no key: the number
    with pytest.raises(ValueError, match="no sample has the key '003'; "):  # and not by leading zeros
        show_command(str(source), "003")


def test_a_key_that_two_shards_hold_shows_both_and_is_written_by_number_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_command(str(source), "dog") == 0
    printed = capsys.readouterr().out
    assert [(block["number"], Path(block["file"]).name) for block in facts(printed)] == [("1 of 9", "a.tar"), ("4 of 9", "b.tar")]
    assert "2 samples have the key 'dog'" in printed
    with pytest.raises(
        ValueError, match=r"2 samples have the key 'dog'; write one of them by its number, \+1 \(.*a\.tar\) or \+4 \(.*b\.tar\)"
    ):
        show_command(str(source), "dog", out=tmp_path / "dog.jpg")
    assert not (tmp_path / "dog.jpg").exists()


def test_a_damaged_picture_tells_why_and_what_is_shown_in_its_place(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = shown(capsys, source, "cut")
    assert cut["valid"].startswith("no: ") and cut["decodes"].startswith("no: ") and cut["shown"] == "sample 7 in its place"
    tail = shown(capsys, source, "tail")  # its header is right: only decoding tells
    assert tail["valid"] == "yes" and tail["decodes"].startswith("no: ") and tail["shown"] == "sample 8 in its place"


def test_a_picture_is_written_as_it_is_or_upright(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, source, "cat", out=tmp_path / "cat.JPG")
    with tarfile.open(source / "a.tar") as tar:
        content = tar.extractfile("cat.jpg").read()  # type: ignore[union-attr]
    assert (tmp_path / "cat.JPG").read_bytes() == content
    shown(capsys, source, "cat", out=tmp_path / "cat.png")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))), np.int64)
    written = np.asarray(Image.open(tmp_path / "cat.png"), np.int64)
    assert written.shape == (60, 40, 3) and np.abs(written - upright).max() <= 2
    assert np.abs(written - upright[::-1]).max() > 50
    shown(capsys, source, "+2", out=tmp_path / "seven.png")  # a PNG: its bytes
    assert (tmp_path / "seven.png").read_bytes() == png_bytes(noise(20, 24, 2))
    shown(capsys, source, "tail", out=tmp_path / "tail.jpg")  # what does not decode can still be looked at
    assert hashlib.sha256((tmp_path / "tail.jpg").read_bytes()).hexdigest() == shown(capsys, source, "tail")["sha256"]
    shown(capsys, source, "cut", out=tmp_path / "cut.jpg")
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "cat.JPG", "cat.png", "seven.png", "tail.jpg", "cut.jpg"}


def test_class_names_and_control_characters_are_shown_in_plain_letters(
    source: Path, tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys, source, "odd\x1b[31m")["key"] == r"odd\x1b[31m"
    picture = jpeg_bytes(noise(32, 32))
    make_shard(tmp_path / "named.tar", [("a", {"jpg": picture, "cls": b"zebra"}), ("b", {"jpg": picture, "cls": b"ant\x1b"})])
    assert shown(capsys, tmp_path / "named.tar", "a", labels="cls")["label"] == "1, zebra"
    assert shown(capsys, tmp_path / "named.tar", "b", labels="cls")["label"] == r"0, ant\x1b"


@pytest.mark.parametrize(
    ("which", "out", "message"),
    [
        ("cta", None, "no sample has the key 'cta'; the nearest keys are cut, cat"),
        ("bird_000124", None, "no sample has the key 'bird_000124'; the nearest keys are bird_000123"),
        ("bird_00123", None, "the nearest keys are bird_000123"),
        ("bir", None, "no sample has the key 'bir'; the nearest keys are bird_000123"),
        ("xxxxxxxx", None, "no sample has the key 'xxxxxxxx'; keys are such as cat"),
        ("", None, "no sample has the key ''; keys are such as cat"),
        ("9", None, "no sample has the key '9', nor that number; they are numbered 0 to 8"),
        ("+9", None, r"nor that number; they are numbered 0 to 8"),
        ("-1", None, "no sample has the key '-1'"),
        ("1" * 5000, None, "no sample has the key '1"),
        ("\ud800", None, "surrogates not allowed|no sample has the key"),
        ("cat", "nowhere/cat.png", "there is no folder .*nowhere; make it, or take another --out"),
        ("cat", "cat.webp", r"cat\.webp: sample 0 is a jpeg; take \.jpg for its bytes as they are, \.png for its pixels upright"),
        ("cat", "cat", "sample 0 is a jpeg; take"),
        ("tail", "tail.png", r"sample 7 does not decode and has no pixels; take \.jpg for its bytes as they are"),
    ],
)
def test_what_is_not_there_is_told_in_one_line_and_nothing_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, out: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        show_command(str(source), which, out=None if out is None else Path(out))
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_keys_of_many_shards_are_each_looked_at_once(
    make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = jpeg_bytes(noise(16, 16))
    for shard in range(20):  # more than are kept at hand
        make_shard(tmp_path / f"{shard:02d}.tar", [(f"key{shard:02d}{row}", {"jpg": picture}) for row in range(3)])
    index = ShardIndex.open(tmp_path)
    loaded: list[Path] = []
    load = index_module.load_table
    monkeypatch.setattr(index_module, "load_table", lambda file, *rest: loaded.append(file) or load(file, *rest))
    assert [index.ids_of(index.key(sample)) for sample in (0, 31, 59)] == [[0], [31], [59]]
    loaded.clear()
    assert index.ids_of("key") == []
    assert len(loaded) <= 20
    loaded.clear()
    assert index.nearest_keys("key1912") == ["key192", "key191", "key112"]
    assert len(loaded) <= 20


class Keys:
    """The columns of a shard's table that hold its keys."""

    def __init__(self, keys: list[bytes]) -> None:
        self.keys = np.frombuffer(b"".join(keys), np.uint8)
        self.key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.key_ends)


def ends_alike(key: bytes, other: bytes) -> int:
    """Return twice the bytes by which two keys begin alike, and those by which they end alike beyond these: one by one."""
    most = min(len(key), len(other))
    heads = next((n for n in range(most) if key[n] != other[n]), most)
    return 2 * heads + next((n for n in range(most - heads) if key[-1 - n] != other[-1 - n]), most - heads)


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=12), st.binary(max_size=5))
def test_rows_are_found_and_ranked_as_by_comparing_every_key(keys: list[bytes], key: bytes) -> None:
    table: Any = Keys(keys)
    for wanted in (key, *keys[:2]):
        assert rows_of_key(table, wanted) == [row for row, other in enumerate(keys) if other == wanted]
        by_hand = sorted(((row, ends_alike(wanted, other)) for row, other in enumerate(keys)), key=lambda each: (-each[1], each[0]))
        assert nearest_rows(table, wanted, 5) == by_hand[:5]


def test_a_slip_in_one_of_very_many_keys_is_found_in_bounded_memory() -> None:
    keys = [f"train/{hashlib.sha256(b'%d' % number).hexdigest()[:12]}.JPEG".encode() for number in range(100_000)]
    table: Any = Keys(keys)
    tracemalloc.start()
    for slip in (keys[70_001].replace(b".JPEG", b".jpg"), keys[70_001][6:], keys[70_001][:10] + b"_" + keys[70_001][11:]):
        assert nearest_rows(table, slip, 1)[0][0] == 70_001
        assert rows_of_key(table, slip) == []
    assert tracemalloc.get_traced_memory()[1] < 100 * len(keys)
    tracemalloc.stop()
