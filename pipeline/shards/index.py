"""The shard index: a set of tar shards and folder trees as one numbered list of samples, with what may not be shown left out.

Here: `ShardIndex` (arrays over all samples, replacement of invalid ones), the quarantine list.
Not here: one shard (table.py), index files (store.py), reading pictures (reader.py), who reads what when (order.py).
Convention: a sample id is the ordinal: shards in the given order, samples in file order or a tree's own, valid or not; sizes are upright
(height, width).
"""

import difflib
import functools
import hashlib
import json
import logging
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.shards.key_search import nearest_rows, rows_of_key
from wherefrom.pipeline.shards.labels import LabelRule, imagenet_classes, is_imagenet_validation
from wherefrom.pipeline.shards.pattern import expand_pattern
from wherefrom.pipeline.shards.storage import Stamp, read_head, storage_of
from wherefrom.pipeline.shards.store import DECODED_PIXELS, ShardProgress, StoredTable, file_beside, gather_tables, load_table, printable
from wherefrom.pipeline.shards.table import BrokenShardError, ShardTable, scan_shard
from wherefrom.pipeline.shards.tree import label_notes
from wherefrom.pipeline.shards.tree_folders import joined

__all__ = ["MAX_PIXELS", "BrokenShardError", "QuarantineEntry", "ShardIndex", "expand_pattern"]

MAX_PIXELS = 64_000_000

_MAX_METADATA_BYTES = 2**26  # of an _info.json
_KEYS_COMPARED = 200  # letter by letter, of those that begin or end as a key does
_MAX_RECENT_TABLES = 8  # shards whose keys are at hand

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineEntry:
    """One invalid sample and why it is left out."""

    id: int
    key: str
    shard: str
    reason: str


