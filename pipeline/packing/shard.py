"""One shard, written: a tar as WebDataset's writer makes it, with DALI's index, ours and a checksum.

Here: a picture as it is stored (unchanged, or smaller and upright), members in order, what is known of a finished shard.
Not here: which pictures (sources.py), which shards (pack.py).
Every byte follows from the pictures and the settings: members have no time and no owner of this machine.
"""

import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from wherefrom.pipeline.decode import DECODE_ERRORS, decode_picture
from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.packing.sources import SourcePicture
from wherefrom.pipeline.shards.index import QuarantineEntry
from wherefrom.pipeline.shards.picture_headers import FORMATS, PictureHeader
from wherefrom.pipeline.shards.storage import storage_of
from wherefrom.pipeline.shards.store import gather_tables, printable
from wherefrom.pipeline.shards.tar_members import walk_tar

__all__ = ["PackSettings", "ShardFacts", "dali_index", "member_bytes", "stored_picture", "write_shard"]

_SUBSAMPLING = "4:2:0"
_ORIENTATION_TAG = 0x0112
_BLOCK, _USTAR_NAME = 512, 100  # bytes in a tar: what all is a multiple of, and of the longest name that needs no PAX header


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSettings:
    """What packed shards hold: everything here changes their bytes.

    Bytes are copied unchanged, unless a picture's short side is longer than `short_side_px`, or `orientation="bake"` turns it upright:
    then it is decoded as every renderer here decodes it, shrunk by Pillow's antialiased bicubic filter, and encoded as a baseline JPEG,
    4:2:0. What it had besides pixels (EXIF, color profile, alpha) is gone, but for the orientation that is kept.
    Raises: ValueError for settings that make no sense, alone or together.
    """

    samples: int | None = None  # a shard; default: 1000, unless mib says how large a shard may be
    mib: int | None = None  # of a shard at most, in 2**20 bytes
    shuffle: int | None = None  # a seed; None: the source's order
    short_side_px: int | None = None
    quality: int = 90  # of JPEGs that are encoded anew
    orientation: Literal["keep", "bake"] = "keep"

    def __post_init__(self) -> None:
        check_literals(self)
        for name in ("samples", "mib", "short_side_px"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: needs at least 1")
        if self.samples is not None and self.mib is not None:
            raise ValueError(f"samples={self.samples} and mib={self.mib}: each says where a shard ends; take one of them")
        if self.mib is not None and self.encodes:
            raise ValueError(f"mib={self.mib}: how large pictures are once they are encoded anew is not known beforehand; take samples")
        if self.shuffle is not None and not 0 <= self.shuffle < 2**64:
            raise ValueError(f"shuffle={self.shuffle}: needs a seed, 0 <= seed < 2**64")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality}: needs 1 to 100")
        if self.quality != 90 and not self.encodes:
            raise ValueError(f"quality={self.quality}: bytes are copied unchanged; it takes effect with short_side_px or orientation=bake")

    @property
    def encodes(self) -> bool:
        """Whether any picture may be encoded anew."""
        return self.short_side_px is not None or self.orientation == "bake"

    @property
    def samples_per_shard(self) -> int:
        """Samples of every shard but the last, where `mib` does not say otherwise."""
        return self.samples or 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFacts:
    """What is known of a shard that is whole on the disk."""

    samples: int
    unlabeled: int
    bytes: int
    mtime_ns: int
    sha256: str
    left_out: tuple[QuarantineEntry, ...]  # found to be invalid on the way


def stored_picture(picture: SourcePicture, settings: PackSettings) -> SourcePicture:
    """Return a picture as it is to be stored; one that will not decode or encode has the reason in its header."""
    header = picture.header
    if header.reason:
        return picture
    short = min(header.height, header.width)
    shrinks = settings.short_side_px is not None and short > settings.short_side_px
    turns = settings.orientation == "bake" and header.orientation != 1
    if not (shrinks or turns):
        return picture
    try:
        pixels = decode_picture(picture.data, header.orientation if turns else 1)
        if sorted(pixels.shape[:2]) != sorted((header.height, header.width)):
            raise ValueError(f"to {pixels.shape[:2]}, its header says {(header.height, header.width)}")
        image = Image.fromarray(np.ascontiguousarray(pixels))
        if shrinks:
            factor = settings.short_side_px / short  # type: ignore[operator]  # it shrinks
            image = image.resize((_scaled(image.width, factor), _scaled(image.height, factor)), Image.Resampling.BICUBIC)
        encoded = _jpeg(image, settings.quality, 1 if turns else header.orientation)
    except DECODE_ERRORS as error:
        return replace(picture, header=PictureHeader(format=header.format, reason=f"does not decode: {printable(str(error))}"))
    upright = image.size if turns or header.orientation < 5 else image.size[::-1]
    kept = PictureHeader(format=FORMATS.index("jpeg"), height=upright[1], width=upright[0], orientation=1 if turns else header.orientation)
    return replace(picture, data=np.frombuffer(encoded, np.uint8), header=kept, extension="jpg")


