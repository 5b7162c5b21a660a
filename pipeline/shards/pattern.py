"""Patterns of shards, as users write them: folders, braces, wildcards, several, `::`.

Here: a pattern -> the paths that it names, in its order.
Not here: looking at files (storage.py), what the shards hold (index.py).
"""

import difflib
import glob
import logging
import math
import os
import re
from collections import Counter
from itertools import islice
from pathlib import PurePath

from braceexpand import braceexpand

from wherefrom.pipeline.shards.storage import storage_of
from wherefrom.pipeline.shards.tree_folders import PICTURE_SUFFIXES

_MAX_SHARDS = 100_000

log = logging.getLogger(__name__)
_MAX_NAMES = 10_000  # of a folder, among which a misspelled one is looked for


def expand_pattern(pattern: str | os.PathLike[str]) -> list[str]:
    """Return the shards that a pattern names, in its order: tars, and folder trees of loose files.

    A pattern is a path, a folder (its *.tar, sorted; without any, the tree below it), a glob (sorted), or a brace expression such as
    `train-{000000..001281}.tar`; `::` joins several.
    Raises: ValueError for a URL, an empty pattern, a parquet file, a picture, or a shard named twice, be it as a part of a tree;
            FileNotFoundError if a named file is missing or none matches, or for a broken link, be it in a folder or a match of a glob.
    """
    paths = [path for part in os.fspath(pattern).split("::") for path in _expand_part(part)]
    missing = [path for path in paths if storage_of(path).kind(path) is None]
    if missing:
        others = f" (nor {len(missing) - 1} others of the {len(paths)} named)" if len(missing) > 1 else ""
        if storage_of(missing[0]).local_folder(missing[0]) is not None and os.path.lexists(missing[0]):
            raise FileNotFoundError(f"{missing[0]}: is {no_file(missing[0])}{others}; mend it, take it away, or name the shards without it")
        near = _near(missing[0])
        mend = f"is it {near}?" if near else "fetch it, or name a shard, a folder of shards or of pictures, or a pattern"
        raise FileNotFoundError(f"{missing[0]}: no such file{others}; {mend}")
    parquet = [path for path in paths if path.lower().endswith(".parquet")]
    if parquet:
        raise ValueError(
            f"{parquet[0]}: pictures in parquet have no place that could be read by itself; `wherefrom pack` makes shards of it"
        )
    picture = next((path for path in paths if path.lower().endswith(PICTURE_SUFFIXES) and storage_of(path).kind(path) == "file"), None)
    if picture is not None:
        raise ValueError(f"{picture}: is a picture, not a shard; name the folder that it lies in")
    names = [storage_of(path).canonical(path) for path in paths]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice by the pattern; name every shard once")
    trees = {name for path, name in zip(paths, names, strict=True) if storage_of(path).kind(path) == "folder"}
    for name in names if trees else ():
        outer = next((parent for parent in map(str, PurePath(name).parents) if parent in trees), None)
        if outer is not None:
            raise ValueError(f"{name} lies in {outer}, which the pattern names too; name every picture once")
    return paths


def no_file(path: str) -> str:
    """Return what lies where a path of this machine leads, of something that is there and is neither a file nor a folder."""
    return "neither a file nor a folder" if os.path.exists(path) else f"a broken link, to {os.readlink(path)}"


def _expand_part(part: str) -> list[str]:
    storage = storage_of(part)
    part = os.path.expanduser(part)
    if not part.strip():
        raise ValueError("the pattern is empty; name a shard, a folder of shards, a glob, or 'train-{000000..000009}.tar'")
    kind = storage.kind(part)
    if kind == "file":
        return [part]
    if kind == "folder":
        return _shards_of_folder(part)
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", part)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > _MAX_SHARDS:
        raise ValueError(f"{part!r} names more than {_MAX_SHARDS} shards; narrow its braces")
    try:
        names = list(braceexpand(part))
    except ValueError as error:
        raise ValueError(f"{part!r} has unbalanced braces; write 'train-{{000000..000009}}.tar'") from error
    return [path for name in names for path in (_matches(name) if glob.has_magic(name) and not _is_file(name) else [name])]


def _shards_of_folder(folder: str) -> list[str]:
    """Return the tars in a folder, or the folder itself as a tree, under a name that says which it is."""
    storage = storage_of(folder)
    tars = storage.glob(os.path.join(glob.escape(folder), "*.tar"))
    if any(_is_file(tar) for tar in tars):
        local = storage.local_folder(tars[0])
        folders = (
            [entry.name for entry in os.scandir(local) if not entry.name.startswith(".") and entry.is_dir()] if local is not None else []
        )
        if folders:
            log.warning(
                "%s: its tars are read (%d), its folders are not (%d, such as %r); name these too where they are meant",
                folder,
                len(tars),
                len(folders),
                min(folders),
            )
        return tars
    if storage.local_folder(folder) is None:
        raise FileNotFoundError(f"{folder}: no file matches *.tar, and loose pictures are read from local disks alone; pack them into tars")
    tree = folder.rstrip("/")
    return [tree if os.path.basename(tree) not in ("", os.curdir, os.pardir) else storage.canonical(folder)]


def _near(path: str) -> str:
    """Return the path that exists and differs least in its first missing part, empty if none is close."""
    whole = PurePath(path)
    for missing in (whole, *whole.parents):
        if storage_of(path).local_folder(path) is not None and os.path.isdir(missing.parent):
            with os.scandir(missing.parent) as entries:
                names = [entry.name for entry in islice(entries, _MAX_NAMES)]
            close = difflib.get_close_matches(missing.name, names, 1)
            return str(missing.parent / close[0] / whole.relative_to(missing)) if close else ""
    return ""


def _matches(pattern: str) -> list[str]:
    paths = storage_of(pattern).glob(pattern)
    if not paths:
        raise FileNotFoundError(f"{pattern}: no file matches; check the path, or name a shard")
    return paths


def _is_file(path: str) -> bool:
    return storage_of(path).kind(path) == "file"
