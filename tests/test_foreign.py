"""A law, an objective and a recipe of another package, with its metadata on the path as pip leaves it: they work wherever ours do."""

import math
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from wherefrom.pipeline import LAWS, Boxes, CropLaw, Independent, Keys, ViewFamily, ViewRecipe, draw_records, make_loader, prove
from wherefrom.pipeline.proof.prove import proof_cases
from wherefrom.pipeline.render.choose import make_renderer
from wherefrom.pipeline.view_recipe import law_name
from wherefrom.tools import training
from wherefrom.tools.cli import main
from wherefrom.train.objective import OBJECTIVES
from wherefrom.train.plain_data import from_plain, to_plain
from wherefrom.train.recipes import RECIPES, recipe
from wherefrom.train.reporting import Summary
from wherefrom.train.run_folder import RunFolder, read_metrics
from wherefrom.train.settings import TrainSettings, read_settings, write_settings

pytestmark = pytest.mark.core

PACKAGE = Path(__file__).resolve().parent / "foreign_package"
MODULES = ("foreign_law", "foreign_objective")


@pytest.fixture(autouse=True)
def installed(install: Callable[..., None]) -> None:
    """Install the package as its pyproject.toml says."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    install(project["name"], project["entry-points"], version=project["version"], modules=PACKAGE)


def ring(views: int = 4, **changes: float) -> ViewRecipe:
    return ViewRecipe(families=(ViewFamily(name="ring", views=views, size_px=(24, 24), law=LAWS["ring"](**changes), min_side_px=4),))


def test_names_of_the_package_are_listed_behind_ours_and_nothing_is_imported() -> None:
    for table, name in ((LAWS, "ring"), (OBJECTIVES, "brightness"), (RECIPES, "rings")):
        assert list(table) == [*table.own, name] and table.owner(name) == "foreign-views 1.2"
    assert not set(MODULES) & set(sys.modules)
    assert law_name(Independent()) == "independent" and law_name(LAWS["ring"]()) == "ring"
    assert set(MODULES) & set(sys.modules) == {"foreign_law"}


def test_a_loader_delivers_views_by_the_foreign_law(tiny_shards: Path) -> None:
    with make_loader(tiny_shards / "train.tar", ring(radius_frac=0.2), global_batch=8, threads=0) as loader:
        batch = next(iter(loader))
        views = batch.views[0]
    height, width = views.geometry.source_size.double().unbind(-1)
    center = (views.geometry.boxes[..., :2] + views.geometry.boxes[..., 2:]).double() / 2 - torch.stack([width, height], -1)[:, None] / 2
    radius = center.norm(dim=-1) / torch.minimum(width, height)[:, None]
    assert views.pixels.shape == (8, 4, 3, 24, 24) and views.valid.all()
    assert (radius - 0.2).abs().max() < 0.02  # boxes are of whole pixels


def test_pictures_too_small_for_the_foreign_law_give_invalid_views() -> None:
    size = np.array([[20, 300], [10, 300]], np.int32)
    (record,) = draw_records(ring(), seed=0, epoch=0, drawn_for=np.arange(2), source_size=size)
    assert record.valid.tolist() == [[True] * 4, [False] * 4]
    assert record.geometry.boxes[1].tolist() == [[0, 0, 300, 10]] * 4


def test_the_fingerprint_tells_foreign_laws_and_their_numbers_apart() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Ring(LAWS["ring"]):  # type: ignore[misc]
        """Another law of the same name and fields, which no table lists."""

    mine = replace(ring().families[0], law=Ring())
    assert law_name(mine.law) == f"{__name__}:{Ring.__qualname__}"
    others = [ring(), ring(side_frac=0.2), ViewRecipe(families=(mine,)), ViewRecipe(families=(replace(mine, law=Independent()),))]
    assert len({one.fingerprint for one in others}) == 4


def test_a_settings_file_names_the_law_with_its_fields(tmp_path: Path) -> None:
    base, path = recipe("demo"), tmp_path / "some.yaml"
    path.write_text("spatial: {law: {name: ring, radius_frac: 0.2}, views: 3}\n")
    read = read_settings(path, base)
    assert read.objectives["spatial"].law == LAWS["ring"](radius_frac=0.2)
    assert to_plain(read)["objectives"]["spatial"]["law"] == {"name": "ring", "side_frac": 0.3, "radius_frac": 0.2}
    write_settings(path, read)
    assert read_settings(path, recipe("sp_dense")) == read
    for text, message in (
        ("{name: rings}", "spatial.law: no law 'rings'; did you mean 'ring'?"),
        ("{name: ring, radius: 1}", "spatial.law.radius: no such setting of the ring law; did you mean spatial.law.radius_frac?"),
        ("{name: ring, radius_frac: 0.5}", "spatial.law: side_frac=0.3, radius_frac=0.5: needs 0 < side"),
    ):
        path.write_text(f"spatial: {{law: {text}}}\n")
        with pytest.raises(ValueError, match=re.escape(message)):
            read_settings(path, base)


def test_views_shows_it(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.yaml").write_text("spatial: {law: ring, views: 3}\n")
    words = ["--config", str(tmp_path / "some.yaml"), "--data", str(tiny_shards / "train.tar"), "--out", str(tmp_path / "views.png")]
    assert main(["views", *words, "--samples", "1"]) == 0, capsys.readouterr().err
    assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")


def test_its_pixels_are_proven_beside_those_of_ours() -> None:
    every = proof_cases(("pixel",), quick=True)[0]
    assert sum(family.views for family in every.recipe.families if family.name.startswith("ring/")) == 8
    case = replace(every, laws=("ring",))
    assert [family.law for family in case.recipe.families] == [LAWS["ring"]()]
    report = prove(partial(make_renderer, name="torch"), cases=[case])
    assert report.passed and {row.law for row in report.rows} == {"ring"}


def trained(words: list[str], monkeypatch: pytest.MonkeyPatch) -> TrainSettings:
    """Return the settings of `wherefrom train WORDS`, which is not run."""
    seen: list[TrainSettings] = []

    def run(settings: TrainSettings, **_: object) -> Summary:
        seen.append(settings)
        return Summary(folder=Path(), update=0, updates=0, stopped_by=None, seconds={}, images_per_s=0.0)

    monkeypatch.setattr(training, "run", run)
    assert main(["train", *words]) == 0
    return seen[0]


def test_the_command_line_names_the_law_and_its_fields(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--spatial.law", "ring", "--spatial.law.radius-frac", "0.25", "--spatial.views", "5"]
    settings = trained(words, monkeypatch)
    assert settings.objectives == {"spatial": replace(recipe("demo").objectives["spatial"], law=LAWS["ring"](radius_frac=0.25), views=5)}
    with pytest.raises(SystemExit):
        main(["train", *words, "--help"])
    said = " ".join(re.sub(r"[│\n]", " ", capsys.readouterr().out).split())
    assert "--spatial.law.radius-frac FLOAT" in said and ", ring;" in said


def test_a_foreign_recipe_with_a_foreign_objective_runs_and_goes_on(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(tiny_shards / "train.tar"), "--runtime.device", "cpu", "--runtime.threads", "1", "--runtime.log-with", "none"]
    words += ["--runtime.renderer", "torch", "--runtime.checkpoint-every", "1", "--out", "run"]
    assert main(["train", "rings", *words]) == 0, capsys.readouterr().err
    folder = RunFolder(tmp_path / "run")
    written = yaml.safe_load(folder.settings.read_text())
    assert (written["recipe"], written["objectives"]["brightness"]["law"]["name"]) == ("rings", "ring")
    (line,) = read_metrics(folder, "train")
    assert math.isfinite(line["losses"]["brightness/squared"])
    assert main(["train", *words, "--resume"]) == 0, capsys.readouterr().err
    assert "goes on at update 2 of 2" in capsys.readouterr().out
    (folder.checkpoints / "latest").write_text("update-00000001\n")
    assert main(["train", *words, "--resume"]) == 0, capsys.readouterr().err
    assert read_metrics(folder, "train")[-1]["losses"] == line["losses"]


WRONG_VIEWS = """
from dataclasses import dataclass, field

