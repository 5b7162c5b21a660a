"""The picture of views, read back from its pixels: boxes stand where the record says; and what the command writes and refuses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline import ColorLaw, Disjoint, Independent, Loader, Paired, ViewFamily, ViewRecipe, make_loader
from wherefrom.pipeline.geometry import map_boxes
from wherefrom.tools.views_picture import save_views_picture, views_command
from wherefrom.train.objectives import DenseSpatialPrediction, DenseSpatialSettings

GRAY = 128
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # of view 0, of region 2
SOURCE_ENDS = 520  # columns; views stand to the right of it
SIZES = [(300, 400), (400, 300), (90, 120)]


@pytest.fixture
def shard(make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path) -> Path:
    """Plain gray pictures, so that everything with a color was drawn."""
    encoded = [jpeg_bytes(np.full((*size, 3), GRAY, np.uint8)) for size in SIZES]
    return make_shard(tmp_path / "gray-000000.tar", [(f"{n}", {"jpg": data}) for n, data in enumerate(encoded)])


def open_loader(shard: Path, *families: ViewFamily, seed: int = 0) -> Loader:
    return make_loader(
        str(shard), ViewRecipe(families=families), seed=seed, global_batch=1, order="sequential", renderer="torch", threads=0
    )


def open_picture(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def extent(mask: NDArray[np.bool_], least: int = 1) -> NDArray[np.float64]:
    """Return xyxy of the rows and columns in which at least so many pixels are true."""
    rows, cols = np.flatnonzero(mask.sum(1) >= least), np.flatnonzero(mask.sum(0) >= least)
    return np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], float)


def assert_box_is_drawn_at(
    picture: NDArray[np.uint8], box: NDArray[np.float64], shown_wh: NDArray[np.float64], color: tuple[int, int, int] = BLUE
) -> None:
    frame = extent((picture == GRAY).all(-1), least=30)  # letters have a few gray pixels
    scale = (frame[2:] - frame[:2]) / shown_wh
    corners = (extent((np.abs(picture.astype(int) - color) < 12).all(-1)) - np.tile(frame[:2], 2)) / np.tile(scale, 2)
    error = np.abs(corners - box) * np.tile(scale, 2)
    assert error.max() <= 5, f"{error} pixels of the drawing off"  # half the line, and the number's frame


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
