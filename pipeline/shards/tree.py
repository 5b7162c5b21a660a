"""A folder tree of loose files as one shard: its pictures in the order of torchvision's ImageFolder, labeled by their folders.

Here: reading and judging loose files, the table that comes of it, what changed since an older one, what labels have to say for themselves.
Not here: the walk (tree_folders.py), what a table holds (table.py), where it is kept and who waits for the disk (store.py).
Convention: classes are the names of the first-level folders, sorted as Python strings; files in the root itself come first, unlabeled.
"""

import errno
import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.files import open_regular
from wherefrom.pipeline.shards.picture_headers import MAX_ENCODED_BYTES, PictureHeader, examine_picture
from wherefrom.pipeline.shards.storage import Stamp, read_at, storage_of
from wherefrom.pipeline.shards.table import FORMAT_VERSION, ShardTable, pack_texts, pack_verdicts, printable
from wherefrom.pipeline.shards.tree_folders import UNSETTLED, Folder, folders_are_as_they_were, joined, list_folders

__all__ = ["TreePart", "TreeRows", "TreeScan", "check_classes", "is_current", "label_notes", "read_loose", "without_labels"]

_FILES_A_PART = 256
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")
_OF_ONE_FILE = {  # no sign of an ill disk; ENXIO: a socket
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO)
}
# of one picture; old_row: where the older table has its name, -1: nowhere; kept: it is as it was, and the older table says the rest
_ROW = np.dtype(
    [
        ("length", "i8"),
        ("version", "i8"),
        ("source_size", "i4", 2),
        ("orientation", "u1"),
        ("format", "u1"),
        ("old_row", "i8"),
        ("kept", "?"),
    ]
)


class TreePart(NamedTuple):
    """Some pictures of one folder, to be read in one go."""

    folder: str  # relative to the root
    names: bytes  # in order, a NUL between two
    pictures: int
    old_rows: range  # of the folder in the older table


class TreeRows(NamedTuple):
    """What was found of some pictures: a `_ROW` each, and by place among them, why some are invalid."""

    rows: NDArray[np.void]
    reasons: Mapping[int, str]


