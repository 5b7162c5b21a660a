"""Where the members of a tar lie.

Here: a walk over the 512-byte headers (ustar, GNU and PAX names and sizes) that yields name, offset and length, in file order.
Not here: extraction (nothing of ours extracts), what the members mean (index.py).
The archive is hostile until shown otherwise: the walk only goes forward, reads by position, and stops with `TarError` at the first thing
that is not as it should be. Written against POSIX.1-2001 pax and the GNU tar manual; tests hold it to Python's tarfile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from wherefrom.pipeline.shards.storage import StoredFile, read_at

__all__ = ["Member", "TarError", "walk_tar"]

_BLOCK = 512
_ZERO_BLOCK = bytes(_BLOCK)
_MAX_META_BYTES = 2**20  # of one PAX or long-name header
_LOOK_PAST_END = 2**16  # bytes looked at behind the end mark

_Kind = Literal["file", "folder", "link", "device", "member of an unknown type"]
_KINDS: dict[bytes, _Kind] = {b"0": "file", b"\0": "file", b"7": "file", b"1": "link", b"2": "link", b"3": "device", b"4": "device"}
_KINDS |= {b"5": "folder", b"6": "device"}
_WITHOUT_DATA = b"123456"


class TarError(ValueError):
    """The archive is not a whole, plain tar; the message says where and why, without the archive's name."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar: its name as raw bytes, and the place of its content in the file."""

    name: bytes
    offset: int
    length: int
    kind: _Kind


def walk_tar(file: StoredFile, size: int) -> Iterator[Member]:
    """Yield the members of a tar that is `size` bytes long, up to its end mark.

    A tar without an end mark was cut short, even if the cut fell between two members.
    Raises: TarError for anything but a whole, uncompressed tar of plain members.
    """
    at, global_records, records = 0, dict[bytes, bytes](), dict[bytes, bytes]()
    while (block := read_at(file, at, _BLOCK)) != _ZERO_BLOCK:
        if len(block) < _BLOCK:
            raise TarError(f"is cut short: it stops at byte {at + len(block)} without an end mark" if size else "is empty (0 bytes)")
        if not _checksum_holds(block):
            raise TarError(f"has a damaged header at byte {at}" if at else "is not an uncompressed tar (its first header makes no sense)")
        kind, length = block[156:157], _number(block[124:136], at)
        if kind in b"xXgLK":
            body = _read_meta(file, at, length, size)
            if kind == b"g":
                global_records |= _pax_records(body, at)
            elif kind in b"xX":
                records |= _pax_records(body, at)
            elif kind == b"L":
                records[b"path"] = body.split(b"\0", 1)[0]
        else:
            merged = global_records | records
            if kind == b"S" or any(name.startswith(b"GNU.sparse.") for name in merged):
                raise TarError(f"has a sparse member at byte {at}, which is not read")
            length = _decimal(merged[b"size"], at) if merged.get(b"size") else length
            length = 0 if kind in _WITHOUT_DATA else length
            if at + _BLOCK + length > size:
                missing = at + _BLOCK + length - size
                raise TarError(f"is cut short: the member at byte {at} lacks {missing} of its {length} bytes")
            name = merged.get(b"path") or _header_name(block)
            is_folder = kind == b"\0" and name.endswith(b"/")
            yield Member(name, at + _BLOCK, length, "folder" if is_folder else _KINDS.get(kind, "member of an unknown type"))
            records = {}
        at += _BLOCK + -(-length // _BLOCK) * _BLOCK
    if records:
        raise TarError(f"ends at byte {at} between a member's names and the member")
    _refuse_joined_tars(file, at)


def _checksum_holds(block: bytes) -> bool:
    """Compare with the unsigned sum of the POSIX standard, or with the signed one that some old tars wrote."""
    field = block[148:156].strip(b" \0")
    if not field or field.strip(b"01234567"):
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    named, unsigned = int(field, 8), sum(rest)
    return named == unsigned or named == unsigned - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes, at: int) -> int:
    """Read an octal number, or GNU's base 256, which sets the first bit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise TarError(f"has a damaged header at byte {at} (a size of {field!r})")
    return int(digits or b"0", 8)


def _decimal(digits: bytes, at: int) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise TarError(f"has a damaged PAX header at byte {at} (a length of {digits[:20]!r})")
    return int(digits)


def _header_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0]
    # GNU's magic ("ustar  ") keeps other fields where POSIX keeps the prefix
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _read_meta(file: StoredFile, at: int, length: int, size: int) -> bytes:
    if length > _MAX_META_BYTES:
        raise TarError(f"has a name header of {length} bytes at byte {at}; {_MAX_META_BYTES} are the limit")
    body = read_at(file, at + _BLOCK, length)
    if len(body) < length:
        raise TarError(f"is cut short: it stops at byte {size} inside a name header")
    return body


def _pax_records(body: bytes, at: int) -> dict[bytes, bytes]:
    """Read the `LENGTH KEY=VALUE` lines of a PAX header; LENGTH counts the whole line."""
    records = {}
    start = 0
    while start < len(body) and body[start]:
        digits, space, _ = body[start : start + 21].partition(b" ")
        end = start + _decimal(digits, at)
        line = body[start + len(digits) + 1 : end - 1]
        if not space or end > len(body) or body[end - 1 : end] != b"\n" or b"=" not in line:
            raise TarError(f"has a damaged PAX header at byte {at}")
        name, _, value = line.partition(b"=")
        records[name] = value
        start = end
    return records


def _refuse_joined_tars(file: StoredFile, end: int) -> None:
    """Refuse a second tar behind the end mark: readers stop at the mark, and its samples would be lost without a word."""
    tail = read_at(file, end + _BLOCK, _LOOK_PAST_END)
    for at in range(0, len(tail) - _BLOCK + 1, _BLOCK):
        block = tail[at : at + _BLOCK]
        if block != _ZERO_BLOCK:
            if _checksum_holds(block):
                raise TarError(f"goes on with another tar behind its end mark at byte {end}")
            return
