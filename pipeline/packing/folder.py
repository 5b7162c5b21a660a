"""The folder that is packed into: the plan that a second run goes on by, which shards are finished, what lies beside them.

Here: `PackFolder`, what it refuses, and what it makes of shards that are all there.
Not here: the shards themselves (shard.py), who writes which (pack.py).
The plan and the facts of finished shards lie in `.pack`. Facts are written after their shard is whole on the disk, and `_info.json` after
all of them; so what is half is never taken for finished, whoever was killed when.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.packing.shard import ShardFacts
from wherefrom.pipeline.shards.index import QuarantineEntry
from wherefrom.pipeline.shards.store import printable

__all__ = ["CLASSES", "INFO", "LEFT_OUT", "PackFolder", "Plan"]

INFO, CLASSES, LEFT_OUT = "_info.json", "classes.json", "left_out.jsonl"

_FOLDER, _PLAN, _UNFINISHED = ".pack", "plan.json", ".writing"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAY_ON = "give the same again to go on, or name another folder"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done. Two runs that go on with one another agree in all of it but `made`."""

    name: str  # of the shards
    settings: Mapping[str, Any]
    source: Mapping[str, Any]  # fingerprint, samples, classes
    made: Mapping[str, str]  # from what, by which versions

    @functools.cached_property
    def digest(self) -> str:
        """Hash what the bytes of shards depend on."""
        decisive = {"name": self.name, "settings": dict(self.settings), "source": dict(self.source)}
        return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class PackFolder:
    """The places of a folder that is packed into."""

    path: Path
    name: str

    @classmethod
    def of(cls, path: Path, name: str | None) -> "PackFolder":
        """Check the name of the shards; default: the folder's where that can be one, else train. Raises: ValueError."""
        if name is None:
            own = path.resolve().name
            name = own if _NAME.fullmatch(own) and "tar" not in own else "train"
        if not _NAME.fullmatch(name) or "tar" in name:
            raise ValueError(f"name={name!r}: needs letters, digits, - and _, and no 'tar', by which timm knows a pattern; e.g. train")
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is a file; name a folder that is empty or new")
        return cls(path, name)

    def shard(self, number: int) -> Path:
        """Return the place of a shard's tar; its other files have the same name but for the suffix."""
        return self.path / f"{self.name}-{number:06d}.tar"

    def refuse_others(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError if the folder holds what is not ours, or what was begun with other settings."""
        plan = self.plan()
        if plan is not None:
            _refuse_difference(self.path, plan, replace(plan, name=self.name, settings=settings))
        shown = sorted(entry for entry in os.listdir(self.path) if not entry.startswith(".")) if self.path.is_dir() else []
        if shown and plan is None:
            raise ValueError(f"{self.path}: is not empty (it holds {printable(shown[0])}); name a folder that is empty or new")
        ours = re.compile(rf"{self.name}-\d{{6,}}\.(tar|idx)|{INFO}|{CLASSES}|{LEFT_OUT}")
        others = [entry for entry in shown if not ours.fullmatch(entry)]
        if others:
            raise ValueError(f"{self.path}: holds {printable(others[0])}, which is not of this pack; move it, or name another folder")

    def plan(self) -> Plan | None:
        """Return the plan, None if nothing was begun. Raises: ValueError if it is damaged."""
        path = self.path / _FOLDER / _PLAN
        try:
            plan = json.loads(path.read_text(encoding="ascii"))
            return Plan(name=plan["name"], settings=dict(plan["settings"]), source=dict(plan["source"]), made=dict(plan["made"]))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: is damaged; empty the folder, or pack into another") from error

    def begin(self, plan: Plan) -> Plan:
        """Record what is to be done, and return what is recorded. Raises: ValueError if that is anything else."""
        (self.path / _FOLDER).mkdir(parents=True, exist_ok=True)
        if self.plan() is None:
            _write(self.path / _FOLDER / _PLAN, _json(asdict(plan)))
        recorded = self.plan() or plan
        _refuse_difference(self.path, recorded, plan)
        return recorded

    def sweep(self, part: tuple[int, int]) -> None:
        """Remove what killed processes left half of the shards of this part; where there is one part, all that they left."""
        shard_of = re.compile(rf"\.{self.name}-(\d{{6,}})\.(?:tar|idx|json)\..*{_UNFINISHED}")
        for folder in (self.path, self.path / _FOLDER):
            for entry in os.listdir(folder):
                shard = shard_of.fullmatch(entry)
                own = entry.endswith(_UNFINISHED) if part == (0, 1) else shard is not None and int(shard[1]) % part[1] == part[0]
                if own:
                    (folder / entry).unlink(missing_ok=True)

    def finished(self, number: int, plan: Plan) -> ShardFacts | None:
        """Return what is known of a finished shard; None if it is not finished, or was changed since.

        A shard that has another time but the same bytes is finished: its new time is recorded.
        """
        path = self.shard(number)
        try:
            noted = json.loads(self._facts(number).read_text(encoding="ascii"))
            left_out = tuple(QuarantineEntry(**entry) for entry in noted["left_out"])
            facts = ShardFacts(**(noted["shard"] | {"left_out": left_out}))
            status = path.stat()
            is_same = noted["plan"] == plan.digest and status.st_size == facts.bytes and path.with_suffix(".idx").is_file()
            is_touched = is_same and status.st_mtime_ns != facts.mtime_ns  # copied, or written to
            if is_touched:
                with path.open("rb") as file:
                    is_same = hashlib.file_digest(file, "sha256").hexdigest() == facts.sha256
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        if is_same and is_touched:
            facts = replace(facts, mtime_ns=status.st_mtime_ns)
            self.note_finished(number, facts, plan)
        return facts if is_same else None

    def note_finished(self, number: int, facts: ShardFacts, plan: Plan) -> None:
        """Record that a shard is finished, and what is known of it."""
        shard = asdict(facts)
        _write(self._facts(number), _json({"plan": plan.digest, "left_out": shard.pop("left_out"), "shard": shard}))

    def forget(self, number: int) -> None:
        """Take back that a shard is finished, and with it that all are."""
        for path in (self.path / INFO, self._facts(number)):
            path.unlink(missing_ok=True)

    def remove_from(self, number: int) -> None:
        """Remove the shards from a number on, which an earlier run made of more samples."""
        while self.shard(number).exists():
            self.forget(number)
            for path in (self.shard(number).with_suffix(".idx"), self.shard(number)):
                path.unlink(missing_ok=True)
            number += 1

    def complete(self, facts: Sequence[ShardFacts], left_out: Sequence[QuarantineEntry], plan: Plan) -> None:
        """Write what lies beside the shards, which are all there: what is left out, the classes, `_info.json` as timm reads it."""
        names, lengths = [self.shard(number).name for number in range(len(facts))], [each.samples for each in facts]
        classes = plan.source["classes"]
        for path, content in (
            (self.path / LEFT_OUT, "".join(json.dumps(asdict(entry)) + "\n" for entry in left_out)),
            (self.path / CLASSES, _json({name: number for number, name in enumerate(classes)}) if classes else ""),
        ):
            if content:
                _write(path, content)
            else:
                path.unlink(missing_ok=True)
        done = {
            **plan.made,
            "settings": plan.settings,
            "source": {name: value for name, value in plan.source.items() if name != "classes"},
            "left_out": len(left_out),
            "unlabeled": sum(each.unlabeled for each in facts),
            "sha256": dict(zip(names, (each.sha256 for each in facts), strict=True)),
        }
        split = {"name": self.name, "filenames": names, "shard_lengths": lengths, "num_samples": sum(lengths)}
        _write(self.path / INFO, _json({"splits": {self.name: split}, "classes": classes, "pack": done}))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Say in one line what to do about a disk that is full inside, or another process that packs the same shards.

        Raises: OSError; every other failure as it comes.
        """
        try:
            yield
        except FileNotFoundError as error:
            if not str(error.filename).endswith(_UNFINISHED):
                raise
            raise OSError(f"{self.path}: another process packs the same shards; let it finish, or give each its own part") from error
        except OSError as error:
            if error.errno not in _FULL:
                raise
            existing = next(above for above in (self.path, *self.path.absolute().parents) if above.is_dir())
            room = f"({os.strerror(error.errno)}), {shutil.disk_usage(existing).free / 1e6:.1f} MB are free there"
            raise OSError(f"{self.path}: cannot be written {room}; make room, then give the same again: it goes on") from error

    def _facts(self, number: int) -> Path:
        return self.path / _FOLDER / f"{self.name}-{number:06d}.json"


def _refuse_difference(folder: Path, begun: Plan, now: Plan) -> None:
    """Raise ValueError that names the first thing in which a plan is not the one that the folder was begun with."""
    pairs = {"name": (begun.name, now.name)} | {key: (begun.settings.get(key), value) for key, value in now.settings.items()}
    for key, (before, value) in pairs.items():
        if before != value:
            raise ValueError(f"{folder}: was begun with {key}={before}, now {value}; {_WAY_ON}")
    if now.source != begun.source:
        which = "classes" if now.source["fingerprint"] == begun.source.get("fingerprint") else "pictures"
        raise ValueError(f"{folder}: was begun from other {which} than {now.made['from']} has, or they have changed since; {_WAY_ON}")


def _json(what: Mapping[str, Any]) -> str:
    return json.dumps(what, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    with write_aside(path, fsync=True, concurrent=True) as aside:
        aside.write_text(text, encoding="ascii")
