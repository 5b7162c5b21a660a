"""Folder trees that loop, hide, change, vanish or lie: passed over aloud, refused in one line, or an error that names the file."""

import errno
import itertools
import os
import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wherefrom.pipeline import Center, ViewFamily, ViewRecipe, make_loader
from wherefrom.pipeline.shards import storage, tree, tree_folders
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardChangedError, ShardReader
from wherefrom.pipeline.shards.store import _store_table, load_table

pytestmark = pytest.mark.core

LONG_AGO = 10**18  # ns


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder for one test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("WHEREFROM_CACHE", str(folder))
    return folder


@pytest.fixture
def picture(jpeg_bytes: Callable[..., bytes]) -> bytes:
    return jpeg_bytes(np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8))


@pytest.fixture
def root(tmp_path: Path, picture: bytes) -> Path:
    """A tree of two classes with two pictures each, whose folders look old."""
    root = tmp_path / "train"
    for name in ("ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)
    for folder in (root / "ant", root / "bee", root):
        os.utime(folder, ns=(LONG_AGO, LONG_AGO))
    return root


KEYS = ["ant/1.jpg", "ant/2.jpg", "bee/1.jpg", "bee/2.jpg"]


def keys(index: ShardIndex) -> list[str]:
    return [index.key(sample) for sample in range(len(index))]


def loop_up(root: Path) -> str:
    (root / "bee" / "up").symlink_to("..")
    return "1 x link that leads back (first bee/up)"


def loop_to_itself(root: Path) -> str:
    (root / "bee" / "me.jpg").symlink_to("me.jpg")
    return "1 x broken link (first bee/me.jpg)"


def loop_of_two(root: Path) -> str:
    (root / "ant" / "b").symlink_to("../bee")
    (root / "bee" / "a").symlink_to("../ant")
    return "2 x link that leads back (first ant/b/a)"


def loop_as_a_class(root: Path) -> str:
    (root / "again").symlink_to(root)
    return "1 x link that leads back (first again)"


def link_to_nothing(root: Path) -> str:
    (root / "ant" / "3.jpg").symlink_to("nowhere")
    return "1 x broken link (first ant/3.jpg)"


def pipe(root: Path) -> str:
    os.mkfifo(root / "ant" / "3.jpg")
    return "1 x pipe (first ant/3.jpg)"


def link_to_a_pipe(root: Path) -> str:
    os.mkfifo(root.parent / "pipe")
    (root / "ant" / "3.jpg").symlink_to(root.parent / "pipe")
    return "1 x pipe (first ant/3.jpg)"


def link_to_a_device(root: Path) -> str:
    (root / "ant" / "3.jpg").symlink_to("/dev/zero")
    return "1 x device (first ant/3.jpg)"


def listening_socket(root: Path) -> str:
    with socket.socket(socket.AF_UNIX) as unix:
        here = os.getcwd()
        os.chdir(root / "ant")  # a socket's path is short
        try:
            unix.bind("3.jpg")
        finally:
            os.chdir(here)
    return "1 x socket (first ant/3.jpg)"


@pytest.mark.parametrize(
    "plant",
    [loop_up, loop_to_itself, loop_of_two, loop_as_a_class, link_to_nothing, pipe, link_to_a_pipe, link_to_a_device, listening_socket],
)
def test_what_is_no_picture_or_leads_back_is_passed_over_aloud(root: Path, plant: Callable[[Path], str]) -> None:
    words = plant(root)
    for _ in range(2):  # the second time from the stored index
        index = ShardIndex.open(root)
        assert [note for note in index.notes if "passed over" in note] == [f"{root}: passed over {words}"]
        own = [key for key in keys(index) if key.count("/") == 1]  # a loop of two shows each class within the other once
        assert own == KEYS and index.classes == ("ant", "bee")
        assert index.invalid_count == 0


def test_a_link_that_leads_back_shows_nothing_twice(root: Path) -> None:
    loop_of_two(root)
    assert sorted(keys(ShardIndex.open(root))) == sorted([*KEYS, "ant/b/1.jpg", "ant/b/2.jpg", "bee/a/1.jpg", "bee/a/2.jpg"])


def test_links_that_multiply_folders_are_refused_in_one_line(
    tmp_path: Path, root: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = tmp_path / "web"
    for one in range(9):
        (web / str(one)).mkdir(parents=True)
        for other in range(9):
            (web / str(one) / f"to{other}").symlink_to(f"../{other}")
    monkeypatch.setattr(tree_folders, "MAX_FOLDERS", 2000)
    with pytest.raises(ValueError, match="has more than 2000 folders") as refused:
        ShardIndex.open(web)
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(tree_folders, "MAX_PICTURES", 3)
    with pytest.raises(ValueError, match="or 3 pictures"):
        ShardIndex.open(root)


def test_hidden_names_are_left_out_and_counted(root: Path, picture: bytes) -> None:
    (root / ".cache").mkdir()
    (root / ".cache" / "1.jpg").write_bytes(picture)
    (root / "ant" / "._1.jpg").write_bytes(b"AppleDouble")
    index = ShardIndex.open(root)
    assert keys(index) == KEYS and index.classes == ("ant", "bee")
    assert index.unread_members["hidden"] == 2 and not index.notes


def test_any_name_is_a_key_and_prints_as_one_line(root: Path, picture: bytes) -> None:
    names = [b"new\nline.jpg", b"\xff\xfe.jpg", b"\x1b[31m.jpg", "\U0001f600 [bold].JPG".encode(), b"a b.png"]
    for name in names:
        with open(os.fsencode(root) + b"/bee/" + name, "wb") as file:
            file.write(picture)
    (root / "odd\nclass").mkdir()
    (root / "odd\nclass" / "1.jpg").write_bytes(picture)
    index = ShardIndex.open(root)
    assert sorted(os.fsencode(key) for key in keys(index)) == sorted(
        [*map(os.fsencode, KEYS), *(b"bee/" + name for name in names), b"odd\nclass/1.jpg"]
    )
    assert index.classes == ("ant", "bee", "odd\nclass")
    with ShardReader(index) as reader:
        assert {data.tobytes() for data in reader.read_batch(np.arange(len(index)))} == {picture}
    assert all(index.name(sample).isprintable() for sample in range(len(index)))


@pytest.mark.parametrize("where", ["ant", ""])
def test_a_folder_that_may_not_be_read_is_passed_over_aloud_and_looked_at_again(
    root: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refused(path: Any) -> Any:
        if path == os.path.join(root, where).rstrip("/"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        if not where:
            with pytest.raises(OSError, match=r"train: cannot be read \(Permission denied\); see that you may read it"):
                ShardIndex.open(root)
            return
        index = ShardIndex.open(root)
        assert keys(index) == KEYS[2:] and index.label.tolist() == [1, 1]
        assert any("1 x unreadable folder (first ant)" in note for note in index.notes)
    assert keys(ShardIndex.open(root)) == KEYS


def test_a_disk_that_fails_is_an_error_and_no_smaller_data_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan, open_regular = os.scandir, tree.open_regular

    def failing(path: Any) -> Any:
        if b"bee" in os.fsencode(path):
            raise OSError(errno.EIO, "Input/output error", path)
        return scan(path) if os.path.isdir(path) else open_regular(path)

    for module, name in ((os, "scandir"), (tree, "open_regular")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            with pytest.raises(OSError, match=r"bee.*: cannot be read \(Input/output error\)") as caught:
                ShardIndex.open(root)
            assert "\n" not in str(caught.value)


def test_files_that_may_not_be_read_or_go_away_meanwhile_are_invalid_and_looked_at_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_regular = tree.open_regular

    def refused(path: bytes) -> int:
        if path.endswith(b"ant/2.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        if path.endswith(b"bee/1.jpg"):
            os.unlink(path)
        return open_regular(path)

    with monkeypatch.context() as patch:
        patch.setattr(tree, "open_regular", refused)
        index = ShardIndex.open(root)
    assert index.valid.tolist() == [True, False, False, True]
    assert index.reason(1) == "cannot be read (Permission denied)" and "No such file" in index.reason(2)
    with make_loader(index, ViewRecipe(families=(CENTER,)), global_batch=4, threads=0) as loader:
        assert sorted(next(iter(loader)).sample.tolist()) == [0, 3, 3, 3]
    again = ShardIndex.open(root)
    assert keys(again) == ["ant/1.jpg", "ant/2.jpg", "bee/2.jpg"] and again.invalid_count == 0


CENTER = ViewFamily(name="whole", views=1, size_px=(16, 16), law=Center())


def test_deep_trees_are_walked_as_far_as_paths_go(root: Path, picture: bytes) -> None:
    deep = root / "ant" / "/".join(["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "x.jpg").write_bytes(picture)
    place = os.open(root / "bee", os.O_RDONLY)
    for _ in range(40):  # 40 x 201 characters: more than a path may have
        os.mkdir("d" * 200, dir_fd=place)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    index = ShardIndex.open(root)
    assert str(deep.relative_to(root) / "x.jpg") in keys(index) and len(index) == 5
    assert any("1 x unreadable folder (first bee/ddd" in note for note in index.notes)


def touch(path: Path) -> str:
    os.utime(path)
    return "was written to since it was indexed"


def cut(path: Path) -> str:
    os.truncate(path, 100)
    return "it has 100 bytes"


def grow(path: Path) -> str:
    with path.open("ab") as file:
        file.write(b"\0")
    return "were indexed"


def other_bytes(path: Path) -> str:
    data = path.read_bytes()
    path.write_bytes(data[:300] + b"\1" + data[301:])
    return "was written to since it was indexed"


def other_file(path: Path) -> str:
    aside = path.with_name("aside")
    aside.write_bytes(path.read_bytes())
    aside.replace(path)
    return "was written to since it was indexed"


def into_pipe(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "not a regular file"


def into_folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return ""


def into_broken_link(path: Path) -> str:
    path.unlink()
    path.symlink_to("nowhere")
    return "No such file"


def gone(path: Path) -> str:
    path.unlink()
    return "No such file"


def folder_gone(path: Path) -> str:
    shutil.rmtree(path.parent)
    return "No such file"


CHANGES = [touch, cut, grow, other_bytes, other_file, into_pipe, into_folder, into_broken_link, gone, folder_gone]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_not_what_was_indexed_is_an_error_that_names_it(root: Path, picture: bytes, change: Callable[[Path], str]) -> None:
    index = ShardIndex.open(root)
    fault = change(root / "bee" / "2.jpg")
    with ShardReader(index) as reader:
        for read in (lambda: reader.read(3), lambda: reader.read_batch(np.array([0, 3, 1]))):
            with pytest.raises(ShardChangedError) as caught:
                read()
            text = str(caught.value)
            assert text.startswith(f"{root}/bee/2.jpg: ") and fault in text and "--rebuild" in text and "\n" not in text
        assert reader.read(0).tobytes() == picture
    with make_loader(index, ViewRecipe(families=(CENTER,)), global_batch=4, threads=1) as loader, pytest.raises(ShardChangedError):
        next(iter(loader))


def test_a_file_that_is_written_to_between_the_check_and_the_read_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.open(root)
    read_into = storage._LocalFile.read_into

    def late(self: storage._LocalFile, buffer: memoryview, offset: int) -> int:
        other_bytes(root / "bee" / "2.jpg")
        return read_into(self, buffer, offset)

    monkeypatch.setattr(storage._LocalFile, "read_into", late)
    with ShardReader(index) as reader, pytest.raises(ShardChangedError, match="was written to"):
        reader.read(3)


@pytest.mark.parametrize("change", CHANGES)
def test_a_tree_is_indexed_again_as_the_error_says(root: Path, change: Callable[[Path], str]) -> None:
    ShardIndex.open(root)
    change(root / "bee" / "2.jpg")
    index = ShardIndex.open(root, rebuild=True)
    with ShardReader(index) as reader:
        for sample, data in enumerate(reader.read_batch(np.arange(len(index)))):
            assert data.tobytes() == (root / index.key(sample)).read_bytes()
    assert len(index) == (4 if change in (touch, cut, grow, other_bytes, other_file) else 2 if change is folder_gone else 3)
    assert index.invalid_count == (1 if change is cut else 0)


def test_files_that_change_while_they_are_read_give_indexed_bytes_or_the_error(root: Path, picture: bytes) -> None:
    index = ShardIndex.open(root)
    path, stop = root / "ant" / "1.jpg", threading.Event()
    status = path.stat()

    def churn() -> None:
        changes = [lambda: os.truncate(path, 100), lambda: path.write_bytes(b"\1" * len(picture)), path.unlink]
        for number in itertools.count():
            if stop.is_set():
                return
            changes[number % 3]()
            aside = path.with_name("aside")
            aside.write_bytes(picture)
            os.utime(aside, ns=(status.st_atime_ns, status.st_mtime_ns))
            aside.replace(path)

    changer = threading.Thread(target=churn)
    changer.start()
    outcomes = {"bytes": 0, "error": 0}
    try:
        with ShardReader(index) as reader:
            for number in range(20_000):
                if number >= 400 and min(outcomes.values()) > 0:  # on a busy machine the other thread comes late
                    break
                try:
                    data = reader.read_batch(np.array([0, 1]))[0].tobytes()
                except ShardChangedError:
                    outcomes["error"] += 1
                else:
                    assert data == picture
                    outcomes["bytes"] += 1
    finally:
        stop.set()
        changer.join()
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("key", [b"../secret.jpg", b"/tmp/secrets.jp", b"ant/../x.jpg", b"ant/.x/12.jp", b"ant\0/abc.jpg"])
def test_an_index_file_whose_names_lead_out_of_the_tree_is_not_believed(root: Path, key: bytes) -> None:
    file = ShardIndex.open(root).files[0]
    assert file is not None
    table = load_table(file, None)
    assert table is not None
    first = table.keys.tobytes()[table.key_ends[0] :]
    ends = table.key_ends + len(key) - table.key_ends[0]
    forged = object.__new__(type(table))
    for name in type(table).__dataclass_fields__:
        object.__setattr__(forged, name, getattr(table, name))
    object.__setattr__(forged, "keys", np.frombuffer(key + first, np.uint8))
    object.__setattr__(forged, "key_ends", ends)
    _store_table(forged, file)
    assert load_table(file, None) is None
    assert keys(ShardIndex.open(root)) == KEYS
    with pytest.raises(ValueError, match="do not fit"):
        replace(table, keys=forged.keys, key_ends=forged.key_ends)


def test_a_folder_in_the_place_of_a_shard_and_the_other_way_round_is_read_as_what_it_is(
    tmp_path: Path, root: Path, make_shard: Callable[..., Path], picture: bytes
) -> None:
    shard = make_shard(tmp_path / "data", [("x", {"jpg": picture})])
    assert len(ShardIndex.open(shard)) == 1
    shard.unlink()
    root.rename(shard)
    assert keys(ShardIndex.open(shard)) == KEYS
    shutil.rmtree(shard)
    make_shard(tmp_path / "data", [("x", {"jpg": picture})])
    assert keys(ShardIndex.open(shard)) == ["x"]
