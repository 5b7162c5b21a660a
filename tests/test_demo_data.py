"""The demo's pictures and shards, read back with tarfile and Pillow; what can be learned from them, measured with plain regressions."""

import functools
import io
import itertools
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.demo import scenes as scenes_module
from wherefrom.pipeline.demo import shards as demo_shards_module
from wherefrom.pipeline.demo.pen import Canvas, Color
from wherefrom.pipeline.demo.scenes import FARTHEST, SHOWN, render_scene, trace_scene
from wherefrom.pipeline.demo.shards import DemoShards, demo_masks, demo_shards
from wherefrom.pipeline.demo.things import KINDS

TRAIN, VAL = 40, 20
PATCH_PX = 48


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> DemoShards:
    return demo_shards(tmp_path_factory.mktemp("demo"), train=TRAIN, val=VAL, workers=1)


def members(shard: str | Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def pictures(shard: str | Path) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for name, data in members(shard).items() if name.endswith(".jpg")]


@pytest.mark.core
def test_every_picture_has_a_label_and_the_ten_labels_are_balanced(shards: DemoShards) -> None:
    for shard, count in ((shards.train, TRAIN), (shards.val, VAL)):
        names = members(shard)
        keys = [name.removesuffix(".jpg") for name in names if name.endswith(".jpg")]
        labels = Counter(int(names[f"{key}.cls"]) for key in keys)
        assert len(keys) == count and len(names) == 2 * count
        assert labels == dict.fromkeys(range(10), count // 10)


def test_samples_are_adjacent_and_keys_unique_across_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_shards_module, "PICTURES_PER_SHARD", 4)
    pattern = demo_shards(tmp_path, train=10, val=2, workers=1).train
    assert pattern.endswith("train-{000000..000002}.tar")
    names = [name for shard in range(3) for name in members(pattern.replace("{000000..000002}", f"{shard:06d}"))]
    assert len(set(names)) == len(names) == 20
    assert all(names[i].rsplit(".", 1)[0] == names[i + 1].rsplit(".", 1)[0] for i in range(0, 20, 2))


@pytest.mark.core
def test_info_file_names_what_lies_there(shards: DemoShards) -> None:
    folder = Path(shards.train).parent
    info = json.loads((folder / "_info.json").read_text(encoding="utf-8"))
    assert info["classes"] == list(KINDS) and len(KINDS) == 10
    for split in info["splits"].values():
        lengths = [len(members(folder / name)) // 2 for name in split["filenames"]]
        assert lengths == split["shard_lengths"] and sum(lengths) == split["num_samples"]
    assert sorted(path.name for path in folder.iterdir()) == ["_info.json", "train-000000.tar", "val-000000.tar"]


def test_held_out_pictures_are_none_of_the_training_pictures(shards: DemoShards) -> None:
    train, val = (set(members(shard).values()) for shard in (shards.train, shards.val))
    assert not {picture for picture in train & val if len(picture) > 1}


def test_bytes_depend_on_neither_run_nor_worker_count(shards: DemoShards, tmp_path: Path) -> None:
    again = demo_shards(tmp_path, train=TRAIN, val=VAL, workers=2)
    for name in ("_info.json", "train-000000.tar", "val-000000.tar"):
        assert (Path(again.train).parent / name).read_bytes() == (Path(shards.train).parent / name).read_bytes(), name


def test_a_picture_depends_on_its_split_and_number_alone(shards: DemoShards, tmp_path: Path) -> None:
    fewer = members(demo_shards(tmp_path, train=10, val=5, workers=1).train)
    assert fewer == dict(list(members(shards.train).items())[:20])


def test_sizes_and_aspects_vary_within_their_bounds(shards: DemoShards) -> None:
    sizes = np.array([picture.size for picture in pictures(shards.train)])  # (40, 2), (width, height)
    short, aspect = sizes.min(axis=1), sizes[:, 0] / sizes[:, 1]
    assert short.min() >= 144 and short.max() <= 192 and np.ptp(short) > 30
    assert aspect.min() > 0.74 and aspect.max() < 1.35 and np.ptp(aspect) > 0.4


@pytest.mark.core
def test_kinds_look_different_and_unknown_kinds_are_named() -> None:
    images = [render_scene(kind, np.random.default_rng(0), (96, 128)) for kind in KINDS]
    assert {picture.size for picture in images} == {(128, 96)}
    assert len({picture.tobytes() for picture in images}) == 10
    with pytest.raises(ValueError, match="kind 'submarine' is unknown; the kinds are face, house"):
        render_scene("submarine", np.random.default_rng(0), (96, 128))


@pytest.mark.core
def test_second_call_renders_nothing(shards: DemoShards) -> None:
    calls: list[int] = []
    cache = Path(shards.train).parents[1]
    assert demo_shards(cache, train=TRAIN, val=VAL, progress=lambda done, total: calls.append(done)) == shards
    assert not calls


@pytest.mark.core
def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    demo_shards(tmp_path, train=6, val=3, workers=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 9) for done in range(1, 10)]


