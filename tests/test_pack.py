"""Packed shards, read back by webdataset, timm, DALI and this package; packing that is stopped, split, shuffled and gone on with.

The judge of bytes is the source itself, read by Python's tarfile; of a run that was killed, one that ran through.
"""

import hashlib
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console

from wherefrom.pipeline import PackReport, PackSettings, ShardIndex, ViewFamily, ViewRecipe, make_loader, pack
from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.packing.shard import dali_index
from wherefrom.pipeline.packing.sources import tar_key
from wherefrom.pipeline.shards.reader import ShardChangedError, ShardReader
from wherefrom.tools.cli import main
from wherefrom.tools.pack import pack_progress

pytestmark = pytest.mark.core

BESIDE = ("_info.json", "classes.json", "left_out.jsonl")
WITH_DALI = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not here")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(height: int, width: int, channels: int = 3) -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    small = rng.integers(64, 192, (height // 16 + 1, width // 16 + 1, channels), np.uint8)
    return Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def encode(kind: str, image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = io.BytesIO()
    image.save(encoded, kind, exif=exif.tobytes() if orientation != 1 else b"", **options)
    return encoded.getvalue()


JPEG = encode("JPEG", picture(30, 40))
ODD = [  # every reader splits these names alike; between them they need PAX headers, hold every format, and one lies about its own
    ("plain", "jpg", JPEG, 0),
    ("with space", "jpg", encode("JPEG", picture(31, 40)), 12),
    ("sub folder/dotted.folder/x", "png", encode("PNG", picture(32, 40)), 2),
    ("d/" + "long" * 40, "webp", encode("WEBP", picture(33, 40)), 3),
    ("Größe/日本", "jpg", encode("JPEG", picture(34, 40), orientation=6), 4),
    ("back\\slash'\"", "JPEG", encode("JPEG", picture(35, 40)), 5),
    ("a-png", "jpg", encode("PNG", picture(36, 40)), 6),
]


def write_odd(path: Path) -> Path:
    """Write the pictures of ODD, in the extension's own case."""
    with tarfile.open(path, "w") as tar:
        for key, extension, content, label in ODD:
            for name, data in ((f"{key}.{extension}", content), (f"{key}.cls", b"%d\n" % label)):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


@pytest.fixture
def many(tmp_path: Path, make_shard: Callable[..., Path]) -> str:
    """Three shards of 20 pictures with labels 0 to 4."""
    folder = tmp_path / "many"
    folder.mkdir()
    for shard in range(3):
        samples = [(f"s{shard}-{n}", {"jpg": encode("JPEG", picture(24 + n, 30 + shard)), "cls": b"%d" % (n % 5)}) for n in range(20)]
        make_shard(folder / f"{shard}.tar", samples)
    return str(folder)


def members(folder: Path) -> dict[str, bytes]:
    """Return every member of the tars of a folder, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None and member.name not in found
                found[member.name] = content.read()
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return what was packed: every file but our own index, which knows times, and the notes of what is finished."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def samples_of(index: ShardIndex) -> list[tuple[bytes, int]]:
    with ShardReader(index) as reader:
        return [(reader.read(sample).tobytes(), int(index.label[sample])) for sample in range(len(index))]


# what was packed, as others read it


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The pictures of ODD, packed."""
    pack(write_odd(tmp_path / "source.tar"), tmp_path / "out", settings=PackSettings(samples=3))
    return tmp_path / "out"


def test_keys_labels_and_bytes_are_those_that_webdataset_gives(packed: Path) -> None:
    urls = [str(path) for path in sorted(packed.glob("*.tar"))]
    assert len(urls) == 3
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    kinds = ["jpg", "jpg", "png", "webp", "jpg", "jpg", "jpg"]  # the last is a PNG among JPEGs, called .jpg
    assert [(s["__key__"], s["cls"], s[kind]) for s, kind in zip(read, kinds, strict=True)] == [
        (key, b"%d" % label, content) for key, _, content, label in ODD
    ]


def test_our_index_gives_the_same_samples_in_the_same_order_and_was_there(packed: Path) -> None:
    index = ShardIndex.open(str(packed))
    assert index.reused == 3 and index.notes == []
    assert [index.key(sample) for sample in range(len(index))] == [key for key, *_ in ODD]
    assert samples_of(index) == [(content, label) for _, _, content, label in ODD]


def test_timm_reads_the_same_pictures_and_labels(packed: Path) -> None:
    from timm.data.readers.reader_wds import ReaderWds

    reader = ReaderWds(str(packed), split="out")
    read = [(np.asarray(image), target) for image, target in reader]
    assert (len(reader), [target for _, target in read]) == (7, [label for *_, label in ODD])
    for (image, _), (_, _, content, _) in zip(read, ODD, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@WITH_DALI
def test_dali_reads_the_same_bytes_and_labels(packed: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    tars = sorted(map(str, packed.glob("*.tar")))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> tuple[Any, ...]:
        indexes = [tar.replace(".tar", ".idx") for tar in tars]
        return tuple(fn.readers.webdataset(paths=tars, index_paths=indexes, ext=["jpg;png;webp", "cls"]))

    pipeline = read()
    pipeline.build()
    outputs = [pipeline.run() for _ in ODD]
    assert [tuple(np.asarray(output[0]).tobytes() for output in outputs_of) for outputs_of in outputs] == [
        (content, b"%d" % label) for _, _, content, label in ODD
    ]


@WITH_DALI
@pytest.mark.skipif(shutil.which("tar") is None, reason="wds2idx asks GNU tar")
def test_the_index_for_dali_is_what_its_own_tool_writes(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wds2idx import IndexCreator

    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    for tar in sorted(packed.glob("*.tar")):
        with IndexCreator(str(tar), str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        theirs = (tmp_path / "theirs.idx").read_bytes()
        for name in (b"with space", b"sub folder"):  # the only difference: DALI cannot read what its tool writes here
            theirs = theirs.replace(name, name.replace(b" ", b"\\040"))
        assert tar.with_suffix(".idx").read_bytes() == dali_index(tar) == theirs


def test_info_says_what_was_done_and_every_checksum(packed: Path) -> None:
    info = json.loads((packed / "_info.json").read_text())
    names = [f"out-{shard:06d}.tar" for shard in range(3)]
    assert info["splits"] == {"out": {"name": "out", "filenames": names, "shard_lengths": [3, 3, 1], "num_samples": 7}}
    assert info["pack"]["sha256"] == {name: hashlib.sha256((packed / name).read_bytes()).hexdigest() for name in names}
    assert info["pack"]["settings"]["samples"] == 3 and info["pack"]["from"].endswith("source.tar")
    assert info["pack"]["source"]["fingerprint"].startswith(ShardIndex.open(str(packed.parent / "source.tar")).fingerprint)


def test_views_are_bit_for_bit_those_of_the_source(many: str, tmp_path: Path) -> None:
    pack(many, tmp_path / "out", settings=PackSettings(samples=7))
    recipe = ViewRecipe(families=(ViewFamily(name="all", views=2, size_px=(16, 16), mirror="view", min_side_px=4),))
    batches = []
    for source in (many, str(tmp_path / "out")):
        with make_loader(source, recipe, global_batch=20, seed=3, renderer="torch", threads=0) as loader:
            batches.append([(batch.sample.tolist(), batch.label.tolist(), batch.views[0].pixels.numpy().copy()) for batch in loader])
    assert [each[:2] for each in batches[0]] == [each[:2] for each in batches[1]]
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one[2], other[2])


def test_members_have_no_time_and_no_owner_of_this_machine(packed: Path) -> None:
    with tarfile.open(packed / "out-000000.tar") as tar:
        assert {(m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0o444, 0, 0, "bigdata", "bigdata")}
        assert [member.offset_data for member in tar][:2] == [512, 1536]  # one header a member: no PAX header for a time of 0.0


def test_a_folder_tree_is_packed_with_the_labels_and_views_of_the_tree(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    tree = tmp_path / "tree"
    for folder, file, content in [
        *(("b cls", f"pic.{n}.JPEG", encode("JPEG", picture(24 + n, 40))) for n in range(6)),
        ("a.x", "one.jpg", encode("JPEG", picture(31, 40), orientation=6)),
        ("a.x", "one.png", encode("PNG", picture(32, 40))),
        ("a.x/deep", "one_2.JPG", encode("PNG", picture(33, 40))),  # called what it is not
        ("__c__", "torn.webp", encode("WEBP", picture(34, 40))[:-9]),
        ("__c__", "whole.webp", encode("WEBP", picture(35, 40))),
    ]:
        (tree / folder).mkdir(parents=True, exist_ok=True)
        (tree / folder / file).write_bytes(content)
    report = pack(tree, tmp_path / "out", settings=PackSettings(samples=4))
    index = ShardIndex.open(str(tmp_path / "out"))
    theirs = [(path, label) for path, label in ImageFolder(str(tree)).samples if "torn" not in path]
    assert samples_of(index) == [(Path(path).read_bytes(), label) for path, label in theirs]
    assert (report.left_out, list(json.loads((tmp_path / "out" / "classes.json").read_text()))) == (1, ["__c__", "a.x", "b cls"])
    names = [name for name in members(tmp_path / "out") if not name.endswith(".cls")]
    assert names == ["x__c__/whole.webp", "a.x/one.jpg", "a.x/one~3.png", "a.x/deep/one_2.jpg", *(f"b cls/pic_{n}.jpg" for n in range(6))]
    with pytest.raises(ValueError, match="lies in the source"):
        pack(ShardIndex.open(str(tree)), tree / "a.x" / "out")


# keys


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01/n01_1.JPEG", "n01/n01_1"),
        ("a.b/c.d.e.jpg", "a.b/c_d_e"),
        ("x.tar.gz.png", "x_tar_gz"),
        ("__meta__/a.jpg", "x__meta__/a"),
        ("__a__.jpg", "__a__"),
        ("/up/../../a.png", "up/a"),
        ("new\nline\x00.jpg", "new_line_"),
        ("dir/noext", "dir/noext"),
        ("with space/ü.webp", "with space/ü"),
    ],
)
def test_a_loose_file_has_a_key_that_the_first_dot_ends(name: str, key: str) -> None:
    assert tar_key(name, suffix=True) == key


@given(name=st.text(st.sampled_from("ab._/ \\_\n\x00é")))
@settings(max_examples=200)
def test_webdataset_splits_every_key_from_its_extension(name: str) -> None:
    key = tar_key(name, suffix=False)
    assert webdataset.tariterators.base_plus_ext(f"{key}.jpg") == (key, "jpg")
    assert not re.match(r"__[^/]*__($|/)", f"{key}.jpg") and not key.startswith("/") and not {"", ".", ".."} & set(key.split("/"))


def test_keys_that_would_be_the_same_are_told_apart_the_first_keeps_its_own(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    for shard in range(3):
        make_shard(tmp_path / f"{shard}.tar", [("same", {"jpg": JPEG}), ("same~2", {"jpg": JPEG}), (f"own{shard}", {"jpg": JPEG})])
    pack([tmp_path / f"{shard}.tar" for shard in range(3)], tmp_path / "out")
    index = ShardIndex.open(str(tmp_path / "out"))
    keys = [index.key(sample) for sample in range(len(index))]
    assert keys == ["same", "same~2", "own0", "same~3", "same~2~4", "own1", "same~6", "same~2~7", "own2"]
    assert index.invalid_count == 0


# which bytes lie where


@pytest.mark.parametrize(
    "settings", [PackSettings(samples=7), PackSettings(samples=7, shuffle=5), PackSettings(samples=7, short_side_px=20)]
)
def test_threads_parts_and_the_order_of_parts_change_no_byte(many: str, tmp_path: Path, settings: PackSettings) -> None:
    plain = tmp_path / "plain" / "out"
    pack(many, plain, settings=settings, workers=1)
    parted = tmp_path / "parted" / "out"
    for part in (2, 0, 1):
        report = pack(many, parted, settings=settings, part=(part, 3), workers=3)
        assert (parted / "_info.json").exists() == (part == 1) == (report.missing == 0)
    assert bytes_of(parted) == bytes_of(plain)


def test_parts_that_run_at_once_make_one_folder(many: str, tmp_path: Path) -> None:
    settings = PackSettings(samples=3)
    pack(many, tmp_path / "plain" / "out", settings=settings)
    for attempt in range(3):
        out = tmp_path / str(attempt) / "out"
        with ThreadPoolExecutor(4) as pool:
            reports = list(pool.map(lambda number: pack(many, out, settings=settings, part=(number, 4), workers=1), range(4)))  # noqa: B023
        assert min(report.missing for report in reports) == 0
        assert sum(report.written for report in reports) == 60
        assert bytes_of(out) == bytes_of(tmp_path / "plain" / "out")


def test_shuffling_by_a_seed_is_a_permutation_and_another_seed_another(many: str, tmp_path: Path) -> None:
    orders = []
    for name, seed in (("in-order", None), ("one", 1), ("two", 2)):
        pack(many, tmp_path / name, settings=PackSettings(samples=20, shuffle=seed))
        orders.append(members(tmp_path / name))
    assert list(orders[0]) != list(orders[1]) != list(orders[2]) != list(orders[0])
    assert orders[0] == orders[1] == orders[2]
    first_shard = {name.partition("-")[0] for name in list(orders[1])[:40]}
    assert first_shard == {"s0", "s1", "s2"}


def test_shards_by_size_are_as_full_as_they_may_be(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    sizes = [int(size) for size in rng.integers(30_000, 300_000, 30)] + [1_500_000] + [60_000] * 5
    names = [f"{'é' * 60 if n % 3 else n}{n}" for n in range(len(sizes))]
    make_shard(tmp_path / "short.tar", [])  # the fixture writes ustar names alone
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        for name, size in zip(names, sizes, strict=True):
            header = tarfile.TarInfo(f"{name}.jpg")
            header.size = size
            tar.addfile(header, io.BytesIO(JPEG + bytes(size - len(JPEG))))
    report = pack(tmp_path / "source.tar", tmp_path / "out", settings=PackSettings(mib=1))
    tars = sorted((tmp_path / "out").glob("*.tar"))
    index = ShardIndex.open(str(tmp_path / "out"))
    assert (report.samples, len(index), index.invalid_count) == (36, 36, 0)
    ends = np.cumsum(index.shard_lengths)
    for tar, end, length in zip(tars, ends.tolist(), index.shard_lengths.tolist(), strict=True):
        assert tar.stat().st_size <= 2**20 or length == 1
        if end < len(index):  # the next picture had no room, but for what headers take
            assert tar.stat().st_size + index.length[end] + 5 * 512 + 10240 > 2**20


# pictures that are encoded anew


def open_packed(folder: Path) -> tuple[ShardIndex, list[NDArray[np.uint8]]]:
    index = ShardIndex.open(str(folder))
    with ShardReader(index) as reader:
        return index, [reader.read(sample) for sample in range(len(index))]


SIDES = [(40, 60), (61, 40), (41, 300), (100, 100), (400, 41)]


@pytest.mark.parametrize("orientation", ["keep", "bake"])
def test_short_sides_are_at_most_what_was_asked_and_orientation_is_kept_or_baked_in(tmp_path: Path, orientation: str) -> None:
    sources = [(f"{n}-{o}", encode("JPEG", picture(*SIDES[n % 5]), orientation=o), 0) for n, o in enumerate([1, 2, 3, 4, 5, 6, 7, 8, 1, 6])]
    settings = PackSettings(short_side_px=40, orientation=orientation)  # type: ignore[arg-type]
    pack(sources, tmp_path / "out", settings=settings)
    index, contents = open_packed(tmp_path / "out")
    for sample, (_, before, _) in enumerate(sources):
        was = ShardHeader(before)
        turned = orientation == "bake" and was.orientation != 1
        short = min(was.size)
        unchanged = short <= 40 and not turned
        assert (contents[sample].tobytes() == before) == unchanged
        factor = min(40 / short, 1)
        assert tuple(index.source_size[sample]) == tuple(max(round(side * factor), 1) for side in was.size)
        assert index.orientation[sample] == (1 if orientation == "bake" else was.orientation)
        if not unchanged:
            shown = decoded(before)
            if turned:
                shown = ImageOps.exif_transpose(Image.open(io.BytesIO(encode("PNG", shown, was.orientation)))).convert("RGB")
            factor = min(40 / min(shown.size), 1)
            smaller = shown.resize(tuple(max(round(side * factor), 1) for side in shown.size), Image.Resampling.BICUBIC)
            expected = encode("JPEG", smaller, quality=90, subsampling="4:2:0")
            np.testing.assert_array_equal(decoded(contents[sample].tobytes()), decoded(expected))


def decoded(content: bytes) -> Image.Image:
    """Return a picture as it is stored, by our decoder."""
    return Image.fromarray(np.ascontiguousarray(decode_picture(np.frombuffer(content, np.uint8))))


class ShardHeader:
    """Upright size and orientation of a picture, by Pillow."""

    def __init__(self, content: bytes) -> None:
        image = Image.open(io.BytesIO(content))
        self.orientation = image.getexif().get(0x0112, 1)
        self.size = image.size if self.orientation > 4 else image.size[::-1]


def special_pictures() -> dict[str, bytes]:
    gray16 = (np.arange(50 * 60, dtype=np.uint32).reshape(50, 60) * 21).astype(np.uint16)
    return {
        "CMYK JPEG": encode("JPEG", picture(50, 60).convert("CMYK")),
        "gray JPEG": encode("JPEG", picture(50, 60).convert("L")),
        "16-bit PNG": encode("PNG", Image.fromarray(gray16)),
        "PNG with alpha": encode("PNG", picture(50, 60, 4)),
        "palette PNG": encode("PNG", picture(50, 60).convert("P")),
        "WebP": encode("WEBP", picture(50, 60)),
    }


def test_what_is_encoded_anew_shows_what_our_decoder_shows(tmp_path: Path) -> None:
    sources = special_pictures()
    pack(
        [(name, content, None) for name, content in sources.items()], tmp_path / "out", settings=PackSettings(short_side_px=49, quality=98)
    )
    index, contents = open_packed(tmp_path / "out")
    assert index.invalid_count == 0 and set(index.format.tolist()) == {1} and (index.label == -1).all()
    for before, after in zip(sources.values(), contents, strict=True):
        expected = encode("JPEG", decoded(before).resize((59, 49), Image.Resampling.BICUBIC), quality=98, subsampling="4:2:0")
        assert after.tobytes() == expected


def test_a_picture_that_does_not_decode_is_left_out_where_it_has_to_be_decoded(tmp_path: Path) -> None:
    whole = encode("JPEG", picture(300, 400))
    torn = whole[: len(whole) // 2] + b"\xff\xd9"  # its header is fine
    sources = [("a", JPEG, 0), ("torn", torn, 1), ("b", JPEG, 2)]
    pack(sources, tmp_path / "as-it-is")
    assert len(ShardIndex.open(str(tmp_path / "as-it-is"))) == 3
    report = pack(sources, tmp_path / "out", settings=PackSettings(short_side_px=20))
    assert (report.samples, report.left_out) == (2, 1)
    [line] = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line) | {"reason": ""} == {"id": 1, "key": "torn", "shard": "", "reason": ""}
    assert json.loads(line)["reason"].startswith("does not decode: ")


# what cannot be packed


def test_invalid_samples_are_left_out_listed_and_counted_and_those_without_label_have_no_cls(
    tmp_path: Path, make_shard: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_shard(
        tmp_path / "source.tar",
        [("a", {"jpg": JPEG, "cls": b"1"}), ("torn", {"jpg": JPEG[:-9], "cls": b"1"}), ("c", {"jpg": JPEG}), ("d", {"jpg": b"words"})],
    )
    assert main(["pack", str(source), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"left out: 2 invalid samples, listed in {tmp_path / 'out' / 'left_out.jsonl'}" in printed
    assert "1 of 2 samples have no label, and no .cls" in printed
    assert list(members(tmp_path / "out")) == ["a.cls", "a.jpg", "c.jpg"]
    listed = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    expected = ShardIndex.open(str(source)).quarantine()
    assert [(each["id"], each["key"], each["reason"]) for each in listed] == [(each.id, each.key, each.reason) for each in expected]


def _not_empty(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")


def _begun_otherwise(folder: Path) -> None:
    pack(folder / "many", folder / "out", settings=PackSettings(samples=7, shuffle=1))


def _begun_of_others(folder: Path) -> None:
    pack(folder / "source.tar", folder / "out", settings=PackSettings(samples=7))


def _with_a_foreign_file(folder: Path) -> None:
    pack(folder / "many", folder / "out", settings=PackSettings(samples=7))
    (folder / "out" / "notes.txt").write_text("mine")


def _damaged_plan(folder: Path) -> None:
    pack(folder / "many", folder / "out", settings=PackSettings(samples=7))
    (folder / "out" / ".pack" / "plan.json").write_text("{")


def _a_file(folder: Path) -> None:
    (folder / "out").write_text("mine")


def _nothing(folder: Path) -> None:
    pass


BAD: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "folder that is not empty": (_not_empty, "many out", "out: is not empty (it holds notes.txt); name a folder that is empty or new"),
    "folder begun with other settings": (
        _begun_otherwise,
        "many out --samples 7",
        "out: was begun with shuffle=1, now None; give the same",
    ),
    "folder begun from others": (_begun_of_others, "many out --samples 7", "out: was begun from other pictures than many has"),
    "folder with a foreign file": (_with_a_foreign_file, "many out --samples 7", "out: holds notes.txt, which is not of this pack"),
    "folder with a damaged plan": (_damaged_plan, "many out --samples 7", "plan.json: is damaged"),
    "folder that is a file": (_a_file, "many out", "out: is a file; name a folder"),
    "typo in the source": (_nothing, "mani out", "mani: no such file"),
    "typo in a parquet file": (_nothing, "train.parquet out", "train.parquet: no such file"),
    "source itself": (_nothing, "many many", "many: is the source many"),
    "inside the source": (_nothing, "many many/out", "many/out: lies in the source many"),
    "part that is none": (_nothing, "many out --part 5/4", "part=5/4: parts are i/n with 0 <= i < n, here 0 to 3"),
    "parts that are none": (_nothing, "many out --part 0/0", "part=0/0: parts are i/n"),
    "part of other words": (_nothing, "many out --part one", "--part one: needs i/n"),
    "size and short side": (_nothing, "many out --mib 5 --short-side 40", "mib=5: how large pictures are once they are encoded anew"),
    "size and number": (_nothing, "many out --mib 5 --samples 40", "samples=40 and mib=5"),
    "no samples a shard": (_nothing, "many out --samples 0", "samples=0: needs at least 1"),
    "no threads": (_nothing, "many out --workers 0", "workers=0: needs at least 1"),
    "quality that nothing has": (_nothing, "many out --quality 80", "quality=80: bytes are copied unchanged"),
    "quality too high": (_nothing, "many out --short-side 40 --quality 101", "quality=101: needs 1 to 100"),
    "name that timm takes for a pattern": (_nothing, "many out --name guitars", "name='guitars': needs letters"),
    "column of what has none": (_nothing, "many out --image-column img", "image_column='img': the source is not parquet"),
    "labels by an unknown rule": (_nothing, "many out --labels json", "json"),
    "classes that are none": (_nothing, "many out --classes many/0.tar", "0.tar: is no classes.json"),
    "negative seed": (_nothing, "many out --shuffle -1", "shuffle=-1: needs a seed"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_packed_costs_one_line_and_leaves_no_folder(
    case: str, many: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_odd(tmp_path / "source.tar")
    prepare, words, message = BAD[case]
    prepare(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*") if ".wherefrom" not in path.parts)
    assert main(["pack", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0
    assert sorted(path for path in tmp_path.rglob("*") if ".wherefrom" not in path.parts) == before


def test_items_of_an_iterable_that_are_no_samples_are_named(tmp_path: Path) -> None:
    wrong_items = ["words", ("a", "words", 1), ("", JPEG, 0), ("a" * 5000, JPEG, 0), ("a", JPEG, 0.5), ("a", JPEG)]
    for item, problem in [*((item, TypeError) for item in wrong_items), (("a", JPEG, np.int64(2)), ValueError)]:
        with pytest.raises(problem, match="sample 1") as raised:
            pack([("fine", JPEG, 0), item], tmp_path / "out", classes=["x", "y"])  # type: ignore[list-item]
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="holds no samples"):
        pack([], tmp_path / "empty")
    for wrong in ({"settings": PackSettings(shuffle=1)}, {"settings": PackSettings(mib=1)}, {"part": (0, 2)}, {"labels": "cls"}):
        with pytest.raises(ValueError, match=r"iterable|this source"):
            pack([("fine", JPEG, 0)], tmp_path / "wrong", **wrong)  # type: ignore[arg-type]


# an iterable


def test_an_iterable_is_packed_in_its_order_and_again_with_fewer_samples(tmp_path: Path) -> None:
    def samples(count: int) -> Iterator[tuple[str, bytes, int | None]]:
        for number in range(count):
            yield ("twice" if number in (2, 4) else f"k.{number}"), JPEG, number % 2 if number != 5 else None

    report = pack(samples(7), tmp_path / "out", settings=PackSettings(samples=3), classes=["cat", "dog"])
    assert (report.shards, report.samples, report.unlabeled) == (3, 7, 1)
    assert [name for name in members(tmp_path / "out") if name.endswith("jpg")] == [
        f"{key}.jpg" for key in ("k_0", "k_1", "twice", "k_3", "twice~4", "k_5", "k_6")
    ]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"cat": 0, "dog": 1}
    again = pack(samples(4), tmp_path / "out", settings=PackSettings(samples=3), classes=["cat", "dog"])
    assert (again.shards, again.samples) == (2, 4)
    assert len(ShardIndex.open(str(tmp_path / "out"))) == 4


# going on


def test_a_second_run_writes_nothing_and_what_changed_is_written_again(many: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    go_on: Callable[[], PackReport] = lambda: pack(many, out, settings=PackSettings(samples=20))  # noqa: E731
    go_on()
    before = bytes_of(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert go_on().written == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    os.utime(out / "out-000000.tar", ns=(1, 1))  # copied: the checksum is asked
    assert go_on().written == 0
    damaged = bytearray((out / "out-000001.tar").read_bytes())
    damaged[5000] ^= 1
    (out / "out-000001.tar").write_bytes(damaged)
    assert go_on().written == 20
    assert bytes_of(out) == before
    (out / "out-000002.idx").unlink()
    assert go_on().written == 20
    (out / "out-000002.tar").unlink()
    (out / "_info.json").unlink()
    assert go_on().written == 20
    assert bytes_of(out) == before


def test_a_folder_of_which_a_shard_is_written_again_is_not_complete_meanwhile(many: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(many, out, settings=PackSettings(samples=20))
    (out / "out-000001.tar").write_bytes(b"damaged")

    def stop(work: str, done: int, total: int | None) -> None:
        if (work, done) == ("packing", 50):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(many, out, settings=PackSettings(samples=20), progress=stop)
    assert not (out / "_info.json").exists()
    assert sorted(path.name for path in (out / ".pack").iterdir()) == ["out-000000.json", "out-000002.json", "plan.json"]


def test_a_source_that_changes_meanwhile_is_one_line_and_nothing_half(many: str, tmp_path: Path) -> None:
    def change(work: str, done: int, total: int | None) -> None:
        if (work, done) == ("packing", 25):
            with open(f"{many}/2.tar", "r+b") as file:
                file.write(b"x")

    out = tmp_path / "out"
    with pytest.raises(ShardChangedError, match="written to since it was indexed") as raised:
        pack(many, out, settings=PackSettings(samples=20), workers=1, progress=change)
    assert "\n" not in str(raised.value)
    assert sorted(bytes_of(out)) == ["out-000000.idx", "out-000000.tar", "out-000001.idx", "out-000001.tar"]


def test_another_process_that_packs_the_same_is_named(many: str, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def clean_up_as_another_would(work: str, done: int, total: int | None) -> None:
        if (work, done) == ("packing", 25):
            for half in out.glob(".*.writing"):
                half.unlink()

    with pytest.raises(OSError, match=r"out: another process packs the same shards; let it finish, or give each its own part$"):
        pack(many, out, settings=PackSettings(samples=20), progress=clean_up_as_another_would)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes, as on a full disk; Python ignores the signal that says so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 300, 20_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_half(many: str, tmp_path: Path, size: int) -> None:
    pack(many, tmp_path / "through" / "out", settings=PackSettings(samples=20))
    out = tmp_path / "out"
    with files_of_at_most(size), pytest.raises(OSError, match="cannot be written") as raised:
        pack(many, out, settings=PackSettings(samples=20))
    assert re.search(r"out: cannot be written \(File too large\), [\d.]+ MB are free there; make room", str(raised.value))
    assert "\n" not in str(raised.value) and bytes_of(out) == {}
    pack(many, out, settings=PackSettings(samples=20))
    assert bytes_of(out) == bytes_of(tmp_path / "through" / "out")


# the command


def test_the_command_says_what_it_did_and_how_to_go_on(many: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "some where" / "train")
    words = ["pack", many, out, "--samples", "25", "--part"]
    assert main([*words, "1/2"]) == 0
    assert "part 1/2 is done; 2 shards left for other parts, the last of which completes the folder" in capsys.readouterr().out
    assert main([*words, "0/2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"train: 60 samples in 3 shards, 0\.\d MB; 35 samples written in \d+s, \d+/s\n", printed)
    assert f"train on them: wherefrom train --data '{out}'\n" in printed
    assert main([*words, "0/1"]) == 0
    assert "nothing was left to write" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_says_how_far_how_fast_and_how_long_still(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, color_system=None, get_time=lambda: now[0])
    with pack_progress(console) as show:
        for second, done in enumerate(range(200, 1001, 50)):  # 200 were there already
            now[0] = 100.0 + second
            show("packing", done, 1000)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    if terminal:
        assert any("packing" in line and "1000/1000" in line and "/s" in line for line in lines)
    else:
        assert lines == ["packing: 500 of 1000, 50/s, 10s left", "packing: 800 of 1000, 50/s, 4s left"]


def test_classes_that_were_numbered_before_keep_their_numbers(tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    source = make_shard(tmp_path / "val.tar", [(f"{n}", {"jpg": JPEG, "cls": name}) for n, name in enumerate([b"dog", b"ape", b"cat"])])
    (tmp_path / "classes.json").write_text('{"cat": 0, "dog": 1}')
    assert main(["pack", str(source), str(tmp_path / "val"), "--labels", "cls", "--classes", str(tmp_path / "classes.json")]) == 0
    assert [content for name, content in members(tmp_path / "val").items() if name.endswith("cls")] == [b"1", b"2", b"0"]
    assert json.loads((tmp_path / "val" / "classes.json").read_text()) == {"cat": 0, "dog": 1, "ape": 2}
    assert json.loads((tmp_path / "val" / "_info.json").read_text())["classes"] == ["cat", "dog", "ape"]
