"""Where the tables of shards are kept, and how those of many shards are found, built and audited.

Here: index files in a folder beside local shards or in a cache folder, parallel building that resumes, the audit by decoding.
Not here: what a table holds and the scan of a tar (table.py), the scan of a folder tree (tree.py), the joined index (index.py).
An index file is safetensors with a checksum: hostile or rotten bytes in it cost another scan, never more. It is written aside and renamed,
so any number of processes may build the same one at once.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.files import read_regular, write_aside
from wherefrom.pipeline.shards.labels import LabelRule
from wherefrom.pipeline.shards.storage import StoredFile, read_at, storage_of
from wherefrom.pipeline.shards.table import FORMAT_VERSION, TABLE_LAYOUT, BrokenShardError, ShardTable, printable, scan_shard, stamp_of
from wherefrom.pipeline.shards.tree import TreeRows, TreeScan, check_classes, is_current, read_loose, without_labels
from wherefrom.pipeline.system import available_cores, user_cache_folder

__all__ = [
    "DECODED_PIXELS",
    "IndexState",
    "ShardProgress",
    "StoredTable",
    "file_beside",
    "gather_tables",
    "load_table",
    "printable",
    "stored_tables",
]

DECODED_PIXELS = 64_000_000  # the audit leaves larger pictures alone

_FOLDER = ".wherefrom"
_SUFFIX = ".index"
_MAX_FILE_BYTES = 2**32
_ROWS_A_PART = 16  # that one thread decodes in one go

log = logging.getLogger(__name__)

ShardProgress = Callable[[int, int], None]  # (done, in all): shards, but of a folder tree its pictures, where they are read


class StoredTable(NamedTuple):
    """One shard's table, its index file (None: it could not be stored), whether that was there before, what else a tree had before."""

    table: ShardTable
    file: Path | None
    reused: bool
    changes: str = ""


class IndexState(NamedTuple):
    """What is stored of a shard as it is now, if anything; whether there is an index file that does not serve: older, or damaged."""

    stored: StoredTable | None
    stale: bool = False


def gather_tables(
    paths: Sequence[str],
    *,
    cache: Path | None,
    beside: bool,
    rebuild: bool,
    decode: bool,
    workers: int | None,
    progress: ShardProgress | None,
    labels: str | None = None,
) -> list[StoredTable]:
    """Find or build the table of every shard, in threads; finished ones are stored at once, so that a second run goes on from there.

    Raises: BrokenShardError for the first broken shard, in their order, when all others are done; OSError if one cannot be read.
    """
    index_files = _IndexFiles(cache=cache, beside=beside, labels=labels)
    tars = [path for path in paths if not _is_tree(path)]
    with ThreadPoolExecutor(workers or min(16, available_cores())) as pool:
        try:
            of_tars = [pool.submit(_find_or_scan, path, index_files, rebuild) for path in tars]
            trees = {path: _Tree(path, index_files, rebuild, pool) for path in paths if _is_tree(path)}
            weights: dict[Future[Any], int] = dict.fromkeys(of_tars, 1)
            for tree in trees.values():
                weights |= tree.reading
            total = sum(weights.values())
            for done in accumulate(weights[future] for future in as_completed(weights)):
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    found = {path: tree.stored() for path, tree in trees.items()}
    found |= zip(tars, _results(of_tars), strict=True)
    stored = [found[path] for path in paths]
    if decode:
        stored = _audit_all(paths, stored, index_files, workers, progress)
    return [item._replace(table=without_labels(item.table)) if labels == "none" and item.table.is_tree else item for item in stored]


def stored_tables(paths: Sequence[str], *, labels: str | None = None) -> Iterator[IndexState]:
    """Look what is stored of every shard, by a rule of labels, one by one; nothing is built or written.

    Raises: ValueError if there is no such rule; OSError if a shard is not there, or cannot be looked at.
    """
    LabelRule.of(labels)
    index_files = _IndexFiles(cache=None, beside=True, labels=labels)
    for path in paths:
        if _is_tree(path):
            current, stored = _of_tree(path, index_files)
            stored = stored if current else None
        else:
            stored = _find(path, index_files)
        yield IndexState(stored, stale=stored is None and any(map(os.path.exists, index_files.candidates(path))))


def file_beside(shard: str | os.PathLike[str], labels: str | None = None) -> Path | None:
    """Return where the index file of a shard, by a rule of labels, lies by preference; None for a shard on no disk of this machine."""
    path = os.fspath(shard).rstrip("/")
    folder = storage_of(path).local_folder(path)
    name = os.path.basename(path)
    return None if folder is None or not name else folder / _FOLDER / (name + _suffix(path, labels))