from wherefrom.pipeline import CropLaw


@dataclass
class Thawed:
    side: float = 1.0


@dataclass(frozen=True)
class Abstract(CropLaw):
    side: float = 1.0


@dataclass(frozen=True)
class Listed(CropLaw):
    scales: list[float] = field(default_factory=list)

    def draw(self, *_): ...
"""


def test_what_another_package_declares_wrongly_is_named_with_the_package(install: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "wrong_views.py").write_text(WRONG_VIEWS)
    laws = {"pi": "math:pi", "thawed": "wrong_views:Thawed", "abstract": "wrong_views:Abstract", "listed": "wrong_views:Listed"}
    entries = {"wherefrom.laws": laws, "wherefrom.recipes": {"none": "builtins:dict", "number": "math:pi"}}
    install("wrong-views", entries, version="0.1", modules=tmp_path)
    with pytest.raises(ValueError, match=r"recipe 'none' of wrong-views 0\.1 returns {}, expected TrainSettings; mend or uninstall it"):
        recipe("none")
    with pytest.raises(ValueError, match=r"recipe 'number' of wrong-views 0\.1 is 3\.14.*, expected a function; mend or uninstall it"):
        recipe("number")
    for name, reason in (
        ("thawed", "expected a frozen dataclass"),
        ("abstract", "lacks no method"),
        ("listed", "scales: settings of type"),
    ):
        law = {"name": name, **({"scales": [1]} if name == "listed" else {})}
        with pytest.raises(ValueError, match=rf"spatial\.law.*{reason}"):
            to_plain(from_plain(recipe("demo"), {"objectives": {"spatial": {"law": law}}}))
    message = r"spatial\.law: law 'pi' of wrong-views 0\.1 is 3\.14.*, expected a frozen dataclass that .*; mend or uninstall it"
    with pytest.raises(ValueError, match=message):
        from_plain(recipe("demo"), {"objectives": {"spatial": {"law": {"name": "pi"}}}})
    with pytest.raises(ValueError, match=message.replace("spatial", "--spatial", 1)):
        training.train_command(["--spatial.law", "pi"])


def test_a_file_adds_a_foreign_objective_to_any_recipe(tmp_path: Path) -> None:
    path, base = tmp_path / "some.yaml", recipe("demo")
    path.write_text("brightness: {views: 3, law: {radius_frac: 0.1}}\n")
    read = read_settings(path, base)
    assert [objective.name for objective in read.make_objectives()] == ["spatial", "brightness"]
    assert [family.views for family in read.make_objectives()[1].families] == [3]
    assert from_plain(base, to_plain(read)) == read and read.with_objectives(brightness=None) == base
    for text in ("brightness: {veiws: 3}", "objectives: {brightness: {veiws: 3}}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"brightness\.veiws: no such setting of the brightness objective; did you mean brightness\.v"):
            read_settings(path, base)


def test_the_command_line_switches_a_foreign_objective_on_beside_any_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    base, brightness = recipe("demo"), OBJECTIVES["brightness"]()
    for words, expected in (
        (["--brightness"], brightness),
        (["--brightness.weight", "0.5"], replace(brightness, weight=0.5)),
        (["--brightness.law.radius-frac", "0.1", "--brightness.views=3"], replace(brightness, law=LAWS["ring"](radius_frac=0.1), views=3)),
    ):
        settings = trained(words, monkeypatch)
        assert list(settings.objectives) == ["spatial", "brightness"]
        assert settings == base.with_objectives(brightness=expected)
        assert [objective.weight for objective in settings.make_objectives()] == [1.0, expected.weight]


@pytest.mark.parametrize("name", ["labels", "update", "full", "model", "out"])
def test_an_objective_whose_name_stands_for_something_else_is_refused(name: str) -> None:
    """In the evaluation's report, among the settings, or on the command line."""
    settings = OBJECTIVES["brightness"]()
    with pytest.raises(ValueError, match=rf"objectives\.{name}=Bright.*: needs an objective's settings, .* under a name of its own"):
        recipe("demo").with_objectives(**{name: settings})


