"""The picture of views, read back from its pixels: boxes stand where the record says; and what the command writes and refuses.

Panels are compared with what the network is given in `forward`, and what GTSA compares with the pictures themselves: both views show the
same place.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from wherefrom.pipeline import Batch, ColorLaw, Disjoint, Independent, Loader, Paired, ViewFamily, ViewRecipe, Views, make_loader
from wherefrom.pipeline.geometry import map_boxes
from wherefrom.tools.views_picture import save_views_picture, views_command
from wherefrom.train import (
    ColorizationSettings,
    ContextSettings,
    DINOSettings,
    Features,
    GTSASettings,
    JigsawSettings,
    Objective,
    Panel,
    PARTSettings,
    Progress,
    RotationSettings,
    SpatialSettings,
    TileGuards,
)
from wherefrom.train.objective import QUARTER_TURNS
from wherefrom.train.objectives import DenseSpatialPrediction, DenseSpatialSettings

GRAY = 128
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # of view 0, of view 1 and of region 2
NOW = Progress(update=0, updates=2, updates_per_epoch=1)
SOURCE_ENDS = 520  # columns; views stand to the right of it
SIZES = [(300, 400), (400, 300), (90, 120)]


@pytest.fixture
def shard(make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path) -> Path:
    """Plain gray pictures, so that everything with a color was drawn."""
    encoded = [jpeg_bytes(np.full((*size, 3), GRAY, np.uint8)) for size in SIZES]
    return make_shard(tmp_path / "gray-000000.tar", [(f"{n}", {"jpg": data}) for n, data in enumerate(encoded)])


def open_loader(shard: Path, *families: ViewFamily, seed: int = 0, renderer: str = "torch") -> Loader:
    return make_loader(
        str(shard), ViewRecipe(families=families), seed=seed, global_batch=1, order="sequential", renderer=renderer, threads=0
    )


def open_picture(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def extent(mask: NDArray[np.bool_], least: int = 1) -> NDArray[np.float64]:
    """Return xyxy of the rows and columns in which at least so many pixels are true."""
    rows, cols = np.flatnonzero(mask.sum(1) >= least), np.flatnonzero(mask.sum(0) >= least)
    return np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], float)


def assert_box_is_drawn_at(
    picture: NDArray[np.uint8], box: NDArray[np.float64], shown_wh: NDArray[np.float64], color: tuple[int, int, int] = BLUE, most: float = 5
) -> None:
    frame = extent((picture == GRAY).all(-1), least=30)  # letters have a few gray pixels
    scale = (frame[2:] - frame[:2]) / shown_wh
    corners = (extent((np.abs(picture.astype(int) - color) < 12).all(-1)) - np.tile(frame[:2], 2)) / np.tile(scale, 2)
    error = np.abs(corners - box) * np.tile(scale, 2)
    assert error.max() <= most, f"{error} pixels of the drawing off"  # by default half the line, and the number's frame


@pytest.mark.core
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_boxes_are_drawn_where_the_record_says(shard: Path, tmp_path: Path, seed: int) -> None:
    family = ViewFamily(name="one", views=1, size_px=(40, 40), law=Independent(area_frac=(0.1, 0.3)), mirror="view", turns=True)
    with open_loader(shard, family, seed=seed) as loader:
        save_views_picture(tmp_path / "views.png", loader, samples=1)
        batch = loader.batch([0])
    box = batch.views[0].geometry.boxes[0, 0].double().numpy()
    source_wh = batch.source_size[0].numpy()[::-1].astype(float)
    picture = open_picture(tmp_path / "views.png")[:, :SOURCE_ENDS]
    assert_box_is_drawn_at(picture, box, source_wh)
    mirrored = np.array([source_wh[0] - box[2], box[1], source_wh[0] - box[0], box[3]])
    for wrong in (mirrored, box + 10):
        with pytest.raises(AssertionError, match="of the drawing off"):
            assert_box_is_drawn_at(picture, wrong, source_wh)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_regions_are_drawn_where_the_record_says_on_the_view_and_in_the_source(shard: Path, tmp_path: Path, seed: int) -> None:
    settings = DenseSpatialSettings(size_px=96, regions=3, side_frac=(0.35, 0.4), pairs="all", mirror="view", color=None)
    dense = DenseSpatialPrediction(settings)
    with open_loader(shard, *dense.families, seed=seed) as loader:
        save_views_picture(tmp_path / "views.png", loader, samples=1, objectives=[dense])
        save_views_picture(tmp_path / "without.png", loader, samples=1)
        batch = loader.batch([0])
    picture, without = open_picture(tmp_path / "views.png"), open_picture(tmp_path / "without.png")
    record = batch.family("dense").geometry
    region = dense.boxes(record)[0, 2].double()
    in_source = map_boxes(record.view_to_source[0, 0], region[None])[0].numpy()
    view_wh, source_wh = np.array([96.0, 96.0]), batch.source_size[0].numpy()[::-1].astype(float)
    source, view = picture[:, :SOURCE_ENDS], picture[:, SOURCE_ENDS:]
    assert_box_is_drawn_at(source, in_source, source_wh, ORANGE)
    assert_box_is_drawn_at(view, region.numpy(), view_wh, ORANGE)
    for place, box, wh in ((source, in_source, source_wh), (view, region.numpy(), view_wh)):
        mirrored = np.array([wh[0] - box[2], box[1], wh[0] - box[0], box[3]])
        for wrong in (mirrored, box + 0.05 * wh[0]):
            with pytest.raises(AssertionError, match="of the drawing off"):
                assert_box_is_drawn_at(place, wrong, wh, ORANGE)
    assert not (np.abs(without.astype(int) - ORANGE) < 12).all(-1).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_two_views_share_is_drawn_on_both_where_the_record_says(shard: Path, tmp_path: Path, seed: int) -> None:
    gtsa = GTSASettings(size_px=64, local_views=0, color=None, min_shared_frac=0.15).objective("gtsa")
    with open_loader(shard, *gtsa.families, seed=seed) as loader:
        save_views_picture(tmp_path / "views.png", loader, samples=1, objectives=[gtsa])
        record = loader.batch([0]).views[0].geometry
    common = record.common(record).boxes[0]
    picture = open_picture(tmp_path / "views.png")
    view_wh = np.array([64.0, 64.0])
    for view, other, columns, color in ((0, 1, slice(530, 830), ORANGE), (1, 0, slice(834, 1130), BLUE)):
        box = common[view, other].numpy()
        assert_box_is_drawn_at(picture[:, columns], box, view_wh, color, most=8)  # the view's border hides some of its gray, too
        for wrong in (box[[1, 0, 3, 2]] + 4, box - 4):
            with pytest.raises(AssertionError, match="of the drawing off"):
                assert_box_is_drawn_at(picture[:, columns], wrong, view_wh, color, most=8)


# What an objective shows beside its views

GUARDS = TileGuards(normalize=True, color="drop", channel_shift_px=1, resample_prob=0.5, resample_px=(8, 16))


@pytest.fixture
def colorful(make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path) -> Path:
    """Pictures of smooth noise: no two places look alike."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((180, 140), Image.Resampling.BICUBIC) for _ in range(8)]
    return make_shard(tmp_path / "noise-000000.tar", [(f"{n}", {"jpg": jpeg_bytes(np.asarray(each))}) for n, each in enumerate(noise)])