class TreeScan:
    """One scan of a tree: listed when it is made, then read part by part, from any number of threads, then put together as a table.

    `old`: an older table of the tree. Pictures that have the size and mtime that it says keep their verdicts and are not read again; in
    folders that have the mtime that it says they are not even looked at.
    Raises: OSError if the tree cannot be listed; ValueError if it is too large or, where it is to be labeled, its folders are no classes.
    """

    def __init__(self, root: str, old: ShardTable | None = None, *, labeled: bool = True) -> None:
        self.changes = ""  # what is not as the older table says, when there is a new one
        self._root, self._old = root, old
        self._listing = list_folders(root)
        self._folders = self._listing.folders
        self._counts = np.array([folder.count for folder in self._folders], np.int64)
        self._classes, self._labels = _labels_of_folders(self._folders)
        if labeled:
            _refuse_splits(root, self._classes, _by_class(np.repeat(self._labels, self._counts), len(self._classes)))
        self._plan: list[TreePart | range] = []  # in turn: what is to be read, or rows of the older table
        older = {} if old is None else _older_folders(old)
        for folder in self._folders:
            version, rows = older.get(folder.path, (UNSETTLED, range(0)))
            if version == folder.version != UNSETTLED and len(rows) == folder.count:
                self._plan.append(rows)
            else:
                names = folder.pictures()
                parts = (names[first : first + _FILES_A_PART] for first in range(0, len(names), _FILES_A_PART))
                self._plan += (TreePart(folder.path, b"\0".join(part), len(part), rows) for part in parts)

    @property
    def parts(self) -> list[TreePart]:
        """What is to be read."""
        return [planned for planned in self._plan if isinstance(planned, TreePart)]

    def read(self, part: TreePart) -> TreeRows:
        """Read the pictures of a part and judge them, those alone that the older table does not know as they are.

        Raises: OSError if the disk fails.
        """
        place = os.fsencode(os.path.join(joined(self._root, part.folder), ""))
        rows = np.zeros(part.pictures, _ROW)
        reasons: dict[int, str] = {}
        names = part.names.split(b"\0")
        old_rows = {} if self._old is None else _rows_by_name(self._old, part.folder, part.old_rows, names)
        for number, name in enumerate(names):
            path, old_row = place + name, old_rows.get(name, -1)
            if old_row >= 0 and self._is_as_it_was(path, old_row):
                rows[number] = (0, 0, (0, 0), 0, 0, old_row, True)
                continue
            length, version, header = _examine_file(path)
            rows[number] = (length, version, (header.height, header.width), header.orientation, header.format, old_row, False)
            if header.reason:
                reasons[number] = header.reason
        return TreeRows(rows, reasons)

    def _is_as_it_was(self, path: bytes, old_row: int) -> bool:
        assert self._old is not None
        try:
            status = os.stat(path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self._old.length[old_row], self._old.version[old_row])

    def table(self, results: Sequence[TreeRows]) -> ShardTable:
        """Put the table together; `results` belong to `parts`, one each."""
        rows, reasons = self._joined(results)
        audited, undecodable = False, np.zeros(0, np.int64)
        if self._old is not None:
            undecodable = _take_over(rows, reasons, self._old)
            audited = bool(self._old.audited[0] and rows["kept"].all())
        of_row = np.repeat(np.arange(len(self._folders)), self._counts)
        folders = self._packed_folders(np.unique(of_row[rows["version"] == UNSETTLED]))
        table = ShardTable(
            stamp=np.array([FORMAT_VERSION, rows["length"].sum(), _digest(*folders.values())], np.int64),
            audited=np.array([audited]),
            offset=np.zeros(len(rows), np.int64),
            label=self._labels[of_row],
            undecodable=undecodable,
            folder_lengths=self._counts,
            **{name: rows[name].copy() for name in ("length", "version", "source_size", "orientation", "format")},
            **folders,
            **self._packed_names(),
            **pack_verdicts(reasons),
        )
        self.changes = "" if self._old is None else _changes(table, rows, self._old)
        return table

    def _joined(self, results: Sequence[TreeRows]) -> tuple[NDArray[np.void], dict[int, str]]:
        """Return the rows of all pictures in order, and why some are invalid, by row."""
        remaining = iter(results)
        found, reasons, count = [np.zeros(0, _ROW)], dict[int, str](), 0
        for planned in self._plan:
            result = next(remaining) if isinstance(planned, TreePart) else _kept_rows(planned)
            reasons |= {count + number: reason for number, reason in result.reasons.items()}
            found.append(result.rows)
            count += len(result.rows)
        return np.concatenate(found), reasons

    def _packed_folders(self, unsettled: NDArray[np.int64]) -> dict[str, NDArray]:
        """Return folders, their ends and their versions; those that some rows of `unsettled` ask for are looked at again next time."""
        paths, ends = pack_texts(os.fsencode(folder.path) for folder in self._folders)
        versions = np.array([folder.version for folder in self._folders], np.int64)
        versions[unsettled] = UNSETTLED
        return {"folders": paths, "folder_ends": ends, "folder_versions": versions}

    def _packed_names(self) -> dict[str, NDArray]:
        """Return the columns of texts: keys, classes, what is not read, notes."""
        kinds = sorted(self._listing.unread)
        columns: dict[str, NDArray] = {"extension_counts": np.array([self._listing.unread[kind] for kind in kinds], np.int64)}
        columns["keys"], columns["key_ends"] = _keys(self._folders)
        columns["class_names"], columns["class_name_ends"] = pack_texts(map(os.fsencode, self._classes))
        columns["extensions"], columns["extension_ends"] = pack_texts(map(str.encode, kinds))
        columns["notes"], columns["note_ends"] = pack_texts(map(str.encode, self._notes()))
        return columns

    def _notes(self) -> Iterator[str]:
        passed_over = sorted(self._listing.passed_over.items())
        if passed_over:
            kinds = (f"{self._listing.unread[kind]} x {kind} (first {printable(path)})" for kind, path in passed_over)
            yield f"passed over {', '.join(kinds)}"


