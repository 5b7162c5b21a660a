"""Checks and times a machine with a CUDA GPU: `python -m wherefrom.tools.gpu_check [SHARDS] [--kernels FOLDER]`.

SHARDS, the `dali` renderer: the pixel proof, the float64 reference, the CPU's pixels, slots and batch sizes, with the hardware decoder's
share 0 and 1; then pictures a second of the loader, of training, and of training on one batch again and again: JSON and a short table.
FOLDER, the kernels: their tests with Triton compiling, then their benchmark, both written into it. A red check prints no time.
Not here: other loaders (wherefrom bench loader), the kernels' cases (kernel_cases.py).
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tyro.conf import Positional

from wherefrom.kernels import dispatch
from wherefrom.pipeline.colour import draw_colours
from wherefrom.pipeline.crops import draw_geometry
from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.parity import away_from_borders, level_errors, levels, reference_levels
from wherefrom.pipeline.proof import proof_cases, prove
from wherefrom.pipeline.reader import ShardReader
from wherefrom.pipeline.recipe import ColourLaw, Independent, PixelType, Recipe, ViewFamily
from wherefrom.pipeline.render_dali import DaliRenderer
from wherefrom.pipeline.shards import ShardIndex
from wherefrom.pipeline.views import Photometric, ViewGeometry
from wherefrom.tools.bench_kernels import bench_kernels_command
from wherefrom.train.loop import accelerator_for
from wherefrom.train.recipes import RECIPES
from wherefrom.train.trainer import Trainer

HARDWARE_SHARES = (0.0, 1.0)  # of JPEGs that go to the hardware decoder
KERNEL_TESTS = ("test_pair_targets*.py", "test_pair_loss*.py", "test_roi_pool*.py", "test_render_views*.py")
BATCHES = (1, 2, 3, 8, 64, 256)
DECODER_BAR = 1.0  # levels, mean: a GPU's decoder rounds its own way, the resize and the rest are held tighter by the proof
Records = list[tuple[ViewGeometry, Photometric]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the outcome."""

    name: str
    passed: bool
    found: str


def gpu_check(
    shards: Positional[str] = "",
    *,
    kernels: Path | None = None,
    out: Path = Path("gpu_check.json"),
    pictures: int = 32,
    batch: int = 256,
    seconds: float = 20.0,
    quick: bool = False,
) -> int:
    """Check, then time; return 0, or 1 if a check is red.

    Args:
        shards: the pattern of the shards whose photographs are rendered; without it the renderer is left alone.
        kernels: the folder for what the kernels' tests and benchmark say; without it they are left alone.
        out: where the renderer's outcome is written, as JSON.
        pictures: how many photographs are compared with the reference.
        batch: samples a batch when timing.
        seconds: how long each of three timed rounds of the renderer lasts.
        quick: a short cut through the proof, and a few small cases of the kernels.
    Raises: ValueError without a CUDA GPU, or without anything to check.
    """
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA GPU here; wherefrom prove and wherefrom bench kernels check and measure on the CPU")
    if not shards and kernels is None:
        raise ValueError("neither SHARDS nor --kernels FOLDER is given: there is nothing to check")
    of_kernels = 0 if kernels is None else kernel_check(kernels, quick=quick)
    return max(of_kernels, _renderer_check(shards, out, pictures, batch, seconds, quick) if shards else 0)


def kernel_check(folder: Path, *, quick: bool = False) -> int:
    """Run the kernels' tests with Triton compiling, then `wherefrom bench kernels`, into a folder; return 0, or 1 if a check is red.

    tests.txt is what pytest said, checks.json its outcome, bench.json and bench.png the benchmark's; a red test ends it before that.
    Raises: ValueError if the tests are not there: they come with a checkout, not with an installed wheel.
    """
    root = Path(dispatch.__file__).parents[1]
    tests = sorted(str(path) for pattern in KERNEL_TESTS for path in (root / "tests").glob(pattern))
    if not tests:
        raise ValueError(f"{root} has no tests of the kernels; install wherefrom from a checkout with pip install --editable")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # -P: the checkout's own folders must not be found beside the installed wherefrom
    command = [sys.executable, "-P", "-m", "pytest", "-q", *tests]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    said = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing said"])[-1]
    check = Check(name="tests of the kernels, compiled", passed=done.returncode == 0, found=said)
    (folder / "checks.json").write_text(json.dumps([asdict(check)], indent=1), encoding="utf-8")
    _say(check)
    return bench_kernels_command(out=folder, quick=quick) if check.passed else 1


