"""`wherefrom evaluate` as a user calls it: masks and depths in the public layouts, what is refused, what is told and gone on from.

Pictures are of 4 x 4 cells, whose color tells their class: raw pixels find them, if and only if each mask is its picture's and classes are
read as the layout numbers them.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from timm.models import save_for_hf

from wherefrom.tools import evaluate, evaluation_page
from wherefrom.tools.cli import main
from wherefrom.train.evaluation.dense_linear import LinearDepth

pytestmark = pytest.mark.core

COLORS = np.array([[20, 20, 20], [240, 40, 40], [40, 240, 40]], np.uint8)
SIDES = {"train": 12, "val": 6}
CELL = 12


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that timm wrote, of a small random ViT for pictures of 32 px."""
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **small)
    config = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    model.pretrained_cfg.update(config)
    save_for_hf(model, str(folder), model_config=config, model_args=small, safe_serialization=True)
    return folder


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has tests of its own, and is slow to import."""
    monkeypatch.setattr(evaluation_page, "write_page", lambda *_, **__: None)


def painted(side: str) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield names, pictures (H, W, 3) and the classes of their pixels (H, W), 0 to 2."""
    rng = np.random.default_rng(len(side))
    for number in range(SIDES[side]):
        classes = rng.integers(0, 3, (4, 4), dtype=np.uint8).repeat(CELL, 0).repeat(CELL, 1)
        noise = rng.integers(-12, 13, (*classes.shape, 3))
        yield f"{side}_{number:03}", (COLORS[classes] + noise).clip(0, 255).astype(np.uint8), classes


