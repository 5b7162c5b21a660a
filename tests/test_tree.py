"""Folder trees of loose files: against torchvision's ImageFolder, timm's reader, `datasets` where it is here, and packed shards."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import ImageFolder

from wherefrom.pipeline import Center, Independent, ViewFamily, ViewRecipe, make_loader
from wherefrom.pipeline.shards import tree
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.pattern import expand_pattern
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.shards.storage import LocalStorage
from wherefrom.pipeline.shards.store import file_beside
from wherefrom.tools.index import index_command
from wherefrom.tools.views_picture import views_command
from wherefrom.train.evaluation.report import check_held_out

pytestmark = pytest.mark.core

SAME_FOLDER = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OURS = (".jpg", ".jpeg", ".png", ".webp")
LONG_AGO = 10**18  # ns


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder for one test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("WHEREFROM_CACHE", str(folder))
    return folder


def settle(root: Path) -> None:
    """Make every folder look as if it had not changed for years."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())):
        os.utime(folder, ns=(LONG_AGO, LONG_AGO))


def plant(root: Path, names: Iterable[str], content: Callable[[int], bytes] = lambda number: b"%d" % number) -> Path:
    """Write a file under every name, each with bytes of its own; return the root."""
    root.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(number))
    settle(root)
    return root


@pytest.fixture
def picture(jpeg_bytes: Callable[..., bytes]) -> Callable[[int], bytes]:
    """`picture(number) -> bytes` of a small JPEG that tells its number."""

    def encode(number: int) -> bytes:
        return jpeg_bytes(np.random.default_rng(number).integers(0, 256, (24 + number % 9, 30, 3), np.uint8))

    return encode


@pytest.fixture
def pictures(tmp_path: Path, picture: Callable[[int], bytes]) -> Path:
    """A tree of three classes with 12 pictures."""
    return plant(tmp_path / "train", [f"{name}/{number}.JPEG" for name in ("ant", "bee", "cat") for number in range(4)], picture)


def keys(index: ShardIndex) -> list[str]:
    return [index.key(sample) for sample in range(len(index))]


def said(caplog: pytest.LogCaptureFixture) -> str:
    """Return all warnings since the last call."""
    text = "\n".join(record.getMessage() for record in caplog.records)
    caplog.clear()
    return text


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["a", "a-b", "a.b", "B", "b", "10", "9", "n01", "ü", "\U0001f600", "\uffee", "x y"]),
        st.sampled_from(["", "", "sub/", "sub-1/", "sub/deep/", "sub.2/", "Z/"]),
        st.sampled_from(["1.jpg", "10.jpg", "9.JPEG", "x.y.png", "A.WebP", "é.jpeg", "a.jpg", "B.png", "no.txt", "b.bmp", "noext"]),
    ).map("/".join),
    min_size=1,
    max_size=14,
    unique=True,
).filter(lambda names: any(name.lower().endswith(OURS) for name in names))


@SAME_FOLDER
@given(names=NAMES)
def test_order_labels_and_classes_are_those_of_torchvision(tmp_path: Path, names: list[str]) -> None:
    shutil.rmtree(tmp_path / "any", ignore_errors=True)
    root = plant(tmp_path / "any", names)
    theirs = ImageFolder(str(root), is_valid_file=lambda path: path.lower().endswith(OURS), allow_empty=True)
    index = ShardIndex.open(root, beside=False, rebuild=True)
    assert [(index.location(sample)[0], label) for sample, label in enumerate(index.label.tolist())] == theirs.samples
    assert list(index.classes) == theirs.classes


def test_keys_and_labels_are_those_of_timm(pictures: Path) -> None:
    theirs = ReaderImageFolder(str(pictures))
    index = ShardIndex.open(pictures)
    by_name = {theirs.filename(number): label for number, (_, label) in enumerate(theirs.samples)}
    assert dict(zip(keys(index), index.label.tolist(), strict=True)) == by_name
    assert {name: number for number, name in enumerate(index.classes)} == theirs.class_to_idx