class ShardIndex:
    """All samples of a set of shards: arrays over their N ids, and the list of those that are replaced.

    `classes` are the names that labels number, none where labels are numbers of the data's own.
    Shapes: shard (N,) int32; offset, length, label (N,) int64 (label -1: none); source_size (N, 2) int32, upright (height, width), (0, 0)
    where it is not known; orientation (N,) uint8, EXIF 1 to 8; format (N,) uint8, place in picture_headers.FORMATS; valid (N,) bool;
    decodable (N,) bool, valid when opened, and decoded whole by an audit (`decode`); shard_lengths (S,) int64, samples of each of the S
    shards.
    The arrays are read-only. Only `mark_invalid` changes an index, and only `valid`: N, order and fingerprint depend on the data alone.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tables: Sequence[ShardTable],
        *,
        files: Sequence[Path | None],
        reused: int = 0,
        max_pixels: int = MAX_PIXELS,
        labels: str | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.paths = tuple(paths)
        self.labels = labels  # the rule that they were read by
        self.files = tuple(files)  # where each shard's index lies; None: nowhere, it could not be stored
        self.reused = reused  # shards whose stored index served
        self.max_pixels = max_pixels
        self.unread_members = sum((table.unread_members() for table in tables), Counter())  # by extension
        self.notes: list[str] = []

        self.shard_lengths = _read_only(np.array([len(table) for table in tables], np.int64))
        self.shard = _read_only(np.repeat(np.arange(len(tables), dtype=np.int32), self.shard_lengths))
        self.offset = _joined([table.offset for table in tables])
        self.length = _joined([table.length for table in tables])
        self.classes_file: Path | None = None  # where the names of classes lie by number; None: there are none, or nothing can be written
        self.classes, label = _numbered(paths, tables, classes)
        self.label = _read_only(label)
        self.source_size = _joined([table.source_size for table in tables])
        self.orientation = _joined([table.orientation for table in tables])
        self.format = _joined([table.format for table in tables])
        self.shard_stamps = _read_only(np.stack([table.stamp for table in tables]))  # (S, 3): format version, bytes, mtime_ns
        self._starts = np.cumsum(self.shard_lengths) - self.shard_lengths
        too_large = np.prod(self.source_size, axis=1, dtype=np.int64) > max_pixels
        self._valid = np.concatenate([table.valid() for table in tables]) & ~too_large
        self.valid = _read_only(self._valid.view())
        decoded = np.repeat([bool(table.audited[0]) for table in tables], self.shard_lengths)
        self.decodable = _read_only(decoded & self._valid & (np.prod(self.source_size, axis=1, dtype=np.int64) <= DECODED_PIXELS))
        self.audited = max_pixels <= DECODED_PIXELS and all(table.audited[0] for table in tables)  # every valid sample was decoded once
        undecodable = np.concatenate([table.undecodable_mask() for table in tables])
        self._digest_with_audit = _digest(~self._valid)
        self._digest_without_audit = _digest(~self._valid & (too_large | ~undecodable))
        self.fingerprint = _fingerprint(paths, tables)

        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}  # of the samples that `mark_invalid` added
        self._valid_ids: NDArray[np.int64] | None = None
        self._trees = {shard: table for shard, table in enumerate(tables) if table.is_tree}  # every read asks for a file's name
        unstored = {shard: table for shard, (table, file) in enumerate(zip(tables, files, strict=True)) if file is None}
        self._kept = unstored | self._trees
        self._recent: OrderedDict[int, ShardTable] = OrderedDict()

    @classmethod
    def open(
        cls,
        pattern: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        cache: str | os.PathLike[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        workers: int | None = None,
        progress: ShardProgress | None = None,
        beside: bool = True,
        rebuild: bool = False,
        decode: bool = False,
        labels: str | None = None,
        classes: Sequence[str] = (),
    ) -> Self:
        """Find the stored index of every shard or build it, and join them.

        `labels` says what labels the samples: None (whole numbers in KEY.cls; names of tars within a tar, and of tars that are WordNet
        ids), the extension of a member that holds a number or a class's name, "json.FIELD", "tar" (each tar's name) or "none".
        `classes` are names that have their numbers already, such as a train set's; others are numbered after them, in Python's order.
        A folder tree of loose files is labeled by the names of its first folders, as torchvision's ImageFolder does, unless by "none".
        A shard's index is kept in the folder `.wherefrom` beside it, or in `cache` (default: the user's cache folder) where that place
        cannot be written or `beside` is False; it is keyed by the shard's size and mtime, a tree's by the mtimes of its folders: those
        that changed are listed again. `progress` is called with (done, in all): shards, and of trees the pictures that are read.
        `decode` really decodes every picture that counts as valid, once, with progress of its own, and keeps the verdicts.
        Raises: FileNotFoundError, ValueError (expand_pattern); BrokenShardError; ValueError if there is no picture, or a bad setting;
                TypeError for what is no path, folder, rule or name.
        """
        check_literal("max_pixels", max_pixels, int)
        check_literal("workers", workers, int | None)
        if cache is not None and not isinstance(cache, str | os.PathLike):
            raise TypeError(f"cache={cache!r:.60}: needs a folder, or None for the user's cache folder")
        if max_pixels < 1 or (workers is not None and workers < 1):
            raise ValueError(f"max_pixels={max_pixels}, workers={workers}: needs at least 1 of each")
        LabelRule.of(labels)
        _check_names(classes)
        numbered_before = classes
        paths = expand_pattern(_one_pattern(pattern))
        stored = gather_tables(
            paths,
            cache=None if cache is None else Path(cache),
            beside=beside,
            rebuild=rebuild,
            decode=decode,
            workers=workers,
            progress=progress,
            labels=labels,
        )
        tables, files = _with_imagenet_classes(paths, [item.table for item in stored], labels), [item.file for item in stored]
        if labels in (None, "cls"):
            tables, numbered = _with_written_classes(paths, tables)
            classes = classes or numbered
        reused = sum(item.reused for item in stored)
        index = cls(paths, tables, files=files, reused=reused, max_pixels=max_pixels, labels=labels, classes=classes)
        if not len(index):
            raise ValueError(_no_pictures(index))
        index.classes_file = _write_classes(index)
        for note in _notes(index, stored, beside, numbered_before):
            index.warn_once(note)
        return index

    def __len__(self) -> int:
        return len(self._valid)

    def __repr__(self) -> str:
        shards = f"{self.paths[0]!r}" + (f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else "")
        classes = f", {len(self.classes)} classes by name" if self.classes else ""
        return f"ShardIndex({len(self)} samples, {self.invalid_count} invalid{classes}, of {shards}, fingerprint {self.fingerprint[:8]})"

    @property
    def invalid_count(self) -> int:
        """How many samples are invalid now."""
        return len(self) - int(np.count_nonzero(self._valid))

    def warn_once(self, note: str) -> None:
        """Log what a user should know about these shards as a warning, and keep it in `notes`; not a second time."""
        if note not in self.notes:
            self.notes.append(note)
            log.warning(note)

    def key(self, sample: int) -> str:
        """Return the WebDataset key of a sample, looked up in its shard's index file; a loose file's path below the root.

        Raises: IndexError; BrokenShardError or OSError if both that file and the shard have changed since.
        """
        self._check_ids(np.asarray([sample], np.int64))
        shard = int(self.shard[sample])
        return self._table(shard).key(int(sample - self._starts[shard]))

    def ids_of(self, key: str) -> list[int]:
        """Return the samples that have a key, in their order: one, several where shards share it, or none. Each shard is looked at once.

        Raises: as `key`.
        """
        wanted = key.encode("utf-8", "surrogateescape")
        return [start + row for shard, start in enumerate(self._starts.tolist()) for row in rows_of_key(self._table(shard), wanted)]

    def nearest_keys(self, key: str, count: int = 3) -> list[str]:
        """Return the keys most like one that no sample has, the nearest first; few or none where nothing is like it.

        Raises: as `key`.
        """
        wanted, found = key.encode("utf-8", "surrogateescape"), list[tuple[int, str]]()
        for shard in range(len(self.paths)):
            table = self._table(shard)
            found += [(score, table.key(row)) for row, score in nearest_rows(table, wanted, _KEYS_COMPARED)]
            found = sorted(found, reverse=True)[:_KEYS_COMPARED]
        half_alike = [each for score, each in found[:count] if score >= len(wanted) > 0]
        return difflib.get_close_matches(key, [each for _, each in found], count) or half_alike

    def location(self, sample: int) -> tuple[str, int, int]:
        """Return where a sample's bytes lie: the file, the offset in it, their length.

        Raises: IndexError.
        """
        self._check_ids(np.asarray([sample], np.int64))
        shard = int(self.shard[sample])
        path = self.paths[shard]
        if shard in self._trees:
            path = joined(path, self._trees[shard].key(int(sample - self._starts[shard])))
        return path, int(self.offset[sample]), int(self.length[sample])

    @property
    def has_trees(self) -> bool:
        """Whether some of the shards are folder trees of loose files."""
        return bool(self._trees)

    def is_tree(self, shard: int) -> bool:
        """Return whether a shard is a folder tree of loose files."""
        return shard in self._trees

    def tree_folders(self, shard: int) -> dict[str, int]:
        """Return the folders of a tree, links followed, and how many samples lie in each itself; ids go through them in turn."""
        table = self._trees[shard]
        root = self.paths[shard]
        return {joined(root, path): count for path, count in zip(table.folder_names(), table.folder_lengths.tolist(), strict=True)}

    def stamp(self, sample: int) -> Stamp:
        """Return what the file must still be that holds a sample: its shard, or a loose file."""
        shard = int(self.shard[sample])
        if shard in self._trees:
            return Stamp(int(self.length[sample]), int(self._trees[shard].version[sample - self._starts[shard]]))
        return Stamp(*self.shard_stamps[shard, 1:].tolist())

    @property
    def block_lengths(self) -> tuple[int, ...]:
        """Samples of every stretch that lies together: a shard, or of a tree one folder. They add up to all."""
        return tuple(
            length
            for shard, of_shard in enumerate(self.shard_lengths.tolist())
            for length in (self._trees[shard].folder_lengths.tolist() if self.is_tree(shard) else [of_shard])
        )

    def name(self, sample: int) -> str:
        """Return `SHARD:KEY`, or a loose file's path, in printable characters; a number where the key can't be looked up."""
        shard = int(self.shard[sample])
        if self.is_tree(shard):
            return joined(self.paths[shard], printable(self.key(sample)))
        try:
            key = printable(self.key(sample))
        except (OSError, ValueError):
            key = f"sample {sample}"
        return f"{self.paths[shard]}:{key}"

    def replacement(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Return for every id the next valid one, cyclically; a valid id is its own.

        Shapes: ids (...) -> (...) int64.
        Raises: IndexError for an id out of range; ValueError if no sample is valid.
        """
        drawn = np.asarray(ids, np.int64)
        self._check_ids(drawn)
        if self._valid[drawn].all():
            return drawn.copy()
        with self._lock:
            if self._valid_ids is None:
                self._valid_ids = np.flatnonzero(self._valid)
            valid_ids = self._valid_ids
        if not len(valid_ids):
            raise ValueError(f"none of the {len(self)} samples is valid; `wherefrom index` lists the reasons")
        return valid_ids[np.searchsorted(valid_ids, drawn) % len(valid_ids)]

    def invalid_digest(self, *, audit: bool) -> str:
        """Hash which samples were invalid when the index was opened, with or without those that only its audit by decoding found.

        It depends on the data, on max_pixels and, if asked, on which shards were audited; never on `mark_invalid`.
        """
        return self._digest_with_audit if audit else self._digest_without_audit

    def mark_invalid(self, sample: int, reason: str) -> bool:
        """Mark a sample as invalid from now on, because a strict decode failed; return whether that is news. Safe from any thread."""
        self._check_ids(np.asarray([sample], np.int64))
        with self._lock:
            news = bool(self._valid[sample])
            if news:
                self._reasons[int(sample)] = reason
                self._valid[sample] = False
                self._valid_ids = None
        return news

    def reason(self, sample: int) -> str:
        """Return why a sample is invalid, empty if it is valid."""
        self._check_ids(np.asarray([sample], np.int64))
        if self._valid[sample]:
            return ""
        if sample in self._reasons:
            return self._reasons[sample]
        shard = int(self.shard[sample])
        height, width = self.source_size[sample].tolist()
        too_large = f"has {height} x {width} pixels; the limit is {self.max_pixels}"
        return self._table(shard).reason(int(sample - self._starts[shard])) or too_large

    def quarantine(self, limit: int | None = None) -> list[QuarantineEntry]:
        """List the invalid samples with their reasons, by id; the first `limit` of them."""
        return [
            QuarantineEntry(id=sample, key=self.key(sample), shard=self.paths[self.shard[sample]], reason=self.reason(sample))
            for sample in np.flatnonzero(~self._valid)[:limit].tolist()
        ]

    def write_quarantine(self, path: Path) -> None:
        """Write the invalid samples to a file, one JSON object a line: id, key, shard, reason. The file is whole or not there.

        Raises: OSError if the place cannot be written.
        """
        with write_aside(path, concurrent=True) as aside, aside.open("w", encoding="ascii") as lines:
            lines.writelines(json.dumps(asdict(entry)) + "\n" for entry in self.quarantine())

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self)):
            outside = int(ids.min() if ids.min() < 0 else ids.max())
            raise IndexError(f"sample {outside} of {len(self)}; samples are numbered 0 to {len(self) - 1}")

    def _table(self, shard: int) -> ShardTable:
        """Return a shard's table: kept, or from its file, or by another scan of a shard that has not changed."""
        if shard in self._kept:
            return self._kept[shard]
        with self._lock:
            if shard in self._recent:
                self._recent.move_to_end(shard)
                return self._recent[shard]
        stamp = tuple(self.shard_stamps[shard].tolist())
        file = self.files[shard]
        table = load_table(file, stamp) if file is not None else None
        if table is None:
            table = scan_shard(self.paths[shard], LabelRule.of(self.labels))
        if tuple(table.stamp.tolist()) != stamp or len(table) != self.shard_lengths[shard]:
            raise BrokenShardError(f"{self.paths[shard]}: changed since it was indexed; open the index again")
        with self._lock:
            self._recent[shard] = table
            while len(self._recent) > _MAX_RECENT_TABLES:
                self._recent.popitem(last=False)
        return table


