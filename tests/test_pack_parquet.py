"""Parquet files as a source: against what was written into them; and files that lie, end early or hold no pictures.

Files are written by pyarrow as `datasets` does it for the Hub; what is hostile is made of them by changing bytes.
"""

import io
import json
import random
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wherefrom.pipeline import PackSettings, ShardIndex, pack
from wherefrom.pipeline.packing import parquet
from wherefrom.pipeline.packing.parquet import BrokenParquetError, ParquetRows, names_parquet
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.tools.cli import main

pytestmark = pytest.mark.core
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["zebra", "ape", "moth"]  # the Hub's numbers, which no order of names gives


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path_factory.mktemp("cache")))


def jpeg(number: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20 + number % 9, 24, 3), np.uint8)).save(encoded, "JPEG")
    return encoded.getvalue()


def hub_schema(names: Sequence[str] | None = NAMES) -> Any:
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.schema([("image", PICTURE), ("label", pa.int64())], metadata=metadata)


def write_hub(path: Path, first: int, count: int, *, rows_a_group: int = 4, **options: Any) -> Path:
    """Write pictures first, first + 1, ... with the labels 0, 1, 2, 0, ... as the Hub has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    pictures = [{"bytes": jpeg(number), "path": f"n0{number}.v2.JPEG"} for number in numbers]
    table = pa.table({"image": pictures, "label": [number % 3 for number in numbers]}, schema=hub_schema())
    pq.write_table(table, path, row_group_size=rows_a_group, **options)
    return path


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A data set as it is downloaded: 30 rows of train in three files, 5 of test."""
    for part in range(3):
        write_hub(tmp_path / "hub" / "data" / f"train-{part:05d}-of-00003.parquet", 10 * part, 10)
    write_hub(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", 100, 5)
    return tmp_path / "hub"


def write_table(path: Path, columns: dict[str, Any], **kinds: Any) -> str:
    schema = pa.schema([(name, kinds.get(name, pa.array(values).type)) for name, values in columns.items()])
    pq.write_table(pa.table(columns, schema=schema), path)
    return str(path)


def packed(folder: Path) -> list[tuple[str, bytes, int]]:
    index = ShardIndex.open(str(folder))
    with ShardReader(index) as reader:
        return [(index.key(n), reader.read(n).tobytes(), int(index.label[n])) for n in range(len(index))]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_keys_labels_and_bytes_are_those_of_the_rows(tmp_path: Path, compression: str) -> None:
    for part in range(2):
        write_hub(tmp_path / "data" / f"{part}.parquet", 11 * part, 11, compression=compression)
    pack(tmp_path / "data", tmp_path / "out", settings=PackSettings(samples=5))
    assert packed(tmp_path / "out") == [(f"{n:09d}-n0{n}_v2", jpeg(n), n % 3) for n in range(22)]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"zebra": 0, "ape": 1, "moth": 2}


def test_parts_and_where_a_run_was_stopped_change_no_byte(hub: Path, tmp_path: Path) -> None:
    source, settings = str(hub / "data" / "train-*.parquet"), PackSettings(samples=7)
    pack(source, tmp_path / "through" / "out", settings=settings)
    for part in (1, 0):
        pack(source, tmp_path / "parts" / "out", settings=settings, part=(part, 2), workers=1)
    assert "_info.json" in files_of(tmp_path / "parts" / "out")
    assert files_of(tmp_path / "parts" / "out") == files_of(tmp_path / "through" / "out")
    (tmp_path / "parts" / "out" / "out-000002.tar").unlink()
    pack(source, tmp_path / "parts" / "out", settings=settings)
    assert files_of(tmp_path / "parts" / "out") == files_of(tmp_path / "through" / "out")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("start", [0, 3, 4, 9, 10, 17, 29])
def test_rows_are_read_from_anywhere(hub: Path, start: int) -> None:
    rows = ParquetRows(str(hub / "data" / "train-*.parquet"))
    assert len(rows) == 30
    assert [(row.number, row.data, row.name, row.label) for row in rows.rows(start)] == [
        (n, jpeg(n), f"n0{n}.v2.JPEG", n % 3) for n in range(start, 30)
    ]


def test_names_are_numbered_by_their_order_or_as_others_are(tmp_path: Path) -> None:
    names = ["moth", "ape", None, "zebra", "ape"]
    path = write_table(tmp_path / "x.parquet", {"image": [jpeg(n) for n in range(5)], "label": names})
    rows = ParquetRows(path)
    assert (rows.classes, [row.label for row in rows.rows()]) == (("ape", "moth", "zebra"), [1, 0, -1, 2, 0])
    rows = ParquetRows(path, classes=["zebra", "cat"])
    assert (rows.classes, [row.label for row in rows.rows()]) == (("zebra", "cat", "ape", "moth"), [3, 2, -1, 0, 2])
    hub_rows = ParquetRows(str(write_hub(tmp_path / "hub.parquet", 0, 3)), classes=["moth"])
    assert (hub_rows.classes, [row.label for row in hub_rows.rows()]) == (("moth", "zebra", "ape"), [1, 2, 0])