def pictures_of(shard: Path, objective: Objective) -> list[Batch]:
    with open_loader(shard, *objective.families) as loader:
        return [loader.batch([n]) for n in range(8)]


class Seen(nn.Module):
    """A layer that keeps what it is given, and says the same whatever it is."""

    def __init__(self, out: int | None) -> None:
        super().__init__()
        self.out = out

    def forward(self, features: Tensor) -> Tensor:
        self.given = features
        return features if self.out is None else torch.zeros(*features.shape[:-1], self.out)


def pixels_as_features(views: Views | Tensor, **_: Any) -> Features:
    pixels = views.pixels if isinstance(views, Views) else views
    return Features(summary=pixels.flatten(2), tokens=pixels.movedim(2, -1)[:, :, ::4, ::4])


def given(objective: Any, batch: Batch) -> Tensor:
    """Return what the network is given of a picture in `forward`, (n, 3, h, w), in the order in which its head is told of it."""
    if objective.name == "jigsaw":
        objective.each, objective.head = Seen(None), Seen(len(objective.permutations))
        objective(batch, pixels_as_features, NOW)
        told = objective.each.given[0]
    elif objective.name == "context":
        objective.head = Seen(8)
        objective(batch, pixels_as_features, NOW)
        middle, neighbors = objective.head.given[0].chunk(2, -1)
        assert (middle == middle[0]).all()
        told = torch.cat([neighbors[:4], middle[:1], neighbors[4:]])
    else:
        objective.head = Seen(4 if objective.name == "rotation" else 313)
        kept = []
        objective(batch, lambda views, **_: (kept.append(views), pixels_as_features(views))[1], NOW)
        return kept[0][0]
    return told.unflatten(-1, (3, *objective.families[0].size_px))


