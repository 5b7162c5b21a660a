"""One shard as plain arrays, and the scan that makes them.

Here: WebDataset's grouping of members into samples, the verdict on each picture, `ShardTable` with its checks.
Not here: tar headers (tar_members.py), picture headers (picture_headers.py), what labels say (labels.py), where tables are kept (store.py).
A sample is a key that has a picture, valid or not; members of one key are neighbors. A tar may hold tars, one level deep.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.shards.labels import LabelRule, class_of_tar, label_of_text
from wherefrom.pipeline.shards.picture_headers import FORMATS, MAX_ENCODED_BYTES, PictureHeader, examine_picture
from wherefrom.pipeline.shards.storage import Stamp, StoredFile, read_at, storage_of
from wherefrom.pipeline.shards.tar_members import Member, TarError, walk_tar

__all__ = [
    "FORMAT_VERSION",
    "TABLE_LAYOUT",
    "BrokenShardError",
    "ShardTable",
    "count_unread",
    "pack_texts",
    "pack_verdicts",
    "printable",
    "scan_shard",
    "stamp_of",
]

PICTURE_EXTENSIONS = (b"jpg", b"jpeg", b"png", b"webp")  # where a key has several, the first of these is the sample's picture

FORMAT_VERSION = 4  # of index files; others are built again
_WEBDATASET_META = re.compile(rb"__[^/]*__(?:$|/)")
_MAX_LABEL_BYTES = 2**20  # of a member that labels its sample
_MAX_EXTENSIONS_COUNTED = 64

# dtype and shape of every stored array: n samples, v versions, one a sample where each is a file of its own, else none; u invalid samples,
# d of these by a decode alone; c classes; e extensions that are not read; f folders of a tree; m notes; any number of bytes
TABLE_LAYOUT: dict[str, tuple[type, tuple[int | str, ...]]] = {
    "stamp": (np.int64, (3,)),
    "audited": (np.bool_, (1,)),
    "offset": (np.int64, ("n",)),
    "length": (np.int64, ("n",)),
    "label": (np.int64, ("n",)),
    "source_size": (np.int32, ("n", 2)),
    "orientation": (np.uint8, ("n",)),
    "format": (np.uint8, ("n",)),
    "version": (np.int64, ("v",)),
    "keys": (np.uint8, ("key bytes",)),
    "key_ends": (np.int64, ("n",)),
    "class_names": (np.uint8, ("class name bytes",)),
    "class_name_ends": (np.int64, ("c",)),
    "invalid": (np.int64, ("u",)),
    "undecodable": (np.int64, ("d",)),
    "reasons": (np.uint8, ("reason bytes",)),
    "reason_ends": (np.int64, ("u",)),
    "extensions": (np.uint8, ("extension bytes",)),
    "extension_ends": (np.int64, ("e",)),
    "extension_counts": (np.int64, ("e",)),
    "folders": (np.uint8, ("folder bytes",)),
    "folder_ends": (np.int64, ("f",)),
    "folder_versions": (np.int64, ("f",)),
    "folder_lengths": (np.int64, ("f",)),
    "notes": (np.uint8, ("note bytes",)),
    "note_ends": (np.int64, ("m",)),
}


class BrokenShardError(ValueError):
    """A shard is not a whole, plain tar. One line: the shard, what is wrong, the mend."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardTable:
    """What one shard holds, and exactly what its index file stores.

    Shapes: as in TABLE_LAYOUT. stamp is (format version, shard's size in bytes, its version: mtime_ns of a local file). The texts (keys of
    the n samples, names of the c classes, reasons of the u invalid samples, extensions of other members, folders of a tree, relative to
    its root, notes) lie end to end as bytes, text i up to ends[i].
    Raises: ValueError if the arrays do not fit one another: those of a damaged or foreign file.
    """

    stamp: NDArray[np.int64]
    audited: NDArray[np.bool_]  # whether the samples that count as valid were decoded once as well
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    label: NDArray[np.int64]  # -1: none; where classes have names, the place of its class among them, else a number of the data's own
    source_size: NDArray[np.int32]  # upright (height, width); (0, 0) where the header cannot be trusted
    orientation: NDArray[np.uint8]
    format: NDArray[np.uint8]  # place in picture_headers.FORMATS
    version: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # of each loose file, as in a stamp
    keys: NDArray[np.uint8]
    key_ends: NDArray[np.int64]
    class_names: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))  # rising
    class_name_ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    invalid: NDArray[np.int64]  # rows, rising
    undecodable: NDArray[np.int64]  # those of them that only decoding found, rising
    reasons: NDArray[np.uint8]
    reason_ends: NDArray[np.int64]
    extensions: NDArray[np.uint8]
    extension_ends: NDArray[np.int64]
    extension_counts: NDArray[np.int64]
    folders: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    folder_ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    folder_versions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # mtime_ns, -1 where it says nothing
    folder_lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # samples in each folder itself: rows in turn
    notes: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))  # what the scan has to say whenever the table is used
    note_ends: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        sides: dict[str, int] = {}
        for name, (dtype, shape) in TABLE_LAYOUT.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != len(shape) or not _same_sides(shape, array.shape, sides):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
        for texts, ends in (
            (self.keys, self.key_ends),
            (self.class_names, self.class_name_ends),
            (self.reasons, self.reason_ends),
            (self.extensions, self.extension_ends),
            (self.folders, self.folder_ends),
            (self.notes, self.note_ends),
        ):
            if not _rises(ends, lowest=0) or (ends[-1] if len(ends) else 0) != len(texts):
                raise ValueError("texts and their ends do not fit")
        in_file = (self.offset >= 0) & (self.length >= 0) & (self.offset <= self.stamp[1] - self.length)
        coded = (self.orientation >= 1) & (self.orientation <= 8) & (self.format < len(FORMATS))
        rows_fit = _rises(self.invalid, lowest=0) and (not len(self.invalid) or self.invalid[-1] < len(self))
        rows_fit = rows_fit and _rises(self.undecodable, lowest=0) and bool(np.isin(self.undecodable, self.invalid).all())
        named = len(self.class_name_ends) == 0 or bool(np.all(self.label < len(self.class_name_ends)))
        if not named or len(self.version) != (len(self) if self.is_tree else 0):
            raise ValueError("labels and classes, or versions and samples, do not fit")
        if self.is_tree and not (self._names_stay_inside() and self.folder_lengths.min() >= 0 and self.folder_lengths.sum() == len(self)):
            raise ValueError("folders and samples do not fit")
        if not rows_fit or not np.all(in_file & coded) or not np.all(self.source_size[self.valid()] > 0):
            raise ValueError("offsets, sizes and verdicts do not fit")

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def is_tree(self) -> bool:
        """Whether the samples are loose files in folders."""
        return len(self.folder_ends) > 0

    def _names_stay_inside(self) -> bool:
        """Whether no file or folder of the tree has a name that leads out of it: a scan takes no name that begins with a dot."""
        texts = (self.keys, self.key_ends), (self.folders, self.folder_ends)
        return not any(
            np.isin(array[_starts(ends)], (ord("/"), ord("."))).any() or any(part in array.tobytes() for part in (b"\0", b"//", b"/."))
            for array, ends in texts
        )

    def valid(self) -> NDArray[np.bool_]:
        """Return which rows are valid samples, (n,)."""
        valid = np.ones(len(self), bool)
        valid[self.invalid] = False
        return valid

    def undecodable_mask(self) -> NDArray[np.bool_]:
        """Return which rows only decoding found invalid, (n,)."""
        undecodable = np.zeros(len(self), bool)
        undecodable[self.undecodable] = True
        return undecodable

    def key(self, row: int) -> str:
        """Return the sample's key: WebDataset's, or a loose file's name relative to the root; bytes that are no UTF-8 as surrogates."""
        return text_at(self.keys, self.key_ends, row)

    def reason(self, row: int) -> str:
        """Return why the sample in this row is invalid, empty if it is valid."""
        position = int(np.searchsorted(self.invalid, row))
        is_invalid = position < len(self.invalid) and self.invalid[position] == row
        return text_at(self.reasons, self.reason_ends, position) if is_invalid else ""

    def classes(self) -> list[str]:
        """Return the names of the classes, empty where labels are numbers of the data's own."""
        return [text_at(self.class_names, self.class_name_ends, position) for position in range(len(self.class_name_ends))]

    def with_classes(self, names: Sequence[str | None]) -> "ShardTable":
        """Return the table with a class name, or none, for each of its n samples."""
        arrays = {item.name: getattr(self, item.name) for item in fields(self)}
        return ShardTable(**(arrays | _pack_labels(list(names))))

    def with_names_of_numbers(self, names: Sequence[str]) -> "ShardTable":
        """Return the table, whose labels are numbers, with the names that these have; a name for every number, no name twice."""
        ordered = sorted(names)
        place = {name: position for position, name in enumerate(ordered)}
        arrays = {item.name: getattr(self, item.name) for item in fields(self)}
        texts, ends = pack_texts(os.fsencode(name) for name in ordered)
        label = np.append([place[name] for name in names], -1)[np.maximum(self.label, -1)]
        return ShardTable(**(arrays | {"label": label, "class_names": texts, "class_name_ends": ends}))

    def unread_members(self) -> Counter[str]:
        """Count the members that belong to no sample or are not read, by extension."""
        names = (text_at(self.extensions, self.extension_ends, position) for position in range(len(self.extension_ends)))
        return Counter(dict(zip(names, self.extension_counts.tolist(), strict=True)))

    def folder_names(self) -> list[str]:
        """Return the folders of a tree, relative to its root, which comes first as an empty text."""
        return [text_at(self.folders, self.folder_ends, position) for position in range(len(self.folder_ends))]

    def said_notes(self) -> list[str]:
        """Return what the scan has to say whenever the table is used."""
        return [text_at(self.notes, self.note_ends, position) for position in range(len(self.note_ends))]

    def digest(self) -> bytes:
        """Hash what the members are: not the folder, not the mtime, and no verdict that a later audit may change."""
        hasher = hashlib.blake2b(digest_size=16)
        for array in (self.stamp[1:2], self.offset, self.length, self.label, self.key_ends, self.keys):
            hasher.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        if len(self.class_name_ends):
            hasher.update(self.class_name_ends.astype("<i8").tobytes() + self.class_names.tobytes())
        return hasher.digest()

    def equals(self, other: "ShardTable") -> bool:
        """Whether every stored array is the same."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in TABLE_LAYOUT)

    def with_audit(self, failures: dict[int, str]) -> "ShardTable":
        """Return the table after an audit by decoding: `failures` maps rows to reasons, all other valid rows decode."""
        reasons = {int(row): self.reason(row) for row in self.invalid} | failures
        arrays = {item.name: getattr(self, item.name) for item in fields(self)}
        undecodable = sorted({*self.undecodable.tolist(), *failures})  # a tree's may be known from before a file was added to it
        audit = {"audited": np.array([True]), "undecodable": np.array(undecodable, np.int64)}
        return ShardTable(**(arrays | pack_verdicts(reasons) | audit))


def stamp_of(shard: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Return what an index file must agree with to be of use: format version, the shard's size in bytes, its version.

    Raises: OSError if the shard is not there.
    """
    path = os.fspath(shard)
    return FORMAT_VERSION, *storage_of(path).stamp(path)


