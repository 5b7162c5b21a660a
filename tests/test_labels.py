"""Labels of tar shards and of ImageNet's own files: by names, by JSON, by tars' names, by the lists of the validation set.

The judges are Python's tarfile, the lists that the test itself wrote, and Python's order of strings.
"""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from wherefrom.pipeline.shards.index import BrokenShardError, ShardIndex
from wherefrom.pipeline.shards.labels import LabelRule, imagenet_classes
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.tools.index import index_command
from wherefrom.train.evaluation.report import check_same_classes

pytestmark = pytest.mark.core

JpegBytes = Callable[..., bytes]
MakeShard = Callable[..., Path]
Samples = Sequence[tuple[str, Mapping[str, bytes]]]


@pytest.fixture
def picture(jpeg_bytes: JpegBytes) -> bytes:
    return jpeg_bytes(np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8))


def names_of(index: ShardIndex) -> list[str | None]:
    return [index.classes[label] if label >= 0 else None for label in index.label.tolist()]


def tar_bytes(members: Mapping[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return packed.getvalue()


def test_names_in_a_member_are_numbered_in_the_order_of_strings(tmp_path: Path, make_shard: MakeShard, picture: bytes) -> None:
    names = ["zebra", "ant", "Ünï cöde", "ant", "Bee", "10", "9"]
    make_shard(tmp_path / "a.tar", [(f"k{n}", {"jpg": picture, "cls": f" {name}\n".encode()}) for n, name in enumerate(names)])
    make_shard(tmp_path / "b.tar", [("k", {"jpg": picture, "cls": b"mole"})])
    index = ShardIndex.open(tmp_path, labels="cls")
    assert names_of(index) == [*names, "mole"]
    assert index.classes == tuple(sorted({*names, "mole"}))
    assert index.classes_file is not None
    assert json.loads(index.classes_file.read_text()) == {name: number for number, name in enumerate(index.classes)}
    assert names_of(ShardIndex.open(tmp_path, labels="cls")) == [*names, "mole"]  # found stored
    assert (ShardIndex.open(tmp_path).label >= 0).tolist() == [name.isdigit() for name in [*names, "mole"]]  # another rule, another index


@pytest.mark.parametrize(
    ("labels", "members", "expected"),
    [
        ("cls", {"cls": b"7"}, 7),
        ("txt", {"txt": b"a red fox"}, "a red fox"),
        ("txt", {"txt": b"x" * 257}, None),
        ("json.label", {"json": b'{"label": 3}'}, 3),
        ("json.label", {"json": b'{"label": "fox"}'}, "fox"),
        ("json.meta.class", {"json": b'{"meta": {"class": "fox"}}'}, "fox"),
        ("json.label", {"json": b'{"label": true}'}, None),
        ("json.label", {"json": b'{"label": [1]}'}, None),
        ("json.label", {"json": b'{"label": 1e400}'}, None),
        ("json.label", {"json": b'{"label": 99999999999999999999}'}, None),
        ("json.label", {"json": b"[" * 100_000}, None),
        ("json.label", {"json": b"{"}, None),
        ("json.label", {"json": b"{}", "cls": b"4"}, None),
        ("tar", {"cls": b"4"}, "s"),
        ("none", {"cls": b"4"}, None),
        (None, {"cls": b"4"}, 4),
        (None, {"cls": b"fox"}, None),
    ],
)
def test_a_rule_reads_what_it_names(
    tmp_path: Path, make_shard: MakeShard, picture: bytes, labels: str | None, members: dict[str, bytes], expected: int | str | None
) -> None:
    index = ShardIndex.open(make_shard(tmp_path / "s.tar", [("k", {"jpg": picture, **members})]), labels=labels)
    label = int(index.label[0])
    assert (None if label < 0 else index.classes[label] if index.classes else label) == expected


@pytest.mark.parametrize("labels", ["", "json", "json.", "json..a", "cls.name", "../x", "a b", "Ü"])
def test_a_rule_that_names_nothing_is_refused_in_one_line(labels: str) -> None:
    with pytest.raises(ValueError, match=r"names no label; give a member's extension") as caught:
        LabelRule.of(labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", ["ox", b"ox", [1, 2], ["ox", "ape", "ox"]])
def test_classes_that_do_not_number_names_are_refused(tmp_path: Path, make_shard: MakeShard, picture: bytes, classes: Any) -> None:
    shard = make_shard(tmp_path / "a.tar", [("k", {"jpg": picture, "cls": b"ox"})])
    with pytest.raises((TypeError, ValueError), match=r"^classes(=.*: needs a list of names| name 'ox' twice)"):
        ShardIndex.open(shard, labels="cls", classes=classes)
    assert ShardIndex.open(shard, labels="cls", classes=["ape", "ox"]).label.tolist() == [1]


def test_a_rule_that_is_no_word_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^labels=3: needs a word such as 'cls'"):
        LabelRule.of(3)  # type: ignore[arg-type]


def ilsvrc_train(folder: Path, jpeg_bytes: JpegBytes, *, classes: int, pictures: int) -> Path:
    """Write a tar of tars as ILSVRC2012 has it, with `pictures` in all, odd names among them, and return it."""
    rng = np.random.default_rng(1)
    tars: dict[str, dict[str, bytes]] = {}
    for number in rng.permutation(pictures).tolist():
        wordnet_id = f"n{10_000_000 + 37 * (number % classes):08d}"
        odd = {0: "/sub.dir", 1: "/" + "long" * 40}.get(number // classes, "")
        tars.setdefault(wordnet_id, {})[
            f"{wordnet_id}{odd}/{wordnet_id}_{number}.JPEG".lstrip("/") if odd else f"{wordnet_id}_{number}.JPEG"
        ] = jpeg_bytes(rng.integers(0, 256, (8, 8 + number % 5, 3), np.uint8))
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    inner = {f"{name}.tar": tar_bytes(members, formats[1 + n % 2]) for n, (name, members) in enumerate(tars.items())}
    path = folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_bytes(inner))
    return path


def test_a_tar_of_tars_is_read_in_place_as_tarfile_reads_it(tmp_path: Path, jpeg_bytes: JpegBytes) -> None:
    path = ilsvrc_train(tmp_path, jpeg_bytes, classes=50, pictures=2000)
    expected = []
    with tarfile.open(path) as outer:
        for member in outer:
            content = outer.extractfile(member)
            assert content is not None
            with tarfile.open(fileobj=content) as inner:
                for picture in inner:
                    data = inner.extractfile(picture)
                    assert data is not None
                    stem, name = member.name.removesuffix(".tar"), picture.name
                    folder_end = name.rfind("/") + 1
                    expected.append((f"{stem}/{name[:folder_end]}{name[folder_end:].split('.')[0]}", stem, data.read()))
    index = ShardIndex.open(path)
    assert len(index) == 2000
    assert index.invalid_count == 0
    assert [index.key(sample) for sample in range(2000)] == [key for key, _, _ in expected]
    assert names_of(index) == [name for _, name, _ in expected]
    assert index.classes == tuple(sorted({name for _, name, _ in expected}))
    with ShardReader(index) as reader:
        read = reader.read_batch(np.arange(2000))
    assert [data.tobytes() for data in read] == [data for _, _, data in expected]
    assert index.location(5) == (str(path), index.offset[5], len(expected[5][2]))


def test_tars_are_read_one_level_deep_and_what_is_deeper_is_counted(tmp_path: Path, picture: bytes) -> None:
    innermost = tar_bytes({"deep.jpg": picture})
    path = tmp_path / "outer.tar"
    path.write_bytes(
        tar_bytes({"a.tar": tar_bytes({"b.tar": innermost, "x.jpg": picture}), "y.jpg": picture, "c.d.tar": tar_bytes({"z.jpg": picture})})
    )
    index = ShardIndex.open(path)
    assert [index.key(sample) for sample in range(len(index))] == ["a/x", "y", "c.d/z"]
    assert names_of(index) == ["a", None, "c.d"]
    assert index.unread_members == {"tar": 1}


def test_a_damaged_tar_within_a_tar_is_named(tmp_path: Path, picture: bytes) -> None:
    path = tmp_path / "outer.tar"
    inner = tar_bytes({"x.jpg": picture})
    path.write_bytes(tar_bytes({"good.tar": inner, "short.tar": inner[:700], "late.tar": inner}))
    with pytest.raises(BrokenShardError, match=r"outer\.tar: holds 'short\.tar', which is cut short") as caught:
        ShardIndex.open(path)
    assert "\n" not in str(caught.value)


def test_a_tar_within_a_tar_reads_nothing_beyond_itself(tmp_path: Path, picture: bytes) -> None:
    """A member that claims more bytes than its tar has would read into the next tar."""
    inner = bytearray(tar_bytes({"x.jpg": picture}))
    size = len(inner) + 512
    inner[124:136] = f"{size:011o}\0".encode()
    inner[148:156] = b" " * 8
    inner[148:156] = f"{sum(inner[:512]):06o}\0 ".encode()
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_bytes({"liar.tar": bytes(inner), "next.tar": tar_bytes({"y.jpg": picture})}))
    with pytest.raises(BrokenShardError, match=r"'liar\.tar', which is cut short: the member at byte 0 lacks"):
        ShardIndex.open(path)


def test_tars_named_by_wordnet_are_classes_and_others_when_asked(tmp_path: Path, make_shard: MakeShard, picture: bytes) -> None:
    for folder, stems in (("wordnet", ["n02000000", "n01000000"]), ("words", ["dog", "cat"])):
        (tmp_path / folder).mkdir()
        for stem in stems:
            make_shard(tmp_path / folder / f"{stem}.tar", [(f"{stem}_{n}", {"jpg": picture}) for n in range(2)])
    assert names_of(ShardIndex.open(tmp_path / "wordnet")) == ["n01000000"] * 2 + ["n02000000"] * 2
    assert names_of(ShardIndex.open(tmp_path / "words", labels="tar")) == ["cat"] * 2 + ["dog"] * 2
    assert (ShardIndex.open(tmp_path / "words").label == -1).all()
    make_shard(tmp_path / "wordnet" / "n03000000.tar", [("k", {"jpg": picture, "cls": b"5"})])  # a shard that numbers its samples itself
    with pytest.raises(ValueError, match=r"n01000000\.tar names its classes, .*n03000000\.tar numbers them"):
        ShardIndex.open(tmp_path / "wordnet")


VALIDATION = [f"ILSVRC2012_val_{number:08d}" for number in (1, 2, 3, 4, 5)]
TRUTH = {1: "n05", 2: "n03", 3: "n05", 4: "n04", 5: "n03"}  # by picture


def write_solution(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["ImageId", "PredictionString"])
        for number, name in reversed(TRUTH.items()):
            lines.writerow([f"ILSVRC2012_val_{number:08d}", f"{name} 85 1 499 272 {name} 3 4 5 6 "])


def write_devkit(folder: Path, *, meta: bool = True) -> None:
    """Write the two files with numbers of classes that are not those of sorted names, an inner node of WordNet among them."""
    folder.mkdir(parents=True, exist_ok=True)
    number_of = {"n05": 1, "n03": 2, "n04": 3}
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number_of[TRUTH[picture]]}\n" for picture in sorted(TRUTH)))
    if meta:
        rows: Any = np.array(
            [(number, name, "words", 0) for name, number in number_of.items()] + [(4, "n00", "inner", 3)],
            dtype=[("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")],
        )
        savemat(folder / "meta.mat", {"synsets": rows}, do_compression=True)


@pytest.mark.parametrize(
    "place",
    [
        "LOC_val_solution.csv",
        "../LOC_val_solution.csv",
        "../../../../LOC_val_solution.csv",
        "../ILSVRC2012_devkit_t12/data",
        "../data",
        ".",
    ],
)
def test_the_flat_validation_set_is_labeled_by_the_lists_above_it(
    tmp_path: Path, make_shard: MakeShard, picture: bytes, place: str
) -> None:
    folder = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    folder.mkdir(parents=True)
    shard = make_shard(folder / "ILSVRC2012_img_val.tar", [(name, {"JPEG": picture}) for name in VALIDATION])
    if place.endswith(".csv"):
        write_solution(folder / place)
    else:
        write_devkit(folder / place)
    index = ShardIndex.open(shard)
    assert names_of(index) == list(TRUTH.values())
    assert index.classes == ("n03", "n04", "n05")
    again = ShardIndex.open(shard, classes=("n00", "n05"))  # with the numbers of a train set
    assert names_of(again) == list(TRUTH.values())
    assert again.classes == ("n00", "n05", "n03", "n04")
    assert any("'n03' and 1 more are not among the 2 that were numbered before" in note for note in again.notes)


def test_the_ground_truth_alone_is_refused_and_says_why(tmp_path: Path, make_shard: MakeShard, picture: bytes) -> None:
    shard = make_shard(tmp_path / "val.tar", [(name, {"JPEG": picture}) for name in VALIDATION])
    assert (ShardIndex.open(shard).label == -1).all()  # no list at all
    write_devkit(tmp_path / "data", meta=False)
    with pytest.raises(
        ValueError, match=r"its numbers are the devkit's own, not those of sorted class names; put .*meta\.mat beside it"
    ) as caught:
        ShardIndex.open(shard)
    assert "\n" not in str(caught.value)
    assert (ShardIndex.open(shard, labels="none").label == -1).all()
    write_devkit(tmp_path / "data")
    assert names_of(ShardIndex.open(shard)) == list(TRUTH.values())


@pytest.mark.parametrize("damage", [b"", b"MATLAB 5.0 MAT-file" + b"\0" * 200, "cut", "flipped"])
def test_a_damaged_devkit_is_one_line(tmp_path: Path, damage: bytes | str) -> None:
    write_devkit(tmp_path)
    meta = tmp_path / "meta.mat"
    whole = meta.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    meta.write_bytes(
        {"cut": whole[: len(whole) // 2], "flipped": bytes(flipped)}.get(damage, damage) if isinstance(damage, str) else damage
    )
    with pytest.raises(ValueError, match=r"meta\.mat: is not the devkit's") as caught:
        imagenet_classes(VALIDATION, str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_solution_of_another_form_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "LOC_val_solution.csv").write_text("id,label\n1,2\n")
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv: does not begin with ImageId"):
        imagenet_classes(VALIDATION, str(tmp_path))


def test_a_solution_with_a_field_that_does_not_end_is_one_line(tmp_path: Path) -> None:
    endless = '"n01440764' + " 1" * csv.field_size_limit()
    (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\nILSVRC2012_val_00000001,{endless}")
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv: line \d+ is no line of CSV \(.+\); fetch it again"):
        imagenet_classes(["ILSVRC2012_val_00000001"], str(tmp_path))


def test_pictures_without_a_label_and_a_single_class_are_said_aloud(tmp_path: Path, make_shard: MakeShard, picture: bytes) -> None:
    some = make_shard(tmp_path / "some.tar", [(f"k{n}", {"jpg": picture, **({"cls": b"ox"} if n else {})}) for n in range(3)])
    index = ShardIndex.open(some, labels="cls")
    assert [note for note in index.notes if "1 of 3 samples have no label" in note and "some.tar:k0" in note]
    one = ShardIndex.open(make_shard(tmp_path / "one.tar", [("k", {"jpg": picture, "cls": b"ox"})]), labels="cls")
    assert [note for note in one.notes if "one.tar: all labels are of one class, 'ox'" in note]


def test_held_out_labels_that_cannot_be_compared_are_refused(tmp_path: Path, make_shard: MakeShard, picture: bytes) -> None:
    def opened(name: str, label: bytes, labels: str | None = "cls") -> ShardIndex:
        return ShardIndex.open(make_shard(tmp_path / f"{name}.tar", [("k", {"jpg": picture, "cls": label})]), labels=labels)

    train, numbered, same, other = opened("train", b"ox"), opened("numbered", b"1"), opened("same", b"ox"), opened("other", b"yak")
    check_same_classes(train, same)
    check_same_classes(train, opened("none", b"ox", "none"))
    for first, second, words in ((train, numbered, "numbers its classes"), (train, other, "'yak' there, 'ox' here")):
        renumbered = ShardIndex.open(second.paths[0], labels="cls", classes=first.classes)
        with pytest.raises(ValueError, match=words) as caught:
            check_same_classes(first, renumbered)
        assert "\n" not in str(caught.value)


def test_the_index_command_shows_numbers_of_classes(
    tmp_path: Path, make_shard: MakeShard, picture: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"class\n{n:02d}" for n in range(12)]
    make_shard(tmp_path / "s.tar", [(f"k{n}", {"jpg": picture, "cls": f"class\t{n:02d}".encode()}) for n in range(len(names))])
    assert index_command(str(tmp_path), labels="cls") == 0
    printed = capsys.readouterr().out
    assert r"0 class\t00, 1 class\t01, ..., 11 class\t11; all in" in printed
    assert "classes      12, numbered 0 to 11" in printed


def test_sets_packed_apart_are_compared_by_the_names_that_their_info_lists(tmp_path: Path, make_shard: MakeShard, picture: bytes) -> None:
    """Held-out pictures lack a class, so that their own numbers mean other classes than those of the training pictures."""
    lists = {"train": ["yak", "ant", "bee"], "val": ["ant", "yak"]}  # as numbered when packed, which need not be by name
    for split, names in lists.items():
        (tmp_path / split).mkdir()
        make_shard(tmp_path / split / "s.tar", [(name, {"jpg": picture, "cls": str(n).encode()}) for n, name in enumerate(names)])
        (tmp_path / split / "_info.json").write_text(json.dumps({"classes": names}))
    train = ShardIndex.open(tmp_path / "train")
    assert train.classes == ("yak", "ant", "bee")
    assert train.label.tolist() == [0, 1, 2]
    val = ShardIndex.open(tmp_path / "val", classes=train.classes)
    assert names_of(val) == ["ant", "yak"]
    assert val.label.tolist() == [1, 0]
    for damaged in ("{", '{"classes": ["a"]}', '{"classes": ["a", "a"]}', '{"classes": [1, 2]}', '{"classes": {"a": 0, "b": 1}}'):
        (tmp_path / "val" / "_info.json").write_text(damaged)
        assert ShardIndex.open(tmp_path / "val").classes == ()
        assert ShardIndex.open(tmp_path / "val").label.tolist() == [0, 1]


def test_a_rule_that_labels_nothing_and_trees_of_other_classes_are_said_aloud(
    tmp_path: Path, make_shard: MakeShard, picture: bytes
) -> None:
    shard = make_shard(tmp_path / "s.tar", [("k", {"jpg": picture, "cls": b"1"})])
    assert "no sample has a label by 'clss'; a member .clss beside each picture would say it" in ShardIndex.open(shard, labels="clss").notes
    for place in ("one/ant", "one/bee", "two/ant", "two/cow", "two/dog"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.jpg").write_bytes(picture)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    index = ShardIndex.open([two, one])
    assert index.classes == ("ant", "bee", "cow", "dog")
    assert [note for note in index.notes if note.startswith(f"{two}: class 'cow' and 1 more not in all 2 folders")]
    assert not ShardIndex.open(one).notes


def test_labels_that_lie_apart_from_their_pictures_are_counted_and_that_is_said(
    tmp_path: Path, make_shard: MakeShard, picture: bytes
) -> None:
    apart = [(key, {"jpg": picture}) for key in "abc"] + [(key, {"cls": b"4"}) for key in "abc"]
    shard = make_shard(tmp_path / "apart.tar", [*apart, ("d", {"cls": b"4", "jpg": picture}), ("e", {"cls": b"5"})])
    why = "have no picture of their key beside them, so they label nothing; in a tar the members of a sample follow one another"
    for labels in (None, "cls"):
        index = ShardIndex.open(shard, labels=labels)
        assert index.label.tolist() == [-1, -1, -1, 4]
        assert index.unread_members == {"cls (no picture beside it)": 4}
        assert f"4 .cls members {why}" in index.notes
    index = ShardIndex.open(make_shard(tmp_path / "all.tar", apart), labels="cls")
    assert [note for note in index.notes if "label" in note] == [f"3 .cls members {why}"]
    described = [("a", {"jpg": picture}), ("a.b/c", {"json": b'{"name": "ant"}'})]
    index = ShardIndex.open(make_shard(tmp_path / "json.tar", described), labels="json.name")
    assert index.unread_members == {"json (no picture beside it)": 1}


def test_what_would_label_unlabeled_pictures_is_named(tmp_path: Path, make_shard: MakeShard, picture: bytes) -> None:
    val = ShardIndex.open(make_shard(tmp_path / "val.tar", [(name, {"JPEG": picture}) for name in VALIDATION]))
    assert [note for note in val.notes if "put LOC_val_solution.csv" in note]
    (tmp_path / "tars").mkdir()
    for stem in ("cat", "dog"):
        make_shard(tmp_path / "tars" / f"{stem}.tar", [("k", {"jpg": picture})])
    assert [note for note in ShardIndex.open(tmp_path / "tars").notes if "--labels tar" in note]
    assert not ShardIndex.open(tmp_path / "tars", labels="tar").notes
    (tmp_path / "shards").mkdir()
    for number in range(2):  # shards are numbered: nothing is amiss
        make_shard(tmp_path / "shards" / f"train-{number:06d}.tar", [("k", {"jpg": picture})])
    assert not ShardIndex.open(tmp_path / "shards").notes


def test_a_tar_beside_folders_is_read_alone_and_that_is_said(
    tmp_path: Path, make_shard: MakeShard, picture: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    make_shard(tmp_path / "s.tar", [("k", {"jpg": picture})])
    ShardIndex.open(tmp_path)
    ShardIndex.open(tmp_path)  # our own hidden folder is none
    assert "its folders are not" not in caplog.text
    (tmp_path / "dog").mkdir()
    assert len(ShardIndex.open(tmp_path)) == 1
    assert "its tars are read (1), its folders are not (1, such as 'dog')" in caplog.text