def test_labels_are_those_of_datasets(pictures: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train", cache_dir=str(tmp_path / "hub"))
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    index = ShardIndex.open(pictures)
    assert theirs.features["label"].names == list(index.classes)
    by_name = {os.path.relpath(row["image"]["path"], pictures): row["label"] for row in theirs}
    assert dict(zip(keys(index), index.label.tolist(), strict=True)) == by_name


def test_pictures_in_the_root_come_first_without_label_and_it_is_said(
    pictures: Path, picture: Callable[[int], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    plant(pictures, ["z.jpg", "0.jpg"], picture)
    index = ShardIndex.open(pictures)
    assert keys(index)[:3] == ["0.jpg", "z.jpg", "ant/0.JPEG"]
    assert index.label.tolist() == [-1, -1, *np.repeat([0, 1, 2], 4).tolist()]
    assert "2 pictures lie in the root itself, not in a class folder, and have no label (first 0.jpg)" in said(caplog)


def test_a_class_folder_without_pictures_keeps_its_number_and_is_said(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pictures / "aaa" / "deep").mkdir(parents=True)
    index = ShardIndex.open(pictures)
    assert index.classes == ("aaa", "ant", "bee", "cat")
    assert np.unique(index.label).tolist() == [1, 2, 3]
    assert "1 of 4 class folders hold no pictures (first aaa)" in said(caplog)


def test_a_tree_without_class_folders_has_no_labels(tmp_path: Path, picture: Callable[[int], bytes]) -> None:
    root = plant(tmp_path / "flat", ["1.jpg", "2.jpg", "notes/readme.txt"], picture)
    index = ShardIndex.open(root)
    assert index.classes == ()
    assert index.label.tolist() == [-1, -1]


def test_labels_none_leaves_labels_out_and_the_stored_index_as_it_is(pictures: Path) -> None:
    named = ShardIndex.open(pictures)
    bare = ShardIndex.open(pictures, labels="none")
    assert bare.classes == () and set(bare.label.tolist()) == {-1}
    assert bare.reused == 1 and bare.files == named.files
    assert keys(bare) == keys(named)
    assert bare.fingerprint != named.fingerprint
    assert ShardIndex.open(pictures).fingerprint == named.fingerprint


def test_classes_of_a_held_out_tree_have_the_numbers_of_the_training_tree(
    pictures: Path, tmp_path: Path, picture: Callable[[int], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    train = ShardIndex.open(pictures)
    held_out = ShardIndex.open(plant(tmp_path / "val", ["cat/1.jpg", "bat/1.jpg", "ant/1.jpg"], picture), classes=train.classes)
    assert held_out.classes == (*train.classes, "bat")
    assert dict(zip(keys(held_out), held_out.label.tolist(), strict=True)) == {"ant/1.jpg": 0, "bat/1.jpg": 3, "cat/1.jpg": 2}
    assert "class 'bat'" in said(caplog)


def test_imagenets_flat_validation_folder_is_labeled_by_its_list(tmp_path: Path, picture: Callable[[int], bytes]) -> None:
    names = [f"ILSVRC2012_val_{number:08d}" for number in (1, 2, 3)]
    root = plant(tmp_path / "val", [f"{name}.JPEG" for name in names], picture)
    rows = [f"{name},{wnid} 1 2 3 4" for name, wnid in zip(names, ("n02", "n01", "n02"), strict=True)]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    index = ShardIndex.open(root)
    assert index.classes == ("n01", "n02") and index.label.tolist() == [1, 0, 1]
    assert not index.notes


def test_pictures_that_lie_deeper_are_labeled_by_the_first_folder_and_it_is_said(
    tmp_path: Path, picture: Callable[[int], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    root = plant(tmp_path / "deep", ["a/x/1.jpg", "b/x/1.jpg"], picture)
    assert ShardIndex.open(root).label.tolist() == [0, 1]
    text = said(caplog)
    assert "deeper than CLASS/FILE" in text and "--labels none" in text


@pytest.mark.parametrize("names", [("train/a/1.jpg", "val/a/1.jpg"), ("Test/1.jpg", "TRAIN/a/1.jpg", "notes/a.txt"), ("val/1.jpg",)])
def test_folders_that_are_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...], picture: Callable[[int], bytes]) -> None:
    root = plant(tmp_path / "set", names, picture)
    way_on = next(name.split("/")[0] for split in ("train", "val") for name in names if name.lower().startswith(split))
    for _ in range(2):  # the second time, there is an index for `--labels none`
        with pytest.raises(ValueError, match=r"are parts of a data set, no classes") as refused:
            ShardIndex.open(root)
        assert "\n" not in str(refused.value)
        assert f"{root}/{way_on}" in str(refused.value) and "--labels none" in str(refused.value)
        assert len(ShardIndex.open(root, labels="none")) == len([name for name in names if name.endswith("jpg")])
    assert len(ShardIndex.open(plant(tmp_path / "vehicles", ["train/1.jpg", "boat/1.jpg"], picture)).classes) == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), ("nothing else either", "NAME.jpg, .jpeg, .png or .webp")),
        (("a/1.bmp", "a/2.bmp", "b/3.tif", "b/x"), ("2 .bmp", "1 .tif", "1 (no extension)")),
        (("a/.1.jpg", "a/.hidden/2.jpg"), ("2 .hidden",)),
        (("a/1.tar",), ("1 .tar", "name the folder that the tars lie in")),
        (("data/1.parquet",), ("1 .parquet", "wherefrom pack")),
    ],
)
def test_a_folder_without_pictures_says_what_it_holds_and_leaves_nothing(
    tmp_path: Path, names: tuple[str, ...], words: tuple[str, ...]
) -> None:
    root = plant(tmp_path / "none", names)
    with pytest.raises(ValueError, match="no pictures") as refused:
        ShardIndex.open(root)
    text = str(refused.value)
    assert "\n" not in text and str(root) in text
    assert all(word in text for word in words), text
    assert os.listdir(tmp_path) == ["none"]


def test_a_misspelled_path_is_told_the_nearest_one(pictures: Path) -> None:
    for wrong, right in ((f"{pictures.parent}/trian", pictures), (f"{pictures}/bea", pictures / "bee")):
        with pytest.raises(FileNotFoundError, match="no such file") as refused:
            ShardIndex.open(wrong)
        assert str(refused.value) == f"{wrong}: no such file; is it {right}?"
    with pytest.raises(FileNotFoundError, match="name a shard, a folder of shards or of pictures"):
        ShardIndex.open(f"{pictures.parent}/entirely different")


def test_one_tree_has_one_name_however_it_is_written(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ShardIndex.open(pictures)
    monkeypatch.chdir(pictures)
    for name in (f"{pictures}/", ".", "../train", f"{pictures}//"):
        again = ShardIndex.open(name)
        assert (again.reused, again.fingerprint) == (1, first.fingerprint)


def test_a_picture_is_not_named_twice(pictures: Path) -> None:
    for pattern in (f"{pictures}::{pictures}/", f"{pictures}::{pictures}/ant", f"{pictures}/ant::{pictures}"):
        with pytest.raises(ValueError, match=r"named twice|which the pattern names too"):
            expand_pattern(pattern)
    assert expand_pattern(f"{pictures}/bee::{pictures}/ant") == [f"{pictures}/bee", f"{pictures}/ant"]


def test_links_to_files_and_folders_are_followed(pictures: Path, tmp_path: Path) -> None:
    farm = tmp_path / "farm"
    (farm / "ant").mkdir(parents=True)
    (farm / "ant" / "x.jpg").symlink_to(pictures / "ant" / "1.JPEG")
    (farm / "bee").symlink_to(pictures / "bee")
    os.link(pictures / "cat" / "3.JPEG", farm / "ant" / "y.jpg")
    index = ShardIndex.open(farm)
    assert keys(index) == ["ant/x.jpg", "ant/y.jpg", *(f"bee/{number}.JPEG" for number in range(4))]
    assert index.invalid_count == 0
    with ShardReader(index) as reader:
        assert reader.read(0).tobytes() == (pictures / "ant" / "1.JPEG").read_bytes()


def test_nothing_is_ever_written_into_a_tree(pictures: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (pictures, *pictures.rglob("*"))}

    before = state()
    index = ShardIndex.open(pictures, decode=True)
    assert state() == before
    assert index.files == (pictures.parent / ".wherefrom" / "train.index",) == (file_beside(pictures),)
    assert len(ImageFolder(str(pictures))) == 12


def test_an_index_that_cannot_lie_beside_the_tree_lies_in_the_cache(pictures: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures.parent.chmod(0o555)
    try:
        index = ShardIndex.open(pictures)
        assert index.files[0] is not None and cache in index.files[0].parents
        assert "nothing can be written beside" in said(caplog)
        assert ShardIndex.open(pictures).reused == 1
    finally:
        pictures.parent.chmod(0o755)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read to be judged."""
    names: list[str] = []
    examine = tree._examine_file

    def noted(path: bytes) -> Any:
        names.append(os.fsdecode(path))
        return examine(path)

    monkeypatch.setattr(tree, "_examine_file", noted)
    return names


def test_opening_again_looks_at_folders_alone(pictures: Path, examined: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = ShardIndex.open(pictures)
    assert len(examined) == 12
    asked: list[str] = []
    look = os.stat

    def noted(path: Any, **options: Any) -> os.stat_result:
        asked.append(os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "")
        return look(path, **options)

    monkeypatch.setattr(os, "stat", noted)
    again = ShardIndex.open(pictures)
    assert {name for name in asked if name.startswith(str(pictures))} == {str(pictures), *(f"{pictures}/{name}" for name in first.classes)}
    assert len(examined) == 12
    assert (again.reused, again.fingerprint) == (1, first.fingerprint)


def test_what_was_added_removed_or_replaced_is_found_named_and_alone_read_again(
    pictures: Path, picture: Callable[[int], bytes], examined: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    damaged = pictures / "cat" / "0.JPEG"
    damaged.write_bytes(picture(0)[:-2])
    settle(pictures)
    assert not ShardIndex.open(pictures).valid[8]
    examined.clear()
    said(caplog)

    (pictures / "ant" / "00.jpg").write_bytes(picture(77))
    (pictures / "dog").mkdir()
    (pictures / "dog" / "1.jpg").write_bytes(picture(78))
    (pictures / "bee" / "2.JPEG").unlink()
    aside = pictures / "bee" / "aside"
    aside.write_bytes(picture(79))
    aside.rename(pictures / "bee" / "3.JPEG")
    index = ShardIndex.open(pictures)
    changed = ["ant/00.jpg", "bee/3.JPEG", "dog/1.jpg"]
    assert sorted(examined) == [f"{pictures}/{name}" for name in changed]
    assert (
        "since it was indexed, 2 added (first ant/00.jpg), 1 removed (first bee/2.JPEG), 1 replaced (first bee/3.JPEG), "
        "4 class folders where there were 3"
    ) in said(caplog)

    fresh = ShardIndex.open(pictures, beside=False, rebuild=True)
    assert index.fingerprint == fresh.fingerprint
    assert np.array_equal(index.valid, fresh.valid) and np.array_equal(index.source_size, fresh.source_size)
    assert index.classes == ("ant", "bee", "cat", "dog")
    assert [index.key(sample) for sample in np.flatnonzero(~index.valid)] == ["cat/0.JPEG"]
    assert "no end marker" in index.reason(int(np.argmin(index.valid)))


def test_a_folder_that_changed_a_moment_ago_is_listed_again(pictures: Path, picture: Callable[[int], bytes]) -> None:
    """Its mtime may stay the same when it changes once more within one tick of the disk's clock."""
    now = time.time_ns()
    os.utime(pictures / "bee", ns=(now, now))
    assert len(ShardIndex.open(pictures)) == 12
    (pictures / "bee" / "new.jpg").write_bytes(picture(50))
    os.utime(pictures / "bee", ns=(now, now))
    assert len(ShardIndex.open(pictures)) == 13


def test_an_index_that_nothing_changed_is_not_written_again(pictures: Path) -> None:
    now = time.time_ns() + 10**12  # in the future: never settled
    os.utime(pictures / "bee", ns=(now, now))
    file = ShardIndex.open(pictures).files[0]
    assert file is not None
    before = file.stat()
    assert ShardIndex.open(pictures).reused == 1
    assert file.stat().st_ino == before.st_ino


def test_the_fingerprint_depends_on_names_sizes_and_labels_alone(pictures: Path, tmp_path: Path) -> None:
    first = ShardIndex.open(pictures).fingerprint
    elsewhere = tmp_path / "other" / "train"
    shutil.copytree(pictures, elsewhere)
    for path in elsewhere.rglob("*"):
        os.utime(path, ns=(LONG_AGO // 2, LONG_AGO // 2))
    assert ShardIndex.open(elsewhere).fingerprint == first
    renamed = shutil.copytree(pictures, tmp_path / "renamed" / "train")
    (renamed / "ant").rename(renamed / "aunt")
    longer = shutil.copytree(pictures, tmp_path / "longer" / "train")
    with (longer / "ant" / "0.JPEG").open("ab") as file:
        file.write(b"\0")
    more = shutil.copytree(pictures, tmp_path / "more" / "train")
    (more / "aaa").mkdir()
    assert len({first, *(ShardIndex.open(path).fingerprint for path in (renamed, longer, more))}) == 4


def test_reading_gives_the_files_bytes_through_few_descriptors_and_many_threads(pictures: Path) -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    index = ShardIndex.open(pictures)
    contents = [(pictures / key).read_bytes() for key in keys(index)]
    before, most = open_descriptors(), 0
    ids = np.random.default_rng(0).integers(0, 12, (40, 64))
    reader = ShardReader(index, loose_threads=4)

    def read(row: np.ndarray) -> bool:
        nonlocal most
        most = max(most, open_descriptors())
        return all(data.tobytes() == contents[sample] for data, sample in zip(reader.read_batch(row), row.tolist(), strict=True))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, ids))
        assert all(pool.map(lambda sample: reader.read(sample).tobytes() == contents[sample], range(12)))
    assert most - before <= 4 + 2  # those of the listing itself
    reader.close()
    reader.close()
    assert open_descriptors() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wherefrom-read")]
    for read_closed in (lambda: reader.read(0), lambda: reader.read_batch(np.arange(12))):
        with pytest.raises(ValueError, match="closed"):
            read_closed()


def test_a_reader_that_closes_amid_reads_says_so_to_each_of_them(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches, of which the second waits for the threads that the first has: no read of either is dropped without a word."""
    started, go_on = threading.Semaphore(0), threading.Event()
    open_file = LocalStorage.open

    def far_away(self: LocalStorage, path: str) -> Any:
        started.release()
        assert go_on.wait(timeout=20)
        return open_file(self, path)

    reader = ShardReader(ShardIndex.open(pictures), loose_threads=2)
    monkeypatch.setattr(LocalStorage, "open", far_away)
    with ThreadPoolExecutor(3) as callers:
        batches = [callers.submit(reader.read_batch, np.arange(4)) for _ in range(2)]
        assert all(started.acquire(timeout=20) for _ in range(2))
        closing = callers.submit(reader.close)
        while not reader._closed:
            time.sleep(0.001)
        go_on.set()
        for batch in batches:
            with pytest.raises(ValueError, match="closed"):
                batch.result(timeout=20)
        closing.result(timeout=20)


def test_files_of_a_batch_are_waited_for_at_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk far away takes its time over each file."""
    index = ShardIndex.open(pictures)
    meeting = threading.Barrier(4)
    open_file = LocalStorage.open

    def far_away(self: LocalStorage, path: str) -> Any:
        meeting.wait(timeout=20)
        return open_file(self, path)

    monkeypatch.setattr(LocalStorage, "open", far_away)
    with ShardReader(index, loose_threads=4) as reader:
        assert len(reader.read_batch(np.arange(12))) == 12
    with ShardReader(index, loose_threads=0) as reader:
        meeting.abort()
        with pytest.raises(threading.BrokenBarrierError):
            reader.read_batch(np.arange(12))


def test_a_reader_goes_on_in_a_process_that_was_forked(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a DataLoader forks its workers."""
    index = ShardIndex.open(pictures)
    contents = [(pictures / key).read_bytes() for key in keys(index)]
    with ShardReader(index, loose_threads=3) as reader:
        with monkeypatch.context() as patch:
            meeting, open_file = threading.Barrier(3), LocalStorage.open
            patch.setattr(LocalStorage, "open", lambda self, path: (meeting.wait(timeout=20), open_file(self, path))[1])
            reader.read_batch(np.arange(12))  # with all its threads
        child = os.fork()
        if not child:
            signal.alarm(20)
            right = [data.tobytes() for data in reader.read_batch(np.arange(12))] == contents
            os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_an_audit_of_a_tree_is_remembered_and_outlives_a_file_that_is_added(
    pictures: Path, picture: Callable[[int], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    start = picture(3).index(b"\xff\xda") + 20
    (pictures / "bee" / "0.JPEG").write_bytes(picture(3)[:start] + b"\0" * 40 + b"\xff\xd9")
    settle(pictures)
    assert ShardIndex.open(pictures).invalid_count == 0
    audited = ShardIndex.open(pictures, decode=True)
    assert audited.audited
    assert [audited.key(int(sample)) for sample in np.flatnonzero(~audited.valid)] == ["bee/0.JPEG"]
    assert ShardIndex.open(pictures).audited
    without_audit = audited.invalid_digest(audit=False)

    (pictures / "ant" / "new.jpg").write_bytes(picture(5))
    changed = ShardIndex.open(pictures)
    assert not changed.audited
    assert [changed.key(int(sample)) for sample in np.flatnonzero(~changed.valid)] == ["bee/0.JPEG"]
    again = ShardIndex.open(pictures, decode=True)
    assert again.audited and "does not decode" in again.reason(int(np.argmin(again.valid)))
    (pictures / "ant" / "new.jpg").unlink()
    assert ShardIndex.open(pictures).invalid_digest(audit=False) == without_audit


FAMILIES = (
    ViewFamily(name="global", views=2, size_px=(32, 32), law=Independent(area_frac=(0.3, 1))),
    ViewFamily(name="whole", views=1, size_px=(16, 16), law=Center()),
)


def packed(root: Path, path: Path, make_shard: Callable[..., Path]) -> Path:
    """Pack a tree's pictures in its order into one shard, with the numbers of its classes."""
    theirs = ImageFolder(str(root))
    samples = [(f"{i:06d}", {"jpg": Path(name).read_bytes(), "cls": b"%d" % label}) for i, (name, label) in enumerate(theirs.samples)]
    return make_shard(path, samples)


@pytest.mark.parametrize("threads", [0, 2])
def test_views_are_bit_for_bit_those_of_packed_shards(
    pictures: Path, tmp_path: Path, make_shard: Callable[..., Path], threads: int
) -> None:
    (pictures / "bee" / "1.JPEG").write_bytes(b"no picture")
    sources = [pictures, packed(pictures, tmp_path / "packed.tar", make_shard)]
    loaders = [make_loader(source, ViewRecipe(families=FAMILIES), seed=3, global_batch=5, threads=threads) for source in sources]
    with loaders[0] as loose, loaders[1] as shards:
        for epoch in range(2):
            for batch, other in zip(loose, shards, strict=True):
                for name in ("sample", "drawn_for", "label", "source_size"):
                    assert torch.equal(getattr(batch, name), getattr(other, name)), (epoch, name)
                for views, others in zip(batch.views, other.views, strict=True):
                    assert torch.equal(views.pixels, others.pixels)
                    assert torch.equal(views.geometry.boxes, others.geometry.boxes)
        assert loose.stats().replaced == shards.stats().replaced > 0


def test_trees_and_tars_are_mixed(pictures: Path, tmp_path: Path, make_shard: Callable[..., Path], picture: Callable[[int], bytes]) -> None:
    named = make_shard(tmp_path / "named.tar", [("x", {"jpg": picture(1), "txt": b"bee"}), ("y", {"jpg": picture(2), "txt": b"ape"})])
    index = ShardIndex.open(f"{named}::{pictures}/", labels="txt")
    assert index.classes == ("ant", "ape", "bee", "cat")
    assert index.label.tolist() == [2, 1, *np.repeat([0, 2, 3], 4).tolist()]
    assert index.location(0) == (str(named), 512, len(picture(1)))
    assert index.location(2) == (f"{pictures}/ant/0.JPEG", 0, (pictures / "ant" / "0.JPEG").stat().st_size)
    assert index.name(2) == f"{pictures}/ant/0.JPEG" and index.name(0) == f"{named}:x"
    with ShardReader(index) as reader:
        assert [data.tobytes() for data in reader.read_batch(np.array([3, 0]))] == [(pictures / "ant" / "1.JPEG").read_bytes(), picture(1)]


def test_blocks_of_a_tree_are_its_folders(
    pictures: Path, tmp_path: Path, make_shard: Callable[..., Path], picture: Callable[[int], bytes]
) -> None:
    shard = make_shard(tmp_path / "one.tar", [(f"{number}", {"jpg": picture(number)}) for number in range(2)])
    index = ShardIndex.open([pictures, shard], labels="none")
    assert index.block_lengths == (0, 4, 4, 4, 2)
    with make_loader(index, ViewRecipe(families=FAMILIES), global_batch=2, order="block", threads=0) as loader:
        assert sorted(np.concatenate([batch.sample.numpy() for batch in loader]).tolist()) == list(range(14))


def test_held_out_trees_that_are_learned_from_are_refused_by_name(
    pictures: Path, tmp_path: Path, picture: Callable[[int], bytes], make_shard: Callable[..., Path]
) -> None:
    train = ShardIndex.open(pictures)
    same_sizes = plant(
        tmp_path / "held" / "train", keys(train), lambda number: (pictures / keys(train)[number]).read_bytes()[:-1] + b"\xd8"
    )
    check_held_out(train, ShardIndex.open(same_sizes))
    check_held_out(train, ShardIndex.open(make_shard(tmp_path / "one.tar", [("x", {"jpg": picture(1)})])))
    linked, farm, copied = tmp_path / "linked", tmp_path / "farm", tmp_path / "copied"
    linked.symlink_to(pictures)
    farm.mkdir()
    (farm / "cat").symlink_to(pictures / "cat")
    shutil.copytree(pictures, copied)
    for again in (pictures, pictures / "bee", linked, farm, copied):
        with pytest.raises(
            ValueError, match=r"val: \S+ (is a folder of training pictures too|holds copies of the training pictures in)"
        ) as refused:
            check_held_out(train, ShardIndex.open(again))
        assert str(again) in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="is a folder of training pictures too"):
        check_held_out(ShardIndex.open(pictures / "bee"), train)


def test_progress_moves_while_a_tree_is_read(tmp_path: Path, make_shard: Callable[..., Path], picture: Callable[[int], bytes]) -> None:
    root = plant(tmp_path / "many", [f"a/{number}.jpg" for number in range(600)])
    shard = make_shard(tmp_path / "one.tar", [("x", {"jpg": picture(1)})])
    seen: list[tuple[int, int]] = []
    ShardIndex.open([root, shard], labels="none", progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {601}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == 4 and seen[-1][0] == 601
    seen.clear()
    plant(tmp_path / "good", [f"{number}.jpg" for number in range(40)], picture)
    ShardIndex.open(tmp_path / "good", decode=True, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [40, 16, 32, 40, 40]


def test_a_scan_that_is_broken_off_leaves_nothing_and_the_next_one_is_whole(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(path: bytes) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tree, "_examine_file", broken_off)
        with pytest.raises(KeyboardInterrupt):
            ShardIndex.open(pictures)
    assert os.listdir(pictures.parent) == ["train"]
    assert len(ShardIndex.open(pictures)) == 12


def test_the_commands_take_a_tree(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index_command(str(pictures)) == 0
    text = capsys.readouterr().out
    for expected in ("1 (1 of loose files)", "12: 12 valid", "12 jpeg", "0 ant, 1 bee, 2 cat", "same folder", "1 built"):
        assert expected in text
    (pictures / "ant" / "0.JPEG").rename(pictures / "ant" / "$\\frac{\udcff\n.jpg")
    views_command(data=str(pictures), out=tmp_path / "views.png", samples=1)
    assert (tmp_path / "views.png").stat().st_size > 0
