"""Any source of pictures -> tar shards that every reader of WebDataset, timm, DALI and this package open at once.

Here: `pack`: which shards there are, which of them this process writes, pictures read and converted in threads.
Not here: what can be packed (sources.py), one shard (shard.py), how a second run goes on (folder.py).
"""

import importlib.metadata
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from wherefrom.pipeline.packing.folder import PackFolder, Plan
from wherefrom.pipeline.packing.parquet import ParquetRows, names_parquet
from wherefrom.pipeline.packing.shard import PackSettings, ShardFacts, member_bytes, stored_picture, write_shard
from wherefrom.pipeline.packing.sources import IndexPictures, IterablePictures, PackSource, ParquetPictures, SourcePicture, Task
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.system import available_cores

__all__ = ["PackProgress", "PackReport", "pack"]

PackProgress = Callable[[str, int, int | None], None]  # (what is done, how many, of how many; None: nobody knows)
_Source = str | ShardIndex | Iterable[tuple[str, bytes, int | None]]

_TAR_END, _TAR_RECORD = 1024, 10_240  # bytes: of the end mark, and what the whole is a multiple of


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """What lies in the folder now. Counts are of the shards that are finished, of which this call wrote `written` samples."""

    folder: Path
    name: str
    shards: int
    missing: int  # shards that other parts have yet to write; 0: the folder is complete
    samples: int
    unlabeled: int
    left_out: int  # samples of the source that are invalid
    bytes: int  # of the tars
    written: int
    seconds: float


def pack(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | ShardIndex | Iterable[tuple[str, bytes, int | None]],
    out: str | os.PathLike[str],
    *,
    settings: PackSettings | None = None,
    name: str | None = None,
    labels: str | None = None,
    classes: Sequence[str] = (),
    image_column: str | None = None,
    label_column: str | None = None,
    part: tuple[int, int] = (0, 1),
    workers: int | None = None,
    progress: PackProgress | None = None,
) -> PackReport:
    """Write the pictures of a source as tar shards into a folder that is new or empty, or in which the same was begun.

    A source is what `ShardIndex.open` takes (with `labels` and `classes`), an index, parquet files (one, a folder, a glob; columns by name
    where they cannot be told), or an iterable of (key, bytes, label or None). The shards are NAME-000000.tar and so on, by default with
    the folder's name. Beside them lie DALI's .idx, our index, `_info.json` as timm reads it, with what was done and the SHA-256 of every
    shard, `classes.json` where classes have names, and `left_out.jsonl` where samples are invalid. `part=(i, n)` writes the shards i,
    i + n, ... alone; who finishes the last one completes the folder. The bytes depend on the source, the settings and the name, never on
    parts, `workers` (threads) or where an earlier run was killed. An iterable is packed from its start each time.
    Raises: ValueError for a folder that holds anything else, or what was begun otherwise; ValueError and OSError as ShardIndex.open and
            ShardReader, OSError for a full disk, each in one line; TypeError for an item of an iterable that is no sample.
    """
    begun = time.monotonic()
    settings = settings or PackSettings()
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part={part[0]}/{part[1]}: parts are i/n with 0 <= i < n" + (f", here 0 to {part[1] - 1}" if part[1] > 0 else ""))
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: needs at least 1")
    folder = PackFolder.of(Path(out), name)
    named = _named(source)
    _refuse_overlap(folder.path, named)
    folder.refuse_others(_decisive(settings))
    columns = {"image_column": image_column, "label_column": label_column}
    pictures = _opened(named, settings, labels, classes, columns, progress)
    try:
        if pictures.count is None and part != (0, 1):
            raise ValueError(f"part={part[0]}/{part[1]}: an iterable is packed by one process; leave part out")
        ends = _shard_ends(pictures, settings)
        with folder.writing():
            origin = named if isinstance(named, str) else pictures.name
            plan = folder.begin(_plan_of(folder, settings, pictures, origin))
            run = _Run(folder, plan, settings, pictures, ends, part, workers or min(16, available_cores()), progress)
            run.write_shards()
            return run.finish(begun)
    finally:
        pictures.close()