def scan_shard(shard: str | os.PathLike[str], labels: LabelRule | None = None) -> ShardTable:
    """Read a shard once, from its first header to its end mark, and judge every picture in it; its samples are labeled as the rule says.

    Raises: BrokenShardError if it is not a whole, plain tar, or changed meanwhile; OSError if it cannot be read.
    """
    stamp = stamp_of(shard)
    try:
        groups = _group_members(os.fspath(shard), stamp[1], labels or LabelRule.of(None))
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{shard}: cannot be read ({reason}); see that you may read it and that its disk is healthy") from error
    if stamp_of(shard) != stamp:
        raise BrokenShardError(f"{shard}: changed while it was read; let its writer finish, then index it again")
    return groups.table(stamp)


def _group_members(shard: str, size: int, labels: LabelRule) -> "_SampleGrouper":
    file = storage_of(shard).open(shard)
    groups = _SampleGrouper(file, labels, class_of_tar(shard, labels))
    try:
        for member in walk_tar(file, size):
            groups.add(member)
        groups.end_sample()
    except TarError as error:
        raise BrokenShardError(f"{shard}: {error}; {groups.whole_samples} whole samples lie before that; fetch or pack it again") from error
    finally:
        file.close()
    return groups


class _Sample(NamedTuple):
    key: bytes
    offset: int
    length: int
    label: int | str | None
    tar: str | None  # the class that its tar's name says
    header: PictureHeader