def _check_names(classes: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless these are names of classes, each with one number."""
    if isinstance(classes, str | bytes) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes={classes!r:.60}: needs a list of names, by number")
    twice = [name for name, times in Counter(classes).items() if times > 1]
    if twice:
        raise ValueError(f"classes name {printable(twice[0])!r} twice; every name has one number")


def _one_pattern(pattern: object) -> str:
    """Join patterns to one.

    Raises: TypeError for what is no path.
    """
    several = isinstance(pattern, Iterable) and not isinstance(pattern, str | bytes | os.PathLike)
    parts: list[Any] = list(pattern) if several else [pattern]  # type: ignore[call-overload]
    for part in parts:
        if not isinstance(part, str | os.PathLike):
            raise TypeError(f"{part!r:.60} names no shards; give a path or a pattern, or several of them in a list")
    return "::".join(os.fspath(part) for part in parts)


def _numbered(paths: Sequence[str], tables: Sequence[ShardTable], classes: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the names of all classes, those of `classes` first, and the label (N,) of every sample.

    Raises: ValueError if some shards name their classes and others number them.
    """
    names = [table.classes() for table in tables]
    if not any(names):
        return (), np.concatenate([table.label for table in tables])
    numbered = [path for path, table, own in zip(paths, tables, names, strict=True) if not own and (table.label >= 0).any()]
    if numbered:
        named = next(path for path, own in zip(paths, names, strict=True) if own)
        raise ValueError(f"{named} names its classes, {numbered[0]} numbers them; label both alike by --labels, or take one of them")
    ordered = (*classes, *sorted(set().union(*names).difference(classes)))
    number_of = {name: number for number, name in enumerate(ordered)}
    labels = [np.append([number_of[name] for name in own], -1)[table.label] for table, own in zip(tables, names, strict=True)]
    return ordered, np.concatenate(labels).astype(np.int64)


def _no_pictures(index: ShardIndex) -> str:
    """Say in one line that there is no picture, what there is, and the way on."""
    first, kinds = index.paths[0], index.unread_members
    unread = ", ".join(f"{count} .{kind}" if kind.isalnum() else f"{count} {kind}" for kind, count in kinds.most_common(3))
    others = f" nor in {len(index.paths) - 1} more shards" if len(index.paths) > 1 else ""
    mend = f"a picture is a {'file NAME' if index.is_tree(0) else 'member KEY'}.jpg, .jpeg, .png or .webp"
    if index.is_tree(0) and kinds["tar"]:
        mend = "name the folder that the tars lie in"
    elif index.is_tree(0) and kinds["parquet"]:
        mend = f"`wherefrom pack {first} OUT` makes shards of parquet"
    return f"{first}: no pictures{others} ({unread or 'nothing else either'}); {mend}"


def _with_imagenet_classes(paths: Sequence[str], tables: Sequence[ShardTable], labels: str | None) -> list[ShardTable]:
    """Return the tables, those of ImageNet's flat validation set with the classes that its lists name."""
    labeled = []
    for path, table in zip(paths, tables, strict=True):
        names = None
        if labels is None and len(table) and not (table.label >= 0).any() and is_imagenet_validation(table.key(0)):
            folder = path if storage_of(path).kind(path) == "folder" else os.path.dirname(path)
            names = imagenet_classes([table.key(row) for row in range(len(table))], folder or os.curdir)
        labeled.append(table if names is None else table.with_classes(names))
    return labeled


def _with_written_classes(paths: Sequence[str], tables: Sequence[ShardTable]) -> tuple[list[ShardTable], tuple[str, ...]]:
    """Return the tables, numbers of classes as the names that an _info.json beside their shards gives them, and the first such list.

    So sets that were packed apart, each with numbers of its own, are compared by names.
    """
    lists: dict[str, tuple[str, ...]] = {}
    named, first = [], tuple[str, ...]()
    for path, table in zip(paths, tables, strict=True):
        folder = path.removesuffix(os.path.basename(path))
        is_numbered = not len(table.class_name_ends) and (table.label >= 0).any()
        if is_numbered and folder not in lists:
            lists[folder] = _info_classes(folder)
        names = lists.get(folder, ()) if is_numbered else ()
        fits = len(names) > int(table.label.max(initial=-1)) if names else False
        first = first or (names if fits else ())
        named.append(table.with_names_of_numbers(names) if fits else table)
    return named, first


def _info_classes(folder: str) -> tuple[str, ...]:
    """Return the names of classes by number that an `_info.json` lists; empty where there is none, or it lists none that are all unlike."""
    try:
        names = json.loads(read_head(folder + "_info.json", _MAX_METADATA_BYTES))["classes"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()
    unlike = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return tuple(names) if unlike else ()


def _write_classes(index: ShardIndex) -> Path | None:
    """Write the number of every class beside the index, as JSON; return the file, or None."""
    beside = next((file for file in index.files if file is not None), None)
    if not index.classes or beside is None:
        return None
    others = f"-and-{len(index.paths) - 1}-more" if len(index.paths) > 1 else ""
    path = beside.with_name(f"{beside.name.removesuffix('.index')}{others}.classes.json")
    text = json.dumps({name: number for number, name in enumerate(index.classes)}, indent=1) + "\n"
    try:
        if not path.is_file() or path.read_text(encoding="ascii") != text:
            with write_aside(path, concurrent=True, follow_symlinks=False) as aside:
                aside.write_text(text, encoding="ascii")
    except (OSError, ValueError) as error:
        log.debug("%s: %s", path, error)
        return None
    return path


def _fingerprint(paths: Sequence[str], tables: Sequence[ShardTable]) -> str:
    """Hash the shards' names and what their members are, in order."""
    hasher = hashlib.blake2b(digest_size=16)
    for path, table in zip(paths, tables, strict=True):
        hasher.update(os.fsencode(os.path.basename(path)) + b"\0" + table.digest())
    return hasher.hexdigest()


def _digest(mask: NDArray[np.bool_]) -> str:
    return hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=8).hexdigest()


def _joined(arrays: Sequence[NDArray]) -> NDArray:
    """Join arrays end to end, read-only; a single one is taken as it is, for a tree of loose files may be all the data there is."""
    return _read_only(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))


