"""Shards behind the storage seam: what holds for local files holds for a storage that has no files at all, a dictionary of bytes.

The judge is the local storage: the same shards, the same samples, records and pixels. Nothing of the dictionary's lies on a disk, so
whatever would go past the seam finds nothing.
"""

import fnmatch
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.pattern import expand_pattern
from wherefrom.pipeline.shards.reader import ShardChangedError, ShardReader
from wherefrom.pipeline.shards.storage import STORAGES, LocalStorage, Stamp, read_at, read_head
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe

pytestmark = pytest.mark.core


class MemoryFile:
    """A file of `MemoryStorage`, which may give fewer bytes than it has and counts who has it open."""

    def __init__(self, storage: "MemoryStorage", path: str) -> None:
        self.storage, self.path = storage, path

    def stamp(self) -> Stamp:
        return self.storage.stamp(self.path)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        chunk = self.storage.files[self.path][offset : offset + len(buffer)][: self.storage.most_bytes]
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        with self.storage.lock:
            self.storage.opened[self.path] -= 1


class MemoryStorage:
    """Bytes by URL. A folder is what names begin with."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.versions: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        self.most_opened = 0
        self.most_bytes: int | None = None  # that one read gives
        self.lock = threading.Lock()

    def put(self, path: str, content: bytes) -> None:
        self.files[path] = content
        self.versions[path] += 1

    def kind(self, path: str) -> Literal["file", "folder"] | None:
        if path in self.files:
            return "file"
        return "folder" if any(name.startswith(path.rstrip("/") + "/") for name in self.files) else None

    def glob(self, pattern: str) -> list[str]:
        return sorted(fnmatch.filter(self.files, pattern))

    def stamp(self, path: str) -> Stamp:
        if path not in self.files:
            raise FileNotFoundError(2, "no such object", path)
        return Stamp(len(self.files[path]), self.versions[path])

    def open(self, path: str) -> MemoryFile:
        self.stamp(path)
        with self.lock:
            self.opened[path] += 1
            self.most_opened = max(self.most_opened, self.opened.total())
        return MemoryFile(self, path)

    def canonical(self, path: str) -> str:
        return path

    def local_folder(self, path: str) -> None:
        return None


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder for one test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("WHEREFROM_CACHE", str(folder))
    return folder


@pytest.fixture
def shards(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> Path:
    """A folder of three shards of four pictures each; one picture is cut short, and one count of WebDataset's is wrong."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        pictures = [jpeg_bytes(rng.integers(0, 256, (40 + 3 * shard, 50 + n, 3), np.uint8)) for n in range(4)]
        if shard == 1:
            pictures[2] = pictures[2][:-2]
        make_shard(folder / f"train-{shard}.tar", [(f"k{shard}{n}", {"jpg": data, "cls": b"%d" % n}) for n, data in enumerate(pictures)])
    (folder / "train-0.idx").write_text("v1.2 4\njpg 512 10 a.jpg\n")
    (folder / "_info.json").write_text('{"splits": {"train": {"filenames": ["train-2.tar"], "shard_lengths": [9]}}}')
    return folder


@pytest.fixture
def memory(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStorage]:
    """The same files under mem://data; when the test is over, none of them is open."""
    storage = MemoryStorage()
    for path in shards.iterdir():
        storage.put(f"mem://data/{path.name}", path.read_bytes())
    monkeypatch.setitem(STORAGES, "mem", storage)
    yield storage
    assert storage.opened.total() == 0