def test_whole_numbers_without_names_stay_what_they_are_and_negative_ones_are_none(tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", {"image": [jpeg(n) for n in range(4)], "label": [7, -1, None, 1000]})
    rows = ParquetRows(path)
    assert (rows.classes, [row.label for row in rows.rows()]) == ((), [7, -1, -1, 1000])
    assert [row.label for row in ParquetRows(path, labeled=False).rows()] == [-1] * 4


def test_columns_are_found_where_one_alone_can_be_meant_and_by_name_elsewhere(tmp_path: Path) -> None:
    columns = {
        "id": [1, 2],
        "photo": [{"bytes": jpeg(1), "path": None}, {"bytes": jpeg(2), "path": None}],
        "thumbnail": [jpeg(3), jpeg(4)],
        "kind": ["a", "b"],
    }
    path = write_table(tmp_path / "x.parquet", columns, photo=PICTURE, thumbnail=pa.large_binary())
    with pytest.raises(ValueError, match=r"x.parquet: several columns may hold the pictures, photo, thumbnail; name one by --image-column"):
        ParquetRows(path)
    rows = ParquetRows(path, image_column="thumbnail", label_column="kind")
    assert [(row.data, row.name, row.label) for row in rows.rows()] == [(jpeg(3), "", 0), (jpeg(4), "", 1)]
    rows = ParquetRows(path, image_column="photo")
    assert rows.label_column is None and [row.data for row in rows.rows()] == [jpeg(1), jpeg(2)]


def test_rows_that_hold_no_picture_are_left_out_and_listed(tmp_path: Path) -> None:
    pictures = [{"bytes": jpeg(0), "path": "a.jpg"}, None, {"bytes": None, "path": "far/away.jpg"}, {"bytes": b"words", "path": None}]
    path = write_table(tmp_path / "x.parquet", {"image": pictures, "label": [0, 1, 2, 3]}, image=PICTURE)
    report = pack(path, tmp_path / "out")
    assert (report.samples, report.left_out, packed(tmp_path / "out")) == (1, 3, [("000000000-a", jpeg(0), 0)])
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    reasons = ["has no bytes in its row", "has no bytes in its row", "is not a JPEG, PNG or WebP"]
    assert [(each["id"], each["reason"]) for each in listed] == list(zip((1, 2, 3), reasons, strict=True))


def test_rows_of_which_none_holds_a_picture_are_refused_with_the_first_reason(tmp_path: Path) -> None:
    path = write_table(tmp_path / "x.parquet", {"image": [None, {"bytes": b"words", "path": None}], "label": [0, 1]}, image=PICTURE)
    with pytest.raises(ValueError, match=r"x\.parquet: none of its 2 samples is valid, first 0+: has no bytes in its row$"):
        pack(path, tmp_path / "out")
    assert not (tmp_path / "out" / "_info.json").exists()  # not complete


def test_a_column_of_labels_that_cannot_be_read_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path / "x.parquet", {"image": [{"bytes": jpeg(0), "path": None}], "label": [1.5]}, image=PICTURE)
    assert main(["pack", str(path), str(tmp_path / "out")]) == 0
    assert "1 of 1 samples have no label" in capsys.readouterr().out


def test_the_way_on_of_a_source_that_cannot_be_shuffled_works(hub: Path, tmp_path: Path) -> None:
    train = str(hub / "data" / "train-*.parquet")
    with pytest.raises(ValueError, match="parquet files can be read in order alone; pack in order, then pack the result shuffled"):
        pack(train, tmp_path / "shuffled", settings=PackSettings(shuffle=1))
    pack(train, tmp_path / "in-order")
    pack(tmp_path / "in-order", tmp_path / "shuffled", settings=PackSettings(shuffle=1))
    in_order, shuffled = packed(tmp_path / "in-order"), packed(tmp_path / "shuffled")
    assert in_order != shuffled and sorted(in_order) == sorted(shuffled)


