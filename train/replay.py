"""Any update of a run, once more: the samples and views of its batch, from the run's folder and its data alone.

Here: finding them from settings.yaml and the position that the run wrote down, whatever process, machine or GPU made the run.
Not here: drawing them for eyes (tools/replay.py); what a checkpoint holds (checkpoint.py).
Updates are counted as in metrics.jsonl: update N is the N-th that was completed, the first is 1. Its batch is the whole global batch, of
all ranks and micro-batches in their order.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wherefrom.pipeline.demo.shards import demo_shards
from wherefrom.pipeline.literals import check_literal
from wherefrom.pipeline.loader import Loader, make_loader
from wherefrom.pipeline.order import Order
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.choose import choose_renderer, renderer_entry
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Batch, Record
from wherefrom.train import checkpoint
from wherefrom.train.objective import united_families
from wherefrom.train.plain_data import Plain
from wherefrom.train.run_folder import RunFolder, read_metrics, start_of
from wherefrom.train.settings import TrainSettings, read_settings

log = logging.getLogger(__name__)

EPOCHS_SEARCHED = 1000  # in each direction: an epoch's remainder is dropped, and may hold a sample now and then


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Replay:
    """An update found again: which samples, where in the run, and the loader that makes their views; a context manager that closes it."""

    settings: TrainSettings
    loader: Loader  # of one rank and one micro-batch: neither changes a view
    update: int
    updates: int  # of the whole run
    ids: NDArray[np.int64]  # (B,) the samples drawn for, B the global batch
    notes: tuple[str, ...]  # what may make pixels other than the run's, each in a line; mostly none

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()

    @property
    def epoch(self) -> int:
        """The epoch whose draws these are."""
        return (self.update - 1) // self.loader.updates_per_epoch

    @property
    def step(self) -> int:
        """The update's number within its epoch, from 0."""
        return (self.update - 1) % self.loader.updates_per_epoch

    def batch(self, ids: Sequence[int] | NDArray[np.int64] | None = None) -> Batch:
        """Return the views of these samples, some of the update's (default: all, in their order), as the run had them."""
        return self.loader.batch(self.ids if ids is None else np.asarray(ids, np.int64), epoch=self.epoch)

    def records(self, batch: Batch) -> tuple[Record, ...]:
        """Return the records by which the views of a batch were rendered, one a family; they also tell which views kept their law."""
        return draw_records(
            self.loader.recipe,
            seed=self.settings.seed,
            epoch=self.epoch,
            drawn_for=batch.drawn_for.numpy(force=True),
            sample=batch.sample.numpy(force=True),
            source_size=batch.source_size.numpy(force=True),
            stored_orientation=batch.views[0].geometry.stored_orientation.numpy(force=True),
        )

    def check_holds(self, sample: int) -> None:
        """Refuse a sample that the update's batch does not hold.

        Raises: ValueError in one line that names the nearest updates that do, or says that there is no such sample.
        """
        if sample in self.ids:
            return
        count = self.loader.order.samples
        if not 0 <= sample < count:
            raise ValueError(f"sample {sample} of {count}; samples are numbered 0 to {count - 1}")
        nearest = _nearest_showing(self.loader.order, sample, self.update, self.updates)
        shown = " and ".join(f"update {update} (epoch {(update - 1) // self.loader.updates_per_epoch})" for update in nearest)
        where = f"it is in {shown}" if nearest else f"no update of the run, which has {self.updates}, holds it"
        raise ValueError(f"sample {sample} is not in update {self.update} (epoch {self.epoch}); {where}")


def open_replay(run: str | PathLike[str], update: int, *, data: str | None = None, threads: int | None = None) -> Replay:
    """Find an update of a run again; update 1 is the first.

    run: its folder. data: where its data lies, if no longer where the settings say. threads: as for `make_loader`.
    Raises: ValueError or OSError in one line, if there is no such run or update, or the data is not what the run learned from.
    """
    check_literal("update", update, int)
    folder = RunFolder(Path(run))
    if not folder.settings.is_file():
        raise ValueError(f"{folder.path}: holds no {folder.settings.name}; name the folder of a run, such as runs/demo-0")
    settings = read_settings(folder.settings, TrainSettings(recipe="the file's"))
    start, position = _told(folder, update)
    renderer, device, notes = _renderer_here(position.get("renderer", settings.runtime.renderer), start, settings)
    loader = make_loader(
        _index_of(settings, data, position, folder),
        ViewRecipe(families=united_families(settings.make_objectives())),
        seed=settings.seed,
        global_batch=settings.global_batch,
        order=settings.order,
        renderer=renderer,
        threads=threads,
        device=device,
    )
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(loader.close)
        notes = [*notes, *_agreeing(loader, position, folder)]
        updates = settings.updates_in_all(loader.updates_per_epoch)
        if not 1 <= update <= updates:
            raise ValueError(f"update {update} of {updates}: updates are numbered 1 to {updates}, as in {folder.metrics.name}")
        notes += _not_made_yet(folder, update)
        epoch, step = divmod(update - 1, loader.updates_per_epoch)
        ids = loader.order.micro_batch(epoch, step, 0)
        on_failure.pop_all()
    return Replay(settings=settings, loader=loader, update=update, updates=updates, ids=ids, notes=tuple(notes))


