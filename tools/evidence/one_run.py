"""One run of the evidence: trained, judged, its gradients told apart, all of it one small file. Killed, it goes on where it was.

Here: the unit that is made or is not there; its CPU-seconds; its curves; gradients of its objectives into the encoder.
Not here: which runs there are (plan.py), several side by side (side_by_side.py), the metrics (metrics.py).
"""

import contextlib
import itertools
import json
import math
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor

from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools.against_lightly.judge import random_encoder
from wherefrom.tools.evidence.controls import HostOnSpatialViews
from wherefrom.tools.evidence.metrics import ALL_PICTURES, Judged, judge_all
from wherefrom.tools.evidence.plan import OUTSIDE, Held, PlannedRun, changes, read, settings_of, updates_of
from wherefrom.tools.machine import machine
from wherefrom.train import checkpoint
from wherefrom.train.evaluation.network import open_network
from wherefrom.train.loop import accelerator_of_a_run, run
from wherefrom.train.objective import Step
from wherefrom.train.reporting import LogRecord, Reporter, RunFacts
from wherefrom.train.run_folder import RunFolder, read_metrics, replace_text
from wherefrom.train.run_lock import locked
from wherefrom.train.settings import TrainSettings
from wherefrom.train.trainer import Trainer

GRADIENT_BATCHES = 8
PACKAGES = ("wherefrom", "torch", "torchvision", "timm", "numpy", "simplejpeg")


class StoppedError(Exception):
    """A signal has ended the run; what it has done is saved."""

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}, and saved")
        self.number = int(signal.Signals[name])


def make(unit: PlannedRun, out: Path, *, data: str, val: str, keep: bool = False, limit: int | None = None) -> Held:
    """Make a run, or go on with one that was stopped, and write its file; return what it holds, also of one that is there already.

    keep: its folder, with checkpoint and encoder, under out/work; limit: pictures of either side that protocols take.
    Raises: ValueError or OSError in one line, as for `wherefrom train`, and if another process is making it; StoppedError.
    """
    work = unit.work(out)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work), one_thread(), plain_attention():
        held = read(unit, out)
        if held is None:
            settings = settings_of(unit, data=data, updates=updates_of(unit, out))
            trained = _train(settings, work)
            network = open_network(str(work / "run"))
            random = random_encoder(settings) if unit.arm == "alone" else None
            whole = unit.seed != OUTSIDE  # of other runs only what choices are made by
            file = work / "protocols.json"
            judged = judge_all(network, random, settings, data=data, val=val, file=file, protocols=whole, limit=limit)
            gradients = encoder_gradients(settings, work / "run")
            held = _result(unit, settings, trained, judged, gradients, pictures=(data, val))
            with write_aside(unit.file(out)) as aside:
                aside.write_text(json.dumps(held, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if not keep:
            shutil.rmtree(work)
    return held


def is_running(unit: PlannedRun, out: Path) -> bool:
    """Return whether some process is making a run."""
    work = unit.work(out)
    if not work.is_dir():
        return False
    try:
        with locked(work):
            return False
    except ValueError:
        return True


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute by one thread: what is computed, and how long it takes, is the same whatever runs beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attend by separate products: on a processor, backward in bfloat16, the fused kernel takes as long as all the rest of an update."""
    before = use_fused_attn()
    set_fused_attn(False)
    try:
        yield
    finally:
        set_fused_attn(before)


class CpuSeconds(Reporter):
    """Writes down the CPU-seconds of this process, all its threads, from each line of the log to the next, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def started(self, facts: RunFacts) -> None:
        """Forget what was counted after the checkpoint."""
        lines = [line for line in self.lines() if line["to"] <= facts.resumed_at]
        replace_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._since = facts.resumed_at, time.process_time()

    def logged(self, record: LogRecord) -> None:
        """Count to here."""
        update, began = self._since
        now = time.process_time()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"from": update, "to": record.update, "cpu_s": round(now - began, 4)}) + "\n")
        self._since = record.update, now

    def lines(self) -> list[dict[str, float]]:
        """Return what was counted; a line torn by a kill is left out."""
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else ():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def an_update(self) -> float:
        """Return the CPU-seconds of an update: the median of all lines, which nothing that ran beside for a while has moved."""
        return statistics.median(line["cpu_s"] / (line["to"] - line["from"]) for line in self.lines())


