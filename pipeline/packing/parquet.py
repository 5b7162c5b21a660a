"""Rows of parquet files as pictures, in the layout of the Hugging Face Hub: a column of encoded pictures, a column of classes.

Here: which files a pattern names, which columns hold what, reading rows in order by pages, so that memory stays bounded.
Not here: what becomes of a row (sources.py); fetching files. pyarrow is an extra, imported where a file is opened.
A file is hostile until shown otherwise: whatever pyarrow finds wrong with it, or it says that is not so, is one `BrokenParquetError`.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from wherefrom.pipeline.files import open_regular
from wherefrom.pipeline.shards.pattern import no_file
from wherefrom.pipeline.shards.storage import LocalStorage
from wherefrom.pipeline.shards.store import printable

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

__all__ = ["BrokenParquetError", "ParquetRow", "ParquetRows", "names_parquet"]

_SUFFIX = ".parquet"
_HUB_FILE = re.compile(r"(?P<split>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.parquet")
_MAX_FOOTER_BYTES = 2**28
_BUFFER_BYTES = 2**20  # without one pyarrow reads whole column chunks
_BATCH_BYTES, _MAX_BATCH = 2**24, 64
_MAX_CLASSES = 2**20
_MAX_LABEL = 2**62


class BrokenParquetError(ValueError):
    """A file is not the parquet file that it says it is. One line: the file, what is wrong, the mend."""


class ParquetRow(NamedTuple):
    """One row: its number over all files, the picture's bytes (None: there are none), the picture's own name, its label, its file."""

    number: int
    data: bytes | None
    name: str
    label: int  # -1: none
    file: str


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    group_rows: tuple[int, ...]  # rows of each row group
    first: int  # the number of its first row
    stamp: tuple[int, int]  # bytes, mtime_ns
    footer: bytes  # hashed

    @property
    def end(self) -> int:
        return self.first + sum(self.group_rows)


def names_parquet(source: str) -> bool:
    """Return whether a pattern names parquet files: by their suffix, or a folder of them, which has no tars and no folders but `data`."""
    return any(part.endswith(_SUFFIX) or _is_folder_of_parquet(part) for part in map(os.path.expanduser, source.split("::")))


def _is_folder_of_parquet(folder: str) -> bool:
    if not os.path.isdir(folder) or not _folder_files(folder):
        return False
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return not any(entry.name.endswith(".tar") or (entry.is_dir() and entry.name != "data") for entry in shown)


class ParquetRows:
    """All rows of a set of parquet files as one numbered list: files in the given order, rows as they lie.

    `classes`: names by number, () where labels are numbers of the data's own; `fingerprint` hashes the files' names, sizes and footers.
    """

    def __init__(
        self,
        pattern: str,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        labeled: bool = True,
        classes: Sequence[str] = (),
    ) -> None:
        """Open the files that a pattern names: a file, a folder (its *.parquet, or those of its folder `data`), a glob; `::` joins several.

        A column is found by itself where one alone can be meant. `labeled=False` leaves labels alone. `classes` are names that have
        their numbers already; others are numbered after them.
        Raises: FileNotFoundError; BrokenParquetError; ValueError if pyarrow is missing, a column cannot be told, or the files differ.
        """
        paths = _expand(pattern)
        self.files: list[_File] = []
        schemas = []
        for path in paths:
            first = self.files[-1].end if self.files else 0
            stamp, footer = _stamp(path), _footer_digest(path)
            with _opened(path) as file:
                self.files.append(_File(path, _group_rows(path, file, stamp[0]), first, stamp, footer))
                schemas.append(file.schema_arrow)
        self.image_column = _image_column(paths[0], schemas[0], image_column)
        self.label_column = _label_column(paths[0], schemas[0], label_column) if labeled else None
        self._columns = [name for name in (self.image_column, self.label_column) if name is not None]
        for path, schema in zip(paths, schemas, strict=True):
            if [_type(path, schema, name) for name in self._columns] != [_type(path, schemas[0], name) for name in self._columns]:
                raise ValueError(f"{path}: its columns {', '.join(self._columns)} are not as in {paths[0]}; pack them one by one")
        self._names = self._class_names(schemas[0])  # by the number that the files give them
        ordered = [*classes, *(name for name in self._names if name not in set(classes))] if self._names else []
        self._number_of = {name: number for number, name in enumerate(ordered)}
        self.classes = tuple(ordered)

    def __len__(self) -> int:
        return self.files[-1].end

    @property
    def fingerprint(self) -> str:
        """Hash what the files are: their names, their sizes, and their footers, which say where every page lies."""
        hasher = hashlib.blake2b(digest_size=16)
        for file in self.files:
            hasher.update(os.fsencode(os.path.basename(file.path)) + b"\0" + file.stamp[0].to_bytes(8, "little") + file.footer)
        return hasher.hexdigest()

    def rows(self, start: int = 0) -> Iterator[ParquetRow]:
        """Yield the rows from number `start` on, a few at a time in memory.

        Raises: BrokenParquetError, also if a file was changed since it was opened; ValueError for a label that has no name.
        """
        for file in self.files:
            if file.end <= start:
                continue
            with _opened(file.path) as opened:
                first = file.first
                for group, rows in enumerate(file.group_rows):
                    if first + rows > start:
                        yield from self._rows_of_group(file, opened, group, first, start)
                    first += rows

    def _rows_of_group(
        self, file: _File, opened: "pyarrow.parquet.ParquetFile", group: int, first: int, start: int
    ) -> Iterator[ParquetRow]:
        """Yield the rows of a row group, whose first row has the number `first`, from number `start` on."""
        if _stamp(file.path) != file.stamp:
            raise BrokenParquetError(f"{file.path}: was changed since it was opened; let its writer finish, then start again")
        rows, at = file.group_rows[group], first
        batch_size = min(max(_BATCH_BYTES * rows // max(opened.metadata.row_group(group).total_byte_size, 1), 1), _MAX_BATCH)
        for batch in _batches(file.path, opened, batch_size, [group], self._columns):
            for row in range(max(start - at, 0), len(batch)):
                yield self._row(file.path, batch, row, at + row)
            at += len(batch)
        if at != first + rows:
            raise BrokenParquetError(f"{file.path}: row group {group} has {at - first} rows, its footer names {rows}; fetch it again")

    def _row(self, path: str, batch: "pyarrow.RecordBatch", row: int, number: int) -> ParquetRow:
        data, name = _picture(batch.column(self.image_column), row)
        label = -1 if self.label_column is None else self._label(path, batch.column(self.label_column)[row], number)
        return ParquetRow(number, data, name, label, path)

    def _label(self, path: str, value: "pyarrow.Scalar", number: int) -> int:
        if not value.is_valid:
            return -1
        label = _text(path, value) if _is_text(value.type) else int(value.as_py())
        if isinstance(label, str):
            return self._number_of[label]
        if label >= (len(self._names) if self._names else _MAX_LABEL):
            which = f"names {len(self._names)} classes" if self._names else "is to hold numbers of classes"
            raise ValueError(f"{path}: row {number} has label {label}, and {self.label_column} {which}; take another --label-column")
        return -1 if label < 0 else self._number_of[self._names[label]] if self._names else label

    def _class_names(self, schema: "pyarrow.Schema") -> list[str]:
        """Return the names of the classes: as the Hub's metadata has them, or all texts of the column, sorted; [] if there are none."""
        if self.label_column is None or not _is_text(schema.field(self.label_column).type):
            return _hub_names(schema).get(self.label_column or "", [])
        names: set[str] = set()
        for file in self.files:
            with _opened(file.path) as opened:
                groups = list(range(len(file.group_rows)))
                for batch in _batches(file.path, opened, 2**14, groups, [self.label_column]):
                    names.update(_text(file.path, value) for value in batch.column(0).unique() if value.is_valid)
                    if len(names) > _MAX_CLASSES:
                        more = f"has more than {_MAX_CLASSES} values, so it names no classes"
                        raise ValueError(f"{file.path}: {self.label_column} {more}; take another --label-column, or --labels none")
        return sorted(names)