def _renderer_check(shards: str, out: Path, pictures: int, batch: int, seconds: float, quick: bool) -> int:
    """Check, then time the `dali` renderer and training with it; return 0, or 1 if a check is red."""
    index = ShardIndex.open(shards)
    checks = []
    for check in _checks(index, pictures, quick):
        checks.append(check)
        _say(check)
    passed = all(check.passed for check in checks)
    speeds = _speeds(index, batch, seconds) if passed else {}
    for name, rates in speeds.items():
        print(f"{statistics.median(rates):9.0f} pictures/s  {name} ({min(rates):.0f} to {max(rates):.0f}, n = {len(rates)})")
    trained = training_speeds(index, batch, seconds) if passed else {}
    for name, found in trained.items():
        waiting, memory = found["waiting_frac"], found["memory_bytes"] / 2**30
        print(f"{found['pictures_per_s']:9.0f} pictures/s  {name}, waiting {waiting:.1%}, {memory:.1f} GiB")
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    outcome = {"machine": machine, "checks": [asdict(check) for check in checks], "pictures_per_s": speeds, "training": trained}
    out.write_text(json.dumps(outcome, indent=1))
    return 0 if passed else 1


def _say(check: Check) -> None:
    print(f"{'holds' if check.passed else 'RED  '}  {check.name}: {check.found}", flush=True)


def _recipe(colour: ColourLaw | None = None, pixels: PixelType = "float32") -> Recipe:
    large, small = Independent(area_frac=(0.4, 1)), Independent(area_frac=(0.05, 0.4))
    return Recipe(
        families=(
            ViewFamily(name="global", views=2, size_px=(224, 224), law=large, mirror="view", colour=colour),
            ViewFamily(name="local", views=8, size_px=(96, 96), law=small, mirror="view", turns=colour is not None, colour=colour),
        ),
        pixels=pixels,
    )


def _draw(index: ShardIndex, recipe: Recipe, ids: NDArray[np.int64]) -> Records:
    size, orientation = index.source_size[ids], index.orientation[ids]
    drawn = draw_geometry(recipe, seed=0, epoch=0, drawn_for=ids, source_size=size, stored_orientation=orientation)
    return [(one.geometry, colour) for one, colour in zip(drawn, draw_colours(recipe, seed=0, epoch=0, drawn_for=ids), strict=True)]


def _checks(index: ShardIndex, pictures: int, quick: bool) -> Iterator[Check]:
    for share in HARDWARE_SHARES:
        renderer = partial(DaliRenderer, device="cuda", hw_decoder_load=share)
        report = prove(renderer, cases=proof_cases(quick=quick))
        worst = max(row.worst_px for row in report.rows)
        yield Check(name=f"pixel proof, hardware share {share:g}", passed=report.passed, found=f"{worst:.3f} source px worst")
    reader = ShardReader(index)
    ids = index.replacement(np.arange(min(pictures, len(index))))
    files = [reader.read(int(i)) for i in ids]
    for colour in (None, ColourLaw(blur_prob=0.5, solarise_prob=0.3)):
        recipe = _recipe(colour)
        records = _draw(index, recipe, ids)
        shown = {
            share: DaliRenderer(recipe, device="cuda", hw_decoder_load=share).render(files, records).pixels for share in HARDWARE_SHARES
        }
        cpu = DaliRenderer(recipe).render(files, records).pixels
        stored = [decode_picture(file) for file in files]
        for number, record in enumerate(records):
            inside = away_from_borders(*record)
            others = {"the reference": reference_levels(stored, *record), "the CPU": levels(cpu[number], recipe)}
            for share, pixels in shown.items():
                for name, other in others.items():
                    error = level_errors(levels(pixels[number], recipe), other, inside)
                    found = f"mean {error.inside_mean:.4f} inside, {error.border_mean:.4f} at borders; worst {error.inside_worst:.2f}"
                    told = f"{record[0].family}, {'all photometrics' if colour else 'geometry'}, hardware share {share:g}, against {name}"
                    yield Check(name=told, passed=error.inside_mean <= DECODER_BAR, found=found + " levels")
    for share in HARDWARE_SHARES:
        recipe = _recipe(ColourLaw(blur_prob=0.5))
        yield from _slots(recipe, files[0], _draw(index, recipe, ids[:1]), share)