@pytest.mark.parametrize("stop_at", [1, 7, 12])
def test_interrupted_rendering_leaves_nothing(tmp_path: Path, stop_at: int) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_shards(tmp_path, train=8, val=4, workers=1, progress=interrupt)
    assert not list(tmp_path.iterdir())
    assert len(members(demo_shards(tmp_path, train=8, val=4, workers=1).val)) == 8


def test_drawing_is_announced_once_and_only_where_nobody_reports(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No logging need be set up, and standard output stays the caller's."""
    demo_shards(tmp_path, train=3, val=2, workers=1)
    assert capfd.readouterr() == (
        "",
        f"drawing 5 demo pictures, once; they are kept in {tmp_path / f'demo-v{demo_shards_module.GENERATOR}-3-2'}\n",
    )
    demo_shards(tmp_path, train=3, val=2, workers=1)
    demo_shards(tmp_path, train=2, val=1, workers=1, progress=lambda done, total: None)
    assert capfd.readouterr() == ("", "")


def test_the_slower_of_two_renderings_takes_the_faster_ones_shards(tmp_path: Path) -> None:
    stamps: list[int] = []

    def be_overtaken(done: int, total: int) -> None:
        if done == total:
            first = demo_shards(tmp_path, train=5, val=2, workers=1)
            stamps.append(Path(first.train).stat().st_ino)

    second = demo_shards(tmp_path, train=5, val=2, workers=1, progress=be_overtaken)
    assert stamps == [Path(second.train).stat().st_ino]
    assert [path.name for path in tmp_path.iterdir()] == [Path(second.train).parent.name]


SCRIPT = """
import sys
from pathlib import Path
from wherefrom.pipeline.demo.shards import demo_shards
print("started", flush=True)
demo_shards(Path(sys.argv[1]), train=int(sys.argv[2]), val=2, workers=2, progress=lambda done, total: print(done, flush=True))
"""


def test_an_unguarded_script_may_ask_for_the_shards(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "cache"), "4"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["started", "1", "2", "3", "4", "5", "6"], done.stderr


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == [b"started\n", b"1\n"]
        parent.kill()
        parent.communicate(timeout=60)  # the workers hold the error pipe too: this returns when the last of them has ended
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


@pytest.mark.core
def test_a_worker_that_fails_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_shards_module, "WORKER", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="a rendering process ended early, with exit code 3; use workers=1 to render in this one"):
        demo_shards(tmp_path, train=4, val=2, workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["train", "val", "workers"])
