"""Where the tables of shards are kept, and how those of many shards are found, built and audited.

Here: index files in a folder beside local shards or in a cache folder, parallel building that resumes, the audit by decoding.
Not here: what a table holds (table.py), the joined index (index.py).
An index file is safetensors with a checksum: hostile or rotten bytes in it cost another scan, never more. It is written aside and renamed,
so any number of processes may build the same one at once.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.files import read_regular, write_aside
from wherefrom.pipeline.shards.labels import LabelRule
from wherefrom.pipeline.shards.storage import StoredFile, read_at, storage_of
from wherefrom.pipeline.shards.table import TABLE_LAYOUT, BrokenShardError, ShardTable, scan_shard, stamp_of
from wherefrom.pipeline.system import available_cores, user_cache_folder

__all__ = ["DECODED_PIXELS", "ShardProgress", "StoredTable", "file_beside", "gather_tables", "load_table", "printable"]

DECODED_PIXELS = 64_000_000  # the audit leaves larger pictures alone

_FOLDER = ".wherefrom"
_SUFFIX = ".index"
_MAX_FILE_BYTES = 2**32

log = logging.getLogger(__name__)

ShardProgress = Callable[[int, int], None]  # (shards done, shards in all)


class StoredTable(NamedTuple):
    """One shard's table, its index file (None: it could not be stored), and whether that was there before."""

    table: ShardTable
    file: Path | None
    reused: bool


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
    with ThreadPoolExecutor(workers or min(16, available_cores())) as pool:
        futures = [pool.submit(_find_or_scan, path, index_files, rebuild) for path in paths]
        try:
            for done, _ in enumerate(as_completed(futures), 1):
                if progress is not None:
                    progress(done, len(paths))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    stored = _results(futures)
    return _audit_all(paths, stored, index_files, workers, progress) if decode else stored


def file_beside(shard: str | os.PathLike[str], labels: str | None = None) -> Path | None:
    """Return where the index file of a shard, by a rule of labels, lies by preference; None for a shard on no disk of this machine."""
    path = os.fspath(shard).rstrip("/")
    folder = storage_of(path).local_folder(path)
    return None if folder is None else folder / _FOLDER / (os.path.basename(path) + _suffix(labels))


def _suffix(labels: str | None) -> str:
    """Return what an index file's name ends with: other rules, other files."""
    return _SUFFIX if labels is None else f".{labels}{_SUFFIX}"


def load_table(file: Path, stamp: tuple[int, ...]) -> ShardTable | None:
    """Return the table that the file keeps, or None if it is missing, damaged, or of another state of the shard."""
    try:
        if os.path.getsize(file) > _MAX_FILE_BYTES:
            return None
        arrays = load(read_regular(file, _MAX_FILE_BYTES))
        is_whole = arrays.pop("checksum").tobytes() == _checksum(arrays)
        table = ShardTable(**arrays)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):  # KeyError, TypeError: dtypes or names that are not ours
        return None
    return table if is_whole and tuple(table.stamp.tolist()) == stamp else None


def printable(text: str) -> str:
    """Return text from a file with everything that could end a line or steer a terminal escaped."""
    return repr(text)[1:-1]


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
        yield folder / "indexes" / f"{os.path.basename(shard)[:100]}.{whole_path}{_suffix(self.labels)}"

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
    if not rebuild:
        stamp = stamp_of(shard)
        loaded = ((load_table(file, stamp), file) for file in index_files.candidates(shard))
        stored = [StoredTable(table, file, True) for table, file in loaded if table is not None]
        if stored:  # audited ones first: where nothing can be written beside the shard, its audit lies in the cache
            return max(stored, key=lambda item: bool(item.table.audited[0]))
    table = scan_shard(shard, LabelRule.of(index_files.labels))
    return StoredTable(table, index_files.store(shard, table), False)


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
    with write_aside(file, concurrent=True) as aside:
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
    with ThreadPoolExecutor(workers or min(16, available_cores())) as pool:
        for done, (path, item) in enumerate(zip(paths, stored, strict=True), 1):
            if item.table.audited[0]:
                audited.append(item)
            else:
                table = _audit(path, item.table, pool)
                audited.append(StoredTable(table, index_files.store(path, table), item.reused))
            if progress is not None:
                progress(done, len(paths))
    return audited


def _audit(shard: str, table: ShardTable, pool: ThreadPoolExecutor) -> ShardTable:
    pixels = np.prod(table.source_size, axis=1, dtype=np.int64)
    rows = np.flatnonzero(table.valid() & (pixels <= DECODED_PIXELS)).tolist()
    file = storage_of(shard).open(shard)
    try:
        faults = list(pool.map(lambda row: _decode_fault(table, row, file), rows))
    finally:
        file.close()
    return table.with_audit({row: fault for row, fault in zip(rows, faults, strict=True) if fault})


def _decode_fault(table: ShardTable, row: int, file: StoredFile) -> str:
    """Decode one picture as the renderers do; return what is wrong, empty if nothing."""
    data = np.frombuffer(read_at(file, int(table.offset[row]), int(table.length[row])), np.uint8)
    try:
        picture = decode_picture(data, int(table.orientation[row]))
    except DECODE_ERRORS as error:
        return f"does not decode: {printable(str(error))}"
    size = tuple(table.source_size[row].tolist())
    return "" if picture.shape[:2] == size else f"decodes to {picture.shape[:2]}, its header says {size}"
