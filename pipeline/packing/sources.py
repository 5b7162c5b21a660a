"""What can be packed: the pictures of an index, of parquet files or of an iterable, each with a label and a key that a tar can hold.

Here: one protocol over them, keys that every reader of WebDataset shards splits alike, and no two of them the same.
Not here: writing (shard.py), which samples make a shard (pack.py).
A picture's extension is its format. One of another format than most of its index keeps its own name's: readers that ask for `jpg` alone
find ImageNet's one PNG called .JPEG, and decoders go by the bytes anyway. Rows of parquet files keep their own names' too.
Convention: a position counts what may be packed, in the order of packing; an id is a sample's number in the source.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.order import Order
from wherefrom.pipeline.packing.parquet import ParquetRow, ParquetRows
from wherefrom.pipeline.shards.index import MAX_PIXELS, QuarantineEntry, ShardIndex
from wherefrom.pipeline.shards.picture_headers import FORMATS, PictureHeader, examine_picture
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.shards.storage import read_at, storage_of

__all__ = ["IndexPictures", "IterablePictures", "PackSource", "ParquetPictures", "SourcePicture", "tar_key"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SKIPPED_BY_WEBDATASET = re.compile(r"__[^/]*__/")
_PICTURE_SUFFIX = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)
_TAR_HEADER, _TAR_NAME = 512, 100  # bytes of a member's header, and of the name in it
_MAX_KEY, _MAX_OWN_NAME = 4096, 200  # letters, where no file system sets a limit


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """One picture as it lies in the source. A header with a reason says why it cannot be packed."""

    id: int
    key: str  # in the tar
    shard: str  # the file or folder that it lies in
    data: NDArray[np.uint8]
    label: int  # -1: none
    header: PictureHeader
    extension: str  # jpg, png or webp


Task = Callable[[], SourcePicture]  # reads one picture, in any thread


class PackSource(Protocol):
    """Pictures by position, from 0 on."""

    name: str  # for messages
    fingerprint: str  # which pictures, in which order; "" where nobody can say
    classes: tuple[str, ...]  # names by number

    @property
    def count(self) -> int | None:
        """How many there are; None where that is known at the end."""
        ...

    def tasks(self, start: int, stop: int) -> Iterator[Task]:
        """Yield what reads the pictures at positions [start, stop), fewer where the source ends."""
        ...

    def left_out(self) -> list[QuarantineEntry]:
        """List what has no position, because it is known to be invalid."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class IndexPictures:
    """The valid samples of an index, as they lie or permuted by a seed."""

    def __init__(self, index: ShardIndex, *, seed: int | None = None) -> None:
        self._index = index
        self._reader = ShardReader(index)
        self._valid = np.flatnonzero(index.valid)
        if not len(self._valid):
            raise ValueError(f"{index.paths[0]}: none of the {len(index)} samples is valid; `wherefrom index` lists the reasons")
        loose = np.array([storage_of(path).kind(path) == "folder" for path in index.paths])[index.shard[self._valid]]
        names = zip(self._valid.tolist(), loose.tolist(), strict=True)
        self._keys = _UniqueKeys((tar_key(index.key(sample), suffix=is_file) for sample, is_file in names), self._valid)
        positions = np.arange(len(self._valid))
        self._order = positions if seed is None else Order(samples=len(positions), global_batch=1, seed=seed).ids(0, positions)
        self._usual_format = int(np.bincount(index.format[self._valid]).argmax())
        self.name = index.paths[0]
        self.fingerprint = f"{index.fingerprint}-{index.invalid_digest(audit=True)}"
        self.classes = index.classes

    @property
    def count(self) -> int:
        return len(self._valid)

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        """Yield key, bytes and label of every picture, by position."""
        samples = self._valid[self._order]
        lengths, labels = self._index.length[samples].tolist(), self._index.label[samples].tolist()
        return zip((self._keys[row] for row in self._order.tolist()), lengths, labels, strict=True)

    def tasks(self, start: int, stop: int) -> Iterator[Task]:
        return (partial(self._read, row) for row in self._order[start:stop].tolist())

    def left_out(self) -> list[QuarantineEntry]:
        return self._index.quarantine()

    def close(self) -> None:
        self._reader.close()

    def _read(self, row: int) -> SourcePicture:
        index, sample = self._index, int(self._valid[row])
        height, width = index.source_size[sample].tolist()
        header = PictureHeader(format=int(index.format[sample]), height=height, width=width, orientation=int(index.orientation[sample]))
        own = "" if header.format == self._usual_format else _extension_of(_name_in_source(index, sample))
        return SourcePicture(
            id=sample,
            key=self._keys[row],
            shard=index.paths[index.shard[sample]],
            data=self._reader.read(sample),
            label=int(index.label[sample]),
            header=header,
            extension=own or _extension_of(FORMATS[header.format]),
        )