def _expand(pattern: str) -> list[str]:
    """Return the files that a pattern names.

    Raises: FileNotFoundError, also for a broken link; ValueError for a folder that holds several splits, or not all files of one.
    """
    paths = []
    for part in map(os.path.expanduser, pattern.split("::")):
        if os.path.isdir(part):
            paths += _one_split(part, _folder_files(part))
        elif os.path.isfile(part):
            paths.append(part)
        else:
            matches = LocalStorage().glob(part)
            if not matches:
                raise FileNotFoundError(f"{part}: no such file; fetch it, or name a parquet file, a folder of them or a pattern")
            paths += matches
    unread = next((path for path in paths if not os.path.isfile(path)), None)  # the Hub's cache holds links
    if unread is not None:
        raise FileNotFoundError(f"{unread}: is {no_file(unread)}; mend it, take it away, or name the files without it")
    twice = next((path for path in paths if paths.count(path) > 1), None) if len(set(paths)) < len(paths) else None
    if twice is not None:
        raise ValueError(f"{twice} is named twice by the pattern; name every file once")
    return paths


def _folder_files(folder: str) -> list[str]:
    for inside in (folder, os.path.join(folder, "data")):
        if paths := LocalStorage().glob(os.path.join(glob.escape(inside), "*" + _SUFFIX)):
            return paths
    return []