def _suffix(shard: str, labels: str | None) -> str:
    """Return what an index file's name ends with: other rules, other files, but of a folder tree, whose folders are named in any case."""
    return _SUFFIX if labels is None or _is_tree(shard) else f".{labels}{_SUFFIX}"


def _is_tree(shard: str) -> bool:
    return storage_of(shard).kind(shard) == "folder"


def load_table(file: Path, stamp: tuple[int, ...] | None) -> ShardTable | None:
    """Return the table that the file keeps, or None if it is missing, damaged, or of another state of the shard; without stamp, of any."""
    try:
        if os.path.getsize(file) > _MAX_FILE_BYTES:
            return None
        arrays = load(read_regular(file, _MAX_FILE_BYTES))
        is_whole = arrays.pop("checksum").tobytes() == _checksum(arrays)
        table = ShardTable(**arrays)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # KeyError, TypeError: dtypes or names that are not ours
        return None
    is_ours = table.stamp[0] == FORMAT_VERSION if stamp is None else tuple(table.stamp.tolist()) == stamp
    return table if is_whole and is_ours else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _IndexFiles:
    """Where index files may lie, in order of preference: in a folder beside the shard, then in a cache folder."""

    cache: Path | None  # None: the user's
    beside: bool
    labels: str | None = None  # the rule that labels are read by

    def candidates(self, shard: str) -> Iterator[Path]:
        if self.beside and (beside := file_beside(shard, self.labels)) is not None:
            yield beside
        try:
            folder = self.cache or user_cache_folder()
        except OSError as error:
            log.debug("%s", error)
            return
        whole_path = hashlib.blake2b(os.fsencode(storage_of(shard).canonical(shard)), digest_size=8).hexdigest()
        yield folder / "indexes" / f"{os.path.basename(shard)[:100]}.{whole_path}{_suffix(shard, self.labels)}"

    def store(self, shard: str, table: ShardTable) -> Path | None:
        """Store in the first place that can be written and return it."""
        for file in self.candidates(shard):
            try:
                _store_table(table, file)
            except OSError as error:
                log.debug("%s: %s", file, error)
            else:
                return file
        return None


def _find_or_scan(shard: str, index_files: _IndexFiles, rebuild: bool) -> StoredTable:
    stored = None if rebuild else _find(shard, index_files)
    if stored is not None:
        return stored
    table = scan_shard(shard, LabelRule.of(index_files.labels))
    return StoredTable(table, index_files.store(shard, table), False)


def _find(shard: str, index_files: _IndexFiles) -> StoredTable | None:
    """Return what is stored of a tar as it is now. Raises: OSError if the shard is not there."""
    stamp = stamp_of(shard)
    loaded = ((load_table(file, stamp), file) for file in index_files.candidates(shard))
    stored = [StoredTable(table, file, True) for table, file in loaded if table is not None]
    # audited ones first: where nothing can be written beside the shard, its audit lies in the cache
    return max(stored, key=lambda item: bool(item.table.audited[0]), default=None)


def _of_tree(root: str, index_files: _IndexFiles) -> tuple[bool, StoredTable | None]:
    """Return whether what is stored of a tree is of the tree as it is now, and the best that is stored."""
    loaded = [(load_table(file, None), file) for file in index_files.candidates(root)]
    stored = [
        (is_current(root, table), bool(table.audited[0]), StoredTable(table, file, True))
        for table, file in loaded
        if table is not None and table.is_tree
    ]
    current, _, best = max(stored, key=lambda item: item[:2], default=(False, False, None))
    return current, best


class _Tree:
    """The table of a folder tree, found or in the making: its pictures are what threads share, for a tree alone may be all the data."""

    def __init__(self, root: str, index_files: _IndexFiles, rebuild: bool, pool: ThreadPoolExecutor) -> None:
        self._root, self._index_files = root, index_files
        self._scan: TreeScan | None = None
        self.reading: dict[Future[TreeRows], int] = {}  # the parts that are being read, and how many pictures each has
        labeled = index_files.labels != "none"
        current, self._old = (False, None) if rebuild else _of_tree(root, index_files)
        if self._old is not None and current:
            if labeled:
                check_classes(root, self._old.table)
        else:
            self._scan = TreeScan(root, None if self._old is None else self._old.table, labeled=labeled)
            self.reading = {pool.submit(self._scan.read, part): part.pictures for part in self._scan.parts}

    def stored(self) -> StoredTable:
        """Return the table, stored, when all parts are read. Raises: OSError if one could not be read."""
        if self._scan is None:
            assert self._old is not None
            return self._old
        table = self._scan.table([part.result() for part in self.reading])
        if self._old is not None and table.equals(self._old.table):
            return self._old
        # nothing is left beside a folder that was named by mistake
        file = self._index_files.store(self._root, table) if len(table) else None
        return StoredTable(table, file, False, self._scan.changes)


