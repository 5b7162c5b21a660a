"""The line in a run that says what it is bound by: planted counters, against the limit that was planted, and when it is said."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wherefrom.pipeline import system
from wherefrom.pipeline.loader import LoaderStats
from wherefrom.train import throughput_watch
from wherefrom.train.throughput_watch import Counters, Place, ThroughputWatch, chain_of, judged, verdict_line

pytestmark = pytest.mark.core

# a minute of a GPU that waits for nothing: 600 updates of 100 pictures, the loader at a third of its eight threads
GPU = Counters(
    pictures=60000,
    updates=600,
    read_s=6.0,
    draw_s=6.0,
    decode_s=100.0,
    render_s=60.0,
    updating_s=59.0,
    waiting_s=0.5,
    writing_s=1.0,
    evaluating_s=0.0,
    process_cpu_s=200.0,
    busy_s=210.0,
)
SERVER = Place(
    device="cuda", cores=8, cores_seen=8, ranks=1, threads=8, makers=2, loose=False, batch=100, log_every=10, math_threads=8
)  # fmt: skip
# a minute of two cores that do both, a tenth of it the loader
CPU = Counters(
    pictures=600,
    updates=60,
    read_s=1.0,
    draw_s=0.5,
    decode_s=7.0,
    render_s=4.5,
    updating_s=59.0,
    waiting_s=0.5,
    writing_s=1.0,
    evaluating_s=0.0,
    process_cpu_s=117.0,
    busy_s=119.0,
)
DESKTOP = Place(device="cpu", cores=2, cores_seen=2, ranks=1, threads=2, makers=2, loose=False, batch=10, log_every=10, math_threads=2)


@pytest.mark.parametrize(
    ("planted", "counters", "place", "counted", "placed"),
    [
        ("training", GPU, SERVER, {}, {}),
        ("rendering", GPU, SERVER, {"pictures": 20000, "updates": 200, "waiting_s": 40.0, "decode_s": 60.0, "render_s": 400.0}, {}),
        ("decoding", GPU, SERVER, {"pictures": 20000, "updates": 200, "waiting_s": 40.0, "decode_s": 400.0, "render_s": 60.0}, {}),
        ("reading", GPU, SERVER, {"pictures": 6000, "updates": 60, "waiting_s": 53.0, "read_s": 110.0}, {}),
        ("logging", GPU, SERVER, {"updating_s": 25.0, "writing_s": 35.0}, {}),
        (
            "cores",
            GPU,
            SERVER,
            {"pictures": 20000, "updates": 200, "waiting_s": 40.0, "process_cpu_s": 115.0, "busy_s": 116.0},
            {"cores": 2, "threads": 2},
        ),
        ("training", CPU, DESKTOP, {}, {}),
        ("neighbors", CPU, DESKTOP, {"process_cpu_s": 60.0}, {}),
        ("cores", CPU, DESKTOP, {"process_cpu_s": 58.0, "busy_s": 59.0}, {"cores": 1, "math_threads": 1, "threads": 1}),
        ("reading", CPU, DESKTOP, {"read_s": 115.0, "waiting_s": 45.0, "process_cpu_s": 25.0, "busy_s": 26.0}, {}),
        ("rendering", CPU, DESKTOP, {"render_s": 100.0, "waiting_s": 30.0}, {}),
        ("logging", CPU, DESKTOP, {"updating_s": 20.0, "writing_s": 40.0, "process_cpu_s": 40.0, "busy_s": 41.0}, {}),
    ],
)
def test_the_counters_of_a_planted_limit_name_it(
    planted: str, counters: Counters, place: Place, counted: dict[str, Any], placed: dict[str, Any]
) -> None:
    verdict, _ = judged(replace(counters, **counted), replace(place, **placed))
    assert verdict.limit == planted


def test_costs_of_the_counters_are_those_that_were_counted() -> None:
    chain = chain_of(GPU, SERVER)
    assert chain.decode_s == pytest.approx(100 / 60000)
    assert chain.update_s == pytest.approx(58.5 / 600)
    assert chain.log_s == pytest.approx(1 / 600)
    assert chain.held == pytest.approx(10 / 60)
    shared = chain_of(CPU, DESKTOP)  # seconds of threads that take turns count for less: in all they are the process's
    assert shared.update_cpu_s * 60 + shared.loader_cpu_s * 600 == pytest.approx(117)
    _, reached = judged(CPU, DESKTOP)
    assert reached == pytest.approx(600 / 60)


def test_a_line_names_the_limit_and_what_to_change() -> None:
    starved = replace(GPU, pictures=20000, updates=200, waiting_s=40.0, render_s=110.0, decode_s=10.0, process_cpu_s=140.0, busy_s=141.0)
    verdict, reached = judged(starved, replace(SERVER, threads=2))
    line = verdict_line(verdict, reached, waiting_frac=2 / 3)
    assert line.startswith("bound by rendering views: 333 pictures/s, at most ")
    assert "waiting for data 67%; first: --runtime.threads 8, about " in line
    assert "\n" not in line


class FakeRun:
    """What the watch looks at of a trainer, with seconds that a test lets pass."""

    def __init__(self) -> None:
        self.done = 0
        self.seconds = {"updating": 0.0, "waiting": 0.0, "writing": 0.0, "evaluating": 0.0}
        self.clock = SimpleNamespace(seconds=self.seconds)
        self.made = LoaderStats()
        index = SimpleNamespace(is_tree=lambda shard: False)
        self.loader = SimpleNamespace(stats=lambda: replace(self.made), index=index)
        self.accelerator = SimpleNamespace(device=SimpleNamespace(type="cuda"))
        self.ranks = SimpleNamespace(count=1)
        self.settings = SimpleNamespace(global_batch=10, runtime=SimpleNamespace(threads=1, prefetch=2, log_every=10))

    def train(self, seconds: float, *, waiting: float = 0.0, read_s: float = 0.0, evaluating: float = 0.0) -> None:
        self.done += 10
        self.seconds["updating"] += seconds
        self.seconds["waiting"] += waiting
        self.seconds["evaluating"] += evaluating
        self.made.pictures += 100
        self.made.read_s += read_s


def test_a_rank_has_the_threads_of_its_share_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "available_cores", lambda: 8)
    monkeypatch.setattr(throughput_watch, "available_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    run = FakeRun()
    run.settings.runtime.threads = None
    place = Place.of(run)  # type: ignore[arg-type]
    assert (place.cores, place.ranks, place.threads) == (8, 4, 2)


def test_a_run_says_it_once_after_the_first_minute_and_again_when_the_limit_changes() -> None:
    run = FakeRun()
    watch = ThroughputWatch(run)  # type: ignore[arg-type]
    said = []
    for _ in range(12):  # four minutes of training that waits for nothing
        run.train(20.0)
        said.append(watch.line())
    assert [place for place, line in enumerate(said) if line] == [2]
    assert said[2] is not None and said[2].startswith("bound by training itself")
    run.train(20.0, waiting=19.0, read_s=38.0)  # once may be chance
    assert watch.line() is None
    run.train(20.0, waiting=19.0, read_s=38.0)
    line = watch.line()
    assert line is not None and line.startswith("bound by reading pictures from the disk")
    run.train(20.0, waiting=19.0, read_s=38.0)
    assert watch.line() is None


def test_a_short_run_and_one_that_is_evaluated_say_nothing() -> None:
    run = FakeRun()
    watch = ThroughputWatch(run)  # type: ignore[arg-type]
    run.train(59.0)
    assert watch.line() is None
    for _ in range(5):
        run.train(30.0, evaluating=5.0)
        assert watch.line() is None


def test_a_look_at_the_counters_costs_less_than_a_thousandth_of_a_second() -> None:
    run = FakeRun()
    watch = ThroughputWatch(run)  # type: ignore[arg-type]
    costs = []
    for _ in range(20):
        run.train(1.0)
        start = time.thread_time()
        watch.line()
        costs.append(time.thread_time() - start)
    assert min(costs) < 1e-3


def test_a_run_in_this_process_prints_the_line(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from throughput_runs import tiny_settings

    from wherefrom.train import throughput_watch
    from wherefrom.train.loop import run
    from wherefrom.train.reporting import Reporter

    lines: list[str] = []

    class Listening(Reporter):
        def message(self, line: str) -> None:
            lines.append(line)

    monkeypatch.setattr(throughput_watch.ThroughputWatch.__init__, "__kwdefaults__", {"first_s": 0.0, "window_s": 0.0})
    run(tiny_settings(tiny_shards), reporter=Listening(), out=tmp_path / "run")
    assert len([line for line in lines if line.startswith("bound by ")]) >= 1
