"""A run from settings to a trained encoder: update after update, logged, checkpointed, evaluated, stopped when asked.

Here: `run`, and the order in which things are checked, made, and written.
Not here: one update and what is remembered of it (trainer.py), what a checkpoint is (checkpoint.py), how a run looks (tools/terminal.py).
The count of completed updates is the only truth: position, learning rate, random streams and epoch follow from it.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, get_cpu_distributed_information

from wherefrom.pipeline.demo.shards import demo_shards
from wherefrom.pipeline.records import shown_frac
from wherefrom.pipeline.render.choose import choose_renderer, decodes_parts
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.train import checkpoint
from wherefrom.train.disk import writing
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.report import check_held_out, check_same_classes, evaluate_run
from wherefrom.train.export import write_encoder
from wherefrom.train.meters import METER
from wherefrom.train.objective import united_families
from wherefrom.train.objectives.collapse import COLLAPSED_STD, FEATURE_STD
from wherefrom.train.plain_data import Plain, from_plain, to_plain
from wherefrom.train.ranks import Ranks
from wherefrom.train.reporting import LogRecord, Reporter, RunFacts, Summary
from wherefrom.train.run_folder import (
    RunFolder,
    append_metrics,
    claim,
    cut_metrics,
    read_metrics,
    refuse_if_absent,
    refuse_if_taken,
    start_of,
    write_classes,
    write_evaluation,
)
from wherefrom.train.run_lock import locked
from wherefrom.train.settings import TrainSettings, check_same_run, read_plain_settings, write_settings
from wherefrom.train.throughput_watch import ThroughputWatch
from wherefrom.train.trainer import Trainer

CHANGES_BITS = ("renderer", "ranks", "accumulation", "device", "compile", "threads", "torch")  # of a run, where it goes on with another
SPLITS_BATCH = {"ranks", "accumulation"}
REPEATED = [getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name)]  # signals to stop that may come twice; not on Windows
LEFT_OUT = ("pairs_left_out", "pictures_left_out")  # meters: the share of what is learned from that does not count
SIZES_LOOKED_AT = 64  # pictures, for what share of them a recipe's views show
LARGEST_SHOWN = 0.75  # share of pictures that views show, above which it makes little difference how much is decoded
NO_PAIRS = 1 - 1e-6  # share of them from which on none counted: float32 says no more of a mean


def run(settings: TrainSettings, *, reporter: Reporter, out: Path | None = None, resume: bool = False) -> Summary:
    """Train as the settings say, in `out` (default: the next free runs/RECIPE-NUMBER).

    `resume` goes on from the newest checkpoint in `out`, bit for bit on the same machine; where there is none yet, from the start.
    Raises: ValueError or OSError before anything is written, if settings, data, folder or checkpoint do not fit;
    FloatingPointError if a loss or a gradient is not finite: the weights are kept as they were before it, and not saved.
    """
    settings.refuse_without_data()
    resumed_folder = _checked_folder(settings, out, resume)
    with contextlib.ExitStack() as stack:
        accelerator = stack.enter_context(accelerator_of_a_run(settings))
        ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        reporter = reporter if ranks.first else Reporter()
        stack.callback(reporter.closed)
        if _launcher_started_one_of_several(os.environ):
            reporter.message(
                "one process where several were asked for: accelerate launch --cpu starts one; use torchrun --nproc-per-node N"
            )
        if resumed_folder is not None:
            _lock(resumed_folder, ranks, stack)
            settings = _with_its_renderer(settings, resumed_folder)
        train, val = _open_data(settings, accelerator, ranks, reporter)
        newest = None if resumed_folder is None else checkpoint.latest(resumed_folder.checkpoints)
        trainer = stack.enter_context(contextlib.closing(Trainer(settings, train, accelerator, ranks, restored=newest is not None)))
        _report_unreached(trainer, reporter)
        resumption = _restored(trainer, resumed_folder, newest)
        folder = resumed_folder or _claimed(out, settings.recipe, ranks, stack, resume=resume)
        stack.enter_context(writing(folder.path))
        _begin_records(trainer, folder)
        stack.callback(accelerator.end_training)
        reporter.started(_facts(trainer, folder))
        if resumption:
            reporter.message(resumption)
        if val is None:
            reporter.message("no held-out pictures: neither R2 nor k-NN will be measured; name some shards by --val")
        stopped_by = _train(trainer, folder, val, reporter)
        if stopped_by is None:
            stopped_by = _finish_unless_stopped(trainer, folder, val, reporter)
        summary = trainer.summary(folder.path, stopped_by)
        reporter.finished(summary)
        return summary


def _report_unreached(trainer: Trainer, reporter: Reporter) -> None:
    """Say which parameters no objective reaches."""
    if trainer.frozen_parameters:
        reporter.message(f"frozen, no objective reaches them: {', '.join(trainer.frozen_parameters)}")
    if trainer.unreached_parameters:
        reporter.message(f"not reached before the first update, and free to be later: {', '.join(trainer.unreached_parameters)}")


def _restored(trainer: Trainer, folder: RunFolder | None, newest: Path | None) -> str:
    """Go on from the newest checkpoint of a resumed run's folder, if there is one; return where that is, and whether bit for bit.

    Empty for a new run.
    """
    if folder is None:
        return ""
    if newest is None:
        return "goes on at the start: no checkpoint was saved yet"
    trainer.restore(newest)
    epoch, step = divmod(trainer.done, trainer.loader.updates_per_epoch)
    samples = len(trainer.loader.index)
    where = f"epoch {epoch}, step {step}, sample {step * trainer.settings.global_batch} of {samples}"
    return f"goes on at update {trainer.done} of {trainer.updates}: {where}; {_bit_for_bit(trainer, folder, newest)}"


def _bit_for_bit(trainer: Trainer, folder: RunFolder, restored: Path) -> str:
    """Return whether a run goes on from a checkpoint bit for bit, as far as can be known, and if not, why not and what will differ."""
    then, here = (plain["runtime"] for plain in (checkpoint.read_state(restored).settings, to_plain(trainer.settings)))
    told = ("renderer", "accumulation", "compile")  # by the settings
    before = {name: then[name] for name in told if name in then} | start_of(folder, trainer.done)
    now = {name: here[name] for name in told} | _circumstances(trainer)
    changes = [name for name in CHANGES_BITS if name in before and before[name] != now[name]]
    if not changes:
        alike = "bit for bit"
        return f"{alike}, but for the order in which a GPU adds" if trainer.accelerator.device.type == "cuda" else alike
    why = ", ".join(f"{name} is {now[name]}, was {before[name]}" for name in changes)
    more = ", by more with drop-path" if SPLITS_BATCH & {*changes} else ""
    if "ranks" in changes and (coupled := trainer.settings.coupled_by()):
        more += f" (what {', '.join(coupled)} gathers is the same)"
    pixels = "pixels and " if "renderer" in changes else ""
    return f"not bit for bit, for {why}: {pixels}losses differ by rounding{more}, records do not"


def _begin_records(trainer: Trainer, folder: RunFolder) -> None:
    """Write down how the run starts, forget what was logged after its checkpoint, and begin to track."""
    if trainer.ranks.first:
        write_settings(folder.settings, trainer.settings)
        if trainer.loader.index.classes:
            write_classes(folder, trainer.loader.index.classes)
        cut_metrics(folder, trainer.done)
        append_metrics(folder, _circumstances(trainer))
    _start_tracker(trainer, folder)


def _train(trainer: Trainer, folder: RunFolder, val: ShardIndex | None, reporter: Reporter) -> str | None:
    """Make the updates that are left; return the name of the signal that came before the end, or None."""
    runtime = trainer.settings.runtime
    watch = ThroughputWatch(trainer)
    with _Signals() as signals:
        if not _is_evaluated(trainer, folder):
            _evaluate_if_due(trainer, folder, val, reporter)  # what a run that was stopped or killed here left out
        while trainer.done < trainer.updates:
            trainer.update()
            done, last = trainer.done, trainer.done == trainer.updates
            stopped_by = signals.name(trainer.ranks.highest(signals.came))
            logs = done % runtime.log_every == 0 or last
            saves = done % runtime.checkpoint_every == 0 or last or stopped_by is not None
            if logs or saves:
                trainer.settle()
            with trainer.clock.spending("writing"):
                if logs:
                    _log(trainer, folder, reporter)
                    if trainer.ranks.first and (line := watch.line()) is not None:
                        reporter.message(line)
                if saves:
                    trainer.save(folder.checkpoints)
            if stopped_by is not None:
                return stopped_by
            _evaluate_if_due(trainer, folder, val, reporter)
        return signals.name(trainer.ranks.highest(signals.came))


def _log(trainer: Trainer, folder: RunFolder, reporter: Reporter) -> None:
    """Write a line of the log, everywhere.

    Raises: ValueError, on all ranks alike, if nothing counted since the one before.
    """
    pictures, newest = len(trainer.window.rows) * trainer.settings.global_batch, trainer.window.rows[-1]
    record = trainer.log()
    if trainer.ranks.first:
        append_metrics(folder, {"kind": "train"} | asdict(record))
    trainer.accelerator.log(record.curves(), step=record.update)
    reporter.logged(record)
    _check_share_left_out(trainer, record, pictures, reporter)
    for name, value in newest.items():  # not means, which a collapse since the last line would only lower
        if name.startswith(METER) and name.endswith(f"/{FEATURE_STD}") and value < COLLAPSED_STD:
            objective = name.removeprefix(METER).partition("/")[0]
            reporter.message(f"{objective}: features have collapsed at update {record.update}, they are alike to {value:.1e}")


def _check_share_left_out(trainer: Trainer, record: LogRecord, pictures: int, reporter: Reporter) -> None:
    """Say if no pair, or picture, of the record's pictures counts, or at first most do not; raise ValueError if at first none does.

    At first: at the first line of a run's log. Later some small pictures may come together by chance, and to stop would stop for good:
    every continuation meets them again.
    """
    settings, step = trainer.settings, trainer.step
    at_first = record.update <= settings.runtime.log_every
    for name, share in record.meters.items():
        objective, _, meter = name.partition("/")
        if meter not in LEFT_OUT:
            continue
        left_out = meter.partition("_")[0]
        if share > NO_PAIRS and step.weight_of(objective) > 0:
            complaint = f"{objective}: not a {left_out[:-1]} of the last {pictures} pictures counts, all are too small for the law"
            if at_first:
                data = "the demo's" if settings.data is None else f"those of data={settings.data!r}"
                raise ValueError(f"{complaint}; lower {objective}.min_side_px, or take larger pictures than {data}")
            reporter.message(f"{complaint}; see {objective}.min_side_px")
        elif share > 0.5 and at_first:
            too_small = "their pictures are" if left_out == "pairs" else "they are"
            reporter.message(f"{name}: {share:.0%} of the {left_out}, {too_small} too small for the law; see {objective}.min_side_px")


def _start_tracker(trainer: Trainer, folder: RunFolder) -> None:
    """Begin to track: TensorBoard in the run's folder, the others as they are set up here, as a run of project wherefrom."""
    accelerator = trainer.accelerator
    accelerator.project_configuration.logging_dir = str(folder.path)
    if trainer.settings.runtime.log_with == "tensorboard":  # what was logged after the checkpoint is logged again
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": trainer.done + 1}})
        return
    name = folder.path.absolute().name
    run_names = {"wandb": {"name": name}, "trackio": {"name": name}, "mlflow": {"run_name": name}, "swanlab": {"experiment_name": name}}
    accelerator.init_trackers("wherefrom", config=to_plain(trainer.settings), init_kwargs=run_names)


