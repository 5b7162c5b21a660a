"""Values against annotations: what an annotation allows is taken, its nearest mistakes are refused in one line."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional, Protocol, Union

import numpy as np
import pytest

from wherefrom.pipeline.literals import check_literal, check_literals

pytestmark = pytest.mark.core

Word = Literal["none", "view", "picture"]


@dataclass(frozen=True)
class Inner:
    count: int = 1


class Drawn(Protocol):
    def draw(self) -> int: ...


TAKEN: list[tuple[Any, Any]] = [
    (Word, "view"),
    (Word | None, None),
    (Optional[Literal["a"]], "a"),  # noqa: UP045  the older spelling is met in other people's dataclasses
    (Union[Literal["a"], int], 3),  # noqa: UP007
    (Literal[1, 2], 2),
    (bool, False),
    (int, -3),
    (int | None, None),
    (float, 2),
    (float, math.inf),
    (float | None, 0.5),
    (str, ""),
    (tuple[int, int], (96, 64)),
    (tuple[float, float], (0, 1.0)),
    (tuple[float, float] | None, None),
    (tuple[str, ...], ()),
    (tuple[Inner, ...], (Inner(), Inner())),
    (tuple[Literal["a", "b"], ...], ("b", "a")),
    (Inner | None, Inner()),
    (Mapping[str, float], {}),
    (Callable[[], int], len),
    (Drawn, object()),  # not checked, as the next
    (Any, object()),
]

REFUSED: list[tuple[Any, Any, str]] = [
    (Word, "veiw", "x='veiw': take one of none, view, picture; did you mean 'view'?"),
    (Word, "both", "x='both': take one of none, view, picture"),
    (Word, True, "x=True: take one of none, view, picture"),
    (Word, None, "x=None: take one of none, view, picture"),
    (Word | None, "pictures", "x='pictures': take one of none, view, picture or None; did you mean 'picture'?"),
    (Literal[1, 2], True, "x=True: take one of 1, 2"),
    (bool, "yes", "x='yes': needs True or False"),
    (bool, 1, "x=1: needs True or False"),
    (int, 2.0, "x=2.0: needs a whole number"),
    (int, True, "x=True: needs a whole number"),
    (int, np.int64(2), "x=np.int64(2): needs a whole number; it is NumPy's, take .item() of it"),
    (int, np.float64(2), "x=np.float64(2.0): needs a whole number"),
    (float | None, np.float32(0.5), "x=np.float32(0.5): needs a number or None; it is NumPy's, take .item() of it"),
    (Word, np.str_("view"), "x=np.str_('view'): take one of none, view, picture; it is NumPy's, take .item() of it"),
    (int | None, 2.5, "x=2.5: needs a whole number or None"),
    (float, "1", "x='1': needs a number"),
    (float, False, "x=False: needs a number"),
    (float, math.nan, "x=nan: needs a number"),
    (str, 3, "x=3: needs a text"),
    (tuple[int, int], [96, 96], "x=[96, 96]: needs a tuple (a whole number, a whole number)"),
    (tuple[int, int], (96,), "x=(96,): needs a tuple (a whole number, a whole number)"),
    (tuple[int, int], (96, 96.0), "x=(96, 96.0): needs a tuple (a whole number, a whole number)"),
    (tuple[float, float] | None, (0.1, True), "x=(0.1, True): needs a tuple (a number, a number) or None"),
    (tuple[Inner, ...], (Inner(), 1), "x=(Inner(count=1), 1): needs a tuple, each Inner"),
    (Inner | None, Inner, f"x={str(Inner)[:60]}: needs Inner or None"),
    (Callable[[], int], 7, "x=7: needs Callable"),
    (str, ["x" * 100], f"x=['{'x' * 58}...: needs a text"),
]


@pytest.mark.parametrize(("annotation", "value"), TAKEN)
def test_what_an_annotation_allows_is_taken(annotation: Any, value: object) -> None:
    check_literal("x", value, annotation)


@pytest.mark.parametrize(("annotation", "value", "message"), REFUSED)
def test_what_an_annotation_does_not_allow_is_refused_in_one_line(annotation: Any, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_literal("x", value, annotation)


def test_every_field_of_a_settings_class_is_checked_by_its_name() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Settings:
        mirror: Word = "none"
        views: int = 1

        def __post_init__(self) -> None:
            check_literals(self)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class More(Settings):
        turns: bool = False

    assert More(mirror="view", views=2, turns=True).turns
    for changed in ({"mirror": "veiw"}, {"views": 2.0}, {"turns": 1}):
        name, value = next(iter(changed.items()))
        with pytest.raises(ValueError, match=f"^{name}={value!r}: "):
            More(**changed)  # type: ignore[arg-type]