def write_shard(path: Path, pictures: Iterable[SourcePicture]) -> ShardFacts:
    """Write a tar, DALI's index and ours; return what is known of it. The tar is on the disk itself, whole, before it has its name.

    Raises: OSError if it cannot be written, or does not read back as it was written; whatever reading the pictures raises.
    """
    from webdataset import TarWriter  # here: it takes long to import

    lengths: list[int] = []
    left_out: list[QuarantineEntry] = []
    unlabeled = 0
    with write_aside(path, fsync=True, concurrent=True) as aside:
        with aside.open("wb") as file:
            hashing = _HashingFile(file)
            with TarWriter(hashing, encoder=False, mtime=0) as tar:  # a time of 0.0 would cost a header more for each member
                for picture in pictures:
                    if picture.header.reason:
                        entry = QuarantineEntry(id=picture.id, key=picture.key, shard=picture.shard, reason=picture.header.reason)
                        left_out.append(entry)
                        continue
                    members = {"__key__": picture.key, picture.extension: picture.data.data}
                    if picture.label >= 0:
                        members["cls"] = str(picture.label).encode()
                    tar.write(members)
                    lengths.append(len(picture.data))
                    unlabeled += picture.label < 0
        listing = dali_index(aside)
    with write_aside(path.with_suffix(".idx"), fsync=True, concurrent=True) as aside:
        aside.write_bytes(listing)
    _index(path, lengths)
    status = path.stat()
    return ShardFacts(
        samples=len(lengths),
        unlabeled=unlabeled,
        bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sha256=hashing.digest.hexdigest(),
        left_out=tuple(left_out),
    )


def dali_index(tar: Path) -> bytes:
    """Return the index of a shard for DALI's WebDataset reader, as its wds2idx writes it.

    A line `v1.2 SAMPLES`, then one for each sample: extension, offset, length and name of each member. Names are as GNU tar lists them
    in UTF-8, and spaces as `\\040` too, for a name that holds one is more than DALI 2.4 can read.
    Source: wds2idx of DALI 2.4.
    """
    lines: list[list[str]] = []
    before = None
    path = os.fspath(tar)
    file = storage_of(path).open(path)
    try:
        for member in walk_tar(file, file.stamp().size):
            name = os.fsdecode(member.name)
            folder_end = name.rfind("/") + 1
            stem, _, extension = name[folder_end:].partition(".")
            if before != name[:folder_end] + stem:
                lines.append([])
                before = name[:folder_end] + stem
            lines[-1].append(f"{extension} {member.offset} {member.length} {_listed(name)}")
    finally:
        file.close()
    return "".join([f"v1.2 {len(lines)}\n", *(" ".join(line) + "\n" for line in lines)]).encode("utf-8", "surrogateescape")


def member_bytes(key: str, length: int, label: int) -> int:
    """Return what a sample takes in a tar, at most: headers, contents, PAX headers for a name that needs one."""
    name = len(os.fsencode(key)) + len(".webp")
    needs_pax = name > _USTAR_NAME or not key.isascii()
    pax = _BLOCK + -(-(name + len("12345 path=\n21 hdrcharset=BINARY\n")) // _BLOCK) * _BLOCK if needs_pax else 0
    picture = _BLOCK + -(-length // _BLOCK) * _BLOCK + pax
    return picture + (2 * _BLOCK + pax if label >= 0 else 0)


def _listed(name: str) -> str:
    """Return a member's name as GNU tar lists it in UTF-8, spaces escaped like whatever cannot be printed."""
    return "".join(map(_listed_letter, name))


def _listed_letter(letter: str) -> str:
    if letter == "\\":
        return "\\\\"
    return letter if letter.isprintable() and letter != " " else "".join(f"\\{byte:03o}" for byte in os.fsencode(letter))


def _scaled(side: int, factor: float) -> int:
    return max(round(side * factor), 1)


def _jpeg(image: Image.Image, quality: int, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = orientation
    encoded = io.BytesIO()
    tags = exif.tobytes() if orientation != 1 else b""
    image.save(encoded, "JPEG", quality=quality, subsampling=_SUBSAMPLING, exif=tags)
    return encoded.getvalue()


class _HashingFile:
    """A file that knows the checksum of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


def _index(path: Path, lengths: list[int]) -> None:
    """Store our own index of a shard, and see by it that the shard is what was written."""
    [stored] = gather_tables([str(path)], cache=None, beside=True, rebuild=True, decode=False, workers=1, progress=None)
    table = stored.table
    if table.length.tolist() != lengths or len(table.invalid):
        raise OSError(f"{path}: does not read back as it was written; see that its disk is healthy, delete it and pack again")