def _read_only(array: NDArray) -> NDArray:
    array.setflags(write=False)
    return array


def _notes(index: ShardIndex, stored: Sequence[StoredTable], beside: bool, classes: Sequence[str]) -> Iterator[str]:
    """Say what a user should know once: invalid samples, odd shards, an index that lies elsewhere, other indexes that disagree."""
    if index.invalid_count:
        first = int(np.argmin(index.valid))
        yield (
            f"{index.invalid_count} of {len(index)} samples are invalid and will be replaced, "
            f"first {index.name(first)}: {index.reason(first)}; `wherefrom index` lists them"
        )
    empty = [path for path, length in zip(index.paths, index.shard_lengths, strict=True) if not length]
    if empty:
        yield f"{empty[0]}: no pictures" + (f" nor in {len(empty) - 1} more shards" if len(empty) > 1 else "")
    unstored = [path for path, item in zip(index.paths, stored, strict=True) if item.file is None and len(item.table)]
    if unstored:
        where = f"{unstored[0]}: its index could not be stored and is built each time ({len(unstored)} shards)"
        yield f"{where}; set WHEREFROM_CACHE to a folder that can be written"
    built = [(path, item.file) for path, item in zip(index.paths, stored, strict=True) if item.file and not item.reused]
    elsewhere = [(path, file.parent) for path, file in built if file_beside(path, index.labels) not in (file, None)]
    if beside and elsewhere:
        path, folder = elsewhere[0]
        yield f"nothing can be written beside {path}: its index lies in {folder} ({len(elsewhere)} shards)"
    for path, item in zip(index.paths, stored, strict=True):
        if item.changes:
            yield f"{path}: since it was indexed, {item.changes}"
        for note in item.table.said_notes():
            yield f"{path}: {note}"
        if item.table.is_tree:
            yield from (f"{path}: {note}" for note in label_notes(item.table))
    if not all(item.table.is_tree and item.table.classes() for item in stored):
        yield from _labels_not_read(index)
    yield from _lists_missing(index)
    yield from _odd_classes(index, classes)
    yield from _other_counts_that_differ(index)


