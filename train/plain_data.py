"""Settings as plain data and back: what YAML and JSON can hold, checked against the dataclasses it is for.

Here: frozen dataclasses <-> mappings, lists, numbers and words; fields that hold one of a table, told by its name; errors that name the
field by its dotted path; a stage on the way to settings, which is not checked yet.
Not here: which settings there are (settings.py). Nothing is ever built from a type that the data names: only from those the fields declare,
and from the tables' entries.
"""

import dataclasses
import difflib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.pipeline.view_recipe import LAWS, CropLaw
from wherefrom.train.objective import OBJECTIVES, ObjectiveSettings

Plain = Any  # None, bool, int, float, str, and lists and string-keyed mappings of these
T = TypeVar("T")

# what a field is annotated as -> the table that it holds one of
TABLES: dict[Any, EntryTable] = {CropLaw: LAWS, ObjectiveSettings: OBJECTIVES}
NAME = "name"  # the key that tells which


def to_plain(value: object) -> Plain:
    """Return dataclasses as mappings (with `name`, where the field holds one of a table), tuples as lists."""
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(checked_type(value))
        return {field.name: _named(getattr(value, field.name), hints[field.name]) for field in dataclasses.fields(checked_type(value))}
    if isinstance(value, Mapping):
        return {str(key): to_plain(held) for key, held in value.items()}
    return [to_plain(held) for held in value] if isinstance(value, tuple | list) else value


def _named(held: object, hint: Any) -> Plain:
    return {NAME: TABLES[hint].name_of(checked_type(held))} | to_plain(held) if hint in TABLES else to_plain(held)


def from_plain(base: T, plain: Plain, where: str = "") -> T:
    """Return dataclass `base` with the fields that `plain` gives replaced, all the way down; `where` is its dotted path.

    A field that holds one of a table becomes another one where it is named, with that one's own defaults; a name alone will do.
    Raises: ValueError in one line that names the field, for unknown names, wrong types and values out of range.
    """
    return _changed(base, plain, where)


def _changed(base: T, plain: Plain, where: str, of: str = "") -> T:
    if not isinstance(plain, Mapping):
        raise ValueError(f"{where or 'settings'}={plain!r}: needs named fields")
    kind = checked_type(base)
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in plain:
        if name not in names:
            raise ValueError(f"{_path(where, str(name))}: no such setting{of}{_nearest(str(name), names, where)}")
    stage = kind is not type(base)
    restored = {name: _restored(hints[name], value, getattr(base, name), _path(where, name), stage) for name, value in plain.items()}
    return _replaced(base, restored, where)


def unchecked(value: Any, kind: type | None = None, *, naming: Callable[[EntryTable], Any] | None = None) -> Any:
    """Return a dataclass of dataclasses as an equal one that checks nothing: a stage on the way, whose values need not fit one another yet.

    It is a subclass with the same fields, whose annotations say what these hold; `to_plain`, then `from_plain` on the checked class, checks
    the result once. `kind`: a dataclass with more fields, which keep their defaults, to be a stage of. `naming`: returns the annotation
    of one more field, `name`, of what a table holds.
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    own = checked_type(value)
    hints, held = get_type_hints(own), {}
    for field in dataclasses.fields(own):
        part = getattr(value, field.name)
        table = TABLES.get(hints[field.name])
        if isinstance(part, Mapping):
            held[field.name] = {name: unchecked(each, naming=naming) for name, each in part.items()}
        else:
            held[field.name] = unchecked(part, naming=naming) if table is None else _named_stage(part, naming, table)
    return _stage(kind or own, {name: (type(part),) for name, part in held.items() if dataclasses.is_dataclass(part)})(**held)


def with_fields(stage: Any, parts: Mapping[str, Any]) -> Any:
    """Return a stage that has parts, stages themselves, as more fields."""
    held = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    return _stage(type(stage), {name: (type(part), dataclasses.field(default=part)) for name, part in parts.items()})(**held)


def unchecked_default(kind: type, *, missing: Any) -> Any:
    """Return a stage of a dataclass with all its defaults, and `missing` where there is none."""
    return _stage(kind, {})(**{field.name: missing for field in dataclasses.fields(kind) if _is_required(field)})


def checked_type(value: Any) -> type:
    """Return the class of a dataclass; of a stage, that of what it is a stage of."""
    return getattr(type(value), "_checked", type(value))


def entry_class(table: EntryTable, name: str, where: str) -> type:
    """Return the dataclass that a table has under a name.

    Raises: ValueError in one line that begins with `where`, if there is none, or another package declares what is none.
    """
    try:
        kind = table[name]
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from None
    parameters = getattr(kind, "__dataclass_params__", None)
    if not isinstance(kind, type) or parameters is None or not parameters.frozen or inspect.isabstract(kind):
        raise ValueError(
            f"{where}: {table.kind} {name!r} of {table.owner(name)} is {kind!r:.60}, expected a frozen dataclass that lacks no method; "
            "mend or uninstall it"
        )
    return kind


def named_fields(value: Any, where: str = "") -> Iterator[tuple[str, EntryTable]]:
    """Yield the dotted path of every field that holds one of a table, and the table, all the way down; mappings add nothing to a path."""
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(checked_type(value))
        for field in dataclasses.fields(checked_type(value)):
            path = _path(where, field.name)
            held = getattr(value, field.name)
            if hints[field.name] in TABLES:
                yield path, TABLES[hints[field.name]]
            for inner, part in held.items() if isinstance(held, Mapping) else [(path, held)]:
                yield from named_fields(part, inner)


def _named_stage(value: Any, naming: Callable[[EntryTable], Any] | None, table: EntryTable) -> Any:
    stage = unchecked(value, naming=naming)
    if naming is None:
        return stage
    name = table.name_of(checked_type(value))
    held = {field.name: getattr(stage, field.name) for field in dataclasses.fields(checked_type(value))}
    return _stage(type(stage), {NAME: (naming(table), dataclasses.field(default=name))})(**held)


def _stage(kind: type, more: Mapping[str, tuple[Any, ...]]) -> type:
    """Return the subclass of a dataclass that checks nothing, with more fields or other annotations, as `make_dataclass` takes them."""
    own = getattr(kind, "_checked", kind)
    namespace = {"__post_init__": lambda self: None, "__doc__": own.__doc__, "__module__": own.__module__, "_checked": own}
    fields = [(name, *declared) for name, declared in more.items()]
    return dataclasses.make_dataclass(own.__name__, fields, bases=(kind,), namespace=namespace, frozen=True, kw_only=True)


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def differences(ours: Plain, theirs: Plain, where: str = "") -> Iterator[tuple[str, Plain, Plain]]:
    """Yield (dotted path, ours, theirs) for every leaf of two pieces of plain data that is not the same."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in dict.fromkeys([*ours, *theirs]):
            yield from differences(ours.get(name), theirs.get(name), _path(where, name))
    elif ours != theirs:
        yield where, ours, theirs


