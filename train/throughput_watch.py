"""A run's own counters as the costs that the throughput model judges: one line after the first minute, and when the limit changes.

Here: what the counters say between two moments, the chain that they make, when there is something to say.
Not here: the model (throughput.py), measuring each stage (tools/throughput/).
The counters are there anyway: a line of the log costs one look at them and one at the system's.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from wherefrom.pipeline.system import available_cores, cores_of_rank, local_world_size
from wherefrom.train.throughput import (
    PARALLEL_FRAC,
    WORDS,
    Chain,
    Limit,
    Verdict,
    disk_change,
    judge,
    log_change,
    machine_changes,
    packing_change,
    thread_changes,
)
from wherefrom.train.trainer import Trainer

FIRST_S = 60.0  # of training, before which nothing is said: files come into memory, kernels are compiled
WINDOW_S = 20.0  # of training at least, over which counters are judged
PACKED_READ_S = 2e-5  # of a picture in a tar that is in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """What a rank's counters stand at; seconds since some moment, summed over the loader's threads where they are its."""

    pictures: int  # that the loader made
    updates: int
    read_s: float
    draw_s: float
    decode_s: float
    render_s: float
    updating_s: float  # by the clock, waiting included
    waiting_s: float
    writing_s: float
    evaluating_s: float
    process_cpu_s: float
    busy_s: float  # of the cores that the process may use, whoever used them; 0 where the system does not say

    @classmethod
    def of(cls, trainer: Trainer) -> "Counters":
        """Return a trainer's."""
        stats, clock = trainer.loader.stats(), trainer.clock.seconds
        return cls(
            pictures=stats.pictures,
            updates=trainer.done,
            read_s=stats.read_s,
            draw_s=stats.draw_s,
            decode_s=stats.decode_s,
            render_s=stats.render_s,
            updating_s=clock["updating"],
            waiting_s=clock["waiting"],
            writing_s=clock["writing"],
            evaluating_s=clock["evaluating"],
            process_cpu_s=time.process_time(),
            busy_s=_busy_s(),
        )

    def since(self, earlier: "Counters") -> "Counters":
        """Return what came after an earlier moment."""
        return Counters(**{name: getattr(self, name) - getattr(earlier, name) for name in Counters.__dataclass_fields__})

    @property
    def training_s(self) -> float:
        """Seconds of training by the clock."""
        return self.updating_s + self.writing_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the counters were made."""

    device: str
    cores: int
    cores_seen: int
    ranks: int  # on this machine
    threads: int
    makers: int
    loose: bool
    batch: int  # pictures of this rank in an update
    log_every: int
    math_threads: int  # that training computes with on a processor

    @classmethod
    def of(cls, trainer: Trainer) -> "Place":
        """Return a trainer's."""
        runtime, cores = trainer.settings.runtime, available_cores()
        return cls(
            device=trainer.accelerator.device.type,
            cores=cores,
            cores_seen=os.cpu_count() or cores,
            ranks=local_world_size(),
            threads=cores_of_rank() if runtime.threads is None else runtime.threads,
            makers=min(2, runtime.prefetch),
            loose=trainer.loader.index.is_tree(0),
            batch=trainer.settings.global_batch // trainer.ranks.count,
            log_every=runtime.log_every,
            math_threads=torch.get_num_threads(),
        )


class ThroughputWatch:
    """Says what a run is bound by: once after its first minute, and again when that has changed for two judgments in a row."""

    def __init__(self, trainer: Trainer, *, first_s: float = FIRST_S, window_s: float = WINDOW_S) -> None:
        self._trainer, self._first_s, self._window_s = trainer, first_s, window_s
        self._place = Place.of(trainer)
        self._began = self._before = Counters.of(trainer)
        self._said: Limit | None = None
        self._last: Limit | None = None

    def line(self) -> str | None:
        """Return what there is to say at this line of the log, or None."""
        now = Counters.of(self._trainer)
        passed = now.since(self._before)
        if passed.evaluating_s > 0:  # the process's seconds are not those of training
            self._before = now
            return None
        if now.since(self._began).training_s < self._first_s or passed.training_s < self._window_s or not passed.updates:
            return None
        self._before = now
        verdict, reached = judged(passed, self._place)
        changed = verdict.limit != self._said and (self._said is None or verdict.limit == self._last)
        self._last = verdict.limit
        if not changed:
            return None
        self._said = verdict.limit
        return verdict_line(verdict, reached, waiting_frac=passed.waiting_s / passed.training_s)