def _train(settings: TrainSettings, work: Path) -> dict[str, Any]:
    """Train to the end, from where an earlier try was stopped; return curves, and what an update took."""
    folder, clock = RunFolder(work / "run"), CpuSeconds(work / "cpu.jsonl")
    summary = run(settings, reporter=clock, out=folder.path, resume=folder.path.is_dir())
    if summary.stopped_by is not None:
        raise StoppedError(summary.stopped_by)
    records: list[dict[str, Any]] = read_metrics(folder, "train")
    names = list(dict.fromkeys(name for record in records for name in record["losses"]))
    curves = {"update": [record["update"] for record in records], "loss": [_rounded(record["loss"]) for record in records]}
    curves |= {name: [_rounded(record["losses"].get(name)) for record in records] for name in names}
    return {"curves": curves, "cpu_s_an_update": round(clock.an_update(), 5)}


def _result(
    unit: PlannedRun,
    settings: TrainSettings,
    trained: dict[str, Any],
    judged: Judged,
    gradients: Mapping[str, Mapping[str, float]],
    *,
    pictures: tuple[str, str],
) -> Held:
    assert settings.updates is not None
    return {
        "run": {
            "name": unit.name,
            "host": unit.host,
            "arm": unit.arm,
            "seed": unit.seed,
            "updates": settings.updates,
            "batch": settings.global_batch,
            "precision": settings.precision,
            "data": [_last_words(each) for each in pictures],
        },
        "settings": changes(settings, unit.host),
        "metrics": _all_rounded(judged.metrics),
        "floors": {column: _all_rounded(scores) for column, scores in judged.floors.items()},
        "not_measured": dict(judged.not_measured),
        "judged": ALL_PICTURES,
        "gradients": {name: _all_rounded(numbers) for name, numbers in gradients.items()},
        "curves": trained["curves"],
        "cpu_s_an_update": trained["cpu_s_an_update"],
        "cpu_s": round(trained["cpu_s_an_update"] * settings.updates, 1),
        "machine": machine(PACKAGES),
    }


def encoder_gradients(settings: TrainSettings, folder: Path) -> dict[str, dict[str, float]]:
    """Return how each objective pulls at the encoder where a run has ended: the norm of its weighted loss's gradient, and the cosine of
    that to the host's, means over the next batches.
    """
    newest = checkpoint.latest(RunFolder(folder).checkpoints)
    assert newest is not None and settings.data is not None
    rows: dict[str, list[tuple[float, float]]] = {}
    with accelerator_of_a_run(settings) as accelerator:
        trainer = Trainer(settings, ShardIndex.open(settings.data), accelerator, restored=True)
        with contextlib.closing(trainer):
            trainer.restore(newest)
            for batch in itertools.islice(trainer.loader.forever(), GRADIENT_BATCHES):
                host: Tensor | None = None
                for name, step in parts_of(trainer.step):
                    gradient = _encoder_gradient(step, step(batch, trainer.progress).loss)
                    host = gradient if host is None else host
                    cosine = torch.nn.functional.cosine_similarity(gradient, host, dim=0)
                    rows.setdefault(name, []).append((float(gradient.norm()), float(cosine)))
    return {
        name: dict(zip(("norm", "cosine"), map(statistics.fmean, zip(*values, strict=True)), strict=True)) for name, values in rows.items()
    }


def parts_of(step: Step) -> Iterator[tuple[str, Step]]:
    """Yield the step with all but one part at weight 0, and that part's name: every objective, the host first; its own views, then SP's."""
    objectives: dict[str, Any] = dict(step.objectives.items())
    before = {name: (objective.weight, objective.weights) for name, objective in objectives.items()}
    for name, objective in objectives.items():
        parts = objective.parts() if isinstance(objective, HostOnSpatialViews) else {name: objective.weights}
        for part, weights in parts.items():
            for other in objectives.values():
                other.weight = 0.0
            objective.weight, objective.weights = before[name][0], weights
            try:
                yield part, step
            finally:
                for own, each in objectives.items():
                    each.weight, each.weights = before[own]


def _encoder_gradient(step: Step, loss: Tensor) -> Tensor:
    """Return the gradient of a loss by all of the encoder that learns, as one row of float64, zeros where it does not reach."""
    learns = [parameter for parameter in step.encoder.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, learns, allow_unused=True)
    pairs = zip(gradients, learns, strict=True)
    return torch.cat([(torch.zeros_like(own) if gradient is None else gradient).flatten().double() for gradient, own in pairs])


def _last_words(place: str) -> str:
    """Return the last two parts of a path, which say what pictures they are and not whose."""
    return "/".join(Path(place).parts[-2:])


def _all_rounded(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _rounded(value) for name, value in numbers.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 5)