@pytest.mark.core
@pytest.mark.parametrize("guards", [TileGuards(), GUARDS])
@pytest.mark.parametrize("settings", [JigsawSettings(size_px=24, permutations=100), ContextSettings(size_px=24, mirror="picture")])
def test_tiles_are_shown_as_the_network_is_given_them_mirrored_or_not(colorful: Path, settings: Any, guards: TileGuards) -> None:
    objective = replace(settings, guards=guards).objective("jigsaw" if isinstance(settings, JigsawSettings) else "context")
    mirrored = set()
    for batch in pictures_of(colorful, objective):
        (panel,) = objective.shown(batch)
        shown = panel.pictures.flatten(0, 1)
        assert panel.pictures.shape == (3, 3, 3, 24, 24) and torch.equal(shown, given(objective, batch))
        assert not torch.equal(shown.flip(0), given(objective, batch))
        views = batch.views[0]
        for position, (picture, label) in enumerate(zip(shown, panel.labels, strict=True)):
            view = int(re.search(r"view \[(\d)\]", label)[1])  # type: ignore[index]
            assert guards != TileGuards() or torch.equal(picture, views.pixels[0, view])
            column = 2 - view % 3 if views.geometry.flipped[0, 0] else view % 3
            place = 3 * (view // 3) + column
            if objective.name == "jigsaw":
                assert label.startswith(f"place {place}:")
            else:
                assert place == position and label.startswith("middle" if place == 4 else f"direction {place - (place > 4)}:")
        mirrored.add(bool(views.geometry.flipped[0, 0]))
    assert mirrored == {False, True}


@pytest.mark.core
def test_jigsaw_says_which_permutation_its_tiles_lie_in(colorful: Path) -> None:
    objective = JigsawSettings(size_px=24, permutations=100).objective("jigsaw")
    numbers = set()
    for batch in pictures_of(colorful, objective):
        (panel,) = objective.shown(batch)
        number, places = re.fullmatch(r"permutation (\d+) of 100: places ([\d ]+)", panel.captions[0]).groups()  # type: ignore[union-attr]
        assert [int(place) for place in places.split()] == objective.permutations[int(number)].tolist()
        assert [label.split(":")[0] for label in panel.labels] == [f"place {place}" for place in places.split()]
        assert ("mirrored, and so is the order of columns" in panel.captions) == bool(batch.views[0].geometry.flipped[0, 0])
        numbers.add(number)
    assert len(numbers) > 1


@pytest.mark.core
def test_rotation_and_colorization_show_what_the_network_is_given(colorful: Path) -> None:
    for settings, name, count in ((RotationSettings(size_px=32), "rotation", 4), (ColorizationSettings(size_px=32), "colorization", 1)):
        objective = settings.objective(name)  # type: ignore[attr-defined]
        batch = pictures_of(colorful, objective)[0]
        (panel,) = objective.shown(batch)
        assert torch.equal(panel.pictures[0, :count], given(objective, batch))


@pytest.mark.core
def test_what_gtsa_compares_shows_the_same_place_turned_alike(colorful: Path) -> None:
    objective = GTSASettings(size_px=64, local_views=3, local_px=32, color=None, min_shared_frac=0.05).objective("gtsa")
    turns = set()
    for batch in pictures_of(colorful, objective):
        (panel,) = objective.shown(batch)
        assert panel.pictures.shape[:2] == (4, 4)
        teacher, student = panel.pictures[0::2].flatten(0, 1), panel.pictures[1::2].flatten(0, 1)
        words = [label.split(" ", 1)[1] for label in (*panel.labels[0:4], *panel.labels[8:12])]
        apart = (teacher - student).abs().mean((1, 2, 3))
        wrong = torch.stack([(teacher.rot90(turn, (-2, -1)) - student).abs().mean((1, 2, 3)) for turn in (1, 2, 3)]).amin(0)
        assert (apart < 0.25).all() and (wrong > 2 * apart).all(), (apart, wrong)
        large, small = (views.geometry for views in batch.views)
        relative = [(large.quarter_turns[0, 1 - a] - large.quarter_turns[0, a]) % 4 for a in range(2)]
        relative = [torch.cat([relative[a][None], (small.quarter_turns[0] - large.quarter_turns[0, a]) % 4]) for a in range(2)]
        assert words == [QUARTER_TURNS[turn] for turn in torch.cat(relative).tolist()]
        turns |= set(words)
    assert turns == set(QUARTER_TURNS)
    invalid = replace(batch, views=tuple(replace(views, valid=torch.zeros_like(views.valid)) for views in batch.views))
    assert [label for label in objective.shown(invalid)[0].labels if "left out" in label] == ["[0] left out"] * 4 + ["[1] left out"] * 4


class Flag(Objective):
    """Shows six pictures of one color each."""

    name = "flag"
    families = (ViewFamily(name="flag", views=1, size_px=16),)
    colors = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (200, 0, 200), (0, 200, 200))

    def shown(self, batch: Batch) -> list[Panel]:
        recipe = ViewRecipe(families=self.families)
        levels = (torch.tensor(self.colors) / 255 - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)
        pictures = levels.view(2, 3, 3, 1, 1).expand(-1, -1, -1, 8, 12)
        return [Panel(title="flag", pictures=pictures, labels=["color"] * 6, captions=["all of them " * 20])]