def _store_table(table: ShardTable, file: Path) -> None:
    """Write the table aside and rename it.

    Raises: OSError if the place cannot be written; a folder whose mode forbids writing is left alone even by root.
    """
    existing = next(folder for folder in file.parents if folder.exists())
    if not os.stat(existing).st_mode & 0o222:
        raise PermissionError(f"{existing} is read-only")
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(getattr(table, name)) for name in TABLE_LAYOUT}
    arrays["checksum"] = np.frombuffer(_checksum(arrays), np.uint8)
    with write_aside(file, concurrent=True, follow_symlinks=False) as aside:
        aside.write_bytes(save(arrays))


def _checksum(arrays: Mapping[str, NDArray]) -> bytes:
    """Hash the stored arrays, so that a file that rotted is built again."""
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        hasher.update(arrays[name].tobytes())
    return hasher.digest()


def _results(futures: Sequence[Future[StoredTable]]) -> list[StoredTable]:
    """Return all results, or raise the first error; a broken shard's says how many others are broken too."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    broken = [error for error in errors if isinstance(error, BrokenShardError)]
    if len(broken) > 1:
        raise BrokenShardError(f"{broken[0]} ({len(broken) - 1} more shards are broken too)") from broken[0]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def _audit_all(
    paths: Sequence[str], stored: Sequence[StoredTable], index_files: _IndexFiles, workers: int | None, progress: ShardProgress | None
) -> list[StoredTable]:
    """Decode every picture that counts as valid, once; return the tables with the verdicts, stored again."""
    audited = []
    weights = [len(item.table) if item.table.is_tree and not item.table.audited[0] else 1 for item in stored]
    with ThreadPoolExecutor(workers or min(16, available_cores())) as pool:
        done = 0
        for path, item, weight in zip(paths, stored, weights, strict=True):
            if item.table.audited[0]:
                audited.append(item)
            else:
                shown = None if progress is None or weight == 1 else partial(_show, progress, done, sum(weights))
                table = _audit(path, item.table, pool, shown)
                audited.append(item._replace(table=table, file=index_files.store(path, table)))
            done += weight
            if progress is not None:
                progress(done, sum(weights))
    return audited


def _show(progress: ShardProgress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _audit(shard: str, table: ShardTable, pool: ThreadPoolExecutor, decoded: Callable[[int], None] | None) -> ShardTable:
    """Decode the pictures of one shard; `decoded` is told now and then how many are done."""
    pixels = np.prod(table.source_size, axis=1, dtype=np.int64)
    rows = np.flatnonzero(table.valid() & (pixels <= DECODED_PIXELS))
    parts = [rows[first : first + _ROWS_A_PART] for first in range(0, len(rows), _ROWS_A_PART)]
    faults: dict[int, str] = {}
    file = None if table.is_tree else storage_of(shard).open(shard)
    try:
        for part, of_part in zip(parts, pool.map(partial(_decode_faults, shard, table, file), parts), strict=True):
            faults |= of_part
            if decoded is not None:
                decoded(int(np.searchsorted(rows, part[-1])) + 1)
    finally:
        if file is not None:
            file.close()
    return table.with_audit(faults)


def _decode_faults(shard: str, table: ShardTable, file: StoredFile | None, rows: NDArray[np.int64]) -> dict[int, str]:
    """Decode some pictures as the renderers do; return what is wrong, by row, with those where something is."""
    faults = {}
    for row in rows.tolist():
        data = read_at(file, int(table.offset[row]), int(table.length[row])) if file is not None else read_loose(shard, table, row)
        if fault := _decode_fault(np.frombuffer(data, np.uint8), int(table.orientation[row]), table.source_size[row].tolist()):
            faults[row] = fault
    return faults


def _decode_fault(data: NDArray[np.uint8], orientation: int, size: list[int]) -> str:
    """Decode one picture as the renderers do; return what is wrong, empty if nothing."""
    try:
        picture = decode_picture(data, orientation)
    except DECODE_ERRORS as error:
        return f"does not decode: {printable(str(error))}"
    return "" if list(picture.shape[:2]) == size else f"decodes to {picture.shape[:2]}, its header says {tuple(size)}"
