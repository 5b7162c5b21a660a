"""One update after another: encoder, objectives, optimiser and loader as one thing with a position.

Here: `Trainer`, its window of losses that nobody has read yet, its clock.
Not here: when to log, save, evaluate and stop (loop.py).
The device is asked for numbers only when a line of the log or a checkpoint is due.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from wherefrom.pipeline.loader import Loader, make_loader
from wherefrom.pipeline.recipe import Recipe
from wherefrom.pipeline.shards import ShardIndex
from wherefrom.pipeline.views import Batch
from wherefrom.train import checkpoint
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Progress, Step, random_scope
from wherefrom.train.objectives.spatial import SpatialPrediction
from wherefrom.train.optimiser import clip_gradients, gated_step, make_optimiser
from wherefrom.train.plain import to_plain
from wherefrom.train.reporting import LogRecord, Summary
from wherefrom.train.settings import TrainSettings, check_same_run

RUN_AHEAD = 2  # updates that the host may be ahead of the device

# columns of the window: a prefix and a name, or one of these
LOSS, SOUND = "loss", "sound"  # sound is 0 from the first broken update on
TERM, METER, GRADIENT = "term:", "meter:", "gradient:"


class Clock:
    """Seconds by what they were spent on; one spending inside another counts for both."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("updating", "waiting", "writing", "evaluating"), 0.0)

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Count the time inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start

    @property
    def training(self) -> float:
        """Seconds of training: updates with their waiting, and writing; evaluations apart."""
        return self.seconds["updating"] + self.seconds["writing"]


class Window:
    """Losses, norms and meters of the updates since the last line of the log: one row an update, means over ranks.

    They stay on the device until somebody has to know.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rows: list[dict[str, float]] = []
        self._accelerator = accelerator
        self._names: tuple[str, ...] = ()
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def add(self, update: int, values: dict[str, Tensor], samples: Tensor) -> None:
        """Take in an update's values, scalars on the device, and this rank's samples."""
        self._names = tuple(values)
        self._pending.append((update, torch.stack([value.float() for value in values.values()]), samples))

    def settle(self) -> None:
        """Read what is pending.

        Raises: FloatingPointError, on all ranks alike, if an update was broken: its number, terms, samples.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        own = torch.stack([row for _, row, _ in pending])
        mean = own
        if self._accelerator.num_processes > 1:
            mean = own.clone()
            dist.all_reduce(mean)
            mean /= self._accelerator.num_processes
        for (update, _, samples), own_row, row in zip(pending, own.tolist(), mean.tolist(), strict=True):
            named = dict(zip(self._names, row, strict=True))
            if named[SOUND] < 1:
                raise FloatingPointError(self._complaint(update, dict(zip(self._names, own_row, strict=True)), samples))
            self.rows.append(named)

    def take(self) -> dict[str, float]:
        """Return the means over the window, and empty it."""
        self.settle()
        rows, self.rows = self.rows, []
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    def _complaint(self, update: int, row: dict[str, float], samples: Tensor) -> str:
        broken = [name for name, value in row.items() if not math.isfinite(value) and not name.startswith(METER)]
        terms = [name for name in broken if name.startswith(TERM)] or broken
        ids = samples.tolist()
        said = ", ".join(f"{name.removeprefix(TERM)} is {row[name]}" for name in terms)
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        said += f" on rank {self._accelerator.process_index}, samples {', '.join(map(str, ids[:8]))}{more}"
        said_by_ranks = [said] if terms else []
        if self._accelerator.num_processes > 1:
            said_by_ranks = gather_object(said_by_ranks)
        return f"update {update}: {'; '.join(said_by_ranks)}; look at these samples, or lower optim.lr. No weight was changed by it"


