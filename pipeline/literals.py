"""Settings hold what their annotations say: a misspelled word, 2.0 for a count or a 1 for a flag is refused where it is set.

Here: values against annotations; what is wrong in one line, the nearest allowed word beside it.
Not here: which numbers make sense together (each dataclass's own `__post_init__`); settings from files (train/plain_data.py).
"""

import dataclasses
import difflib
import functools
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

_LONGEST = 60  # characters of a refused value that a message shows
_WORDS: dict[Any, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", types.NoneType: "None"}


def check_literals(settings: Any) -> None:
    """Refuse a dataclass whose fields hold what their annotations do not allow: the first line of a `__post_init__`.

    A whole number serves where a number is asked for, but not the other way round; True is no number; nan and lists serve nowhere.
    Unions, None, tuples and nested dataclasses are looked into; protocols and type variables are not checked.
    Raises: ValueError in one line that names the field, its value, what it needs, and the nearest of several words.
    """
    for name, annotation in _annotations(settings.__class__):
        check_literal(name, getattr(settings, name), annotation)


def check_literal(name: str, value: object, annotation: Any) -> None:
    """Refuse an argument called `name` that its annotation does not allow, as `check_literals` does a field.

    Raises: ValueError in one line.
    """
    if not _allowed(value, annotation):
        value_text = repr(value)
        value_text = value_text if len(value_text) <= _LONGEST else f"{value_text[:_LONGEST]}..."
        needed = _needed(annotation)
        verb = "take" if needed.startswith("one of") else "needs"
        raise ValueError(f"{name}={value_text}: {verb} {needed}{_nearest(value, annotation)}")


@functools.cache
def _annotations(kind: type) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind))


def _allowed(value: object, annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_allowed(value, part) for part in parts)
    if origin is Literal:  # by type too: True == 1
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(parts) and all(map(_allowed, value, parts))
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    kind = origin or annotation
    if kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)


def _needed(annotation: Any) -> str:
    """Say what an annotation allows, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_needed(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple and parts[-1] is Ellipsis:
        return f"a tuple, each {_needed(parts[0])}"
    if origin is tuple:
        return f"a tuple ({', '.join(map(_needed, parts))})"
    kind = origin or annotation
    return _WORDS.get(kind) or (kind.__name__ if isinstance(kind, type) else str(annotation))


def _nearest(value: object, annotation: Any) -> str:
    """Return the word that a misspelled one was meant for, or how NumPy's number becomes Python's, or nothing."""
    if isinstance(value, np.generic) and _allowed(value.item(), annotation):
        return "; it is NumPy's, take .item() of it"
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member) if isinstance(word, str)]
    near = difflib.get_close_matches(value, words, 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