def _one_split(folder: str, paths: Sequence[str]) -> list[str]:
    """Return the files of a folder, if those that are named as on the Hub are of one split, and all of it."""
    if not paths:
        raise FileNotFoundError(f"{folder}: no file matches *{_SUFFIX}; check the path, or name a file")
    named = [match for path in paths if (match := _HUB_FILE.fullmatch(os.path.basename(path)))]
    splits = sorted({match["split"] for match in named})
    if len(splits) > 1:
        example = os.path.join(os.path.dirname(paths[0]), f"{splits[-1]}-*{_SUFFIX}")
        raise ValueError(f"{folder}: holds the splits {', '.join(splits)}; name one of them, quoted for the shell: '{example}'")
    present = {int(match["number"]) for match in named}
    missing = sorted(set(range(int(named[0]["count"]))) - present) if named else []
    if missing:
        first = f"{splits[0]}-{missing[0]:05d}-of-{named[0]['count']}{_SUFFIX}"
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {named[0]['count'].lstrip('0')} files are missing, first {first}; fetch them, "
            f"or name those that are there by a pattern: '{os.path.join(os.path.dirname(paths[0]), '*' + _SUFFIX)}'"
        )
    return list(paths)


@functools.cache
def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError("parquet is read by pyarrow, which is not here; pip install 'wherefrom[parquet]'") from error
    return pyarrow


