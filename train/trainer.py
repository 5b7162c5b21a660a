"""One update after another: encoder, objectives, optimizer and loader as one thing with a position.

Here: `Trainer`: updates, the numbers that they leave, saving and restoring.
Not here: when to log, save, evaluate and stop (loop.py); how the weights change (optimizer.py); numbers nobody has read yet (meters.py).
The device is asked for numbers only when a line of the log or a checkpoint is due.
"""

import contextlib
import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from wherefrom.pipeline.loader import Loader, make_loader
from wherefrom.pipeline.ranges import Range, no_range, nvtx_range
from wherefrom.pipeline.render.choose import choose_renderer
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Batch
from wherefrom.train import checkpoint
from wherefrom.train.encoder import Encoder
from wherefrom.train.meters import FINITE, GRADIENT, LOSS, METER, TERM, Clock, Window
from wherefrom.train.objective import Progress, Step, random_scope
from wherefrom.train.optimizer import clip_gradients, drop_resting, gated_step, make_optimizer, set_rates
from wherefrom.train.plain_data import from_plain, to_plain
from wherefrom.train.pretrained import load_weights
from wherefrom.train.ranks import Ranks
from wherefrom.train.reporting import LogRecord, Summary
from wherefrom.train.settings import TrainSettings, check_same_run

log = logging.getLogger(__name__)

RUN_AHEAD = 2  # updates that the host may be ahead of the device