def save(path: Path, values: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def voc(root: Path, side: str) -> None:
    for name, picture, classes in painted(side):
        save(root / "JPEGImages" / f"{name}.jpg", picture)
        save(root / "SegmentationClass" / f"{name}.png", classes)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Segmentation" / f"{side}.txt").write_text("".join(f"{name}\n" for name, _, _ in painted(side)))


def ade20k(root: Path, side: str) -> None:
    split = {"train": "training", "val": "validation"}[side]
    for name, picture, classes in painted(side):
        save(root / "images" / split / f"ADE_{name}.jpg", picture)
        save(root / "annotations" / split / f"ADE_{name}.png", classes + 1)


def coco(root: Path, side: str) -> None:
    images, annotations = [], []
    for number, (name, picture, classes) in enumerate(painted(side)):
        save(root / f"{side}2017" / f"{name}.jpg", picture)
        images.append({"id": number, "file_name": f"{name}.jpg", "height": 4 * CELL, "width": 4 * CELL})
        for row, col in np.argwhere(classes[::CELL, ::CELL] > 0).tolist():
            y, x = row * CELL, col * CELL
            corners = [x, y, x + CELL, y, x + CELL, y + CELL, x, y + CELL]
            of = {"image_id": number, "category_id": 10 + int(classes[y, x])}
            annotations.append({"id": len(annotations), "iscrowd": 0, "segmentation": [corners]} | of)
    categories = [{"id": 11, "name": "red"}, {"id": 12, "name": "green"}]
    (root / "annotations").mkdir(exist_ok=True)
    listed = {"images": images, "categories": categories, "annotations": annotations}
    (root / "annotations" / f"instances_{side}2017.json").write_text(json.dumps(listed))


def folder(root: Path, side: str) -> None:
    for name, picture, classes in painted(side):
        save(root / "images" / side / f"{name}.jpg", picture)
        save(root / "masks" / side / f"{name}.png", classes)
        save(root / "depths" / side / f"{name}.png", 1000 + 2000 * classes.astype(np.uint16))


LAYOUTS: dict[str, Callable[[Path, str], None]] = {"voc": voc, "ade20k": ade20k, "coco": coco, "folder": folder}


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of the same pictures and masks in every layout."""
    roots = {}
    for name, write in LAYOUTS.items():
        roots[name] = tmp_path_factory.mktemp(name)
        for side in SIDES:
            write(roots[name], side)
    return roots


@pytest.fixture
def run(network: Path, tiny_shards: Path, tmp_path: Path) -> Callable[..., int]:
    """Call the command on a few pictures, with a report in out/."""
    sides = ("--data", str(tiny_shards / "train.tar"), "--val", str(tiny_shards / "val.tar"))

    def called(*words: str) -> int:
        return main(["evaluate", str(network), *sides, "--renderer", "torch", "--threads", "1", "--out", str(tmp_path / "out"), *words])

    return called


def scores(out: Path) -> dict[str, dict[tuple[str, str], float]]:
    protocols = json.loads((out / "evaluation.json").read_text())["protocols"]
    return {of["protocol"]: {(each["row"], each["features"]): each["value"] for each in of["scores"]} for of in protocols}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_ones_own_are_evaluated_in_every_layout(
    layout: str, laid_out: dict[str, Path], run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--masks", f"{layout}:{laid_out[layout]}", "--protocols", "hummingbird") == 0
    assert "12 pictures with masks to learn from, 6 held out" in capsys.readouterr().out
    assert scores(tmp_path / "out")["hummingbird@1"]["mIoU, memory 10240", "raw pixels"] > 0.85  # of masks of others: a fifth


def test_depths_of_ones_own_are_evaluated_in_meters(
    laid_out: dict[str, Path], run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(laid_out["folder"])
    short = LinearDepth(depth_px=16, bins=8, rate=0.02, batch=12, epochs=12)
    monkeypatch.setattr(evaluate, "protocols_named", lambda _: {"linear-depth": short})

    def error(*words: str) -> float:
        assert run("--depths", root, *words, "--protocols", "linear-depth") == 0
        return scores(tmp_path / "out")["linear-depth@1"]["RMSE", "raw pixels"]

    meters = error()
    assert meters < 1.63  # the deviation of 1, 3 and 5 m
    kilometers = error("--depth-unit", "1", "--farthest", "10000")
    assert 300 < kilometers / meters < 3000


def test_masks_that_changed_are_measured_anew(laid_out: dict[str, Path], run: Callable[..., int], tmp_path: Path) -> None:
    root = tmp_path / "own"
    shutil.copytree(laid_out["folder"], root)
    words = ("--masks", f"folder:{root}", "--protocols", "hummingbird")

    def measured() -> float:
        assert run(*words) == 0
        return scores(tmp_path / "out")["hummingbird@1"]["mIoU, memory 10240", "raw pixels"]

    right = measured()
    for mask in (root / "masks" / "val").iterdir():
        save(mask, 2 - np.asarray(Image.open(mask)))
    assert measured() < 0.6 < right


def renamed(root: Path, old: str, new: str) -> None:
    (root / old).rename(root / new)


def wrong_value(root: Path) -> None:
    save(root / "SegmentationClass" / "val_003.png", np.full((4 * CELL, 4 * CELL), 21, np.uint8))


def listed_without(root: Path, kind: str, key: str) -> None:
    file = root / "annotations" / "instances_val2017.json"
    listed = json.loads(file.read_text())
    del listed[kind][3][key]
    file.write_text(json.dumps(listed))


def two_lists(root: Path) -> None:
    shutil.copy(root / "annotations" / "instances_val2017.json", root / "annotations" / "instances_val2014.json")


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no masks": (
        "folder",
        lambda root: shutil.rmtree(root / "masks" / "val"),
        r"has no masks/val; the layout 'folder' is images/train, ",
    ),
    "a mask missing": (
        "ade20k",
        lambda root: (root / "annotations" / "training" / "ADE_train_004.png").unlink(),
        r"picture ADE_train_004: \S+ADE_train_004\.png is not there; add it, or take the picture away$",
    ),
    "another size": (
        "folder",
        lambda root: save(root / "masks" / "val" / "val_002.png", np.zeros((9, 7), np.uint8)),
        r"val_002\.png: is 7 x 9 px, its picture, upright, 48 x 48; a mask has its size$",
    ),
    "no pictures": (
        "coco",
        lambda root: renamed(root, "val2017", "elsewhere"),
        r"val2017: no such folder; name the one that holds",
    ),
    "a picture missing": (
        "coco",
        lambda root: (root / "val2017" / "val_001.jpg").unlink(),
        r"instances_val2017\.json: lists val_001\.jpg, which \S+val2017 lacks; name the folder of its pictures$",
    ),
    "boxes alone": (
        "coco",
        lambda root: listed_without(root, "annotations", "segmentation"),
        r"instances_val2017\.json: annotation \d+ has no segmentation; name the file of instances that has sizes of ",
    ),
    "no sizes": ("coco", lambda root: listed_without(root, "images", "height"), r"instances_val2017\.json: image \d+ has no height; name "),
    "two lists": ("coco", two_lists, r"one instances_val\*\.json, and holds instances_val2014\.json, instances_val2017\.json$"),
    "no list": ("coco", lambda root: (root / "annotations" / "instances_train2017.json").unlink(), r"_train\*\.json, and holds none$"),
}


@pytest.mark.parametrize("name", BAD)
def test_masks_that_do_not_fit_are_one_line(
    name: str, laid_out: dict[str, Path], run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, spoil, message = BAD[name]
    root = tmp_path / "own"
    shutil.copytree(laid_out[layout], root)
    spoil(root)
    assert run("--masks", f"{layout}:{root}", "--protocols", "hummingbird") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


WRONG_VALUES: dict[str, tuple[Callable[[Path], object], str]] = {
    "voc": (wrong_value, r"val_003\.png: holds the value 21, which is none of the 21 classes; mend it"),
    "folder": (
        lambda root: (root / "classes.txt").write_text("black\nred\n"),
        r"\.png: holds the value 2, which is none of the 2 classes; mend it, or make it 255$",
    ),
}


@pytest.mark.parametrize("layout", WRONG_VALUES)
def test_a_protocol_that_meets_wrong_masks_says_so_and_others_are_measured(
    layout: str,
    laid_out: dict[str, Path],
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil, message = WRONG_VALUES[layout]
    root = tmp_path / "own"
    shutil.copytree(laid_out[layout], root)
    spoil(root)
    chosen = evaluate.protocols_named(["hummingbird", "knn"])
    monkeypatch.setattr(evaluate, "protocols_named", lambda _: chosen)
    assert run("--masks", f"{layout}:{root}") == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("hummingbird@1: not measured, "))
    assert re.search(message, line), line
    assert scores(tmp_path / "out")["knn@1"]


def test_a_second_call_adds_to_the_report_and_the_page_and_puts_others_aside(
    laid_out: dict[str, Path],
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[list[str]] = []

    def page(path: Path, _: Any, found: Any, **__: Any) -> None:
        path.touch()
        shown.append([measured.protocol for measured in found])

    monkeypatch.setattr(evaluation_page, "write_page", page)
    assert run("--protocols", "knn") == 0
    assert run("--masks", f"folder:{laid_out['folder']}", "--protocols", "hummingbird") == 0
    assert shown == [["knn@1"], ["knn@1", "hummingbird@1"]]
    assert "now in" not in capsys.readouterr().out
    assert run("--limit", "20", "--protocols", "knn") == 0
    out = tmp_path / "out"
    expected = (
        f"{out}/evaluation.json held results of another network, other pictures or other options: they are now in {out}/evaluation-1.json"
    )
    assert expected in capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in out.iterdir()) == [f"evaluation{of}" for of in ("-1.html", "-1.json", ".html", ".json")]
    assert shown[2] == ["knn@1"]


def test_every_network_has_a_folder_of_its_own(tmp_path: Path) -> None:
    named = ["hf-hub:timm/vit_small_patch14_dinov2.lvd142m", "hf-hub:mine/vit_small_patch14_dinov2.lvd142m", "vit_small_patch16_224.dino"]
    folders = [evaluate._folder(name, "exported") for name in (*named, "vit_small_patch16_224.augreg_in1k", str(tmp_path))]
    folders.append(evaluate._folder(str(tmp_path), "student"))
    assert len(set(folders)) == 6
    assert folders[4:] == [tmp_path / "evaluations", tmp_path / "evaluations" / "student"]


def test_pictures_that_are_not_named_are_those_of_the_run(tiny_shards: Path, tmp_path: Path) -> None:
    train, val = (str(tiny_shards / f"{side}.tar") for side in ("train", "val"))

    def opened(settings: str, data: str | None, val: str | None) -> list[tuple[str, ...]]:
        (tmp_path / "settings.yaml").write_text(settings)
        return [index.paths for index in evaluate._pictures(Console(quiet=True), str(tmp_path), data, val, None)[:2]]

    both = opened("", train, val)
    assert opened(f"data: {train}\nval: {val}\n", None, None) == both
    assert opened(f"data: {train}\n", None, val) == both
    assert opened(f"data: {train}\nval: {train}\n", None, val) == both
    assert opened(f"data: {val}\nval: {val}\n", train, None) == both
    with pytest.raises(ValueError, match="the run held no pictures out; name some by --val"):
        opened(f"data: {train}\n", None, None)


def test_a_layout_that_a_folder_has_not_is_one_line(
    laid_out: dict[str, Path], run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (("--masks", f"voc:{laid_out['ade20k']}"), r"has no JPEGImages; it is laid out as ade20k$"),
        (("--masks", f"coco:{tmp_path}"), r"has no annotations; the layout 'coco' is annotations$"),
        (("--masks", f"{laid_out['voc']}"), r"says no layout; write LAYOUT:FOLDER, of voc, ade20k, coco, folder$"),
        (("--masks", f"cityscapes:{tmp_path}"), r"says no layout; write LAYOUT:FOLDER, of voc, ade20k, coco, folder$"),
        (("--masks", "voc:/nowhere/at/all"), r"/nowhere/at/all: no such folder; name the one that holds JPEGImages, "),
        (("--depths", f"{laid_out['voc']}"), r"has no images/train; it is laid out as voc$"),
        (("--farthest", "80"), r"--depth-unit and --farthest are of --depths: name its folder, or leave them out$"),
        (("--depths", f"{laid_out['folder']}", "--depth-unit", "0"), r"unit 0\.0 of depths: take a number of meters above 0$"),
    ):
        assert run(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line


def test_what_is_lacking_is_refused_by_name_and_else_told_before_anything_is_computed(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--protocols", "knn", "linear-depth@1") == 2
    assert capsys.readouterr().err.endswith(
        "protocol linear-depth@1: the pictures have no depths (--depths); name what it needs, or leave it out\n"
    )
    assert not (tmp_path / "out").exists()
    chosen = evaluate.protocols_named(["knn", "hummingbird", "variants"])
    monkeypatch.setattr(evaluate, "protocols_named", lambda _: chosen)  # as if these were all
    assert run() == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("knn", "hummingbird", "variants", "features"))]
    assert [line.split()[0] for line in told] == ["hummingbird@1:", "variants@1:", "knn@1"]
    assert told[0] == "hummingbird@1: not measured, the pictures have no masks (--masks)"
    assert max(map(len, told)) <= 80


def test_a_named_protocol_that_could_not_be_measured_is_exit_code_1(
    laid_out: dict[str, Path], run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "own"
    shutil.copytree(laid_out["folder"], root)
    (root / "classes.txt").write_text("black\nred\ngreen\n")
    for mask in (root / "masks" / "train").iterdir():
        save(mask, np.zeros((4 * CELL, 4 * CELL), np.uint8))
    assert run("--masks", f"folder:{root}", "--protocols", "linear-segmentation") == 1
    assert "linear-segmentation@1: not measured, the masks to learn from show fewer than two classes" in capsys.readouterr().out


def test_a_side_that_patches_do_not_divide_is_one_line_before_anything_is_computed(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--picture-px", "50", "--protocols", "knn") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "wherefrom: views are (50, 50) px, patches (8, 8): patches must divide a view, e.g. 48 px"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "number"), [("picture_px", -16), ("picture_px", 0), ("limit", 0), ("limit", -3)])
def test_numbers_below_1_are_one_line(
    option: str, number: int, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"--{option.replace('_', '-')}", str(number), "--protocols", "knn") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wherefrom: {option}={number}: ")
    assert not (tmp_path / "out").exists()


def test_pictures_with_masks_on_both_sides_are_counted(
    laid_out: dict[str, Path], run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "own"
    shutil.copytree(laid_out["voc"], root)
    words = ("--masks", f"voc:{root}", "--protocols", "hummingbird", "--limit", "4")
    assert run(*words) == 0
    assert "byte for byte" not in capsys.readouterr().out
    with (root / "ImageSets" / "Segmentation" / "val.txt").open("a") as listing:
        listing.write("train_002\ntrain_007\n")
    assert run(*words) == 0
    said = "2 of the pictures with masks held out are, byte for byte, among those to learn from: scores are too good by them\n"
    assert said in capsys.readouterr().out


def test_classes_that_no_training_picture_shows_are_counted(
    run: Callable[..., int], make_shard: Any, jpeg_bytes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shard(name: str, labels: list[int]) -> str:
        rng = np.random.default_rng(len(labels))
        pictures = [jpeg_bytes(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in labels]
        samples = [
            (f"{name}{i}", {"jpg": data, "cls": str(of).encode()}) for i, (data, of) in enumerate(zip(pictures, labels, strict=True))
        ]
        return str(make_shard(tmp_path / f"{name}.tar", samples))

    train, one = shard("train", [0, 1] * 5), shard("one", [1] * 9)
    held_out = shard("val", [0, 1, 1, 7, 8])
    assert run("--data", train, "--val", held_out, "--protocols", "knn") == 0
    said = "2 held-out classes, such as 7, have no training picture: at most 60.0 % can be right\n"
    assert said in capsys.readouterr().out
    assert run("--data", one, "--val", held_out, "--protocols", "knn") == 2
    assert "protocol knn: the training pictures show one class alone; name what it needs, or leave it out" in capsys.readouterr().err