def _restored(hint: Any, plain: Plain, base: object, where: str, stage: bool = False) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in TABLES:
        return _restored_entry(TABLES[hint], plain, base, where, stage)
    if origin in (Union, types.UnionType):
        return _restored_union(arguments, plain, base, where, stage)
    if origin is Literal:
        return _checked(plain in arguments, plain, where, "needs one of " + ", ".join(map(str, arguments)))
    if origin is tuple:
        return _restored_tuple(arguments, plain, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(base if isinstance(base, hint) else _of_defaults(hint, plain, where, stage), plain, where)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        _checked(isinstance(plain, Mapping), plain, where, "needs named fields")
        if arguments[1] in TABLES:
            return _restored_entries(TABLES[arguments[1]], plain, base, stage)
        return {str(key): _restored(arguments[1], value, None, _path(where, str(key))) for key, value in plain.items()}
    if hint is float:
        return _restored_float(plain, where)
    if hint is int:
        return _checked(isinstance(plain, int) and not isinstance(plain, bool), plain, where, "needs a whole number")
    if hint in (bool, str):
        return _checked(isinstance(plain, hint), plain, where, "needs true or false" if hint is bool else "needs a word")
    raise ValueError(f"{where}: settings of type {hint} have no plain form; make it numbers, words, tuples or dataclasses of these")


def _restored_entry(table: EntryTable, plain: Plain, base: object, where: str, stage: bool) -> Any:
    """Return one of a table: that of `base`, changed, or the named one."""
    given = {NAME: plain} if isinstance(plain, str) else plain
    _checked(isinstance(given, Mapping), plain, where, f"needs a {table.kind}, e.g. {{{NAME}: {next(iter(table))}}}")
    kind, fields = checked_type(base), {name: value for name, value in given.items() if name != NAME}
    if NAME in given:
        _checked(isinstance(given[NAME], str), given[NAME], _path(where, NAME), "needs a word")
        kind = entry_class(table, given[NAME], where)
    start = base if kind is checked_type(base) else _of_defaults(kind, fields, where, stage)
    return _changed(start, fields, where, of=f" of the {table.name_of(kind)} {table.kind}")


def _restored_entries(table: EntryTable, plain: Mapping[Any, Plain], base: object, stage: bool) -> dict[str, Any]:
    """Return those of a table that `plain` names, in its order; each is that of `base`, if there is one, changed.

    In messages they go by their names alone, as on the command line.
    """
    held = base if isinstance(base, Mapping) else {}
    restored = {}
    for name, fields in plain.items():
        _checked(isinstance(fields, Mapping), fields, str(name), "needs named fields, {} for none")
        restored[str(name)] = _restored_entry(table, {**fields, NAME: name}, held.get(name), str(name), stage)
    return restored


def _restored_union(members: tuple[Any, ...], plain: Plain, base: object, where: str, stage: bool) -> Any:
    if plain is None:
        return _checked(type(None) in members, plain, where, "needs a value")
    others = [member for member in members if member is not type(None)]
    problems = []
    for member in others:
        try:
            return _restored(member, plain, base, where, stage)
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


def _of_defaults(kind: type, plain: Plain, where: str, stage: bool) -> Any:
    """Return an instance to start from, a stage if it is for one; what has no default must be in `plain`."""
    hints, required = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if _is_required(field):
            held = isinstance(plain, Mapping) and field.name in plain
            _checked(held, None, _path(where, field.name), "has no default, give a value")
            required[field.name] = _restored(hints[field.name], plain[field.name], None, _path(where, field.name))
    return unchecked(_stage(kind, {})(**required)) if stage else kind(**required)


def _replaced(base: T, restored: dict[str, Any], where: str) -> T:
    try:
        return dataclasses.replace(base, **restored)  # type: ignore[type-var]
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}" if where else str(problem)) from None


def _checked(holds: bool, plain: Plain, where: str, need: str) -> Any:
    if not holds:
        raise ValueError(f"{where}={plain!r}: {need}")
    return plain


def _nearest(name: str, names: list[str], where: str) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {_path(where, near[0])}?" if near else "; there are " + ", ".join(names)


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