class ParquetPictures:
    """The rows of parquet files, in order. A key is the row's number, and the picture's own name behind it where it has one."""

    def __init__(self, rows: ParquetRows) -> None:
        self._rows = rows
        self._iterator: Iterator[ParquetRow] = iter(())
        self._at = -1  # the row that it gives next
        self.name = rows.files[0].path
        self.fingerprint = rows.fingerprint
        self.classes = rows.classes

    @property
    def count(self) -> int:
        return len(self._rows)

    def tasks(self, start: int, stop: int) -> Iterator[Task]:
        if start != self._at:  # else what is open goes on
            self._iterator = self._rows.rows(start)
        for _ in range(start, min(stop, len(self._rows))):
            row = next(self._iterator)
            self._at = row.number + 1
            yield partial(_examined, row.number, _row_key(row), row.file, row.data, row.label, _extension_of(row.name))

    def left_out(self) -> list[QuarantineEntry]:
        return []

    def close(self) -> None:
        self._iterator = iter(())


class IterablePictures:
    """Tuples (key, bytes, label), in order and once."""

    count = None

    def __init__(self, samples: Iterable[tuple[str, bytes, int | None]], classes: Sequence[str]) -> None:
        self._iterator = enumerate(samples)
        self._keys: set[bytes] = set()
        self.name = f"the {type(samples).__name__}"
        self.fingerprint = ""
        self.classes = tuple(classes)

    def tasks(self, start: int, stop: int) -> Iterator[Task]:
        for _ in range(start, stop):
            try:
                number, sample = next(self._iterator)
            except StopIteration:
                return
            yield self._task(number, sample)

    def left_out(self) -> list[QuarantineEntry]:
        return []

    def close(self) -> None:
        pass

    def _task(self, number: int, sample: object) -> Task:
        match sample:
            case (str() as name, (bytes() | bytearray() | memoryview()) as data, (Integral() | None) as given) if 0 < len(name) <= _MAX_KEY:
                label = -1 if given is None else int(given)
            case _:
                raise TypeError(f"sample {number} is {sample!r:.80}, expected (key, bytes of a picture, label or None)")
        if self.classes and label >= len(self.classes):
            raise ValueError(
                f"sample {number} has label {label} of {len(self.classes)} classes; they are numbered 0 to {len(self.classes) - 1}"
            )
        key = tar_key(name, suffix=False)
        while (digest := _hash(key)) in self._keys:
            key = f"{key}~{number}"
        self._keys.add(digest)
        return partial(_examined, number, key, "", bytes(data), label)


def tar_key(name: str, *, suffix: bool) -> str:
    """Return the key of a sample in a tar, which every reader splits from the extension alike.

    A loose file's name loses its suffix (`suffix`), dots in it become `_`, for WebDataset splits at the first; so do control characters.
    Folders stay, but for empty ones, `.` and `..`; WebDataset passes over a first folder `__NAME__`, which gets an `x` before it.
    """
    folder, _, file = _CONTROL.sub("_", name).rpartition("/")
    if suffix:
        file = file.rpartition(".")[0] or file
    parts = [part for part in folder.split("/") if part not in ("", ".", "..")]
    key = "/".join([*parts, file.replace(".", "_") or "_"])
    return f"x{key}" if _SKIPPED_BY_WEBDATASET.match(key) else key