def judged(passed: Counters, place: Place) -> tuple[Verdict, float]:
    """Return the verdict on what the counters say, and the rate of this rank, pictures/s."""
    chain, reached = chain_of(passed, place), passed.updates * place.batch / passed.training_s
    changes = [*thread_changes(chain), *machine_changes(chain), disk_change(chain, 10), log_change(chain, 10, place.log_every)]
    if chain.loose:
        changes.append(packing_change(chain, PACKED_READ_S))
    return judge(chain, changes, reached=reached), reached


def chain_of(passed: Counters, place: Place) -> Chain:
    """Return the costs that the counters make.

    The loader counts by the clock. On a processor, where its threads and those of training take turns, seconds of both are taken to be
    longer than what they cost by the same factor: the process's CPU-seconds over all of them.
    """
    pictures, updates = max(passed.pictures, 1), max(passed.updates, 1)
    computing_s = max(passed.updating_s - passed.waiting_s, 0.0)
    loader_s = passed.draw_s + passed.decode_s + passed.render_s
    factor, update_s, host_s = 1.0, computing_s / updates, 0.0
    if place.device == "cpu":
        factor = min(1.0, passed.process_cpu_s / max(loader_s + computing_s * place.math_threads, 1e-9))
        update_s = max(passed.process_cpu_s - loader_s * factor, 0.0) / updates
    else:
        host_s = max(passed.process_cpu_s - loader_s, 0.0) / updates
    others_s = max(passed.busy_s - passed.process_cpu_s, 0.0) if place.ranks == 1 and passed.busy_s else 0.0
    return Chain(
        read_s=passed.read_s / pictures,
        draw_s=passed.draw_s * factor / pictures,
        decode_s=passed.decode_s * factor / pictures,
        render_s=passed.render_s * factor / pictures,
        batch=place.batch,
        forward_s=update_s,
        host_s=host_s,
        log_s=passed.writing_s / updates,
        parallel_frac=PARALLEL_FRAC,
        device="cpu" if place.device == "cpu" else "cuda",
        cores=float(place.cores),
        cores_seen=float(place.cores_seen),
        held=min(others_s / passed.training_s, float(place.cores)),
        ranks=place.ranks,
        threads=place.threads,
        makers=place.makers,
        loose=place.loose,
    )


def verdict_line(verdict: Verdict, reached: float, *, waiting_frac: float) -> str:
    """Return a verdict as one line of a run."""
    beneath = f", then {WORDS[verdict.beneath]}" if verdict.beneath else ""
    ceiling = max(verdict.rates.ceiling * min(verdict.factor, 1.0), reached)
    first = verdict.first
    advice = "nothing that it can tell gives more" if first is None else f"first: {first.what}, about {first.rate:.3g} pictures/s"
    return (
        f"bound by {WORDS[verdict.limit]}{beneath}: {reached:.3g} pictures/s, at most {ceiling:.3g} if data cost nothing, "
        f"waiting for data {waiting_frac:.0%}; {advice} (`wherefrom profile` measures it)"
    )


def _busy_s() -> float:
    """Return the seconds that the cores which this process may use were busy, for whomever; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not (stat.exists() and hasattr(os, "sched_getaffinity")):
        return 0.0
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in stat.read_text(encoding="ascii").splitlines():
        name, *numbers = line.split()
        if name in names:
            user, nice, system, _, _, irq, softirq, steal = map(int, numbers[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")
