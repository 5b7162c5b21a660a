"""Checkpoints: the whole state after an update, whole on disk or not there at all.

Here: writing aside, syncing, renaming, then the name in `latest`; the newest k are kept; loading into what has the same shape.
Not here: when (loop.py); the run folder around them (run_folder.py).
A checkpoint is a folder `update-00000500`: weights.safetensors, optimizer.pt (tensors and numbers only), state.json.
"""

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wherefrom.pipeline.files import sync_to_disk, write_aside
from wherefrom.train.disk import DiskFullError, save_weights, writing
from wherefrom.train.plain_data import Plain

FORMAT = 2  # of state.json; a checkpoint of another format is refused
LATEST = "latest"
TENSORS = ("weights.safetensors", "optimizer.pt")
WRITING = ".writing"  # the folder that a save is made in; whatever is left in it was never finished
REMOVING = ".removing"
MEND = f"go back to an older checkpoint by writing its name into {LATEST}"


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a run needs to go on, besides tensors; all of it plain data."""

    update: int  # completed updates
    settings: Plain  # of the run, as `to_plain` gives them
    position: Plain  # of the loader: fingerprints of data and views, seed, batch
    unlogged: list[dict[str, float]]  # losses and meters of the updates since the last line of the log, oldest first
    seconds: dict[str, float]  # spent so far, by what on


def save(folder: Path, state: State, weights: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int) -> Path:
    """Save into `folder`, point `latest` at it, remove all but the newest `keep`; return the checkpoint's path.

    Killed at any moment, `latest` names a complete checkpoint or is not there.
    Raises: DiskFullError if there is no room for another one; the earlier ones are as they were, and what was begun is gone.
    """
    aside, final = folder / WRITING, folder / f"update-{state.update:08d}"
    try:
        with writing(final):
            _write(aside, state, weights, optimizer)
    except DiskFullError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _remove(final)  # one that a kill kept out of `latest`
    os.rename(aside, final)
    sync_to_disk(folder)
    _point_to(folder, final.name)
    saved = _checkpoints(folder)
    newest = saved.index(final) + 1
    for other in saved[: max(0, newest - keep)] + saved[newest:]:  # later ones were kept out of `latest`, too
        _remove(other)
    return final


def _write(aside: Path, state: State, weights: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make a whole checkpoint in `aside`, down to the disk."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_weights(aside / "weights.safetensors", weights.state_dict())
    with (aside / "optimizer.pt").open("wb") as file:  # by name, torch would not say why it cannot
        torch.save(optimizer.state_dict(), file)
    plain = {"format": FORMAT, "crc32": {name: _crc32(aside / name) for name in TENSORS}} | {
        name: getattr(state, name) for name in State.__slots__
    }
    (aside / "state.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    for path in (*aside.iterdir(), aside):
        sync_to_disk(path)


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None.

    Raises: ValueError if `latest` names one that is not there.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    path = folder / pointer.read_text(encoding="utf-8").strip()
    if not (path / "state.json").is_file():
        raise ValueError(f"{pointer}: names {path.name}, which is not there; write the name of one that is into it")
    return path


def read_state(checkpoint: Path) -> State:
    """Return a checkpoint's state.

    Raises: ValueError if it is of another format, or damaged.
    """
    return _read(checkpoint)[0]


def _read(checkpoint: Path) -> tuple[State, dict[str, int]]:
    """Return a checkpoint's state and the checksums of its other files."""
    path = checkpoint / "state.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        version = plain.pop("format")
        if version != FORMAT:
            raise ValueError(f"{path}: is of format {version}, this wherefrom reads format {FORMAT}; use the version that wrote it")
        return State(**{name: plain[name] for name in State.__slots__}), plain["crc32"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path}: damaged ({problem}); {MEND}") from None


def load(checkpoint: Path, weights: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state in place.

    Raises: ValueError that names the damaged file, or the first weight that differs in shape or is on one side only.
    """
    _, checksums = _read(checkpoint)
    for name in TENSORS:
        path = checkpoint / name
        if not path.is_file() or _crc32(path) != checksums[name]:
            raise ValueError(f"{path}: damaged (its checksum is not that of state.json); {MEND}")
    stored = load_file(checkpoint / "weights.safetensors")
    moments = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    own = weights.state_dict()
    for name in sorted(own.keys() | stored.keys()):
        here, there = (_shape(tensors.get(name)) for tensors in (own, stored))
        if here != there:
            raise ValueError(f"{name} is {here} in this model and {there} in {checkpoint.name}; the model's settings differ")
    weights.load_state_dict(stored)
    optimizer.load_state_dict(moments)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("update-*"))


def _point_to(folder: Path, name: str) -> None:
    with write_aside(folder / LATEST, fsync=True) as aside:
        aside.write_text(name + "\n", encoding="utf-8")


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, so that none is ever seen in part."""
    if checkpoint.exists():
        aside = checkpoint.with_name(REMOVING)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
        shutil.rmtree(aside)