def _finish_unless_stopped(trainer: Trainer, folder: RunFolder, val: ShardIndex | None, reporter: Reporter) -> str | None:
    """Do what follows the last update, which is saved already; return the name of the signal that cut it short, or None."""
    with _Signals(at_once=True) as signals:
        try:
            _finish(trainer, folder, val, reporter)
        except KeyboardInterrupt:
            return signals.name(signals.came or signal.SIGINT)
    return None


def _finish(trainer: Trainer, folder: RunFolder, val: ShardIndex | None, reporter: Reporter) -> None:
    """Write the trained encoder for others, and measure it: the curves' last point, then everything with every control."""
    if trainer.ranks.first:
        exported, loader = trainer.step.exported(), trainer.loader
        network = "encoder" if exported is trainer.step.encoder else "teacher"
        write_encoder(folder, exported, loader.recipe, settings=trainer.settings, data=loader.index.fingerprint, network=network)
    if not _is_evaluated(trainer, folder):
        _evaluate(trainer, folder, val, reporter, full=False)
    _evaluate(trainer, folder, val, reporter, full=True)


def _evaluate_if_due(trainer: Trainer, folder: RunFolder, val: ShardIndex | None, reporter: Reporter) -> None:
    """Make the short evaluation that follows this update, if one does; that of the last update belongs to the end."""
    every = trainer.settings.evaluation.every
    if every and 0 < trainer.done < trainer.updates and trainer.done % every == 0:
        _evaluate(trainer, folder, val, reporter, full=False)