def _labels_not_read(index: ShardIndex) -> Iterator[str]:
    """Say why samples have no label although something like one lies beside them."""
    unlabeled = int(np.count_nonzero(index.label < 0))
    words, described = index.unread_members["cls (not a number)"], index.unread_members["json"]
    if index.labels is not None:
        words = described = 0
    rule = LabelRule.of(index.labels)
    extension = rule.extension.decode()
    apart = index.unread_members[f"{extension} (no picture beside it)"]
    if apart:
        yield (
            f"{apart} .{extension} members have no picture of their key beside them, so they label nothing; "
            "in a tar the members of a sample follow one another"
        )
    elif unlabeled == len(index) and rule.kind == "member":
        yield f"no sample has a label by {index.labels!r}; a member .{str(index.labels).partition('.')[0]} beside each picture would say it"
    if words:
        yield f"{words} .cls members hold no whole number, so their samples have no label; --labels cls takes them for names of classes"
    elif unlabeled and described:
        yield f"{unlabeled} of {len(index)} samples have no label, and {described} .json members are not read; --labels json.FIELD does"
    elif 0 < unlabeled < len(index):
        yield f"{unlabeled} of {len(index)} samples have no label, first {index.name(int(np.argmax(index.label < 0)))}; the others have"


def _lists_missing(index: ShardIndex) -> Iterator[str]:
    """Say what would label pictures that have no label at all, where their names or their tars' number tell what they are."""
    if index.labels is not None or (index.label >= 0).any():
        return
    if is_imagenet_validation(index.key(0)):
        mend = "put LOC_val_solution.csv, or the devkit's two lists, beside or above"
        yield f"{index.paths[0]}: ImageNet's validation pictures without labels; {mend}"
    words = [path for path in index.paths if re.search(r"[^0-9]\.tar$", path)]  # shards are numbered, classes are words
    if len(words) == len(index.paths) > 1:
        yield f"no sample of {len(words)} tars has a label; --labels tar takes the tars' names for classes"