def replayed_batch(
    run: str | PathLike[str], update: int, *, samples: Sequence[int] | None = None, data: str | None = None, threads: int | None = None
) -> Batch:
    """Return the batch from which a run made an update: the very samples, records and pixels, of all ranks and micro-batches.

    update: counted as in metrics.jsonl, the first is 1. samples: some of the batch's; None: all. data, threads: as `open_replay`.
    Pixels are the run's, bit for bit, where the renderer that made them runs here; else another one's, which is logged as a warning.
    Raises: as `open_replay`; ValueError if a sample is not in the batch, naming the nearest updates that have it.
    """
    with open_replay(run, update, data=data, threads=threads) as replay:
        for sample in () if samples is None else samples:
            replay.check_holds(sample)
        for note in replay.notes:
            log.warning("%s", note)
        return replay.batch(samples)


def _told(folder: RunFolder, update: int) -> tuple[Mapping[str, Plain], dict[str, Any]]:
    """Return the line of the start after which an update was made, and a position of the run; both empty where none is kept."""
    start = start_of(folder, update)
    position = start.get("position")
    if not isinstance(position, dict):  # a run of before positions were logged
        newest = checkpoint.latest(folder.checkpoints)
        position = {} if newest is None else checkpoint.read_state(newest).position
    return start, position


def _renderer_here(wanted: str, start: Mapping[str, Plain], settings: TrainSettings) -> tuple[str, str, list[str]]:
    """Return which renderer serves in place of the run's, on which device, and a note if pixels will not be the run's."""
    entry = None if wanted == "auto" else renderer_entry(wanted)
    if entry is None:
        return wanted, "cpu", ["which renderer served is not written down: pixels may differ by rounding"]
    on_gpu = "cuda" in entry.devices and start.get("device", settings.runtime.device) != "cpu"
    if on_gpu and torch.cuda.is_available() and entry.missing() is None:
        return wanted, "cuda", []
    lacks = entry.missing() if "cpu" in entry.devices else entry.missing() or "it needs a GPU"
    if lacks is None:
        return wanted, "cpu", [f"the {wanted} renderer worked on a GPU, and works on the CPU here: pixels differ by rounding"] * on_gpu
    name, _ = choose_renderer("auto", torch.device("cpu"))
    return name, "cpu", [f"rendered by {name}, for {wanted}, the run's, cannot run here ({lacks}): pixels differ by rounding"]


def _index_of(settings: TrainSettings, data: str | None, position: Mapping[str, Any], folder: RunFolder) -> ShardIndex:
    """Return the index of the run's data, or of where that lies now.

    Raises: OSError if it is not there; ValueError that names both fingerprints, if it is other data than the position's.
    """
    place = data or settings.data or demo_shards().train
    try:
        index = ShardIndex.open(place, labels=settings.labels)
    except FileNotFoundError as problem:
        if data is not None:
            raise
        raise FileNotFoundError(f"{problem}; if the run's data lies elsewhere now, name it by --data") from None
    if position and position.get("dataset") != index.fingerprint:
        raise ValueError(
            f"{place} has the fingerprint {index.fingerprint}, the data that {folder.path} learned from has {position.get('dataset')}; "
            "restore that, or name where it lies by --data"
        )
    return index


def _agreeing(loader: Loader, position: dict[str, Any], folder: RunFolder) -> list[str]:
    """Return what must be said of a loader that is to show what a run saw from a position.

    Raises: ValueError that names what differs, if it would show something else.
    """
    if not position:
        return [f"{folder.path} holds no position: whether the data is still what it learned from is not known"]
    here, notes = loader.position(), []
    if (position.get("decoding"), here["decoding"]) == ("lenient", "strict"):
        position = position | {name: here[name] for name in ("decoding", "invalid")}
        notes.append("the run's decoder on the GPU may have shown damaged pictures in part, which are replaced here")
    try:
        loader.resume(position)
    except ValueError as problem:
        raise ValueError(f"{folder.path}: {problem}") from None
    return notes


def _not_made_yet(folder: RunFolder, update: int) -> list[str]:
    made = max((record["update"] for record in read_metrics(folder, "train")), default=0)
    return [f"update {update} is not in the log, which ends at {made}: this is what it will see"] * (update > made)


def _nearest_showing(order: Order, sample: int, update: int, updates: int) -> list[int]:
    """Return the last update before `update` and the first after it whose batch holds a sample, of those there are."""
    ids = np.array([sample], np.int64)
    epoch = (update - 1) // order.updates_per_epoch

    def showing(epochs: Iterable[int]) -> Iterator[int]:
        for each in epochs:
            step = int(order.positions(each, ids)[0]) // order.global_batch
            if step < order.updates_per_epoch:  # else it is in the remainder, which no batch takes
                yield each * order.updates_per_epoch + step + 1

    last = (updates - 1) // order.updates_per_epoch
    before = (each for each in showing(range(epoch, max(epoch - EPOCHS_SEARCHED, -1), -1)) if each < update)
    after = (each for each in showing(range(epoch, min(epoch + EPOCHS_SEARCHED, last + 1))) if update < each <= updates)
    return [found for found in (next(before, None), next(after, None)) if found is not None]
