"""Limits planted in a real run of this process, and what the profile says: `python throughput_plants.py PLANT FOLDER SECONDS`.

Prints one JSON object: the limit, the advice or the change that is tried, its predicted rate, and the rate that it then gives.
"""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

SPINNING = "while True: pass"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plant:
    """A limit, what plants it, and the change that is predicted and then made."""

    limit: str
    change: str  # begins so
    settings: Callable[[Any], Any] = lambda settings: settings
    mended: Callable[[Any], Any] = lambda settings: settings
    while_planted: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    while_mended: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@contextlib.contextmanager
def slow_storage(seconds: float) -> Iterator[None]:
    """Let every read of local files take its time, each reader's own."""
    from wherefrom.pipeline.shards.storage import _LocalFile

    read_into, read_parts = _LocalFile.read_into, _LocalFile.read_parts

    def slowly(self: Any, buffer: memoryview, offset: int) -> int:
        time.sleep(seconds)
        return read_into(self, buffer, offset)

    def slowly_many(self: Any, memory: Any, parts: Any) -> Any:
        time.sleep(seconds * len(parts))
        return read_parts(self, memory, parts)

    with mock.patch.object(_LocalFile, "read_into", slowly), mock.patch.object(_LocalFile, "read_parts", slowly_many):
        yield


@contextlib.contextmanager
def slow_open(seconds: float) -> Iterator[None]:
    """Let every file take its time to be opened, as on a disk far away."""
    from wherefrom.pipeline.shards.storage import LocalStorage

    opened = LocalStorage.open

    def slowly(self: Any, path: str) -> Any:
        time.sleep(seconds)
        return opened(self, path)

    with mock.patch.object(LocalStorage, "open", slowly):
        yield


@contextlib.contextmanager
def slow_log(seconds: float) -> Iterator[None]:
    """Let every line of the log take its time."""
    from wherefrom.train import run_folder

    append = run_folder.append_metrics

    def slowly(*arguments: Any) -> None:
        time.sleep(seconds)
        append(*arguments)

    with mock.patch.object(run_folder, "append_metrics", slowly):
        yield


@contextlib.contextmanager
def busy_neighbors(count: int) -> Iterator[None]:
    """Let other processes spin meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", SPINNING]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep every thread of this process on some of its cores."""
    import torch

    before = os.sched_getaffinity(0)
    cores = set(sorted(before)[:count])
    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)
    computing = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, before)
    torch.set_num_threads(computing)


def with_runtime(**changes: Any) -> Callable[[Any], Any]:
    return lambda settings: replace(settings, runtime=replace(settings.runtime, **changes))


def with_spatial(**changes: Any) -> Callable[[Any], Any]:
    return lambda settings: replace(settings, objectives={"spatial": replace(settings.objectives["spatial"], **changes)})


def with_large_views(settings: Any) -> Any:
    from wherefrom.pipeline.view_recipe import ColorLaw

    spatial = replace(settings.objectives["spatial"], size_px=96, views=8, color=ColorLaw(blur_prob=1.0))
    model = replace(settings.model, view_size_px=96, patch_size_px=48, width=32, depth=1)
    return replace(settings, objectives={"spatial": spatial}, model=model)


def with_a_large_model(settings: Any) -> Any:
    return replace(settings, model=replace(settings.model, width=192, depth=6, heads=3))


def as_the_demo_runs(settings: Any) -> Any:
    """Return the run of `wherefrom train` on these pictures: layers of width 32 are too small for two cores to share."""
    from wherefrom.train.recipes.table import recipe

    demo = recipe("demo")
    return replace(demo, data=settings.data, updates=settings.updates, evaluation=settings.evaluation, runtime=settings.runtime)


def packed(settings: Any) -> Any:
    """Return the same run on a tar of the folder's pictures."""
    folder = Path(settings.data)
    tar_path = folder.parent / "packed.tar"
    with tarfile.open(tar_path, "w") as tar:
        for path in sorted(folder.rglob("*.jpg")):
            tar.add(path, f"{path.parent.name}_{path.name}")
    return replace(settings, data=str(tar_path))