@dataclass(frozen=True, kw_only=True)
class Faulty(CropLaw):
    """A law that does not keep to what is asked of it, and that no package declares."""

    views: int = 2
    beyond_px: float = 0
    fault: str = ""

    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Any, earlier: Any) -> Any:
        """Draw so many whole pictures, and more than that."""
        whole = np.concatenate([np.zeros_like(source_size), source_size[:, ::-1] + self.beyond_px], -1)
        made = Boxes.all_kept(np.repeat(whole[:, None], self.views, 1))
        faults = {
            "bare": made.boxes,
            "counts": replace(made, valid=made.valid.astype(int)),
            "one": replace(made, accepted=made.accepted[:, 0]),
        }
        return faults.get(self.fault, made)

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> Any:
        """Return one number a frame, or one for all."""
        return 20.0 if self.fault == "side" else sizes.min(-1)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (Faulty(views=3), r"the \S+:Faulty law of family 'f' draws boxes of shape \(5, 3, 4\) and float64, expected \(5, 2, 4\)"),
        (
            Faulty(views=2, beyond_px=1),
            r"law of family 'f' draws \[0\.0, 0\.0, 31\.0, 21\.0\] in a picture of .* \(20, 30\);",
        ),
        (Faulty(beyond_px=-0.3), r"draws \[0\.0, 0\.0, 29\.7, 19\.7\] in .*; boxes are multiples of 1/1024 pixel, as snap_boxes"),
        (Faulty(fault="bare"), r"law of family 'f' draws ndarray, expected Boxes, e\.g\. Boxes\.all_kept\(boxes\)"),
        (Faulty(fault="counts"), r"law of family 'f' draws valid of shape \(5, 2\) and int64, expected \(5, 2\) of bool"),
        (Faulty(fault="one"), r"law of family 'f' draws accepted of shape \(5,\) and bool, expected \(5, 2\) of bool"),
        (Faulty(fault="side"), r"law of family 'f' tells smallest sides of shape \(\), expected \(5, 1\) or \(5, 2\), one a frame"),
    ],
)
def test_a_law_that_draws_what_no_view_can_show_is_named(law: CropLaw, message: str) -> None:
    views = ViewRecipe(families=(ViewFamily(name="f", views=2, size_px=(8, 8), law=law),))
    with pytest.raises(ValueError, match=message) as refused:
        draw_records(views, seed=0, epoch=0, drawn_for=np.arange(5), source_size=np.full((5, 2), (20, 30), np.int32))
    assert "\n" not in str(refused.value)
