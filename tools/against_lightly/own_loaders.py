"""Whole runs of our methods and of lightly's, each with its own loader, judged by the same code: one JSON file a run.

Here: the settings of a run, both sides' runs, what is kept of one.
Not here: their modules and views (theirs.py), the judge (judge.py), what runs say together (report.py).
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools.against_lightly.judge import PROTOCOL, judge
from wherefrom.tools.against_lightly.same_batches import common_settings
from wherefrom.tools.against_lightly.theirs import THEIRS, Method, their_transform
from wherefrom.tools.against_lightly.updates import TheirUpdates
from wherefrom.tools.machine import machine
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.loop import run
from wherefrom.train.objective import random_scope
from wherefrom.train.plain_data import to_plain
from wherefrom.train.pretrained import load_weights
from wherefrom.train.reporting import Reporter
from wherefrom.train.run_folder import RunFolder, read_metrics
from wherefrom.train.settings import EvaluationSettings, TrainSettings

Side = Literal["ours", "theirs"]

UPDATES: dict[Method, int] = {"simclr": 800, "dino": 600, "mae": 1000}  # what one core makes in minutes
LOG_EVERY = 10  # updates, over which a loss is a mean
PACKAGES = ("wherefrom", "lightly", "torch", "torchvision", "timm", "pillow", "pillow-simd", "simplejpeg")


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnLoaderRun:
    """One run: which, and where its pictures lie."""

    method: Method
    side: Side
    seed: int
    data: tuple[str, ...]  # folders of pictures, a folder a class; the first is learned from, all are judged by
    updates: int | None = None  # None: UPDATES
    batch: int = 64
    workers: int = 0  # processes of their loader, beside this one

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.method}-{self.side}-{self.seed}"

    def settings(self) -> TrainSettings:
        """Return the settings of both sides: lightly's parts take their numbers from these."""
        settings = replace(common_settings(self.method), data=self.data[0], seed=self.seed, global_batch=self.batch)
        runtime = replace(settings.runtime, log_every=LOG_EVERY, checkpoint_every=200)
        evaluation = EvaluationSettings(every=0, knn_pictures=0)
        return replace(settings, updates=self.updates or UPDATES[self.method], runtime=runtime, evaluation=evaluation)


def run_once(plan: OwnLoaderRun, out: Path) -> dict[str, Any]:
    """Make a run, judge it, and write its file into `out`; return what was written.

    Raises: OSError or ValueError in one line for pictures that cannot be read, or a folder that another run has left.
    """
    settings = plan.settings()
    with ShardPictures(ShardIndex.open(plan.data)) as pictures:
        started, cpu_started = time.monotonic(), time.process_time()
        encoder, losses = _ours(settings, out / plan.name) if plan.side == "ours" else _theirs(plan, settings)
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
        scores = judge(encoder, pictures, picture_px=settings.label_picture_px)
    result = {
        "run": asdict(plan) | {"data": [Path(data).name for data in plan.data], "updates": settings.updates},
        "losses": [round(loss, 5) for loss in losses],
        "log_every": LOG_EVERY,
        "scores": {name: round(score, 4) for name, score in scores.items()},
        "judged": {"protocol": PROTOCOL, "network": "teacher" if plan.method == "dino" else "encoder"},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "settings": {name: value for name, value in to_plain(settings).items() if name in ("model", "objectives", "optim")},
        "machine": machine(PACKAGES),
    }
    with write_aside(out / f"{plan.name}.json") as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _ours(settings: TrainSettings, folder: Path) -> tuple[Encoder, list[float]]:
    """Train as `wherefrom train` does, from where an earlier try was stopped; return what it wrote for others, and the logged losses."""
    run(settings, reporter=Reporter(), out=folder, resume=folder.is_dir())
    with random_scope("weights follow"):
        encoder = Encoder(settings.model)
    load_weights(encoder, str(folder))
    return encoder, [float(str(record["loss"])) for record in read_metrics(RunFolder(folder), "train")]


def _theirs(plan: OwnLoaderRun, settings: TrainSettings) -> tuple[Encoder, list[float]]:
    """Train lightly's modules on batches of its own transforms; return the trained ViT as an encoder of ours, and the losses."""
    torch.manual_seed(plan.seed)
    np.random.seed(plan.seed)  # noqa: NPY002, their blur draws from it
    assert settings.updates is not None
    learned = settings.objectives[plan.method]
    theirs = THEIRS[plan.method](settings.model, learned)
    batches, updates_per_epoch = their_batches(plan, their_transform(learned))
    updates = TheirUpdates(theirs, settings, updates=settings.updates, updates_per_epoch=updates_per_epoch)
    losses: list[float] = []
    while updates.done < updates.updates:
        losses.append(updates.update(next(batches)))
    with random_scope("weights follow"):
        encoder = Encoder(settings.model)
    encoder.model.load_state_dict(theirs.exported.state_dict())
    return encoder, [float(np.mean(losses[first : first + LOG_EVERY])) for first in range(0, len(losses), LOG_EVERY)]


def their_batches(plan: OwnLoaderRun, transform: Any) -> tuple[Iterator[list[Tensor]], int]:
    """Return endless batches of torchvision's ImageFolder, and how many make an epoch."""
    from torchvision.datasets import ImageFolder

    loader = DataLoader(
        ImageFolder(plan.data[0], transform=transform), batch_size=plan.batch, shuffle=True, drop_last=True, num_workers=plan.workers
    )

    def forever() -> Iterator[list[Tensor]]:
        while True:
            for views, _ in loader:
                yield views

    return forever(), len(loader)
