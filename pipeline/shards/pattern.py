"""Patterns of shards, as users write them: braces, wildcards, several, `::`.

Here: a pattern -> the paths that it names, in its order.
Not here: looking at files (storage.py), what the shards hold (index.py).
"""

import glob
import math
import os
import re
import shlex
from collections import Counter

from braceexpand import braceexpand

from wherefrom.pipeline.shards.storage import storage_of

_MAX_SHARDS = 100_000


def expand_pattern(pattern: str | os.PathLike[str]) -> list[str]:
    """Return the shards that a pattern names, in its order.

    A pattern is a path, a folder (its *.tar, sorted), a glob (sorted), or a brace expression such as `train-{000000..001281}.tar`;
    `::` joins several.
    Raises: ValueError for a URL, an empty pattern or a shard named twice; FileNotFoundError if a named file is missing or none matches.
    """
    paths = [path for part in os.fspath(pattern).split("::") for path in _expand_part(part)]
    twice = [path for path, times in Counter(storage_of(path).canonical(path) for path in paths).items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice by the pattern; name every shard once")
    missing = [path for path in paths if not _is_file(path)]
    if missing:
        others = f" (nor {len(missing) - 1} others of the {len(paths)} named)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}: no such file{others}; fetch it, or name a shard, a folder of shards or a pattern")
    return paths


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
    try:
        return _matches(os.path.join(glob.escape(folder), "*.tar"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder}: no file matches *.tar, and pictures are read from tar shards alone; pack them: without labels by "
            f"`tar --sort=name -cf pictures.tar -C {shlex.quote(folder)} .`, with labels as KEY.jpg beside KEY.cls (a whole number) by "
            "webdataset.ShardWriter"
        ) from error


def _matches(pattern: str) -> list[str]:
    paths = storage_of(pattern).glob(pattern)
    if not paths:
        raise FileNotFoundError(f"{pattern}: no file matches; check the path, or name a shard")
    return paths


def _is_file(path: str) -> bool:
    return storage_of(path).kind(path) == "file"