class _Run:
    """One process's part of the work."""

    def __init__(
        self,
        folder: PackFolder,
        plan: Plan,
        settings: PackSettings,
        pictures: PackSource,
        ends: NDArray[np.int64] | None,
        part: tuple[int, int],
        workers: int,
        progress: PackProgress | None,
    ) -> None:
        self._folder, self._plan, self._settings, self._pictures = folder, plan, settings, pictures
        self._ends, self._part, self._workers = ends, part, workers
        self._facts: dict[int, ShardFacts] = {}  # of finished shards, by number
        self._written = 0
        self._progress = progress
        self._done, self._total = 0, None if ends is None else sum(stop - start for _, start, stop in self._own_shards())

    def write_shards(self) -> None:
        """Write the shards of this part that are not finished."""
        self._folder.sweep(self._part)
        with ThreadPoolExecutor(self._workers, "pack") as pool:
            if self._ends is None:
                self._write_to_the_end(pool)
                return
            unfinished = []
            for number, start, stop in self._own_shards():
                facts = self._folder.finished(number, self._plan)
                if facts is None:
                    unfinished.append((number, start, stop))
                else:
                    self._facts[number] = facts
                    self._done += stop - start
            self._show()
            for number, start, stop in unfinished:
                self._write(pool, number, self._pictures.tasks(start, stop))

    def finish(self, begun: float) -> PackReport:
        """Complete the folder if all shards are there, whoever wrote them; return what is there."""
        count = len(self._facts) if self._ends is None else len(self._ends)
        found = (self._facts.get(number) or self._folder.finished(number, self._plan) for number in range(count))
        finished = [facts for facts in found if facts is not None]
        left_out = [*self._pictures.left_out(), *chain.from_iterable(facts.left_out for facts in finished)]
        if len(finished) == count:
            self._folder.complete(finished, sorted(left_out, key=lambda entry: entry.id), self._plan)
        return PackReport(
            folder=self._folder.path,
            name=self._folder.name,
            shards=len(finished),
            missing=count - len(finished),
            samples=sum(facts.samples for facts in finished),
            unlabeled=sum(facts.unlabeled for facts in finished),
            left_out=len(left_out),
            bytes=sum(facts.bytes for facts in finished),
            written=self._written,
            seconds=time.monotonic() - begun,
        )

    def _own_shards(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, first position and end of every shard of this part."""
        assert self._ends is not None
        for number in range(self._part[0], len(self._ends), self._part[1]):
            yield number, int(self._ends[number - 1]) if number else 0, int(self._ends[number])

    def _write_to_the_end(self, pool: ThreadPoolExecutor) -> None:
        """Write shards until the source has no more, and remove those that an earlier run made of more."""
        size, number = self._settings.samples_per_shard, 0
        while first := next(self._pictures.tasks(0, 1), None):
            self._write(pool, number, chain([first], self._pictures.tasks(1, size)))
            number += 1
        if not number:
            raise ValueError(f"{self._pictures.name}: holds no samples")
        self._folder.remove_from(number)

    def _write(self, pool: ThreadPoolExecutor, number: int, tasks: Iterator[Task]) -> None:
        self._folder.forget(number)
        facts = write_shard(self._folder.shard(number), self._stored(pool, tasks))
        self._folder.note_finished(number, facts, self._plan)
        self._facts[number] = facts
        self._written += facts.samples

    def _stored(self, pool: ThreadPoolExecutor, tasks: Iterator[Task]) -> Iterator[SourcePicture]:
        """Read and convert pictures in threads, a few of them before they are asked for, and yield them in order."""
        pending: deque[Future[SourcePicture]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(_read_and_convert, task, self._settings))
                if len(pending) > 2 * self._workers:
                    yield self._counted(pending.popleft())
            while pending:
                yield self._counted(pending.popleft())
        finally:
            for future in pending:  # some only if one before them failed
                future.cancel()

    def _counted(self, future: Future[SourcePicture]) -> SourcePicture:
        picture = future.result()
        self._done += 1
        self._show()
        return picture

    def _show(self) -> None:
        if self._progress is not None:
            self._progress("packing", self._done, self._total)


def _read_and_convert(task: Task, settings: PackSettings) -> SourcePicture:
    return stored_picture(task(), settings)


def _named(source: str | os.PathLike[str] | Sequence[Any] | ShardIndex | Iterable[Any]) -> _Source:
    """Return the pattern of a source that is named, by one path or by several; others as they are."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Sequence) and source and all(isinstance(part, str | os.PathLike) for part in source):
        return "::".join(map(os.fspath, source))
    return source


def _opened(
    source: _Source,
    settings: PackSettings,
    labels: str | None,
    classes: Sequence[str],
    columns: dict[str, str | None],
    progress: PackProgress | None,
) -> PackSource:
    """Return a source's pictures. Raises: ValueError for what that source cannot do; as opening it."""
    if isinstance(source, str) and names_parquet(source):
        if labels not in (None, "none"):
            raise ValueError(f"labels={labels!r}: a column of a parquet file is named by label_column; labels='none' leaves labels out")
        _refuse_for_rows("parquet files", settings)
        return ParquetPictures(ParquetRows(source, **columns, labeled=labels is None, classes=classes))
    for option, column in columns.items():
        if column is not None:
            raise ValueError(f"{option}={column!r}: the source is not parquet and has no columns; leave it out")
    if isinstance(source, str):
        show = None if progress is None else lambda done, total: progress("indexing", done, total)
        return IndexPictures(ShardIndex.open(source, labels=labels, classes=classes, progress=show), seed=settings.shuffle)
    if labels is not None or (classes and isinstance(source, ShardIndex)):
        raise ValueError(f"labels={labels!r}, classes={tuple(classes)!r:.60}: this source has its labels already; leave them out")
    if isinstance(source, ShardIndex):
        return IndexPictures(source, seed=settings.shuffle)
    _refuse_for_rows("an iterable", settings)
    return IterablePictures(source, classes)


def _refuse_for_rows(what: str, settings: PackSettings) -> None:
    """Raise ValueError for settings that need to know all pictures before the first is written."""
    if settings.shuffle is not None:
        raise ValueError(f"shuffle={settings.shuffle}: {what} can be read in order alone; pack in order, then pack the result shuffled")
    if settings.mib is not None:
        raise ValueError(f"mib={settings.mib}: how large the pictures of {what} are is not known beforehand; take samples")


def _refuse_overlap(out: Path, source: _Source) -> None:
    """Raise ValueError if the folder is a folder of the source, or lies in one."""
    if isinstance(source, ShardIndex):
        parts = source.paths
    elif isinstance(source, str):
        parts = tuple(map(os.path.expanduser, source.split("::")))
    else:
        return
    place = out.resolve()
    for part in map(Path, parts):
        if part.is_dir() and part.resolve() in (place, *place.parents):
            relation = "is" if part.resolve() == place else "lies in"
            raise ValueError(f"{out}: {relation} the source {part}, which packing leaves as it is; name a folder outside it")


def _shard_ends(pictures: PackSource, settings: PackSettings) -> NDArray[np.int64] | None:
    """Return the position behind the last sample of every shard; None for a source whose end nobody knows.

    Raises: ValueError if there is no sample.
    """
    count = pictures.count
    if count is None:
        return None
    if not count:
        raise ValueError(f"{pictures.name}: holds no samples")
    if settings.mib is None:
        size = settings.samples_per_shard
        return np.append(np.arange(size, count, size), count)
    assert isinstance(pictures, IndexPictures)  # others are refused with mib
    room = settings.mib * 2**20 // _TAR_RECORD * _TAR_RECORD - _TAR_END
    ends, filled = [], 0
    for position, (key, length, label) in enumerate(pictures.sizes()):
        member = member_bytes(key, length, label)
        if filled and filled + member > room:
            ends.append(position)
            filled = 0
        filled += member
    return np.array([*ends, count])


def _plan_of(folder: PackFolder, settings: PackSettings, pictures: PackSource, origin: str) -> Plan:
    return Plan(
        name=folder.name,
        settings=_decisive(settings),
        source={"fingerprint": pictures.fingerprint, "samples": pictures.count, "classes": list(pictures.classes)},
        made={"from": origin, "wherefrom": importlib.metadata.version("wherefrom"), "pillow": PIL.__version__},
    )


def _decisive(settings: PackSettings) -> dict[str, Any]:
    """Return the settings in which two runs must agree, whether or not a default was written out."""
    return asdict(settings) | {"samples": None if settings.mib is not None else settings.samples_per_shard}