class Trainer:
    """A run's state between updates, `done` of `updates` of which are completed; `settings` are resolved: "auto" is a renderer's name.

    Weights to start from are loaded unless a checkpoint follows.
    Raises: ValueError if the settings do not fit the data or one another, or weights to start from do not fit the model.
    """

    def __init__(
        self, settings: TrainSettings, index: ShardIndex, accelerator: Accelerator, ranks: Ranks | None = None, *, restored: bool = False
    ) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.ranks = ranks or Ranks(accelerator.process_index, accelerator.num_processes)
        self.clock = Clock()
        self.window = Window(self.ranks)
        self.done = 0
        self.range: Range = nvtx_range if accelerator.device.type == "cuda" else no_range  # around each stage of an update
        with random_scope(settings.seed, "encoder"):
            encoder = Encoder(settings.model)
        if settings.model.weights is not None and not restored:
            load_weights(encoder, settings.model.weights)
        self.step = Step(encoder, settings.make_objectives(), seed=settings.seed).to(accelerator.device)
        self._settle_renderer()
        self.loader = self._make_loader(index)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.loader.close)
            self.updates = settings.updates_in_all(self.loader.updates_per_epoch)
            few = min(2, len(index), settings.global_batch // self.ranks.count // settings.runtime.accumulation)
            self.frozen_parameters, self.unreached_parameters = self.step.freeze_unreached(self.loader.batch(range(few)), self.progress)
            rules = self.step.parameter_rules(layer_decay=settings.optim.layer_decay)
            self.optimizer = make_optimizer(self.step, settings.optim, rules)
            on_failure.pop_all()
        self._groups = self.step.clip_groups()
        if settings.runtime.compile:
            for module in self.step.modules():
                if isinstance(module, Encoder):  # and teachers: the parts whose shapes never change; random scopes stay outside
                    module.compile()
        if self.unreached_parameters or self.step.leaves_parameters_unused:  # DDP would else wait for their gradients
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._model: nn.Module = accelerator.prepare_model(self.step)
        self.batches: Iterator[Batch] | None = None  # None: the loader's, from the position, once the first is asked for
        self._is_finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
        self._events: deque[torch.cuda.Event] = deque()
        self._stand_at_log()

    def close(self) -> None:
        """End the loader's threads."""
        self.loader.close()

    def update(self) -> None:
        """Make one update: all micro-batches of this rank, one step of the optimizer, and what follows it."""
        with self.clock.spending("updating"):
            self._do_not_run_ahead()
            progress = self.progress
            optim = self.settings.optim
            values, seen, samples = self._backward(progress)
            with self.range("optimizer"):
                drop_resting(self.optimizer, progress.epoch)
                self.step.before_update(progress)
                norms = clip_gradients(self._groups, optim.clip_norm, each=optim.clip_by == "parameter")
                self._is_finite = self._is_finite & self._all_finite(values[LOSS], *norms.values())
                rate, decay = (get(self.done, self.updates) for get in (self.settings.learning_rate, self.settings.weight_decay))
                set_rates(self.optimizer, lr=rate, peak_lr=self.settings.optim.lr, weight_decay=decay)
                gated_step(self.optimizer, self._is_finite)
                self.optimizer.zero_grad()
                self.done += 1
                self.step.after_step(progress, seen)
                values |= {f"{GRADIENT}{name}": norm for name, norm in norms.items()} | {FINITE: self._is_finite}
            self.window.add(self.done, values, samples)

    @property
    def progress(self) -> Progress:
        """Where training stands."""
        return Progress(update=self.done, updates=self.updates, updates_per_epoch=self.loader.updates_per_epoch)

    def settle(self) -> None:
        """Wait for the device, and read what it found.

        Raises: FloatingPointError if an update was broken.
        """
        with self.clock.spending("updating"):  # the device is at it
            self.window.settle()

    def log(self) -> LogRecord:
        """Return the means since the last record.

        Raises: FloatingPointError if an update was broken.
        """
        means = self.window.take()
        updates, training = self.done - self._logged_at[0], self.clock.training - self._logged_at[1]
        waited = self.clock.seconds["waiting"] - self._logged_at[2]
        self._stand_at_log()
        return LogRecord(
            update=self.done,
            updates=self.updates,
            epoch=self.done / self.loader.updates_per_epoch,
            loss=means[LOSS],
            losses=_with_prefix(means, TERM),
            meters=_with_prefix(means, METER),
            gradients=_with_prefix(means, GRADIENT),
            lr=self.settings.learning_rate(self.done - 1, self.updates),
            images_per_s=updates * self.settings.global_batch / training,
            waiting_frac=waited / training,
            seconds_left=(self.updates - self.done) * training / updates,
        )

    def save(self, folder: Path) -> None:
        """Save a checkpoint of this moment; the first rank writes, the others wait.

        Raises: FloatingPointError if an update was broken: nothing is written then; OSError as `checkpoint.save`.
        """
        self.window.settle()

        def write() -> None:
            state = checkpoint.State(
                update=self.done,
                settings=to_plain(self.settings),
                position=self.loader.position(self.done),
                unlogged=self.window.rows,
                seconds=self.clock.seconds,
            )
            checkpoint.save(folder, state, self.step, self.optimizer, keep=self.settings.runtime.keep)

        self.ranks.first_does(write)

    def restore(self, path: Path) -> None:
        """Stand where a checkpoint was saved.

        Raises: ValueError that names what differs, if it is one of another run.
        """
        state = checkpoint.read_state(path)
        check_same_run(self.settings, state.settings)
        try:
            self.loader.resume(state.position)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
        checkpoint.load(path, self.step, self.optimizer)
        self.done = state.update
        self.window.rows = list(state.unlogged)
        self.clock.seconds = dict(state.seconds)
        self._stand_at_log()

    def summary(self, folder: Path, stopped_by: str | None) -> Summary:
        """Return the run as it ends here."""
        return Summary(
            folder=folder,
            update=self.done,
            updates=self.updates,
            stopped_by=stopped_by,
            seconds={"training": self.clock.training} | self.clock.seconds,
            images_per_s=self.done * self.settings.global_batch / max(self.clock.training, 1e-9),
        )

    def _backward(self, progress: Progress) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Add up the gradients of this update's micro-batches.

        Returns: loss, terms and meters, means over the micro-batches that have them; what was seen, means over all micro-batches and
        ranks; the samples.
        """
        count = self.settings.runtime.accumulation
        values, seen = _Means(), _Means()
        samples = []
        for micro in range(count):
            batch = self._next_batch()
            samples.append(batch.sample)
            with contextlib.nullcontext() if micro == count - 1 else self.accelerator.no_sync(self._model):
                with self.range("forward"):
                    output = self._model(batch, progress, rank=self.ranks.rank, micro=micro)
                with self.range("backward"):
                    self.accelerator.backward(output.loss / count)
            terms = {f"{TERM}{name}": value for name, value in output.losses.items()}
            meters = {f"{METER}{name}": value for name, value in output.meters.items()}
            values.add({LOSS: output.loss.detach()} | terms | meters, count)
            seen.add(output.seen, count)
        of_ranks = self._of_all_ranks(seen.take(count))
        return values.take(count), of_ranks, torch.cat(samples).clone()  # a view of them would hold a slot of the loader

    def _next_batch(self) -> Batch:
        if self.batches is None:  # not before `restore` has had its chance
            self.batches = self.loader.forever()
        with self.clock.spending("waiting"), self.range("wait"):
            return next(self.batches)

    def _of_all_ranks(self, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return means over ranks."""
        if self.ranks.count == 1 or not seen:
            return seen
        flat = torch.cat([value.float().flatten() for value in seen.values()])
        with self.range("collectives"):
            dist.all_reduce(flat)
        parts = (flat / self.ranks.count).split([value.numel() for value in seen.values()])
        return {name: part.view_as(value) for (name, value), part in zip(seen.items(), parts, strict=True)}

    def _all_finite(self, *values: Tensor) -> Tensor:
        """Return whether all values are finite, on all ranks; nobody waits for the answer."""
        finite = torch.stack([value.isfinite() for value in values]).all()
        if self.ranks.count > 1:
            least = finite.float()
            with self.range("collectives"):
                dist.all_reduce(least, dist.ReduceOp.MIN)
            finite = least > 0
        return finite

    def _do_not_run_ahead(self) -> None:
        """Wait for the update before the last, so that waiting for data is seen where it happens, and few batches are held."""
        if self.accelerator.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > RUN_AHEAD:
            self._events.popleft().synchronize()

    def _stand_at_log(self) -> None:
        self._logged_at = (self.done, self.clock.training, self.clock.seconds["waiting"])

    def _settle_renderer(self) -> None:
        """Put the renderer that serves in place of "auto", the same on all ranks: it is written down with the run."""
        runtime = self.settings.runtime
        name, why = choose_renderer(runtime.renderer, self.accelerator.device)
        log.info("renderer %s: %s", name, why)
        change = {"runtime": {"renderer": self.ranks.texts(name)[0]}}
        self.settings = from_plain(self.settings, change)

    def _make_loader(self, index: ShardIndex) -> Loader:
        runtime = self.settings.runtime
        return make_loader(
            index,
            ViewRecipe(families=self.step.families),
            seed=self.settings.seed,
            global_batch=self.settings.global_batch,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            accumulation=runtime.accumulation,
            order=self.settings.order,
            renderer=runtime.renderer,
            threads=runtime.threads,
            prefetch=runtime.prefetch,
            device=self.accelerator.device,
        )


class _Means:
    """Means over micro-batches, each over those that have its name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._number: Counter[str] = Counter()

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Take in the values of one of `count` micro-batches."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value / count if name in self._sums else value / count
            self._number[name] += 1

    def take(self, count: int) -> dict[str, Tensor]:
        """Return the means."""
        fewer = {name: value * (count / self._number[name]) for name, value in self._sums.items() if self._number[name] < count}
        return self._sums | fewer


def _with_prefix(means: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}