class Trainer:
    """A run's state between updates, `done` of `updates` of which are completed.

    Raises: ValueError if the settings do not fit the data or one another.
    """

    def __init__(self, settings: TrainSettings, index: ShardIndex, accelerator: Accelerator) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.clock = Clock()
        self.window = Window(accelerator)
        self.done = 0
        with random_scope(settings.seed, "encoder"):
            encoder = Encoder(settings.model)
        self.step = Step(encoder, [SpatialPrediction(settings.spatial)], seed=settings.seed).to(accelerator.device)
        self.loader = self._make_loader(index)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.loader.close)
            self.updates = settings.updates_in_all(self.loader.updates_per_epoch)
            self.frozen = self.step.freeze_unreached(self.loader.batch([0, 1]))
            self.optimiser = make_optimiser(self.step, settings.optim)
            on_failure.pop_all()
        self._groups = self.step.clip_groups()
        if settings.runtime.compile:
            encoder.compile()  # the part whose shapes never change; random scopes stay outside
        self._model: nn.Module = accelerator.prepare_model(self.step)
        self._batches: Iterator[Batch] | None = None
        self._sound = torch.ones((), dtype=torch.bool, device=accelerator.device)
        self._events: deque[torch.cuda.Event] = deque()
        self._stand_at_log()

    def close(self) -> None:
        """End the loader's threads."""
        self.loader.close()

    def update(self) -> None:
        """Make one update: all micro-batches of this rank, one step of the optimiser, and what follows it."""
        with self.clock.spending("updating"):
            self._do_not_run_ahead()
            values, samples = self._backward()
            norms = clip_gradients(self._groups, self.settings.optim.clip_norm)
            self._sound = self._sound & self._all_finite(values[LOSS], *norms.values())
            rate = self.settings.learning_rate(self.done, self.updates)
            for group in self.optimiser.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            gated_step(self.optimiser, self._sound)
            self.optimiser.zero_grad()
            self.done += 1
            self.step.after_step(Progress(update=self.done, updates=self.updates), rank=self.accelerator.process_index)
            values |= {f"{GRADIENT}{name}": norm for name, norm in norms.items()} | {SOUND: self._sound}
            self.window.add(self.done, values, samples)

    def log(self) -> LogRecord:
        """Return the means since the last record; it reads the device.

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
            losses=_named(means, TERM),
            meters=_named(means, METER),
            gradients=_named(means, GRADIENT),
            lr=self.settings.learning_rate(self.done - 1, self.updates),
            images_per_s=updates * self.settings.global_batch / training,
            waiting_frac=waited / training,
            seconds_left=(self.updates - self.done) * training / updates,
        )

    def save(self, folder: Path) -> None:
        """Save a checkpoint of this moment; the first rank writes, the others wait.

        Raises: FloatingPointError if an update was broken: nothing is written then.
        """
        self.window.settle()
        if self.accelerator.is_main_process:
            state = checkpoint.State(
                update=self.done,
                settings=to_plain(self.settings),
                position=self.loader.position(self.done),
                unlogged=self.window.rows,
                seconds=self.clock.seconds,
            )
            checkpoint.save(folder, state, self.step, self.optimiser, keep=self.settings.runtime.keep)
        self.accelerator.wait_for_everyone()

    def restore(self, saved: Path) -> None:
        """Stand where a checkpoint was saved.

        Raises: ValueError that names what differs, if it is one of another run.
        """
        state = checkpoint.read_state(saved)
        check_same_run(self.settings, state.settings)
        try:
            self.loader.resume(state.position)
        except ValueError as problem:
            raise ValueError(f"{saved}: {problem}") from None
        checkpoint.load(saved, self.step, self.optimiser)
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

    def _backward(self) -> tuple[dict[str, Tensor], Tensor]:
        """Add up the gradients of this update's micro-batches; return loss, terms and meters, their means, and the samples."""
        count = self.settings.runtime.accumulation
        values: dict[str, Tensor] = {}
        samples = []
        for micro in range(count):
            batch = self._next_batch()
            samples.append(batch.sample)
            with contextlib.nullcontext() if micro == count - 1 else self.accelerator.no_sync(self._model):
                output = self._model(batch, update=self.done, rank=self.accelerator.process_index, micro=micro)
                self.accelerator.backward(output.loss / count)
            terms = {f"{TERM}{name}": value for name, value in output.losses.items()}
            meters = {f"{METER}{name}": value for name, value in output.meters.items()}
            for name, value in ({LOSS: output.loss.detach()} | terms | meters).items():
                values[name] = values[name] + value / count if name in values else value / count
        return values, torch.cat(samples).clone()  # a view of them would hold a slot of the loader

    def _next_batch(self) -> Batch:
        if self._batches is None:  # not before `restore` has had its chance
            self._batches = self.loader.forever()
        with self.clock.spending("waiting"):
            return next(self._batches)

    def _all_finite(self, *values: Tensor) -> Tensor:
        """Return whether all values are finite, on all ranks; nobody waits for the answer."""
        finite = torch.stack([value.isfinite() for value in values]).all()
        if self.accelerator.num_processes > 1:
            least = finite.float()
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

    def _make_loader(self, index: ShardIndex) -> Loader:
        runtime = self.settings.runtime
        return make_loader(
            index,
            Recipe(families=self.step.families),
            seed=self.settings.seed,
            global_batch=self.settings.global_batch,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            accumulation=runtime.accumulation,
            order=self.settings.order,
            renderer=runtime.renderer,
            threads=runtime.threads,
            prefetch=runtime.prefetch,
            device=self.accelerator.device,
        )


def _named(means: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}