def test_patterns_name_the_same_shards_through_any_storage(shards: Path, memory: MemoryStorage) -> None:
    for pattern in ("{}", "{}/*.tar", "{}/train-{{0..2}}.tar", "{0}/train-2.tar::{0}/train-[01].tar", "{}/train-{{2,0}}.tar"):
        local = expand_pattern(pattern.format(shards))
        assert len(local) >= 2
        assert expand_pattern(pattern.format("mem://data")) == [path.replace(str(shards), "mem://data") for path in local]
    for pattern, words in (
        ("mem://data/none.tar", "none.tar: no such file"),
        ("mem://data/*.zip", "no file matches"),
        ("mem://data/train-0.tar::mem://data/train-0.tar", "named twice"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            expand_pattern(pattern)


@pytest.mark.parametrize("path", ["s3://bucket/a.tar", "nothing://a.tar", "hf:a.tar", "PIPE:cat a.tar"])
def test_a_scheme_that_nothing_serves_is_refused_in_one_line(path: str) -> None:
    with pytest.raises(
        ValueError, match=r"^'.*' is a [a-z0-9]+: URL, and only local files are read; fetch the shards and name their paths$"
    ):
        expand_pattern(path)


def test_an_index_over_any_storage_is_the_same_and_lies_in_the_cache(shards: Path, memory: MemoryStorage, cache: Path) -> None:
    local, remote = ShardIndex.open(shards, decode=True), ShardIndex.open("mem://data", decode=True)
    assert remote.fingerprint == local.fingerprint
    for name in ("shard", "offset", "length", "label", "source_size", "orientation", "format", "valid"):
        assert np.array_equal(getattr(remote, name), getattr(local, name)), name
    assert [entry.reason for entry in remote.quarantine()] == ["has no end marker after its last scan"]
    assert [note for note in remote.notes if "names" in note] == [
        "mem://data/train-2.tar: 4 samples with a picture, _info.json names 9; the shard itself is believed"
    ]
    assert not any("nothing can be written beside" in note for note in remote.notes)
    assert all(file is not None and file.parent == cache / "indexes" for file in remote.files)
    assert len(set(remote.files)) == 3
    assert ShardIndex.open("mem://data").reused == 3
    memory.put("mem://data/train-1.tar", memory.files["mem://data/train-0.tar"])
    assert ShardIndex.open("mem://data").reused == 2


def test_readers_and_loaders_over_any_storage_give_the_same_bytes_records_and_pixels(shards: Path, memory: MemoryStorage) -> None:
    recipe = ViewRecipe(families=(ViewFamily(name="global", views=2, size_px=(16, 16), mirror="view"),))
    local, remote = ShardIndex.open(shards), ShardIndex.open("mem://data")
    with ShardReader(local) as ours, ShardReader(remote) as theirs:
        ids = np.arange(12)
        assert [data.tobytes() for data in theirs.read_batch(ids)] == [data.tobytes() for data in ours.read_batch(ids)]
    with make_loader(local, recipe, global_batch=4) as one, make_loader(remote, recipe, global_batch=4) as other:
        assert one.position() == other.position()
        for mine, yours in zip(one, other, strict=True):
            for name in ("sample", "drawn_for", "label", "source_size"):
                assert torch.equal(getattr(mine, name), getattr(yours, name)), name
            assert torch.equal(mine.views[0].geometry.boxes, yours.views[0].geometry.boxes)
            assert torch.equal(mine.views[0].geometry.flipped, yours.views[0].geometry.flipped)
            assert torch.equal(mine.views[0].pixels, yours.views[0].pixels)


def test_a_read_that_ends_early_or_a_file_that_changed_is_a_named_error(memory: MemoryStorage) -> None:
    index = ShardIndex.open("mem://data")
    with ShardReader(index) as reader:
        reader.read(0)
        memory.most_bytes = 5
        with pytest.raises(ShardChangedError, match=r"^mem://data/train-0\.tar:k00: 5 of its \d+ bytes are there; restore the shard"):
            reader.read(0)
        memory.most_bytes = None
        reader.read(0)
        memory.put("mem://data/train-0.tar", memory.files["mem://data/train-0.tar"])
        with pytest.raises(ShardChangedError, match="written to since it was indexed"):
            reader.read(0)
        memory.put("mem://data/train-0.tar", b"")
        with pytest.raises(ShardChangedError, match="the shard has 0 bytes"):
            reader.read(1)
        del memory.files["mem://data/train-2.tar"]
        with pytest.raises(ShardChangedError, match=r"train-2\.tar:k20: no such object; restore the shard"):
            reader.read(8)


def test_few_files_are_open_at_once_whatever_the_storage(memory: MemoryStorage) -> None:
    index = ShardIndex.open("mem://data")
    memory.most_opened = 0
    with ShardReader(index, max_open=1) as reader:
        for sample in (0, 4, 8, 1, 5, 9):
            reader.read(sample)
            assert memory.opened.total() == 1
        with ThreadPoolExecutor(8) as pool:
            assert all(len(data) for data in pool.map(lambda k: reader.read(k % 12), range(200)))
        assert memory.opened.total() == 1
        reader.read(0)
        memory.most_opened = 0
        reader.read(1)
        assert memory.most_opened == 0  # still open: it is not opened again
    assert memory.opened.total() == 0


def test_local_files_are_read_by_position_into_memory_that_is_there_already(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.preadv` releases the interpreter's lock; a system may give less than was asked for at a time."""
    path = shards / "train-0.tar"
    whole, targets = path.read_bytes(), []
    preadv = os.preadv

    def at_most_100(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        targets.extend(buffers)
        return preadv(descriptor, [buffers[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", at_most_100)
    file = LocalStorage().open(str(path))
    memory = np.full(600, 7, np.uint8)
    assert file.read_into(memory[:512].data, 30) == 512
    assert len(targets) == 6
    assert all(np.shares_memory(np.frombuffer(target, np.uint8), memory) for target in targets)
    assert memory[:512].tobytes() == whole[30:542]
    assert memory[512:].tolist() == [7] * 88
    assert file.read_into(memory.data, len(whole) - 9) == 9
    assert read_at(file, len(whole) + 5, 3) == b""
    file.close()


def test_a_system_without_preadv_reads_the_same(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    path = str(shards / "train-0.tar")
    assert read_head(path, 10**9) == Path(path).read_bytes()
    assert read_head(path, 700) == Path(path).read_bytes()[:700]


def test_a_pipe_is_no_file_of_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    local = LocalStorage()
    assert local.kind(str(tmp_path / "pipe.tar")) is None
    assert local.glob(f"{tmp_path}/*.tar") == [f"{tmp_path}/pipe.tar"]  # for `expand_pattern` to refuse by name
    with pytest.raises(OSError, match="not a regular file"):
        local.open(str(tmp_path / "pipe.tar"))
