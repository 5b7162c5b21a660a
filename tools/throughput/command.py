"""The command `wherefrom profile`: what limits a run on this machine, and what would change it.

Here: what is opened for it, its files, its lines. Not here: measuring (measuring.py), the verdict (train/throughput.py).
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from wherefrom.pipeline.demo.shards import demo_shards
from wherefrom.pipeline.files import write_aside
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.tools.console import print_line, progress
from wherefrom.tools.machine import machine
from wherefrom.tools.throughput.measuring import Profiler
from wherefrom.tools.throughput.page import write_page
from wherefrom.tools.throughput.report import verdict_lines
from wherefrom.train.loop import accelerator_of_a_run
from wherefrom.train.plain_data import from_plain
from wherefrom.train.ranks import Ranks
from wherefrom.train.recipes import started
from wherefrom.train.settings import TrainSettings, settled
from wherefrom.train.trainer import Trainer

__all__ = ["profile_command"]

PACKAGES = ("torch", "torchvision", "triton", "numpy", "simplejpeg", "timm", "accelerate")


def profile_command(
    recipe: tyro.conf.Positional[str] = "",
    *,
    data: str | None = None,
    config: Path | None = None,
    labels: str | None = None,
    batch: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    renderer: str | None = None,
    threads: int | None = None,
    seconds: float = 60.0,
    out: Path = Path("profile"),
    trace: Path | None = None,
) -> int:
    """Measure each stage of a run alone and together, name what limits it, and predict what changes would give; return 0.

    No run is started and no weight is kept. Start it as the run is started, by torchrun too.

    Args:
        recipe: whose run, one that `wherefrom recipes` lists; default: the file's, or demo.
        data: as for `wherefrom train`; default: the file's, or the demo's pictures.
        config: a settings.yaml, whole or in part, as for `wherefrom train`.
        labels: as for `wherefrom train`.
        batch: pictures of an update, over all ranks; default: the recipe's.
        device: where the run would train.
        renderer: which cuts views, as for `wherefrom train`.
        threads: that read and render; default: one a core of this rank's share.
        seconds: about how long all of it may take.
        out: folder for profile.json and profile.html.
        trace: a file for a Chrome trace of three updates, for chrome://tracing or Perfetto.
    Raises: OSError or ValueError of one line for data or values that do not fit.
    """
    if not 1 <= seconds <= 3600:
        raise ValueError(f"seconds={seconds}: needs 1 to 3600")
    if trace is not None and not trace.absolute().parent.is_dir():
        raise ValueError(f"{trace}: there is no folder {trace.absolute().parent}; make it, or take another --trace")
    settings = _settings(settled(started(recipe, config), source=config), data, labels, batch, device, renderer, threads)
    settings.refuse_without_data()
    with contextlib.ExitStack() as stack:
        accelerator = stack.enter_context(accelerator_of_a_run(settings))
        ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        console = Console(quiet=not ranks.first, highlight=False)
        with ranks.led_by(accelerator.is_local_main_process), progress(console, "indexing") as show:
            index = ShardIndex.open(settings.data or demo_shards().train, labels=settings.labels, progress=show)
        trainer = stack.enter_context(contextlib.closing(Trainer(settings, index, accelerator, ranks)))
        out.mkdir(parents=True, exist_ok=True)
        print_line(console, f"measures each stage for about {seconds:.0f} s; numbers are right where nothing else is started meanwhile")
        start = time.perf_counter()
        profile = Profiler(trainer, seconds=seconds, folder=out).measure(trace)
        if not ranks.first:
            return 0
        for line in verdict_lines(profile):
            print_line(console, line)
        with write_aside(out / "profile.json") as aside:
            about = {"machine": machine(PACKAGES), "seconds": round(time.perf_counter() - start, 1)}
            aside.write_text(json.dumps(about | profile.as_data(), indent=1, allow_nan=False), encoding="utf-8")
        write_page(out / "profile.html", profile)
        traced = f", {trace}" if trace is not None else ""
        print_line(console, f"all numbers: {out / 'profile.json'}, {out / 'profile.html'}{traced}")
    return 0


def _settings(
    settings: TrainSettings,
    data: str | None,
    labels: str | None,
    batch: int | None,
    device: str | None,
    renderer: str | None,
    threads: int | None,
) -> TrainSettings:
    """Return the settings with what the command line says in their place."""
    given = {"data": data, "labels": labels, "global_batch": batch}
    runtime = {"device": device, "renderer": renderer, "threads": threads}
    changes = {name: value for name, value in given.items() if value is not None}
    return from_plain(settings, {**changes, "runtime": {name: value for name, value in runtime.items() if value is not None}})