def _is_evaluated(trainer: Trainer, folder: RunFolder) -> bool:
    """Return whether this update's short evaluation is in the log, as the first rank reads it."""
    ranks = trainer.ranks
    return ranks.highest(int(ranks.first and any(line["update"] == trainer.done for line in read_metrics(folder, "evaluation")))) > 0


def _evaluate(trainer: Trainer, folder: RunFolder, val: ShardIndex | None, reporter: Reporter, *, full: bool) -> None:
    """Evaluate, all ranks together; the first writes it down."""
    settings = trainer.settings
    with trainer.clock.spending("evaluating"):
        if val is None:
            return
        options = {"renderer": settings.runtime.renderer, "threads": settings.runtime.threads, "device": trainer.accelerator.device}
        with ShardPictures(trainer.loader.index, **options) as train, ShardPictures(val, **options) as held_out:
            results = evaluate_run(
                trainer.step,
                train,
                held_out,
                settings.evaluation,
                view_px=settings.label_view_px,
                picture_px=settings.label_picture_px,
                at=trainer.progress,
                full=full,
                progress=reporter.progressed,
                ranks=trainer.ranks,
            )
        if trainer.ranks.first:
            if full:
                write_evaluation(folder, results.report)
            else:
                append_metrics(folder, {"kind": "evaluation", "update": trainer.done, "curves": results.curves})
                trainer.accelerator.log({f"evaluation/{name}": value for name, value in results.curves.items()}, step=trainer.done)
            reporter.evaluated(results)
        trainer.ranks.wait()