def is_current(root: str, table: ShardTable) -> bool:
    """Say whether a table is of a tree whose folders are as they were: none of their names changed, and files are checked when read."""
    return table.is_tree and folders_are_as_they_were(root, table.folder_names(), table.folder_versions.tolist())


def read_loose(root: str, table: ShardTable, row: int) -> bytes:
    """Return the bytes of a picture. Raises: OSError if it is not the file that was indexed."""
    path = joined(root, table.key(row))
    stamp = Stamp(int(table.length[row]), int(table.version[row]))
    file = storage_of(path).open(path)
    try:
        if file.stamp() != stamp:
            raise OSError(errno.ESTALE, f"{printable(path)}: is not as it was indexed; index it again")
        return read_at(file, 0, stamp.size)
    finally:
        file.close()


def check_classes(root: str, table: ShardTable) -> None:
    """Refuse a tree whose folders are no classes. Raises: ValueError."""
    _refuse_splits(root, table.classes(), _by_class(table.label, len(table.class_name_ends)))


def without_labels(table: ShardTable) -> ShardTable:
    """Return the table with no sample labeled."""
    none = np.zeros(0, np.uint8), np.zeros(0, np.int64)
    return replace(table, label=np.full(len(table), -1), class_names=none[0], class_name_ends=none[1])


def label_notes(table: ShardTable) -> Iterator[str]:
    """Say what is odd about the labels of a tree."""
    names = table.classes()
    if not names:
        return
    counts = _by_class(table.label, len(names))
    unlabeled = len(table) - int(counts.sum())
    if unlabeled:
        yield (
            f"{unlabeled} pictures lie in the root itself, not in a class folder, and have no label (first {printable(table.key(0))}); "
            "torchvision's ImageFolder leaves them out"
        )
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        first = printable(names[empty[0]])
        yield f"{len(empty)} of {len(names)} class folders hold no pictures (first {first}); they keep their numbers"
    folders = zip(table.folder_names(), table.folder_lengths.tolist(), strict=True)
    if not any(pictures for path, pictures in folders if path and "/" not in path):
        yield "all pictures lie deeper than CLASS/FILE; their labels are the first folders' names, --labels none leaves labels out"


def _refuse_splits(root: str, classes: Sequence[str], counts: NDArray[np.int64]) -> None:
    used = [name for name, count in zip(classes, counts.tolist(), strict=True) if count]
    splits = [name for word in _SPLITS for name in used if name.lower() == word]
    if splits and len(splits) == len(used):
        listed = ", ".join(map(printable, used))
        raise ValueError(
            f"{root}: its folders ({listed}) are parts of a data set, no classes; name one of them, {joined(root, splits[0])}, "
            "or take --labels none for the pictures of all"
        )