class _SampleGrouper:
    """Groups members into samples as WebDataset does: neighbors that share a key."""

    def __init__(self, file: StoredFile, labels: LabelRule, class_name: str | None) -> None:
        self.samples: list[_Sample] = []
        self.unread_members: Counter[str] = Counter()
        self._file = file
        self._labels = labels
        self._class = class_name
        self._prefix = b""  # of the keys of a tar within the tar
        self._keys_seen: set[bytes] = set()
        self._key = b""
        self._pictures: dict[bytes, Member] = {}
        self._label: int | str | None = None

    def add(self, member: Member) -> None:
        if member.kind == "folder" or _WEBDATASET_META.match(member.name):
            return
        folder_end = member.name.rfind(b"/") + 1
        stem, dot, extension = member.name[folder_end:].lower().partition(b".")  # WebDataset's rule: the file name's first dot
        if not stem or not dot:
            self._count_unread("(no extension)")
            return
        key = self._prefix + member.name[: folder_end + len(stem)]
        if key != self._key or extension in self._pictures:
            self.end_sample()
            self._key = key
        if extension in PICTURE_EXTENSIONS:
            self._pictures[extension] = member
        elif member.name.lower().endswith(b".tar") and member.kind == "file" and not self._prefix:
            self._add_tar(member, member.name[: -len(b".tar")])
        elif extension == self._labels.extension and member.kind == "file":
            self._read_label(member)
        else:
            self._count_unread(extension.decode("ascii", "backslashreplace")[:24])

    def _add_tar(self, tar: Member, key: bytes) -> None:
        """Add the members of a tar within the tar, as ILSVRC2012 has one a class; offsets are those in the outer file."""
        self.end_sample()
        outer, self._prefix, self._class = self._class, key + b"/", class_of_tar(os.fsdecode(key), self._labels, nested=True)
        name = os.fsdecode(tar.name)
        try:
            for member in walk_tar(_Part(self._file, tar.offset, tar.length), tar.length):
                self.add(replace(member, offset=tar.offset + member.offset))
            self.end_sample()
        except TarError as error:
            raise TarError(f"holds {name!r:.80}, which {error}") from error
        self._prefix, self._class = b"", outer

    def end_sample(self) -> None:
        """Close the group of the current key; a key without a picture is no sample."""
        if self._pictures:
            chosen = next(extension for extension in PICTURE_EXTENSIONS if extension in self._pictures)
            picture = self._pictures.pop(chosen)
            for extension in self._pictures:
                self._count_unread(f"{extension.decode()} beside {chosen.decode()}")
            self.samples.append(_Sample(self._key, picture.offset, picture.length, self._label, self._class, self._examine(picture)))
            self._keys_seen.add(self._key)
        elif self._label is not None:
            self._count_unread(f"{self._labels.extension.decode()} (no picture beside it)")
        self._pictures, self._label, self._key = {}, None, b""

    @property
    def whole_samples(self) -> int:
        return len(self.samples) + bool(self._pictures)

    def table(self, stamp: tuple[int, int, int]) -> ShardTable:
        samples, kinds = self.samples, sorted(self.unread_members)
        keys, key_ends = pack_texts(sample.key for sample in samples)
        extensions, extension_ends = pack_texts(kind.encode() for kind in kinds)
        headers = [sample.header for sample in samples]
        return ShardTable(
            stamp=np.array(stamp, np.int64),
            audited=np.array([False]),
            offset=np.array([sample.offset for sample in samples], np.int64),
            length=np.array([sample.length for sample in samples], np.int64),
            source_size=np.array([(header.height, header.width) for header in headers], np.int32).reshape(-1, 2),
            orientation=np.array([header.orientation for header in headers], np.uint8),
            format=np.array([header.format for header in headers], np.uint8),
            keys=keys,
            key_ends=key_ends,
            undecodable=np.array([], np.int64),
            extensions=extensions,
            extension_ends=extension_ends,
            extension_counts=np.array([self.unread_members[kind] for kind in kinds], np.int64),
            **pack_verdicts({row: header.reason for row, header in enumerate(headers) if header.reason}),
            **_pack_labels(self._settled_labels()),
        )

    def _examine(self, picture: Member) -> PictureHeader:
        if picture.kind != "file":
            return PictureHeader(format=0, reason=f"is a {picture.kind} in the tar")
        if picture.name.startswith(b"/") or b".." in picture.name.split(b"/"):
            return PictureHeader(format=0, reason="has a name that leaves its folder")
        if self._key in self._keys_seen:
            return PictureHeader(format=0, reason="has the key of an earlier sample of its shard")
        if picture.length > MAX_ENCODED_BYTES:
            return PictureHeader(format=0, reason=f"is {picture.length} bytes long; the limit is {MAX_ENCODED_BYTES}")
        data = read_at(self._file, picture.offset, picture.length)
        if len(data) < picture.length:
            raise TarError(f"lost bytes while it was read (at byte {picture.offset + len(data)})")
        return examine_picture(data)

    def _settled_labels(self) -> Sequence[int | str | None]:
        """Return a label or none for every sample: what its member says, or where no member says anything, what its tar's name says."""
        own = [sample.label for sample in self.samples]
        return own if any(label is not None for label in own) else [sample.tar for sample in self.samples]

    def _read_label(self, member: Member) -> None:
        text = read_at(self._file, member.offset, min(member.length, _MAX_LABEL_BYTES))
        label = label_of_text(text, self._labels) if member.length <= _MAX_LABEL_BYTES else None
        if label is None:
            self._count_unread(f"{self._labels.extension.decode()} ({self._labels.complaint})")
        else:
            self._label = label

    def _count_unread(self, kind: str) -> None:
        count_unread(self.unread_members, kind)


