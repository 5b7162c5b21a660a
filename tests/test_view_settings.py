"""Settings of views and orders: what a field is not annotated as is refused where it is set, in one line that names it."""

import dataclasses
import math
import re
from typing import Any

import pytest

from wherefrom.pipeline import Center, ColorLaw, Disjoint, Grid, Independent, Inside, Order, Overlapping, Paired, ViewFamily, ViewRecipe

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
    (FAMILY, {"size_px": 8}, "size_px=8: needs a tuple (a whole number, a whole number)"),
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
    """A law from outside, whose repr is long."""

    turns: str = "around " * 100


@pytest.mark.parametrize("law", ["disjoint", Disjoint, None, Spiral()])
def test_a_law_that_is_none_of_ours_is_refused_in_one_short_line(law: Any) -> None:
    expected = r"of family 'a': needs one of Independent, .*, Grid, such as law=Disjoint\(\); others are not taken$"
    with pytest.raises(ValueError, match=expected) as refused:
        ViewFamily(name="a", views=2, size_px=(8, 8), law=law)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_whole_numbers_serve_where_numbers_are_asked_for() -> None:
    assert ViewRecipe(families=(FAMILY,), mean=(0, 0, 0), std=(1, 1, 1)).std == (1, 1, 1)
    assert Independent(area_frac=(1, 1)).area_frac == (1, 1)