@pytest.mark.core
def test_a_panel_is_drawn_row_by_row_beside_its_own_picture(shard: Path, tmp_path: Path) -> None:
    flag = Flag()
    with open_loader(shard, *flag.families) as loader:
        save_views_picture(tmp_path / "views.png", loader, samples=2, objectives=[flag])
    picture = open_picture(tmp_path / "views.png")
    half = picture.shape[0] * 11 // 20
    for part in (picture[:half], picture[half:]):
        boxes = np.array([extent((part == color).all(-1)) for color in flag.colors]).reshape(2, 3, 4)
        assert (boxes[:, :2, 2] < boxes[:, 1:, 0]).all() and (boxes[0, :, 3] < boxes[1, :, 1]).all()
        size = boxes[..., 2:] - boxes[..., :2]
        assert np.ptp(size[..., 0]) <= 2 and np.abs(size[..., 0] / size[..., 1] - 12 / 8).max() < 0.03
        assert (boxes[:, :, 0] > SOURCE_ENDS).all() and (boxes[..., 2] < picture.shape[1]).all()


@pytest.mark.core
def test_a_panel_has_a_label_for_each_picture() -> None:
    with pytest.raises(ValueError, match=r"panel 'flag': pictures of shape \(1, 2, 3, 4, 4\) with 3 labels"):
        Panel(title="flag", pictures=torch.zeros(1, 2, 3, 4, 4), labels=["one", "two", "three"])


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All that is written beside pictures."""
    written: list[str] = []
    write = Figure.text

    def keep(self: Figure, x: float, y: float, s: str, **style: Any) -> Any:
        written.append(s)
        return write(self, x, y, s, **style)

    monkeypatch.setattr(Figure, "text", keep)
    return written


@pytest.mark.core
@pytest.mark.parametrize(
    ("settings", "has_reference"),
    [
        (SpatialSettings(views=2, size_px=32), True),
        (PARTSettings(size_px=32, patches=4, patch_px=8), True),
        (DINOSettings(size_px=32, local_views=3, local_px=16), False),
        (GTSASettings(size_px=32, local_views=2, local_px=16), False),
        (DenseSpatialSettings(size_px=32, regions=3), False),  # its pairs are of regions
    ],
)
def test_only_views_in_pairs_have_a_reference(shard: Path, tmp_path: Path, settings: Any, has_reference: bool, words: list[str]) -> None:
    objective = settings.objective("some")
    with open_loader(shard, *objective.families, renderer="native") as loader:  # PART cuts between pixels
        save_views_picture(tmp_path / "views.png", loader, samples=1, objectives=[objective])
    text = "\n".join(words)
    assert ("ln s " in text) == ("reference" in text) == ("\nreference\n" in text) == has_reference


def test_every_kind_of_family_fits_one_picture_which_is_the_same_each_time(shard: Path, tmp_path: Path) -> None:
    much = ColorLaw(jitter_prob=1, gray_prob=0.5, blur_prob=1, solarize_prob=0.5)
    families = (
        ViewFamily(name="pair", views=2, size_px=(24, 40), law=Paired(), mirror="view", turns=True, color=much),
        ViewFamily(name="spread", views=3, size_px=(16, 16), law=Disjoint()),
        ViewFamily(name="single", views=1, size_px=(48, 48), law=Independent()),
    )
    with open_loader(shard, *families) as loader:
        for name in ("one.png", "two.png"):
            save_views_picture(tmp_path / name, loader, samples=99)
        loader.seek(len(SIZES))
        save_views_picture(tmp_path / "later.png", loader, samples=99)
    one, two, later = (open_picture(tmp_path / name) for name in ("one.png", "two.png", "later.png"))
    assert np.array_equal(one, two)
    assert one.shape != later.shape or not np.array_equal(one, later)
    assert one.shape[0] > 3 * 300  # a row a picture, and no more rows than pictures
    assert {path.name for path in tmp_path.glob("*.png*")} | {path.name for path in tmp_path.glob(".*")} == {
        "one.png",
        "two.png",
        "later.png",
        ".wherefrom",  # the index of the shard
    }


@pytest.mark.core
def test_any_key_heads_its_row(tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> None:
    picture = jpeg_bytes(np.full((90, 120, 3), GRAY, np.uint8))
    names = ("$\\frac$", "two\nlines", "bytes\udcff", "\x1b[31m")
    make_shard(tmp_path / "odd.tar", [(name, {"jpg": picture}) for name in names])
    with open_loader(tmp_path / "odd.tar", ViewFamily(name="one", views=1, size_px=16)) as loader:
        save_views_picture(tmp_path / "views.png", loader)
    assert open_picture(tmp_path / "views.png").shape[0] > 4 * 300


@pytest.mark.core
def test_the_command_writes_the_picture_and_says_where(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "views.png"
    assert views_command(data=str(shard), out=out, samples=2, seed=3, epoch=1) == 0
    assert capsys.readouterr().out == f"{out}: 2 pictures of recipe demo, seed 3, epoch 1\n"
    assert open_picture(out).shape[1] > 600


@pytest.mark.core
def test_the_command_draws_the_views_of_a_settings_file(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out, plain = tmp_path / "some.yaml", tmp_path / "views.png", tmp_path / "plain.png"
    config.write_text(f"{{recipe: sp_dense, seed: 7, data: '{shard}', dense: {{regions: 5}}}}")
    assert views_command(config=config, out=out, samples=1) == 0
    assert capsys.readouterr().out == f"{out}: 1 pictures of recipe sp_dense, seed 7, epoch 0\n"
    assert views_command("sp_dense", data=str(shard), out=plain, samples=1, seed=7) == 0
    assert not np.array_equal(open_picture(out), open_picture(plain))  # 5 regions, not 24
    with pytest.raises(ValueError, match=r"some\.yaml is of recipe 'sp_dense'"):
        views_command("demo", config=config, out=out)


@pytest.mark.core
@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("samples=0, epoch=0: needs samples >= 1", {"samples": 0}),
        ("samples=6, epoch=-1: needs", {"epoch": -1}),
        ("no recipe 'deom'; did you mean 'demo'?", {"recipe": "deom"}),
        ("there is no folder .*nowhere; make it", {"out": Path("nowhere/views.png")}),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(shard: Path, words: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        views_command(**{"data": str(shard), **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