def test_numbers_below_one_are_refused_by_name(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong}=0: needs at least 1"):
        demo_shards(tmp_path, **{wrong: 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.core
def test_masks_belong_to_the_pictures_of_their_keys_and_name_all_that_is_shown(shards: DemoShards) -> None:
    shown = set()
    for key, picture in ((name, data) for name, data in members(shards.train).items() if name.endswith(".jpg")):
        masks = demo_masks(key.removesuffix(".jpg"))
        kind = list(KINDS)[int(key[6:12]) % 10]
        sizes = {mask.shape for mask in (masks.classes, masks.instances, masks.parts, masks.depth)}
        assert sizes == {Image.open(io.BytesIO(picture)).size[::-1]}
        of_kinds = {SHOWN[number] for number in np.unique(masks.classes)} & set(KINDS)
        assert of_kinds == {kind}
        assert (masks.depth[masks.classes == SHOWN.index(kind)] == 1).all()
        assert (masks.depth[masks.classes == SHOWN.index("sky")] == FARTHEST).all()
        shown |= set(np.unique(masks.classes))
    assert shown == set(range(len(SHOWN)))
    with pytest.raises(ValueError, match=r"'test-000001' is no picture of the demo's; its keys are train-000000, val-000000 and so on"):
        demo_masks("test-000001")


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_drawn_where_the_picture_is_and_changes_none_of_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn with a color of its own for every stroke, the picture itself is the trace."""
    traced, horizon = scenes_module._drawn(kind, np.random.default_rng(5), (90, 110), traced=True)
    plain, same = scenes_module._drawn(kind, np.random.default_rng(5), (90, 110), traced=False)
    assert (np.asarray(traced.image) == np.asarray(plain.image)).all() and horizon == same
    for name in ("polygon", "line"):
        draw = getattr(Canvas, name)

        def numbered(canvas: Canvas, xy: list[float], color: Color, *rest: int, draw: Callable[..., None] = draw) -> None:
            draw(canvas, xy, (*divmod(len(canvas.strokes) - 1, 256), 0), *rest)

        monkeypatch.setattr(Canvas, name, numbered)
    by_color, _ = scenes_module._drawn(kind, np.random.default_rng(5), (90, 110), traced=False)
    red, green, blue = np.asarray(by_color.image).astype(int).transpose(2, 0, 1)
    drawn = traced.seen() > 0
    assert (256 * red + green)[drawn].tolist() == traced.seen()[drawn].tolist()
    assert drawn.mean() > 0.5 and (blue[drawn] == 0).all()


@pytest.mark.core
def test_nothing_is_drawn_over_what_is_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Depths of what is there before each thing, against those of what is seen in the end."""
    before: list[NDArray[np.int32]] = []
    begin = Canvas.begin_thing

    def begin_and_look(canvas: Canvas, name: str, foot: float) -> int:
        before.append(canvas.seen())
        return begin(canvas, name, foot)

    monkeypatch.setattr(Canvas, "begin_thing", begin_and_look)
    for seed, kind in enumerate(list(KINDS)[:4]):
        before.clear()
        size = ((72, 90), (90, 72))[seed % 2]
        canvas, horizon = scenes_module._drawn(kind, np.random.default_rng(seed), size, traced=True)
        depths = [depths_of(canvas, seen, horizon) for seen in (*before, canvas.seen())]
        farther = [(later > earlier + 1e-9).mean() for earlier, later in itertools.pairwise(depths)]
        assert max(farther) == 0
        assert max((later < earlier).mean() for earlier, later in itertools.pairwise(depths)) > 0.1
        masks = trace_scene(kind, np.random.default_rng(seed), size)
        assert masks.instances.max() == len(canvas.things) - 1 > 20


def depths_of(canvas: Canvas, seen: NDArray[np.int32], horizon: float) -> NDArray[np.float64]:
    height = seen.shape[0]
    thing = np.array([of for of, _ in canvas.strokes])[seen]
    flat = np.array([thing.name in scenes_module.GROUND for thing in canvas.things])[thing]
    upright = np.array([scenes_module._depth(thing, horizon, height) for thing in canvas.things])[thing]
    return np.where(flat, scenes_module._ground_depth(np.arange(height) + 0.5, horizon, height)[:, None], upright)


@functools.cache
def scene(number: int) -> NDArray[np.uint8]:
    return np.asarray(render_scene(list(KINDS)[number % 10], np.random.default_rng(number), (160, 160)))


def scenes(count: int) -> list[NDArray[np.uint8]]:
    return [scene(number) for number in range(count)]


def patches(images: list[NDArray[np.uint8]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cut six random patches out of each picture: (6 n, 48, 48, 3) in 0..1 and their corners (6 n, 2), (x, y)."""
    rng = np.random.default_rng(7)
    corners = rng.integers(0, 160 - PATCH_PX, size=(len(images), 6, 2))
    cut = [image[y : y + PATCH_PX, x : x + PATCH_PX] for image, places in zip(images, corners, strict=True) for x, y in places]
    return np.stack(cut) / 255, corners.reshape(-1, 2).astype(np.float64)


def held_out_r2(features: NDArray[np.float64], targets: NDArray[np.float64], *, ridge: float) -> NDArray[np.float64]:
    """Fit ridge regression on the first three quarters, return R2 of each target on the rest."""
    cut = len(features) * 3 // 4
    mean, level = features[:cut].mean(axis=0), targets[:cut].mean(axis=0)
    x = features - mean
    weights = np.linalg.solve(x[:cut].T @ x[:cut] + ridge * np.eye(x.shape[1]), x[:cut].T @ (targets[:cut] - level))
    error = targets[cut:] - level - x[cut:] @ weights
    spread = targets[cut:] - targets[cut:].mean(axis=0)
    return np.asarray(1 - (error**2).sum(axis=0) / (spread**2).sum(axis=0))


def mean_colors(cut: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each patch's mean color and its products: (n, 9)."""
    color = cut.mean(axis=(1, 2))
    rows, columns = np.triu_indices(3)
    return np.concatenate([color, color[:, rows] * color[:, columns]], axis=1)


def edge_directions(cut: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the strength of edges of eight directions in 4 x 4 cells of each patch, blind to color and polarity: (n, 128)."""
    gray = cut.mean(axis=3)
    along_y, along_x = np.gradient(gray, axis=(1, 2))
    strength = np.hypot(along_x, along_y)
    direction = (np.arctan2(along_y, along_x) % np.pi / np.pi * 8).astype(int) % 8
    cells = [np.where(direction == d, strength, 0).reshape(-1, 4, PATCH_PX // 4, 4, PATCH_PX // 4).sum(axis=(2, 4)) for d in range(8)]
    histogram = np.stack(cells, axis=-1).reshape(len(cut), -1)
    return np.asarray(np.sqrt(histogram / histogram.sum(axis=1, keepdims=True)))


def coordinate_pictures(count: int) -> list[NDArray[np.uint8]]:
    ramp = np.linspace(0, 255, 160)
    blues = np.random.default_rng(1).uniform(0, 255, size=count)
    return [np.stack([*np.meshgrid(ramp, ramp), np.full((160, 160), blue)], axis=-1).astype(np.uint8) for blue in blues]


def shuffled_tiles(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    tiles = image.reshape(4, 40, 4, 40, 3).transpose(0, 2, 1, 3, 4).reshape(16, 40, 40, 3)[rng.permutation(16)]
    return tiles.reshape(4, 4, 40, 40, 3).transpose(0, 2, 1, 3, 4).reshape(160, 160, 3)


def share_of_tiny_steps(image: NDArray[np.float64]) -> float:
    """Return how many neighboring pixels differ, but by 3 levels at most: none where colors are flat, many in a smooth field."""
    along_y, along_x = (np.abs(np.diff(image, axis=axis)).max(axis=-1) for axis in (0, 1))
    steps = np.concatenate([along_y.ravel(), along_x.ravel()])
    return float(((steps > 0) & (steps <= 3)).mean())


def test_no_part_carries_a_smooth_color_field() -> None:
    images = [image.astype(np.float64) for image in scenes(40)]
    ramp = np.linspace(-12, 12, 160).round()
    faint_field = np.stack([*np.meshgrid(ramp, ramp), np.zeros((160, 160))], axis=-1)
    assert np.mean([share_of_tiny_steps(image) for image in images]) < 0.01
    assert min(share_of_tiny_steps(np.clip(image + faint_field, 0, 255)) for image in images) > 0.05


def test_color_alone_says_little_of_where_but_in_a_coordinate_picture_it_says_all() -> None:
    cut, corners = patches(scenes(200))
    r2_x, r2_y = held_out_r2(mean_colors(cut), corners, ridge=1e-6)
    assert r2_x < 0.1
    assert r2_y < 0.4  # sky is above, grass below
    cut, corners = patches(coordinate_pictures(200))
    assert (held_out_r2(mean_colors(cut), corners, ridge=1e-6) > 0.99).all()


def test_shapes_say_where_until_the_arrangement_is_broken() -> None:
    images = scenes(320)
    cut, corners = patches(images)
    assert (held_out_r2(edge_directions(cut), corners, ridge=0.3) > 0.1).all()
    rng = np.random.default_rng(2)
    cut, corners = patches([shuffled_tiles(image, rng) for image in images])
    assert (held_out_r2(edge_directions(cut), corners, ridge=0.3) < 0.03).all()
