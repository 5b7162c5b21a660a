"""Patterns of shards, as users write them: braces, wildcards, several, `::`.

Here: a pattern -> the paths that it names, in its order.
Not here: what the shards hold (index.py).
"""

import glob
import math
import os
import re
import shlex
from collections import Counter

from braceexpand import braceexpand

_MAX_SHARDS = 100_000


_REMOTE_SCHEMES = {"pipe", "file", "http", "https", "sftp", "ftps", "scp", "gs", "s3", "hf", "ais", "htgs"}


def expand_pattern(pattern: str | os.PathLike[str]) -> list[str]:
    """Return the shards that a pattern names, in its order.

    A pattern is a path, a folder (its *.tar, sorted), a glob (sorted), or a brace expression such as `train-{000000..001281}.tar`;
    `::` joins several.
    Raises: ValueError for a URL, an empty pattern or a shard named twice; FileNotFoundError if a named file is missing or none matches.
    """
    paths = [path for part in os.fspath(pattern).split("::") for path in _expand_part(part)]
    twice = [path for path, times in Counter(map(os.path.abspath, paths)).items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice by the pattern; name every shard once")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        others = f" (nor {len(missing) - 1} others of the {len(paths)} named)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}: no such file{others}; fetch it, or name a shard, a folder of shards or a pattern")
    return paths


def _expand_part(part: str) -> list[str]:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?", part)
    if scheme and (scheme[2] or scheme[1].lower() in _REMOTE_SCHEMES):
        raise ValueError(f"{part!r} is a {scheme[1]}: URL, and only local files are read; fetch the shards and name their paths")
    part = os.path.expanduser(part)
    if not part.strip():
        raise ValueError("the pattern is empty; name a shard, a folder of shards, a glob, or 'train-{000000..000009}.tar'")
    if os.path.isfile(part):
        return [part]
    if os.path.isdir(part):
        return _shards_of_folder(part)
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", part)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > _MAX_SHARDS:
        raise ValueError(f"{part!r} names more than {_MAX_SHARDS} shards; narrow its braces")
    try:
        names = list(braceexpand(part))
    except ValueError as error:
        raise ValueError(f"{part!r} has unbalanced braces; write 'train-{{000000..000009}}.tar'") from error
    return [path for name in names for path in (_matches(name) if glob.has_magic(name) and not os.path.isfile(name) else [name])]


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
    found = sorted(path for path in glob.glob(pattern) if os.path.isfile(path))
    if not found:
        raise FileNotFoundError(f"{pattern}: no file matches; check the path, or name a shard")
    return found
