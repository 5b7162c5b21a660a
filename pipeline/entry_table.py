"""Tables that other packages may add to: names, and where what they name is defined.

Here: our own entries beside those that installed packages declare as entry points; nothing is imported before it is asked for.
Not here: the tables themselves (laws, renderers, objectives, recipes), each beside what it names.
"""

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

__all__ = ["EntryTable"]

IMPORT_FAILURES = (  # what mistakes in a module, or in a dataclass of it, raise when it is imported
    ImportError,
    AttributeError,
    NameError,
    SyntaxError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    OSError,
    RuntimeError,
    AssertionError,
)


@dataclass(frozen=True, kw_only=True)
class EntryTable(Mapping[str, Any]):
    """Names -> what they stand for, imported when it is looked up. Ours come first, in their order, then those of other packages by name.

    A package adds an entry by its metadata: in pyproject.toml, under [project.entry-points."GROUP"], NAME = "module:attribute".
    """

    kind: str  # what the entries are, in the singular, for messages: "renderer"
    group: str  # of the entry points, e.g. "wherefrom.renderers"
    own: Mapping[str, str]  # name -> "module:attribute"

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *sorted(set(self._foreign()) - set(self.own))])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    def __getitem__(self, name: str) -> Any:
        """Return what a name stands for.

        Raises: ValueError in one line if there is no such entry, two packages declare it, or it cannot be imported.
        """
        foreign = self._foreign().get(name, [])
        if len(foreign) + (name in self.own) > 1:
            owners = [*(["wherefrom"] if name in self.own else []), *(_package(point) for point in foreign)]
            raise ValueError(f"{self.kind} {name!r} is declared by {' and '.join(owners)}; uninstall all but one")
        if name not in self.own and not foreign:
            near = [own for own in self if name and name in own.split("_")] or difflib.get_close_matches(name, list(self), 1)
            told = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(self)}"
            raise ValueError(f"no {self.kind} {name!r}; {told}")
        if name in self.own:
            module, _, attribute = self.own[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        try:
            return foreign[0].load()
        except IMPORT_FAILURES as problem:
            raise ValueError(
                f"{self.kind} {name!r} of {_package(foreign[0])} cannot be imported: {_reason(problem)}; mend or uninstall it"
            ) from problem

    def get(self, name: str, default: Any = None) -> Any:
        """Return what a name stands for, or `default` if there is no such entry.

        Raises: ValueError as a look-up does, if there is one that cannot be had.
        """
        if name not in self:
            return default
        return self[name]

    def name_of(self, kind: type) -> str:
        """Return the name that stands for a class; if none does, where it is defined, as "module:class". Nothing is imported for it."""
        own = (name for name, value in self.own.items() if _imported(value) is kind)
        declared = self._foreign().items()
        foreign = (name for name, points in declared if len(points) == 1 and name not in self.own and _imported(points[0].value) is kind)
        home = f"{kind.__module__}:{kind.__qualname__}"
        return next(own, None) or next(foreign, home)

    def owner(self, name: str) -> str:
        """Return the package that declares an entry, with its version, for messages and settings; ours is "wherefrom"."""
        foreign = self._foreign().get(name)
        return "wherefrom" if name in self.own or not foreign else _package(foreign[0])

    def _foreign(self) -> Mapping[str, Sequence[EntryPoint]]:
        """Return what other packages declare, by name."""
        return _declared(self.group, tuple((folder, _changed_ns(folder)) for folder in sys.path))


@functools.lru_cache(maxsize=64)
def _declared(group: str, path: tuple[tuple[str, int], ...]) -> Mapping[str, Sequence[EntryPoint]]:
    """Return the entry points of a group, by name, for a state of `sys.path`.

    Kept, for every look-up reads a file of each installed package, which takes milliseconds here and more on a network's disk.
    """
    declared: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        if all(point.value != other.value for other in declared.get(point.name, [])):  # one package may be on the path twice
            declared.setdefault(point.name, []).append(point)
    return declared


def _changed_ns(folder: str) -> int:
    """Return when something was last installed into a folder of the path; 0 where that is not known."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def _imported(value: str) -> Any:
    """Return what "module:attribute" is, if its module is imported already."""
    module, _, attribute = value.partition(":")
    return getattr(sys.modules.get(module), attribute, None)


def _reason(problem: Exception) -> str:
    """Say why an import failed; who expects it to can do without the kind of failure."""
    return str(problem) if isinstance(problem, ImportError | AttributeError) else f"{type(problem).__name__}: {problem}"


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
