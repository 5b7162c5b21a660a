"""Stages of `gpu_check` that need photographs: what training reaches on this machine, and the `dali` renderer, checked, then timed.

Here: pictures a second of training, on data and on one batch again and again; the `dali` renderer against the pixel proof, the float64
reference, the CPU's pixels, slots and batch sizes, with the hardware decoder's share 0 and 1, then the loader's speed with it.
Not here: other loaders (wherefrom bench loader), kernels (kernels.py, views.py).
"""

import contextlib
import importlib
import itertools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from wherefrom.kernels import dispatch
from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.decode import decode_picture
from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.proof.level_errors import away_from_borders, level_errors, levels, reference_levels
from wherefrom.pipeline.proof.prove import proof_cases, prove
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.render.dali_decode import installed
from wherefrom.pipeline.render.dali_renderer import DaliRenderer
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.pipeline.view_recipe import ColorLaw, Independent, PixelType, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Record
from wherefrom.tools.gpu_check.stages import Options, Report
from wherefrom.tools.machine import last_line

if TYPE_CHECKING:
    from accelerate import Accelerator

    from wherefrom.train.settings import TrainSettings

HARDWARE_SHARES = (0.0, 1.0)  # of JPEGs that go to the hardware decoder
BATCHES = (1, 2, 3, 8, 64, 256)
DECODER_BAR = 1.0  # levels, mean: a GPU's decoder rounds its own way, the resize and the rest are held tighter by the proof
PICTURES = 32  # compared with the reference
ROUND_S = 4.0  # of timing one contender once
WARM_UPDATES = {False: 5, True: 1}  # until everything is built; in a dry run
COMPILING_S = 40.0  # that must be left for another kind of training


@dataclass(frozen=True, kw_only=True, slots=True)
class DaliCheck:
    """One line of the outcome."""

    name: str
    passed: bool
    outcome: str


def dali(options: Options, report: Report) -> None:
    """Check the `dali` renderer, and time the loader with it if nothing is red."""
    if not options.shards:
        report.leave_out("the dali renderer: no SHARDS were given")
        return
    if not installed():
        report.leave_out("the dali renderer: NVIDIA DALI is not installed here")
        return
    index = ShardIndex.open(options.shards)
    checks = []
    for check in _checks(index, options):
        checks.append(asdict(check))
        report.add("checks", checks)
        if not check.passed:
            report.fail(f"{check.name}: {check.outcome}")
    report.say(f"{sum(check['passed'] for check in checks)} of {len(checks)} checks of the dali renderer hold")
    if all(check["passed"] for check in checks):
        for name, rates in _speeds(index, options).items():
            report.add(name, rates)
            report.say(f"{statistics.median(rates):.0f} pictures/s  {name} ({min(rates):.0f} to {max(rates):.0f}, n = {len(rates)})")


def training(options: Options, report: Report) -> None:
    """Time training with what this machine has to render: dali or triton, else the compiled CPU kernel, which is built if it can be."""
    if not options.shards:
        report.leave_out("training: no SHARDS were given")
        return
    try:
        importlib.import_module("wherefrom.train.loop")
    except ModuleNotFoundError as missing:
        report.leave_out(f"training: {missing}")
        return
    from wherefrom.train.loop import accelerator_for
    from wherefrom.train.recipes import RECIPES

    if native_missing():
        report.say(build_native())
    index = ShardIndex.open(options.shards)
    kinds = [(False, False), (False, True), (True, True), (True, False)]  # (compiled, one batch again and again)
    base = RECIPES["imagenet_sp_vits16"]()
    if options.dry_run:
        demo = RECIPES["demo"]()
        base, kinds = replace(demo, model=replace(demo.model, depth=1), runtime=replace(demo.runtime, device="cpu")), kinds[:2]
    base = replace(base, runtime=replace(base.runtime, log_with="none"))  # nothing is logged, and TensorBoard may not be there
    batch, seconds = min(options.batch, len(index)), 0.1 if options.dry_run else ROUND_S
    report.add("recipe", base.recipe)
    accelerator = accelerator_for(base)
    for compiled, synthetic in kinds:
        name = f"training {base.recipe}{', compiled' if compiled else ''}{', one batch again and again' if synthetic else ''}"
        if compiled and report.seconds_left < COMPILING_S:
            report.leave_out(f"{name}: no time is left")
            continue
        settings, warm = replace(base, global_batch=batch), WARM_UPDATES[options.dry_run]
        rates = training_speed(index, settings, accelerator, seconds, compiled=compiled, synthetic=synthetic, warm=warm)
        report.add(name, rates)
        memory, waiting = rates["memory_bytes"] / 2**30, rates["waiting_frac"]
        report.say(f"{rates['pictures_per_s']:.0f} pictures/s  {name}, B{batch}, waiting {waiting:.1%}, {memory:.1f} GiB")