def as_files(settings: Any) -> Any:
    """Return the same run on a folder of the shard's pictures, each a file."""
    shard = Path(settings.data)
    folder = shard.parent / "loose"
    with tarfile.open(shard) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".jpg"):
                path = folder / "all" / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                file = tar.extractfile(member)
                assert file is not None
                path.write_bytes(file.read())
    return replace(settings, data=str(folder))


PLANTS: dict[str, Plant] = {
    "slow storage": Plant(
        limit="reading",
        change="a disk 10 times as fast",
        while_planted=lambda: slow_storage(0.1),
        while_mended=lambda: slow_storage(0.01),
    ),
    "one core": Plant(
        limit="cores",
        change="all 2 cores",
        settings=lambda settings: with_runtime(threads=None)(as_the_demo_runs(settings)),
        while_planted=lambda: on_cores(1),
    ),
    "heavy renderer": Plant(
        limit="rendering",
        change="--runtime.renderer native",
        settings=lambda settings: with_runtime(renderer="torch")(with_large_views(settings)),
        mended=with_runtime(renderer="native"),
    ),
    "heavy model": Plant(limit="training", change="2 views of spatial", settings=with_a_large_model, mended=with_spatial(views=2)),
    "many tiny files": Plant(
        limit="reading",
        change="wherefrom pack",
        settings=as_files,
        mended=packed,
        while_planted=lambda: slow_open(0.3),
        while_mended=lambda: slow_open(0.3),
    ),
    "slow log": Plant(
        limit="logging",
        change="--runtime.log-every 10",
        mended=with_runtime(log_every=10),
        while_planted=lambda: slow_log(1.0),
        while_mended=lambda: slow_log(1.0),
    ),
    "busy neighbor": Plant(
        limit="neighbors", change="no other programs", settings=as_the_demo_runs, while_planted=lambda: busy_neighbors(4)
    ),
}


def profiled(settings: Any, seconds: float, folder: Path) -> Any:
    """Return the profile of a run."""
    from wherefrom.pipeline.shards.index import ShardIndex
    from wherefrom.tools.throughput.measuring import Profiler
    from wherefrom.train.loop import accelerator_of_a_run
    from wherefrom.train.trainer import Trainer

    with accelerator_of_a_run(settings) as accelerator:
        index = ShardIndex.open(settings.data, beside=False, cache=folder)
        with contextlib.closing(Trainer(settings, index, accelerator)) as trainer:
            return Profiler(trainer, seconds=seconds, folder=folder).measure()


def outcome(name: str, settings: Any, seconds: float, folder: Path) -> dict[str, Any]:
    """Return what the profile says of a plant, what it predicts of the change, and what that gives."""
    from wherefrom.train.throughput import rates

    plant = PLANTS[name]
    planted = plant.settings(settings)
    mended = plant.mended(planted)
    with plant.while_planted():
        found = profiled(planted, seconds, folder)
    with plant.while_mended():
        after = profiled(mended, seconds, folder)
    change = next((change for change in found.verdict.changes if change.what.startswith(plant.change)), None)
    # others on the machine come and go: the same prediction with the cores that were free when the change was made
    there = replace(change.chain, held=min(after.chain.held, change.chain.cores)) if change else None
    return {
        "plant": name,
        "limit": found.verdict.limit,
        "beneath": found.verdict.beneath,
        "first": found.verdict.first.what if found.verdict.first else None,
        "reached": found.together.reached.median,
        "change": change.what if change else None,
        "predicted": change.rate if change else None,
        "predicted_there": rates(there).reached * found.verdict.factor if there else None,
        "got": after.together.reached.median,
        "free_cores": [found.facts["free_cores"], after.facts["free_cores"]],
        "factor": found.verdict.factor,
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from throughput_runs import tiny_settings

    place = Path(sys.argv[2])
    base = replace(tiny_settings(place), updates=100_000)
    print(json.dumps(outcome(sys.argv[1], with_runtime(threads=2, renderer="native")(base), float(sys.argv[3]), place)))