class _Part:
    """A stretch of a file, as a file of its own."""

    def __init__(self, file: StoredFile, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length

    def stamp(self) -> Stamp:
        return Stamp(self._length, self._file.stamp().version)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        return self._file.read_into(buffer[: max(0, self._length - offset)], self._offset + offset)

    def close(self) -> None:
        """Nothing: the whole file is closed by who opened it."""


def _same_sides(names: tuple[int | str, ...], sizes: tuple[int, ...], sides: dict[str, int]) -> bool:
    """Compare sizes with numbers, or with what the same name stood for before."""
    return all(size == (side if isinstance(side, int) else sides.setdefault(side, size)) for side, size in zip(names, sizes, strict=True))


def _rises(numbers: NDArray[np.int64], lowest: int) -> bool:
    return not len(numbers) or (numbers[0] >= lowest and bool(np.all(numbers[1:] >= numbers[:-1])))


def count_unread(kinds: Counter[str], kind: str) -> None:
    """Count one more that is not read; of hostile data, not every kind under its own name."""
    full = len(kinds) >= _MAX_EXTENSIONS_COUNTED and kind not in kinds
    kinds["(others)" if full else kind] += 1


def pack_texts(texts: Iterable[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Lay texts end to end; return them and their ends."""
    all_texts: Sequence[bytes] = list(texts)
    return np.frombuffer(b"".join(all_texts), np.uint8), np.cumsum([len(text) for text in all_texts], dtype=np.int64)


def pack_verdicts(reasons: dict[int, str]) -> dict[str, NDArray]:
    """Return the arrays of the rows that are invalid, with their reasons."""
    rows = sorted(reasons)
    texts, ends = pack_texts(reasons[row].encode() for row in rows)
    return {"invalid": np.array(rows, np.int64), "reasons": texts, "reason_ends": ends}


def _pack_labels(labels: Sequence[int | str | None]) -> dict[str, NDArray]:
    """Return the arrays of labels and of class names, which there are where a label is a name: numbers beside it become names then."""
    names: list[str] = []
    if any(isinstance(label, str) for label in labels):
        labels = [None if label is None else str(label) for label in labels]
        names = sorted({label for label in labels if isinstance(label, str)})
    number_of = {name: number for number, name in enumerate(names)}
    numbers = [-1 if label is None else number_of[label] if isinstance(label, str) else label for label in labels]
    texts, ends = pack_texts(os.fsencode(name) for name in names)
    return {"label": np.array(numbers, np.int64), "class_names": texts, "class_name_ends": ends}


def printable(text: str) -> str:
    """Return text from a file with everything that could end a line or steer a terminal escaped."""
    return repr(text)[1:-1]


def _starts(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the texts begin that are not empty."""
    starts = np.append(0, ends[:-1])
    return starts[starts < ends]


def text_at(texts: NDArray[np.uint8], ends: NDArray[np.int64], position: int) -> str:
    start = ends[position - 1] if position else 0
    return texts[start : ends[position]].tobytes().decode("utf-8", "surrogateescape")