BAD: dict[str, tuple[str, str]] = {
    "several splits": ("hub", "hub: holds the splits test, train; name one of them, quoted for the shell: 'hub/data/train-*.parquet'"),
    "a file that is missing": ("part", "part: 1 of 3 files are missing, first train-00001-of-00003.parquet; fetch them"),
    "no such file": ("hub/data/trian-*.parquet", "hub/data/trian-*.parquet: no such file"),
    "a broken link in a folder": ("links", "links/b.parquet: is a broken link, to gone.parquet; mend it, take it away, or name the files"),
    "a broken link among matches": ("links/*.parquet", "links/b.parquet: is a broken link, to gone.parquet; mend it"),
    "a broken link by its name": ("links/b.parquet", "links/b.parquet: is a broken link, to gone.parquet; mend it"),
    "named twice": ("hub/data/test-*.parquet::hub/data/test-00000-of-00001.parquet", "is named twice"),
    "no pictures": (
        "words.parquet",
        "words.parquet: no column holds pictures (bytes, or a struct with bytes); its columns are text, label",
    ),
    "no such column": ("many.parquet --image-column img", "many.parquet: has no column 'img'; its columns are a, b"),
    "a column of something else": ("words.parquet --image-column text", "column 'text' is string, not encoded pictures; no other could be"),
    "several pictures": ("many.parquet", "several columns may hold the pictures, a, b; name one by --image-column"),
    "labels of something else": ("many.parquet --image-column a --label-column b", "column 'b' is binary, not numbers or names"),
    "several labels": ("cifar.parquet", "several columns may be the label, fine, coarse; name one by --label-column, or --labels none"),
    "a rule for tars": ("many.parquet --labels cls", "labels='cls': a column of a parquet file is named by label_column"),
    "other columns": ("words.parquet::many.parquet --image-column a", "words.parquet: has no column 'a'"),
    "columns that differ": ("many.parquet::names.parquet --image-column a", "names.parquet: has no column 'label'"),
    "no rows": ("none.parquet", "none.parquet: holds no samples"),
    "size of shards": (
        "many.parquet --image-column a --mib 3",
        "mib=3: how large the pictures of parquet files are is not known beforehand",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_packed_costs_one_line(
    case: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in (0, 2):
        write_hub(tmp_path / "part" / f"train-{part:05d}-of-00003.parquet", 0, 1)
    write_hub(tmp_path / "links" / "a.parquet", 0, 1)
    (tmp_path / "links" / "b.parquet").symlink_to("gone.parquet")
    write_table(tmp_path / "words.parquet", {"text": ["a"], "label": [1]})
    write_table(tmp_path / "many.parquet", {"a": [jpeg(0)], "b": [jpeg(1)], "label": [1]})
    write_table(tmp_path / "names.parquet", {"a": [jpeg(0)], "kind": ["x"]})
    write_table(tmp_path / "none.parquet", {"a": []}, a=pa.binary())
    features = {name: {"_type": "ClassLabel", "names": ["x", "y"]} for name in ("fine", "coarse")}
    schema = pa.schema(
        [("a", pa.binary()), ("fine", pa.int64()), ("coarse", pa.int64())],
        metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    pq.write_table(pa.table({"a": [jpeg(0)], "fine": [0], "coarse": [1]}, schema=schema), tmp_path / "cifar.parquet")
    source, message = BAD[case]
    first, *options = source.split()
    assert main(["pack", first, "out", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_without_pyarrow_one_line_says_how_to_get_it(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet._pyarrow.cache_clear()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"^parquet is read by pyarrow, which is not here; pip install 'wherefrom\[parquet\]'$"):
        pack(hub / "data" / "test-00000-of-00001.parquet", tmp_path / "out")


def test_what_names_parquet_is_told_by_its_name_and_what_lies_beside_it(hub: Path, tmp_path: Path) -> None:
    for others in ("tars", "tree/class"):  # with a list of something else beside them
        (tmp_path / others).mkdir(parents=True)
        write_hub(tmp_path / others.partition("/")[0] / "metadata.parquet", 0, 1)
    (tmp_path / "tars" / "0.tar").touch()
    assert all(names_parquet(str(path)) for path in (hub, hub / "data", hub / "data" / "*.parquet", "x.parquet"))
    assert not any(names_parquet(str(path)) for path in (tmp_path / "tars", tmp_path / "tree", "x.tar", tmp_path / "nothing"))


# files that lie


def with_rows(folder: Path, rows: int, times: int) -> bytes:
    """Return a file of 4 rows whose footer names others, in the first `times` of the places where it has the number."""
    content = write_hub(folder / "short.parquet", 0, 4, rows_a_group=10, compression="none").read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:-8].replace(b"\x16\x08", b"\x16" + varint(2 * rows), times)  # a 64-bit number in thrift's compact protocol
    return content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def varint(number: int) -> bytes:
    digits = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes(digit | 128 for digit in digits[:-1]) + bytes(digits[-1:])


LIES: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda content, folder: b"",
    "words": lambda content, folder: b"these are words" * 100,
    "cut short": lambda content, folder: content[: len(content) // 2],
    "without its first byte": lambda content, folder: content[1:],
    "pages of zeros": lambda content, folder: content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :],
    "a footer longer than the file": lambda content, folder: content[:-8] + b"\xff\xff\xff\x0f" + content[-4:],
    "rows that its row groups have not": lambda content, folder: with_rows(folder, 5, 1),
    "rows that its pages have not": lambda content, folder: with_rows(folder, 5, 99),
    "more rows than bytes": lambda content, folder: with_rows(folder, 2**50, 99),
    "an encrypted footer": lambda content, folder: content[:-4] + b"PARE",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_costs_one_line_and_leaves_nothing_half(lie: str, tmp_path: Path) -> None:
    content = write_hub(tmp_path / "true.parquet", 0, 12).read_bytes()
    (tmp_path / "lie.parquet").write_bytes(LIES[lie](content, tmp_path))
    with pytest.raises(BrokenParquetError, match=r"lie\.parquet: .*; fetch it again") as raised:
        pack(tmp_path / "lie.parquet", tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("out/*.tar")) and not list(tmp_path.glob("out/**/*.writing"))


def test_bytes_changed_at_random_cost_one_line_or_a_picture_in_bounded_time_and_memory(tmp_path: Path) -> None:
    count = 300
    content = write_hub(tmp_path / "true.parquet", 0, 12, rows_a_group=5).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path, refused, read = tmp_path / "lie.parquet", 0, 0
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for seed in range(count):
        chance = random.Random(seed)
        copy = bytearray(content)
        places = (range(4, len(copy)), range(footer, len(copy) - 8), range(4, 40))[seed % 3]
        for _ in range(chance.randint(1, 5)):
            copy[chance.choice(places)] = chance.randrange(256)
        path.write_bytes(copy[: chance.randrange(len(copy))] if seed % 10 == 9 else copy)
        try:
            assert sum(1 for _ in ParquetRows(str(path)).rows()) <= len(content)
        except ValueError as problem:
            refused += "lie.parquet" in (words := str(problem)) and "\n" not in words
        else:
            read += 1
    assert refused > count / 3 and refused + read == count
    assert time.monotonic() - began < count / 5 + 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * 2**20  # KiB: a page may name 2 GB, twice


def test_a_label_that_has_no_name_and_a_column_of_captions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image": [{"bytes": jpeg(0), "path": None}], "label": [3]}, schema=hub_schema())
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: row 0 has label 3, and label names 3 classes"):
        list(ParquetRows(str(tmp_path / "x.parquet")).rows())
    monkeypatch.setattr(parquet, "_MAX_CLASSES", 2)
    path = write_table(tmp_path / "captions.parquet", {"image": [jpeg(n) for n in range(3)], "label": ["a cat", "a dog", "an ape"]})
    with pytest.raises(ValueError, match=r"label has more than 2 values, so it names no classes"):
        ParquetRows(path)


def test_a_file_that_changes_after_it_was_opened_is_noticed(hub: Path) -> None:
    path = hub / "data" / "test-00000-of-00001.parquet"
    rows = ParquetRows(str(path))
    write_hub(path, 0, 5)
    with pytest.raises(BrokenParquetError, match="was changed since it was opened"):
        list(rows.rows())


def test_metadata_that_makes_no_sense_is_passed_over(tmp_path: Path) -> None:
    for number, metadata in enumerate(
        [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}']
    ):
        schema = pa.schema([("image", PICTURE), ("label", pa.int64())], metadata={b"huggingface": metadata})
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": [{"bytes": jpeg(0), "path": None}], "label": [5]}, schema=schema), path)
        rows = ParquetRows(str(path))
        assert (rows.classes, [row.label for row in rows.rows()]) == ((), [5])


def test_memory_stays_that_of_a_few_pages(tmp_path: Path) -> None:
    """One row group of 64 MB, whose pages hold 16 pictures: only some of them are in memory at once."""
    content = jpeg(0) + bytes(2**18)
    table = pa.table({"image": [content] * 256})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False, write_batch_size=16, data_page_size=2**20)
    del table
    pa.default_memory_pool().release_unused()
    rows, most = ParquetRows(str(tmp_path / "x.parquet")), 0
    tracemalloc.start()
    try:
        for row in rows.rows():
            assert row.data == content
            most = max(most, pa.total_allocated_bytes())
        read = tracemalloc.get_traced_memory()[1]  # what pyarrow asks of the file is Python's
    finally:
        tracemalloc.stop()
    assert (2**22 < most < 2**25, read < 2**25) == (True, True)