def build_native() -> str:
    """Build the CPU view kernel in the checkout where it can be built; return in words what came of it."""
    root = Path(dispatch.__file__).resolve().parents[1]
    if not shutil.which("gcc") or not (root / "setup.py").is_file():
        return "the CPU view kernel is not built: no gcc, or no checkout"
    command = [sys.executable, "-P", "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    missing = native_missing()
    return f"the CPU view kernel is not built: {last_line(done.stderr)}" if missing else "the CPU view kernel was built"


def _recipe(color: ColorLaw | None = None, pixels: PixelType = "float32") -> ViewRecipe:
    large, small = Independent(area_frac=(0.4, 1)), Independent(area_frac=(0.05, 0.4))
    return ViewRecipe(
        families=(
            ViewFamily(name="global", views=2, size_px=(224, 224), law=large, mirror="view", color=color),
            ViewFamily(name="local", views=8, size_px=(96, 96), law=small, mirror="view", turns=color is not None, color=color),
        ),
        pixels=pixels,
    )


def _draw(index: ShardIndex, recipe: ViewRecipe, ids: NDArray[np.int64]) -> Sequence[Record]:
    size, orientation = index.source_size[ids], index.orientation[ids]
    return draw_records(recipe, seed=0, epoch=0, drawn_for=ids, source_size=size, stored_orientation=orientation)


def _checks(index: ShardIndex, options: Options) -> Iterator[DaliCheck]:
    cases = [replace(case, laws=("grid",)) if options.dry_run else case for case in proof_cases(quick=True)]
    dali = partial(DaliRenderer, device=options.device)
    for share in HARDWARE_SHARES:
        report = prove(partial(dali, hw_decoder_load=share), cases=cases)
        worst = max(row.worst_px for row in report.rows)
        yield DaliCheck(name=f"pixel proof, hardware share {share:g}", passed=report.passed, outcome=f"{worst:.3f} source px worst")
    reader = ShardReader(index)
    ids = index.replacement(np.arange(min(2 if options.dry_run else PICTURES, len(index))))
    files = [reader.read(int(i)) for i in ids]
    for color in (None, ColorLaw(blur_prob=0.5, solarize_prob=0.3)):
        yield from _compare_pixels(index, _recipe(color), ids, files, options)
    for share in HARDWARE_SHARES:
        recipe = _recipe(ColorLaw(blur_prob=0.5))
        yield from _slots(
            dali(recipe, hw_decoder_load=share), files[0], _draw(index, recipe, ids[:1]), BATCHES[: 3 if options.dry_run else None], share
        )


def _compare_pixels(
    index: ShardIndex, recipe: ViewRecipe, ids: NDArray[np.int64], files: Sequence[NDArray[np.uint8]], options: Options
) -> Iterator[DaliCheck]:
    """Compare what is rendered with each hardware share with the reference and with the CPU."""
    records, stored = _draw(index, recipe, ids), [decode_picture(file) for file in files]
    by_share = {
        share: DaliRenderer(recipe, device=options.device, hw_decoder_load=share).render(files, records).pixels for share in HARDWARE_SHARES
    }
    cpu = DaliRenderer(recipe).render(files, records).pixels
    what = "all photometrics" if recipe.families[0].color else "geometry"
    for number, record in enumerate(records):
        yardsticks = {"the reference": reference_levels(stored, record), "the CPU": levels(cpu[number], recipe)}
        for (share, pixels), (name, expected) in itertools.product(by_share.items(), yardsticks.items()):
            error = level_errors(levels(pixels[number], recipe), expected, away_from_borders(record))
            yield DaliCheck(
                name=f"{record.geometry.family}, {what}, hardware share {share:g}, against {name}",
                passed=error.inside_mean <= DECODER_BAR,
                outcome=f"mean {error.inside_mean:.4f} inside, {error.border_mean:.4f} at borders; worst {error.inside_worst:.2f} levels",
            )


def _slots(
    renderer: DaliRenderer, file: NDArray[np.uint8], records: Sequence[Record], batches: Sequence[int], share: float
) -> Iterator[DaliCheck]:
    """Render one picture in every slot of every batch size."""
    alone = renderer.render([file], records).pixels
    for batch in batches:
        repeated = [record[[0] * batch] for record in records]
        pixels = renderer.render([file] * batch, repeated).pixels
        other = sum(int((one != first).flatten(1).any(1).sum()) for one, first in zip(pixels, alone, strict=True))
        yield DaliCheck(
            name=f"one picture in {batch} slots, hardware share {share:g}", passed=other == 0, outcome=f"{other} slots with other bits"
        )


def _speeds(index: ShardIndex, options: Options) -> dict[str, list[float]]:
    """Return pictures a second of the loader alone, three interleaved rounds."""
    batch, seconds = min(options.batch, len(index)), 0.1 if options.dry_run else ROUND_S
    wait = torch.cuda.synchronize if torch.cuda.is_available() else _done
    contenders = {
        f"loader, dali on {options.device}, {pixels}, {'all photometrics' if color else 'geometry'}": _recipe(color, pixels)
        for pixels in ("float16", "float32")
        for color in (None, ColorLaw(blur_prob=0.5, solarize_prob=0.2))
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(3):
        for name, recipe in contenders.items():
            with make_loader(index, recipe, global_batch=batch, renderer="dali", device=options.device) as loader:
                batches = loader.forever()
                for _ in islice(batches, 3):  # until everything is built
                    wait()
                started, pictures = time.perf_counter(), 0
                while time.perf_counter() - started < seconds:
                    pictures += len(next(batches))
                wait()
                rates[name].append(pictures / (time.perf_counter() - started))
    return rates


def _done() -> None:
    """Wait for nothing: a CPU's work is done when a call returns."""


def training_speed(
    index: ShardIndex, settings: "TrainSettings", accelerator: "Accelerator", seconds: float, *, compiled: bool, synthetic: bool, warm: int
) -> dict[str, float]:
    """Return what training reaches: pictures/s, share of time waiting for data, peak memory.

    `synthetic` trains on one batch over and over, which is what training would do if data cost nothing; `warm` updates come before.
    """
    from wherefrom.train.trainer import Trainer

    settings = replace(settings, runtime=replace(settings.runtime, compile=compiled))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.closing(Trainer(settings, index, accelerator)) as trainer:
        if synthetic:
            trainer.batches = itertools.repeat(trainer.loader.batch(index.replacement(np.arange(settings.global_batch))))
        for _ in range(warm):
            trainer.update()
        trainer.settle()
        started, before, waited = time.perf_counter(), trainer.done, trainer.clock.seconds["waiting"]
        while time.perf_counter() - started < seconds:
            trainer.update()
        trainer.settle()  # reads the device: all of it is done
        took = time.perf_counter() - started
        return {
            "pictures_per_s": (trainer.done - before) * settings.global_batch / took,
            "waiting_frac": (trainer.clock.seconds["waiting"] - waited) / took,
            "memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        }