def _by_class(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Count the pictures of every class."""
    return np.bincount(labels + 1, minlength=classes + 1)[1:]


def _labels_of_folders(folders: Sequence[Folder]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the names of the classes, and the label of every folder; no class, where no picture lies below the root."""
    classes = sorted(folder.path for folder in folders if folder.path and "/" not in folder.path)
    if not any(folder.count for folder in folders if folder.path):
        classes = []
    number_of = {name: number for number, name in enumerate(classes)}
    return classes, np.array([number_of.get(folder.path.partition("/")[0], -1) for folder in folders], np.int64)


def _examine_file(path: bytes) -> tuple[int, int, PictureHeader]:
    """Return a file's size in bytes, its mtime in ns, UNSETTLED where it cannot be read now, and the verdict on it.

    Raises: OSError if the disk fails.
    """
    try:
        descriptor = open_regular(path)
        try:
            status = os.fstat(descriptor)
            size = status.st_size
            if size > MAX_ENCODED_BYTES:
                header = PictureHeader(format=0, reason=f"is {size} bytes long; the limit is {MAX_ENCODED_BYTES}")
            else:
                header = examine_picture(_read(descriptor, size))
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _OF_ONE_FILE:
            return 0, UNSETTLED, PictureHeader(format=0, reason=f"cannot be read ({reason})")
        name = printable(os.fsdecode(path))
        raise OSError(error.errno, f"{name}: cannot be read ({reason}); see that its disk is healthy") from error
    return size, status.st_mtime_ns, header


def _read(descriptor: int, size: int) -> bytes:
    """Return the first bytes of a file; fewer where it has fewer."""
    data = os.read(descriptor, size)
    while 0 < len(data) < size and (more := os.read(descriptor, size - len(data))):
        data += more
    return data


def _older_folders(old: ShardTable) -> dict[str, tuple[int, range]]:
    """Return the version of every folder of a table, and its rows."""
    ends = np.cumsum(old.folder_lengths).tolist()
    starts = [0, *ends[:-1]]
    versions = old.folder_versions.tolist()
    folders = zip(old.folder_names(), versions, starts, ends, strict=True)
    return {path: (version, range(start, end)) for path, version, start, end in folders}


def _rows_by_name(old: ShardTable, folder: str, rows: range, names: Sequence[bytes]) -> dict[bytes, int]:
    """Return the rows of a table, among those of one folder, by the names of their files, from the first to the last of `names`."""
    first, last = (joined(folder, os.fsdecode(name)) if folder else os.fsdecode(name) for name in (names[0], names[-1]))
    near = rows[bisect_left(rows, first, key=old.key) : bisect_right(rows, last, key=old.key)]
    prefix = len(os.fsencode(folder)) + 1 if folder else 0
    return {os.fsencode(old.key(row))[prefix:]: row for row in near}


def _kept_rows(old_rows: range) -> TreeRows:
    """Return rows that are all kept."""
    rows = np.zeros(len(old_rows), _ROW)
    rows["old_row"], rows["kept"] = old_rows, True
    return TreeRows(rows, {})


def _take_over(rows: NDArray[np.void], reasons: dict[int, str], old: ShardTable) -> NDArray[np.int64]:
    """Fill in what an older table says of the rows that are kept; return which of them only decoding found invalid, rising."""
    kept = np.flatnonzero(rows["kept"])
    source = rows["old_row"][kept]
    for name in ("length", "version", "source_size", "orientation", "format"):
        rows[name][kept] = getattr(old, name)[source]
    row_of = np.full(len(old), -1)
    row_of[source] = kept
    reasons |= {int(row_of[row]): old.reason(row) for row in old.invalid.tolist() if row_of[row] >= 0}
    undecodable = row_of[old.undecodable]
    return np.sort(undecodable[undecodable >= 0])


def _changes(table: ShardTable, rows: NDArray[np.void], old: ShardTable) -> str:
    """Say in one line what a table has that an older one has not, and the other way round; empty if nothing."""
    is_gone = np.ones(len(old), bool)
    is_gone[rows["old_row"][rows["old_row"] >= 0]] = False
    kinds = (
        ("added", table, np.flatnonzero(rows["old_row"] < 0)),
        ("removed", old, np.flatnonzero(is_gone)),
        ("replaced", table, np.flatnonzero((rows["old_row"] >= 0) & ~rows["kept"])),
    )
    words = [f"{len(of_kind)} {kind} (first {printable(of.key(int(of_kind[0])))})" for kind, of, of_kind in kinds if len(of_kind)]
    classes, before = len(table.class_name_ends), len(old.class_name_ends)
    if classes != before:
        words.append(f"{classes} class folders where there were {before}")
    return ", ".join(words)


def _keys(folders: Sequence[Folder]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the paths of all pictures relative to the root, end to end, and their ends."""
    texts, lengths = [], [np.zeros(0, np.int64)]
    for folder in folders:
        if folder.names:
            prefix = os.fsencode(folder.path) + b"/" if folder.path else b""
            texts.append(prefix + folder.names.replace(b"\0", prefix))
            cuts = np.flatnonzero(np.frombuffer(folder.names, np.uint8) == 0)
            lengths.append(np.diff(cuts, prepend=-1, append=len(folder.names)) - 1 + len(prefix))
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum(np.concatenate(lengths))


def _digest(paths: NDArray[np.uint8], path_ends: NDArray[np.int64], versions: NDArray[np.int64]) -> int:
    """Hash folders and their mtimes to 64 bits, signed."""
    hasher = hashlib.blake2b(digest_size=8)
    for array in (paths, path_ends, versions):
        hasher.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return int.from_bytes(hasher.digest(), "little", signed=True)