@contextlib.contextmanager
def _checked(path: str) -> Iterator[None]:
    """Turn what pyarrow raises inside into one line that names the file."""
    try:
        yield
    except BrokenParquetError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file any more; put it back, or start again") from error
    except (_pyarrow().ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = printable(" ".join(str(error).split())[:200])
        raise BrokenParquetError(f"{path}: is no whole parquet file ({reason}); fetch it again") from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator["pyarrow.parquet.ParquetFile"]:
    parquet = _pyarrow().parquet
    with contextlib.ExitStack() as stack:
        with _checked(path):
            raw = stack.enter_context(open(open_regular(path), "rb"))
            file = stack.enter_context(
                parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
            )
        yield file


def _batches(
    path: str, opened: "pyarrow.parquet.ParquetFile", batch_size: int, groups: list[int], columns: list[str]
) -> Iterator["pyarrow.RecordBatch"]:
    with _checked(path):
        batches = opened.iter_batches(batch_size, row_groups=groups, columns=columns, use_threads=False)
    while True:
        with _checked(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _stamp(path: str) -> tuple[int, int]:
    with _checked(path):
        status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _footer_digest(path: str) -> bytes:
    with _checked(path), open(open_regular(path), "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > min(size - 8, _MAX_FOOTER_BYTES):
            raise BrokenParquetError(f"{path}: is no whole parquet file (it does not end as one); fetch it again")
        file.seek(size - 8 - length)
        return hashlib.blake2b(file.read(length), digest_size=16).digest()


def _group_rows(path: str, file: "pyarrow.parquet.ParquetFile", size: int) -> tuple[int, ...]:
    """Return the rows of every row group. Raises: BrokenParquetError if the footer's numbers cannot be: a picture has a byte at least."""
    with _checked(path):
        metadata = file.metadata
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows or metadata.num_rows > size:
        raise BrokenParquetError(f"{path}: names {metadata.num_rows} rows in {size} bytes, {sum(groups)} in its row groups; fetch it again")
    return groups


def _image_column(path: str, schema: "pyarrow.Schema", given: str | None) -> str:
    """Return the column of pictures. Raises: ValueError if it is not there, or several can be meant."""
    able = [field.name for field in schema if _holds_pictures(field.type)]
    if given is not None:
        _type(path, schema, given)
        if given not in able:
            raise ValueError(f"{path}: column {printable(given)!r} is {schema.field(given).type}, not encoded pictures; {_those(able)}")
        return given
    marked = [name for name, feature in _hub_features(schema).items() if feature.get("_type") == "Image" and name in able]
    candidates = marked or able
    if not candidates:
        raise ValueError(f"{path}: no column holds pictures (bytes, or a struct with bytes); its columns are {_names(schema.names)}")
    if len(candidates) > 1:
        raise ValueError(f"{path}: several columns may hold the pictures, {_names(candidates)}; name one by --image-column")
    return candidates[0]


def _label_column(path: str, schema: "pyarrow.Schema", given: str | None) -> str | None:
    """Return the column of labels: the Hub's one ClassLabel, or `label`; None if there is neither. Raises: ValueError, as above."""
    able = [field.name for field in schema if _is_text(field.type) or _is_whole(field.type)]
    if given is not None:
        _type(path, schema, given)
        if given not in able:
            raise ValueError(f"{path}: column {printable(given)!r} is {schema.field(given).type}, not numbers or names; {_those(able)}")
        return given
    candidates = [name for name in _hub_names(schema) if name in able] or [name for name in able if name == "label"]
    if len(candidates) > 1:
        raise ValueError(f"{path}: several columns may be the label, {_names(candidates)}; name one by --label-column, or --labels none")
    return candidates[0] if candidates else None


def _type(path: str, schema: "pyarrow.Schema", name: str) -> "pyarrow.DataType":
    if schema.names.count(name) != 1:
        count = "no" if name not in schema.names else str(schema.names.count(name))
        raise ValueError(f"{path}: has {count} column {printable(name)!r}; its columns are {_names(schema.names)}")
    return schema.field(name).type


def _names(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")


def _those(able: Sequence[str]) -> str:
    return f"{_names(able)} could be" if able else "no other could be"


def _is_bytes(kind: "pyarrow.DataType") -> bool:
    types = _pyarrow().types
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_pictures(kind: "pyarrow.DataType") -> bool:
    if not _pyarrow().types.is_struct(kind):
        return _is_bytes(kind)
    return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)


def _is_text(kind: "pyarrow.DataType") -> bool:
    types = _pyarrow().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _is_whole(kind: "pyarrow.DataType") -> bool:
    types = _pyarrow().types
    return types.is_integer(kind) or types.is_boolean(kind)


def _text(path: str, value: "pyarrow.Scalar") -> str:
    with _checked(path):
        return str(value.as_py())


def _picture(column: "pyarrow.Array", row: int) -> tuple[bytes | None, str]:
    """Return a picture's bytes, None where there are none, and its own name, "" where it has none."""
    value = column[row]
    if not value.is_valid or not _pyarrow().types.is_struct(column.type):
        return value.as_py(), ""
    fields = {field.name for field in column.type}
    name = value["path"].as_buffer() if "path" in fields and _is_text(column.type.field("path").type) else None
    return value["bytes"].as_py(), bytes(name).decode("utf-8", "replace") if name is not None else ""


def _hub_features(schema: "pyarrow.Schema") -> dict[str, dict[str, Any]]:
    """Return what `datasets` wrote of every column into the schema's metadata, {} where it wrote nothing."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b""))["info"]["features"]
        return {str(name): feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _hub_names(schema: "pyarrow.Schema") -> dict[str, list[str]]:
    """Return the names of classes of every column that the Hub calls a ClassLabel."""
    labels = {name: feature.get("names") for name, feature in _hub_features(schema).items() if feature.get("_type") == "ClassLabel"}
    return {
        name: names
        for name, names in labels.items()
        if isinstance(names, list) and all(isinstance(each, str) for each in names) and len(set(names)) == len(names)
    }