def _checked_folder(settings: TrainSettings, out: Path | None, resume: bool) -> RunFolder | None:
    """Return the folder of the run to go on with, or None for a new one; nothing is touched yet.

    Raises: ValueError if `out` may not be written into, or holds a run of other settings.
    """
    if not resume:
        if out is not None:
            refuse_if_taken(out)
        return None
    if out is None:
        raise ValueError("resume without out: say which run to go on with, e.g. --out runs/demo-0 --resume")
    refuse_if_absent(out)
    folder = RunFolder(out)
    if not folder.settings.is_file():
        refuse_if_taken(out)
        return None
    newest = checkpoint.latest(folder.checkpoints)
    if newest is not None:
        checkpoint.read_state(newest)  # one of another version is refused before its settings are
    check_same_run(settings, read_plain_settings(folder.settings))
    return folder


def _with_its_renderer(settings: TrainSettings, folder: RunFolder) -> TrainSettings:
    """Return the settings with the renderer that the run began with in place of "auto"."""
    plain = read_plain_settings(folder.settings).get("runtime")
    began_with = plain.get("renderer", "auto") if isinstance(plain, dict) else "auto"
    return from_plain(settings, {"runtime": {"renderer": began_with}}) if settings.runtime.renderer == "auto" else settings


def accelerator_for(settings: TrainSettings) -> Accelerator:
    """Return the machine: devices, ranks, precision, and the tracker that curves go to.

    Raises: ValueError if a device or a tracker is asked for that is not there.
    """
    device, tracker = settings.runtime.device, settings.runtime.log_with
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device='cuda': torch sees no CUDA device here; use 'auto' or 'cpu'")
    if tracker not in ("none", *map(str, get_available_trackers())):
        raise ValueError(f"runtime.log_with={tracker!r}: not installed; pip install {tracker}, or take 'tensorboard' or 'none'")
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="bf16" if settings.precision == "bfloat16" else "no",
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=".", logging_dir="."),  # the run's folder, once it is known
    )


@contextlib.contextmanager
def accelerator_of_a_run(settings: TrainSettings) -> Iterator[Accelerator]:
    """Hand out a run's machine, and leave the process free for a run on another one, or of another precision.

    Accelerate keeps one state for a whole process; one that was there before, a caller's own, is left alone.
    Raises: as `accelerator_for`.
    """
    of_the_caller = is_initialized()
    accelerator = accelerator_for(settings)
    try:
        yield accelerator
    finally:
        if not of_the_caller:
            accelerator.state.destroy_process_group()  # a rank that left with it alive would abort the others
            AcceleratorState._reset_state(reset_partial_state=True)