def _row_key(row: ParquetRow) -> str:
    own_name = _PICTURE_SUFFIX.sub("", row.name.rpartition("/")[2])[:_MAX_OWN_NAME]
    return tar_key(f"{row.number:09d}-{own_name}" if own_name else f"{row.number:09d}", suffix=False)


def _name_in_source(index: ShardIndex, sample: int) -> str:
    """Return the name of a sample's file, or in the header of its member in a tar, where a long one has lost its end."""
    path, offset, _ = index.location(sample)
    if offset < _TAR_HEADER:
        return path
    file = storage_of(path).open(path)
    try:
        return os.fsdecode(read_at(file, offset - _TAR_HEADER, _TAR_NAME).partition(b"\0")[0])
    finally:
        file.close()


def _extension_of(name: str) -> str:
    """Return the extension in a tar of a picture with a name, or of a format; "" where that tells nothing."""
    suffix = name.rpartition(".")[2].lower()
    return {"jpeg": "jpg"}.get(suffix, suffix if suffix in ("jpg", "png", "webp") else "")


def _examined(number: int, key: str, shard: str, data: bytes | None, label: int, extension: str = "") -> SourcePicture:
    """Judge a picture that no index has judged, as the index does."""
    header = examine_picture(data) if data is not None else PictureHeader(format=0, reason="has no bytes in its row")
    if header.height * header.width > MAX_PIXELS:
        reason = f"has {header.height} x {header.width} pixels; the limit is {MAX_PIXELS}"
        header = PictureHeader(format=header.format, reason=reason)
    extension = extension or _extension_of(FORMATS[header.format])
    return SourcePicture(number, key, shard, np.frombuffer(data or b"", np.uint8), label, header, extension)


class _UniqueKeys:
    """Keys end to end, in one stretch of memory. Where several are the same, all but the first have the sample's number behind them."""

    def __init__(self, keys: Iterable[str], ids: NDArray[np.int64]) -> None:
        self._bytes, ends, hashes = bytearray(), array("q"), array("Q")
        for key in keys:
            encoded = os.fsencode(key)
            self._bytes += encoded
            ends.append(len(self._bytes))
            hashes.append(int.from_bytes(_hash(key), "little"))
        self._ends = np.frombuffer(ends, np.int64)
        self._changed = self._resolve(np.frombuffer(hashes, np.uint64), ids)

    def __getitem__(self, row: int) -> str:
        return self._changed.get(row) or self._stored(row)

    def _stored(self, row: int) -> str:
        start = int(self._ends[row - 1]) if row else 0
        return os.fsdecode(bytes(self._bytes[start : int(self._ends[row])]))

    def _resolve(self, hashes: NDArray[np.uint64], ids: NDArray[np.int64]) -> dict[int, str]:
        order = np.argsort(hashes, kind="stable")
        ranked = hashes[order]
        again = np.sort(order[1:][ranked[1:] == ranked[:-1]])
        taken = set(hashes[again].tolist())
        changed: dict[int, str] = {}
        for row in again.tolist():
            key = f"{self._stored(row)}~{ids[row]}"
            while (number := int.from_bytes(_hash(key), "little")) in taken or _holds(ranked, number):
                key += "~"
            taken.add(number)
            changed[row] = key
        return changed


def _holds(ranked: NDArray[np.uint64], number: int) -> bool:
    place = int(np.searchsorted(ranked, np.uint64(number)))
    return place < len(ranked) and int(ranked[place]) == number


def _hash(key: str) -> bytes:
    return hashlib.blake2b(os.fsencode(key), digest_size=8).digest()
