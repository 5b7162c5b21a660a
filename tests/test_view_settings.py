"""Settings of views and orders: what a field is not annotated as is refused where it is set, in one line that names it.

And who knows which crop laws there are, read from the files with ast: their table alone.
"""

import ast
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from wherefrom.pipeline import (
    LAWS,
    Center,
    ColorLaw,
    CropLaw,
    Disjoint,
    Grid,
    Independent,
    Inside,
    Order,
    Overlapping,
    Paired,
    Tiles,
    ViewFamily,
    ViewRecipe,
)

pytestmark = pytest.mark.core

FAMILY = ViewFamily(name="a", views=2, size_px=(8, 8))
SETTINGS = [
    Independent(),
    Paired(),
    Disjoint(),
    Overlapping(of="a"),
    Inside(of="a"),
    Center(),
    Grid(),
    Tiles(),
    ColorLaw(),
    FAMILY,
    ViewRecipe(families=(FAMILY,)),
    Order(samples=8, global_batch=2),
]
FIELDS = [(settings, field.name) for settings in SETTINGS for field in dataclasses.fields(settings)]

MISSPELLED: list[tuple[Any, dict[str, Any], str]] = [
    (FAMILY, {"mirror": True}, "mirror=True: take one of none, view, picture"),
    (FAMILY, {"mirror": "both"}, "mirror='both': take one of none, view, picture"),
    (FAMILY, {"mirror": "veiw"}, "mirror='veiw': take one of none, view, picture; did you mean 'view'?"),
    (FAMILY, {"snap": "pixels"}, "snap='pixels': take one of pixel, none; did you mean 'pixel'?"),
    (FAMILY, {"turns": "yes"}, "turns='yes': needs True or False"),
    (FAMILY, {"views": 2.0}, "views=2.0: needs a whole number"),
    (FAMILY, {"views": True}, "views=True: needs a whole number"),
    (FAMILY, {"size_px": [8, 8]}, "size_px=[8, 8]: needs a tuple (a whole number, a whole number)"),
    (FAMILY, {"size_px": 8.0}, "size_px=8.0: needs a tuple (a whole number, a whole number)"),
    (
        ViewRecipe(families=(FAMILY,)),
        {"pixels": "bfloat16"},
        "pixels='bfloat16': take one of uint8, float16, float32; did you mean 'float16'?",
    ),
    (ViewRecipe(families=(FAMILY,)), {"std": (1.0, 1.0, math.nan)}, "std=(1.0, 1.0, nan): needs a tuple (a number, a number, a number)"),
    (Paired(), {"log_scale_max": math.nan}, "log_scale_max=nan: needs a number"),
    (
        Order(samples=8, global_batch=2),
        {"mode": "shufled"},
        "mode='shufled': take one of shuffled, block, sequential; did you mean 'shuffled'?",
    ),
    (Order(samples=8, global_batch=2), {"seed": 1.0}, "seed=1.0: needs a whole number"),
]


@pytest.mark.parametrize(("settings", "changes", "message"), MISSPELLED)
def test_a_misspelled_setting_is_refused_where_it_is_set(settings: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(settings, **changes)


@pytest.mark.parametrize(("settings", "name"), FIELDS, ids=[f"{type(settings).__name__}.{name}" for settings, name in FIELDS])
def test_no_field_takes_a_thing_of_another_kind(settings: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=<object object") as refused:
        dataclasses.replace(settings, **{name: object()})
    assert "\n" not in str(refused.value)


@dataclasses.dataclass(frozen=True)
class Spiral:
    """Numbers, but no law: it does not draw. Its repr is long."""

    turns: str = "around " * 100


class Loose(CropLaw):
    """A law that is no dataclass."""

    def draw(self, *_: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Named(CropLaw):
    """A law with a field that settings need for themselves."""

    name: str = "spiral"

    def draw(self, *_: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Opaque(CropLaw):
    """A law with a field that no settings file can hold."""

    places: Any = frozenset({1, 2})

    def draw(self, *_: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("law", "message"),
    [
        *(
            (law, r"needs a crop law, such as Disjoint\(\); one of your own derives from CropLaw$")
            for law in ("disjoint", Disjoint, None, Spiral())
        ),
        (Loose(), r"settings keep and compare it; make its class a dataclass\(frozen=True\)$"),
        (Opaque(), "settings keep it as JSON, and it is none: .*; use finite numbers, words and tuples$"),
        (Opaque(places=float("inf")), "settings keep it as JSON, and it is none: .*; use finite numbers, words and tuples$"),
        (Named(), "in settings `name` tells which law it is; call its field of that name otherwise$"),
    ],
)
def test_what_is_no_law_is_refused_in_one_short_line(law: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^law=.* of family 'a': {message}") as refused:
        ViewFamily(name="a", views=2, size_px=(8, 8), law=law)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_one_number_is_the_side_of_square_views() -> None:
    square: Any = 24
    family = ViewFamily(name="a", views=2, size_px=square)
    assert family == ViewFamily(name="a", views=2, size_px=(24, 24)) and dataclasses.replace(family, views=3).size_px == (24, 24)
    for size in (24.0, True, 0, (24,)):
        with pytest.raises(ValueError, match=r"^size_px="):
            ViewFamily(name="a", views=2, size_px=size)  # type: ignore[arg-type]


def test_whole_numbers_serve_where_numbers_are_asked_for() -> None:
    assert ViewRecipe(families=(FAMILY,), mean=(0, 0, 0), std=(1, 1, 1)).std == (1, 1, 1)
    assert Independent(area_frac=(1, 1)).area_frac == (1, 1)


ROOT = Path(__file__).resolve().parents[1]
KINDS = {LAWS[name].__name__ for name in LAWS.own}
SOURCES = [path for folder in ("pipeline", "train", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES.remove(ROOT / "train" / "renames.py")  # what the laws of an earlier version were called is history


def knowing_laws(source: str) -> list[str]:
    """Return where a source asks which of our laws something is, or lists two of them by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        inner = list(ast.walk(node))
        kinds = {each.id for each in inner if isinstance(each, ast.Name)} & KINDS
        names = {each.value for each in inner if isinstance(each, ast.Constant) and isinstance(each.value, str)} & set(LAWS.own)
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass")) | ast.MatchClass() if kinds:
                found.append(ast.unparse(node))
            case ast.Compare() if kinds or names:
                found.append(ast.unparse(node))
            case ast.Dict() | ast.Subscript() | ast.List() | ast.Set() | ast.Tuple() if len(names) > 1 or len(kinds) > 1:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(law, Paired)",
        "isinstance(law, Overlapping | Inside)",
        "match law:\n    case Disjoint(): pass",
        "type(law) is Grid",
        'settings.law == "paired"',
        'LawName = Literal["paired", "disjoint"]',
        'laws = {"inside": 8, "grid": 4}',
        "Law = Union[Independent, Paired]",
    ],
)
def test_asking_which_law_it_is_is_seen(source: str) -> None:
    assert knowing_laws(source)


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_only_the_table_knows_which_laws_there_are(path: Path) -> None:
    found = knowing_laws(path.read_text(encoding="utf-8"))
    is_table = [path.name == "view_recipe.py" and all(f"'{name}'" in where for name in LAWS.own) for where in found]
    assert [where for where, allowed in zip(found, is_table, strict=True) if not allowed] == []
