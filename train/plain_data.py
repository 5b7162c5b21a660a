"""Settings as plain data and back: what YAML and JSON can hold, checked against the dataclasses it is for.

Here: frozen dataclasses <-> mappings, lists, numbers and words; errors that name the field by its dotted path; a stage on the way to
settings, which is not checked yet.
Not here: which settings there are (settings.py). Nothing is ever built from a type that the data names: only from those the fields declare.
"""

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Plain = Any  # None, bool, int, float, str, and lists and string-keyed mappings of these
T = TypeVar("T")

KIND = "kind"  # the key that tells which member of a union of dataclasses a mapping is


def to_plain(value: object) -> Plain:
    """Return dataclasses as mappings (with `kind`, their name, if the field that holds them may hold others), tuples as lists."""
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        plain = {}
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            several = len(_dataclasses_among(hints[field.name])) > 1 and dataclasses.is_dataclass(held)
            plain[field.name] = ({KIND: type(held).__name__} if several else {}) | to_plain(held) if several else to_plain(held)
        return plain
    if isinstance(value, Mapping):
        return {str(key): to_plain(held) for key, held in value.items()}
    return [to_plain(held) for held in value] if isinstance(value, tuple | list) else value


def from_plain(base: T, plain: Plain, where: str = "") -> T:
    """Return dataclass `base` with the fields that `plain` gives replaced, all the way down; `where` is its dotted path.

    Raises: ValueError in one line that names the field, for unknown names, wrong types and values out of range.
    """
    if not isinstance(plain, Mapping):
        raise ValueError(f"{where or 'settings'}={plain!r}: needs named fields")
    hints = get_type_hints(type(base))
    names = [field.name for field in dataclasses.fields(base)]  # type: ignore[arg-type]
    given = {name: value for name, value in plain.items() if name != KIND}
    for name in given:
        if name not in names:
            raise ValueError(f"{_path(where, str(name))}: no such setting{_nearest(str(name), names, where)}")
    restored = {name: _restored(hints[name], value, getattr(base, name), _path(where, name)) for name, value in given.items()}
    return _replaced(base, restored, where)


def unchecked(value: Any) -> Any:
    """Return a dataclass of dataclasses as an equal one that checks nothing: a stage on the way, whose values need not fit one another yet.

    It is a subclass with the same fields; `to_plain`, then `from_plain` on the checked class, checks the result once.
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    kind = unchecked_type(type(value))
    return kind(**{field.name: unchecked(getattr(value, field.name)) for field in dataclasses.fields(value)})


@functools.cache
def unchecked_type(kind: type) -> type:
    """Return the subclass of a dataclass that checks nothing, and whose dataclass fields hold such as well."""
    hints = get_type_hints(kind, include_extras=True)
    nested = [
        (field.name, _unchecked_hint(hints[field.name]), _unchecked_default(field))
        for field in dataclasses.fields(kind)
        if _dataclasses_among(hints[field.name])
    ]
    namespace = {"__post_init__": lambda self: None, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return dataclasses.make_dataclass(kind.__name__, nested, bases=(kind,), namespace=namespace, frozen=True, kw_only=True)


def _unchecked_hint(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(map(_unchecked_hint, get_args(hint)))]  # noqa: UP007  its members are known at run time only
    return unchecked_type(hint) if _dataclasses_among(hint) else hint


def _unchecked_default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory
        return dataclasses.field(default_factory=lambda: unchecked(made()))
    return dataclasses.field(default=unchecked(field.default))


def differences(ours: Plain, theirs: Plain, where: str = "") -> Iterator[tuple[str, Plain, Plain]]:
    """Yield (dotted path, ours, theirs) for every leaf of two pieces of plain data that is not the same."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in dict.fromkeys([*ours, *theirs]):
            yield from differences(ours.get(name), theirs.get(name), _path(where, name))
    elif ours != theirs:
        yield where, ours, theirs


def _restored(hint: Any, plain: Plain, base: object, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _restored_union(arguments, plain, base, where)
    if origin is Literal:
        return _checked(plain in arguments, plain, where, "needs one of " + ", ".join(map(str, arguments)))
    if origin is tuple:
        return _restored_tuple(arguments, plain, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(base if isinstance(base, hint) else _of_defaults(hint, plain, where), plain, where)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        _checked(isinstance(plain, Mapping), plain, where, "needs named fields")
        return {str(key): _restored(arguments[1], value, None, _path(where, str(key))) for key, value in plain.items()}
    if hint is float:
        return _restored_float(plain, where)
    if hint is int:
        return _checked(isinstance(plain, int) and not isinstance(plain, bool), plain, where, "needs a whole number")
    if hint in (bool, str):
        return _checked(isinstance(plain, hint), plain, where, "needs true or false" if hint is bool else "needs a word")
    raise TypeError(f"{where}: settings of type {hint} have no plain form")


def _restored_union(members: tuple[Any, ...], plain: Plain, base: object, where: str) -> Any:
    if plain is None:
        return _checked(type(None) in members, plain, where, "needs a value")
    others = [member for member in members if member is not type(None)]
    kinds = {member.__name__: member for member in others if isinstance(member, type) and dataclasses.is_dataclass(member)}
    if kinds and isinstance(plain, Mapping):
        named = plain.get(KIND, type(base).__name__ if type(base).__name__ in kinds else next(iter(kinds)) if len(kinds) == 1 else None)
        _checked(named in kinds, named, _path(where, KIND), "needs one of " + ", ".join(kinds))
        return _restored(kinds[named], plain, base, where)
    problems = []
    for member in others:
        try:
            return _restored(member, plain, base, where)
        except ValueError as problem:
            problems.append(str(problem))
    raise ValueError(problems[0])


def _restored_tuple(arguments: tuple[Any, ...], plain: Plain, where: str) -> tuple[Any, ...]:
    _checked(isinstance(plain, list | tuple), plain, where, "needs a list")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(plain)
    _checked(len(plain) == len(arguments), plain, where, f"needs {len(arguments)} values")
    return tuple(_restored(hint, value, None, f"{where}[{i}]") for i, (hint, value) in enumerate(zip(arguments, plain, strict=True)))


def _restored_float(plain: Plain, where: str) -> float:
    if isinstance(plain, str):  # YAML 1.1 reads 1e-3, without a dot, as a word
        try:
            return float(plain)
        except ValueError:
            pass
    return float(_checked(isinstance(plain, int | float) and not isinstance(plain, bool), plain, where, "needs a number"))


def _of_defaults(kind: type, plain: Plain, where: str) -> Any:
    """Return an instance to start from; what has no default must be in `plain`."""
    hints, required = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            held = isinstance(plain, Mapping) and field.name in plain
            _checked(held, None, _path(where, field.name), "has no default, give a value")
            required[field.name] = _restored(hints[field.name], plain[field.name], None, _path(where, field.name))
    return kind(**required)


def _replaced(base: T, restored: dict[str, Any], where: str) -> T:
    try:
        return dataclasses.replace(base, **restored)  # type: ignore[type-var]
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}" if where else str(problem)) from None


def _checked(sound: bool, plain: Plain, where: str, need: str) -> Any:
    if not sound:
        raise ValueError(f"{where}={plain!r}: {need}")
    return plain


def _nearest(name: str, names: list[str], where: str) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {_path(where, near[0])}?" if near else "; there are " + ", ".join(names)


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _dataclasses_among(hint: Any) -> list[type]:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)]