def _launcher_started_one_of_several(environment: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch --cpu --num_processes N` started this process: it sets a meeting place for N, and starts one."""
    of_processors = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return of_processors and "MASTER_ADDR" in environment and get_cpu_distributed_information().world_size == 1


def _open_data(settings: TrainSettings, accelerator: Accelerator, ranks: Ranks, reporter: Reporter) -> tuple[ShardIndex, ShardIndex | None]:
    """Return the indexes of training and held-out pictures; one rank of a machine renders and indexes, the others find it done.

    Raises: as ShardIndex.open and check_held_out; ValueError if too few pictures are held out to be measured, which would else come out
    at the very end.
    """
    with ranks.led_by(accelerator.is_local_main_process):
        train, val = settings.data, settings.val
        if train is None:
            demo = demo_shards(progress=partial(reporter.progressed, "rendering demo pictures"))
            train, val = demo.train, demo.val
        progress = partial(reporter.progressed, "indexing")
        train_index, val_index = ShardIndex.open(train, labels=settings.labels, progress=progress), None
        if _saves_decoding(settings, train_index, accelerator.device):
            reporter.message("decodes every picture once: of those that decode only what views show is from then on (--index.decode never)")
            decoding = partial(reporter.progressed, "decoding")
            train_index = ShardIndex.open(train, labels=settings.labels, decode=True, progress=decoding)
        if val is not None:
            val_index = ShardIndex.open(val, labels=settings.labels, classes=train_index.classes, progress=progress)
    if val_index is not None and len(val_index) - val_index.invalid_count < 2:
        raise ValueError(f"val={settings.val!r}: 1 valid picture or none, R2 needs at least 2; name more shards, or leave out --val")
    if val_index is not None:
        check_held_out(train_index, val_index)
        check_same_classes(train_index, val_index)
    return train_index, val_index


def _saves_decoding(settings: TrainSettings, index: ShardIndex, device: torch.device) -> bool:
    """Return whether it saves the run more than it takes to decode every picture once, which changes none of its views.

    To decode what shows of a picture, a share s, takes about (1 + s) / 2 of what the whole takes; there is a margin of two.
    """
    if settings.index.decode == "never" or index.audited or None in index.files:
        return False
    renderer, _ = choose_renderer(settings.runtime.renderer, device)
    recipe = ViewRecipe(families=united_families(settings.make_objectives()))
    valid = np.flatnonzero(index.valid)
    if not len(valid) or not decodes_parts(renderer, recipe):
        return False
    shown = shown_frac(recipe, index.source_size[valid[:: -(-len(valid) // SIZES_LOOKED_AT)]])
    return shown <= LARGEST_SHOWN and settings.passes(len(index)) * (1 - shown) > 4


def _claimed(out: Path | None, recipe: str, ranks: Ranks, stack: contextlib.ExitStack, *, resume: bool) -> RunFolder:
    """Return a new run's folder, which the first rank makes and all the others take."""

    def claim_path() -> str:
        return str(claim(out, recipe, resume=resume).path)

    folder = RunFolder(Path(ranks.first_does(claim_path)))
    _lock(folder, ranks, stack)
    return folder


def _lock(folder: RunFolder, ranks: Ranks, stack: contextlib.ExitStack) -> None:
    """Let the first rank hold the run's folder until `stack` ends."""

    def lock() -> str:
        stack.enter_context(locked(folder.path))
        return ""

    ranks.first_does(lock)


def _circumstances(trainer: Trainer) -> dict[str, Plain]:
    """Return what rounding and speed hang on and no setting says, and where the loader stands: the metrics' line of a start."""
    waits = {name.lower(): os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    device = trainer.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    numbers = {"ranks": trainer.ranks.count, "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"kind": "start", "update": trainer.done} | numbers | waits | {"position": trainer.loader.position(trainer.done)}


def _facts(trainer: Trainer, folder: RunFolder) -> RunFacts:
    return RunFacts(
        recipe=trainer.settings.recipe,
        folder=folder.path,
        device=str(trainer.accelerator.device),
        ranks=trainer.ranks.count,
        model=trainer.settings.model.described(),
        model_parameters=sum(p.numel() for p in trainer.step.encoder.parameters()),
        parameters=sum(p.numel() for p in trainer.step.parameters() if p.requires_grad),
        samples=len(trainer.loader.index),
        global_batch=trainer.settings.global_batch,
        updates=trainer.updates,
        updates_per_epoch=trainer.loader.updates_per_epoch,
        resumed_at=trainer.done,
        loader=trainer.loader,
        objectives=trainer.settings.make_objectives(),
    )


class _Signals:
    """A signal that asks the run to stop, as a number that is asked for at the end of an update: SIGTERM, SIGINT, or SIGUSR1.

    A second SIGTERM or SIGINT is not caught: whoever sends it will not wait. SIGUSR1 is what schedulers send before a job's time is over,
    to each of its processes, perhaps more than once; repeated, it changes nothing. With `at_once`, KeyboardInterrupt is raised besides.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.came = 0
        self._at_once = at_once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT, *REPEATED)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(self._before)

    @staticmethod
    def name(number: int) -> str | None:
        """Return the name of a signal, None for 0."""
        return signal.Signals(number).name if number else None

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.came:
            return
        self.came = number
        self._restore({number: handler for number, handler in self._before.items() if number not in REPEATED})
        if self._at_once:
            raise KeyboardInterrupt

    def _restore(self, handlers: Mapping[int, Any]) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self._before = {number: handler for number, handler in self._before.items() if number not in handlers}
