"""Which folders and pictures a folder tree has.

Here: the walk over folders, links followed, in the order of torchvision's ImageFolder; whether folders are as they were.
Not here: the pictures' bytes and the table of a tree (tree.py), tars (tar_members.py).
The tree is hostile until shown otherwise: the walk is bounded, ends where links lead back, and opens nothing but folders. What is passed
over is counted; hidden names, which begin with a dot, are passed over in silence, anything else aloud.
"""

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from wherefrom.pipeline.shards.table import count_unread, printable

__all__ = ["UNSETTLED", "Folder", "FolderListing", "folders_are_as_they_were", "joined", "list_folders"]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # in any case
MAX_FOLDERS = 10**6  # links to folders multiply them
MAX_PICTURES = 5 * 10**7
UNSETTLED = -1  # in place of an mtime: look again next time

_SETTLED_NS = 2 * 10**9  # a folder that changed within this time may change again without another mtime: no disk's clock is coarser
_OF_ONE_FOLDER = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}  # no sign of an ill disk


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder of a tree and the pictures that lie in it, not below it."""

    path: str  # relative to the root, "" for the root itself
    version: int  # mtime in ns, or UNSETTLED
    names: bytes  # of its pictures, in order, a NUL between two: for millions of them, no Python object each

    @property
    def count(self) -> int:
        """How many pictures."""
        return self.names.count(b"\0") + 1 if self.names else 0

    def pictures(self) -> list[bytes]:
        """Return the names of its pictures."""
        return self.names.split(b"\0") if self.names else []


@dataclass(slots=True)
class FolderListing:
    """What a walk found: folders in order, how much of what is not read, and the first name of each kind that is passed over aloud."""

    root: str
    folders: list[Folder] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    passed_over: dict[str, str] = field(default_factory=dict)

    def pass_over(self, kind: str, path: str) -> None:
        """Count something of the tree that is not followed or opened, aloud."""
        self.unread[kind] += 1
        self.passed_over[kind] = min(path, self.passed_over.get(kind, path))  # not the first met: disks list names in any order


class _Place(NamedTuple):
    """A folder and those that it lies in, as the disk knows them."""

    identity: tuple[int, int]  # device, inode
    outer: "_Place | None"

    def leads_back(self) -> bool:
        outer = self.outer
        while outer is not None and outer.identity != self.identity:
            outer = outer.outer
        return outer is not None


def list_folders(root: str) -> FolderListing:
    """Walk the folders of a tree, those behind links too.

    The order is that of torchvision's ImageFolder: the root, then class by class every folder and in it every name, as Python strings.
    Raises: OSError if the root cannot be read, or the disk fails; ValueError if there are too many folders or pictures.
    Source: torchvision 0.29, datasets.folder.make_dataset.
    """
    listing = FolderListing(root)
    waiting: list[tuple[str, _Place | None]] = [("", None)]
    pictures = 0
    while waiting:
        path, outer = waiting.pop()
        try:
            status = os.stat(joined(root, path))
            place = _Place((status.st_dev, status.st_ino), outer)
            if place.leads_back():
                listing.pass_over("link that leads back", path)
                continue
            version = status.st_mtime_ns if time.time_ns() - status.st_mtime_ns > _SETTLED_NS else UNSETTLED  # before it is listed
            names, inner = _list_folder(listing, path)
        except OSError as error:
            if not path or error.errno not in _OF_ONE_FOLDER:
                where, reason = printable(joined(root, path)), error.strerror or error
                raise OSError(f"{where}: cannot be read ({reason}); see that you may read it and that its disk is healthy") from error
            listing.pass_over("unreadable folder", path)
            version, names, inner = UNSETTLED, [], []
        listing.folders.append(Folder(path, version, b"\0".join(map(os.fsencode, names))))
        waiting += ((name, place) for name in inner)
        pictures += len(names)
        if len(listing.folders) + len(waiting) > MAX_FOLDERS or pictures > MAX_PICTURES:
            bounds = f"{MAX_FOLDERS} folders or {MAX_PICTURES} pictures, folders behind links counted"
            raise ValueError(f"{root}: has more than {bounds}; name a part of it, or pack it into shards by parts")
    listing.folders.sort(key=lambda folder: (folder.path.partition("/")[0], folder.path))
    return listing


def _list_folder(listing: FolderListing, path: str) -> tuple[list[str], list[str]]:
    """Return the names of a folder's pictures, sorted, and the paths of the folders in it; count the rest."""
    pictures, folders = [], []
    prefix = f"{path}/" if path else ""
    with os.scandir(joined(listing.root, path)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                count_unread(listing.unread, "hidden")
                continue
            kind = _kind(entry)
            if kind == "folder":
                folders.append(prefix + entry.name)
            elif kind != "file":
                listing.pass_over(kind, prefix + entry.name)
            elif entry.name.lower().endswith(PICTURE_SUFFIXES):
                pictures.append(entry.name)
            else:
                suffix = os.path.splitext(entry.name)[1][1:].lower().encode("ascii", "backslashreplace").decode()[:24]
                count_unread(listing.unread, suffix or "(no extension)")
    pictures.sort()
    return pictures, folders


def _kind(entry: os.DirEntry[str]) -> str:
    """Return what a name stands for, links followed."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        mode = entry.stat().st_mode
    except OSError:  # of links alone: to nothing, to themselves, or past a folder that may not be entered
        return "broken link"
    return "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"


def folders_are_as_they_were(root: str, folders: Iterable[str], versions: Iterable[int]) -> bool:
    """Say whether all folders still have their mtimes: then no name was added or taken away in any of them."""
    try:
        return all(
            version != UNSETTLED and os.stat(joined(root, path)).st_mtime_ns == version
            for path, version in zip(folders, versions, strict=True)
        )
    except OSError:
        return False


def joined(root: str, path: str) -> str:
    """Return the path of what lies at `path` below the root."""
    return os.path.join(root, path) if path else root