def _odd_classes(index: ShardIndex, numbered_before: Sequence[str]) -> Iterator[str]:
    """Say what makes numbers about labels poorer: a single class, classes that another set has not."""
    if len(index.classes) == 1:
        yield f"{index.paths[0]}: all labels are of one class, {printable(index.classes[0])!r}; they tell nothing about an encoder"
    others = index.classes[len(numbered_before) :] if numbered_before else ()
    if others:
        more = f" and {len(others) - 1} more are" if len(others) > 1 else " is"
        yield f"{index.paths[0]}: class {printable(others[0])!r}{more} not among the {len(numbered_before)} that were numbered before"
    yield from _trees_of_other_classes(index)


def _trees_of_other_classes(index: ShardIndex) -> Iterator[str]:
    """Say which classes some of several trees have and others lack; they are numbered together."""
    of_tree = {index.paths[shard]: np.unique(index.label[index.shard == shard]) for shard in index._trees}
    in_all = functools.reduce(np.intersect1d, of_tree.values()) if len(of_tree) > 1 else np.array([])
    for path, labels in of_tree.items() if len(of_tree) > 1 else ():
        alone = [label for label in np.setdiff1d(labels, in_all).tolist() if label >= 0]
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            yield f"{path}: class {printable(index.classes[alone[0]])!r}{more} not in all {len(of_tree)} folders; numbered all together"
            return