def _slots(recipe: Recipe, file: NDArray[np.uint8], records: Records, share: float) -> Iterator[Check]:
    """Render one picture in every slot of every batch size."""
    renderer = DaliRenderer(recipe, device="cuda", hw_decoder_load=share)
    alone = renderer.render([file], records).pixels
    for batch in BATCHES:
        repeated = [(geometry[[0] * batch], photometric[[0] * batch]) for geometry, photometric in records]
        pixels = renderer.render([file] * batch, repeated).pixels
        other = sum(int((one != first).flatten(1).any(1).sum()) for one, first in zip(pixels, alone, strict=True))
        yield Check(
            name=f"one picture in {batch} slots, hardware share {share:g}", passed=other == 0, found=f"{other} slots with other bits"
        )


def _speeds(index: ShardIndex, batch: int, seconds: float) -> dict[str, list[float]]:
    """Return pictures a second of the loader alone, three interleaved rounds."""
    contenders = {
        f"loader, dali on cuda, {pixels}, {'all photometrics' if colour else 'geometry'}": _recipe(colour, pixels)
        for pixels in ("float16", "float32")
        for colour in (None, ColourLaw(blur_prob=0.5, solarise_prob=0.2))
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(3):
        for name, recipe in contenders.items():
            with make_loader(index, recipe, global_batch=min(batch, len(index)), renderer="dali", device="cuda") as loader:
                batches = loader.forever()
                for _ in islice(batches, 3):  # until everything is built
                    torch.cuda.synchronize()
                started, shown = time.perf_counter(), 0
                while time.perf_counter() - started < seconds:
                    shown += len(next(batches))
                torch.cuda.synchronize()
                rates[name].append(shown / (time.perf_counter() - started))
    return rates


def training_speeds(index: ShardIndex, batch: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return what `imagenet_sp_vits16` in bfloat16 reaches: pictures/s, share of time waiting for data, peak memory.

    On real data, and on one batch over and over, which is what training would do if data cost nothing; each compiled and not.
    """
    base = replace(RECIPES["imagenet_sp_vits16"](), global_batch=min(batch, len(index)))
    accelerator = accelerator_for(base)
    found = {}
    for compiled, synthetic in itertools.product((False, True), (False, True)):
        settings = replace(base, runtime=replace(base.runtime, compile=compiled))
        with contextlib.closing(Trainer(settings, index, accelerator)) as trainer:
            if synthetic:
                trainer.batches = itertools.repeat(trainer.loader.batch(index.replacement(np.arange(base.global_batch))))
            for _ in range(5):  # until everything is built
                trainer.update()
            trainer.settle()
            started, before, waited = time.perf_counter(), trainer.done, trainer.clock.seconds["waiting"]
            while time.perf_counter() - started < seconds:
                trainer.update()
            trainer.settle()  # reads the device: all of it is done
            took = time.perf_counter() - started
            name = f"training{', compiled' if compiled else ''}{', synthetic data' if synthetic else ''}"
            found[name] = {
                "pictures_per_s": (trainer.done - before) * base.global_batch / took,
                "waiting_frac": (trainer.clock.seconds["waiting"] - waited) / took,
                "memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            }
    return found


if __name__ == "__main__":
    import tyro

    try:
        sys.exit(tyro.cli(gpu_check))
    except (ValueError, OSError) as problem:
        sys.exit(f"wherefrom: {problem}")