def _other_counts_that_differ(index: ShardIndex) -> Iterator[str]:
    """Compare with DALI's .idx and WebDataset's _info.json where they lie beside the shards: a cross-check, never the truth."""
    infos: dict[str, dict[str, int]] = {}
    for shard, (path, samples) in enumerate(zip(index.paths, index.shard_lengths.tolist(), strict=True)):
        if index.is_tree(shard):
            continue
        name = os.path.basename(path)
        folder = path.removesuffix(name)  # with its last slash
        if folder not in infos:
            infos[folder] = _info_counts(folder)
        for source, count in (("its DALI index", _dali_count(path)), ("_info.json", infos[folder].get(name))):
            if count is not None and count != samples:
                yield f"{path}: {samples} samples with a picture, {source} names {count}; the shard itself is believed"


def _dali_count(shard: str) -> int | None:
    """Return the number of samples in the head of a DALI index, `v1.2 COUNT`; None where there is none."""
    try:
        head = re.match(rb"v1\.[0-2] ([0-9]{1,12})\s", read_head(os.path.splitext(shard)[0] + ".idx", 32))
    except OSError:
        return None
    return int(head[1]) if head else None


def _info_counts(folder: str) -> dict[str, int]:
    """Return samples by file name from `_info.json` or `info.json`; empty where there is none that can be read."""
    for name in ("_info.json", "info.json"):
        try:
            splits = json.loads(read_head(folder + name, _MAX_METADATA_BYTES))["splits"].values()
            return {
                str(shard): int(count) for split in splits for shard, count in zip(split["filenames"], split["shard_lengths"], strict=True)
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            log.debug("%s%s: %s", folder, name, error)
    return {}
