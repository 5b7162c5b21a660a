"""What limits a run's rate on its machine, and what a change would give: arithmetic on costs that others measured.

Here: `Chain`, the costs of a run link by link; the rates that follow from them; which link is the limit; changes and what they are worth.
Not here: measuring (tools/throughput/measuring.py), the counters of a run (throughput_watch.py), how it looks (tools/throughput/report.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

Limit = Literal[
    "reading",
    "drawing",
    "decoding",
    "rendering",
    "handing over",
    "copying",
    "training",
    "collectives",
    "logging",
    "cores",
    "neighbors",
]
Basis = Literal["measured", "estimated", "rated"]
Effort = Literal[
    "option", "data", "recipe", "method", "machine"
]  # what is touched: the run's speed, its files, its numbers, what it learns

LINKS: dict[Limit, tuple[str, ...]] = {  # what a run does, by the costs of `Chain` that it is made of
    "reading": ("read_s", "read_cpu_s"),
    "drawing": ("draw_s",),
    "decoding": ("decode_s",),
    "rendering": ("render_s",),
    "handing over": ("hand_over_s",),
    "copying": ("copy_s",),
    "training": ("forward_s", "backward_s", "optimizer_s"),
    "collectives": ("collectives_s",),
    "logging": ("log_s",),
}
WORDS: dict[Limit, str] = {  # what is said of a limit
    "reading": "reading pictures from the disk",
    "drawing": "drawing views and their records",
    "decoding": "decoding pictures",
    "rendering": "rendering views",
    "handing over": "handing batches over",
    "copying": "copying batches to the device",
    "training": "training itself",
    "collectives": "what the ranks say to one another",
    "logging": "lines of the log and checkpoints",
    "cores": "cores that this process may not use",
    "neighbors": "other programs on these cores",
}
WORTH_SAYING = 1.2  # a machine that is not all ours is the limit where the rest of it would give so many times the rate
WORTH_DOING = 1.05  # what a change must give to be advised: runs of one kind differ by as much
LEAST_CORES = 0.1
WAITS: tuple[Limit, ...] = ("reading", "copying", "collectives", "logging")  # whose costs are no work of the cores
RATED_TFLOPS = {  # dense bfloat16 of data sheets
    "L4": 121,
    "RTX 4090": 165,
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
}
RATED_SHARE = 0.3  # of a data sheet's figure that training of this size is taken to reach
PARALLEL_FRAC = 0.55  # of training on a processor, where only one core is there to tell: the demo's model on two cores gave .39 to .79


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """The costs of one rank of a run, and the machine that it runs on.

    Units: CPU-seconds, but for reading, which mostly waits, by the clock; on a GPU the links of training are seconds of the GPU.
    """

    # the loader, a picture
    read_s: float
    read_cpu_s: float = 0.0
    draw_s: float = 0.0
    decode_s: float
    render_s: float
    hand_over_s: float = 0.0
    # training, an update
    batch: int  # pictures of this rank
    copy_s: float = 0.0
    forward_s: float
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    collectives_s: float = 0.0
    host_s: float = 0.0  # CPU-seconds that it takes to keep a GPU busy
    log_s: float = 0.0  # lines of the log and checkpoints, by the clock: the mean
    parallel_frac: float = 1.0  # of training on a processor: what is faster on more cores
    # the machine
    device: Literal["cpu", "cuda"]
    cores: float  # that this process may use
    cores_seen: float  # that the machine has
    held: float = 0.0  # cores that other processes take meanwhile
    ranks: int = 1  # that share the cores
    threads: int  # that decode and render; 0: in the caller's
    makers: int = 2  # batches that are made at once
    loose: bool = False  # whether every picture is a file of its own

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{item.name}={value}: needs a number of at least 0")
        if self.batch < 1 or self.cores < 1 or self.ranks < 1 or self.makers < 1 or self.threads < 0:
            numbers = f"batch={self.batch}, cores={self.cores}, ranks={self.ranks}, makers={self.makers}, threads={self.threads}"
            raise ValueError(f"{numbers}: needs at least 1 of each, and 0 threads")

    @property
    def free_cores(self) -> float:
        """Cores for this rank: its share of those that others leave."""
        return max(LEAST_CORES, self.cores - self.held) / self.ranks

    @property
    def loader_cpu_s(self) -> float:
        """CPU-seconds of the loader a picture."""
        return self.read_cpu_s + self.draw_s + self.decode_s + self.render_s + self.hand_over_s

    @property
    def update_s(self) -> float:
        """Seconds of an update by the clock, with its batch at hand."""
        total = self.copy_s + self.forward_s + self.backward_s + self.optimizer_s + self.collectives_s
        if self.device == "cuda":
            return total
        cores = self.free_cores
        return total / cores if cores < 1 else total * (1 - self.parallel_frac + self.parallel_frac / cores)

    @property
    def update_cpu_s(self) -> float:
        """CPU-seconds of an update, those of the loader not counted."""
        if self.device == "cuda":
            return self.host_s
        return self.copy_s + self.forward_s + self.backward_s + self.optimizer_s + self.collectives_s


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainRates:
    """Pictures a second of one rank, as a chain gives them."""

    ceiling: float  # of training, if data cost nothing
    loader: float  # of the loader, if training cost nothing
    reached: float  # of both together, with logs
    hidden_frac: float  # of the loader's time: behind training; the rest is exposed

    @property
    def exposed_frac(self) -> float:
        """Share of the loader's time by which training is longer."""
        return 1 - self.hidden_frac


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Something that could be otherwise, and the chain that it would make."""

    what: str
    chain: Chain
    basis: Basis  # of the costs that change
    effort: Effort
    rate: float = 0.0  # pictures/s that it gives; 0: not yet predicted


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What limits a run, and what to do."""

    limit: Limit
    beneath: Limit | None  # what would be the limit next, where the machine is not all ours
    rates: ChainRates
    factor: float  # measured over predicted rate, by which predictions are multiplied
    cores_needed: float  # for the loader and a GPU's host, that training is not held up; beside those that train on a processor
    changes: tuple[Change, ...]  # with their rates
    first: Change | None  # the first thing to change; None: nothing here gives enough


def rates(chain: Chain) -> ChainRates:
    """Return the rates of a chain.

    A picture takes the longest of: training alone, the loader alone, all CPU work over the free cores; then logs, which nothing hides.
    The loader alone takes the longest of: its pool's work over the threads that can run; a maker's way from reading to hand-over over the
    makers, for each waits for its own batch; all of its work over the free cores.
    """
    cores, pool_s = chain.free_cores, chain.decode_s + chain.render_s
    train_s, log_s = chain.update_s / chain.batch, chain.log_s / chain.batch
    alone_s = chain.read_s + chain.draw_s + chain.hand_over_s
    if chain.threads == 0:
        loader_s = alone_s + pool_s / min(1.0, cores)
        picture_s = train_s + loader_s
    else:
        rendered_s = pool_s / min(chain.threads, cores)
        loader_s = max(rendered_s, (alone_s + rendered_s) / chain.makers, chain.loader_cpu_s / cores)
        picture_s = max(train_s, loader_s, (chain.loader_cpu_s + chain.update_cpu_s / chain.batch) / cores)
    hidden = 1 - (picture_s - train_s) / loader_s if loader_s else 1.0
    return ChainRates(
        ceiling=_over(train_s), loader=_over(loader_s), reached=_over(picture_s + log_s), hidden_frac=min(max(hidden, 0.0), 1.0)
    )


def clock_seconds(chain: Chain) -> dict[str, float]:
    """Return how long a picture holds its part of the machine by each cost: seconds by the clock, by the names of `Chain`.

    Of decoding and rendering it is a thread's time over the threads that can run, of what makers do over the makers; where training
    shares the cores, all of it is CPU time over the free ones.
    """
    makers, cores = 1 if chain.threads == 0 else chain.makers, chain.free_cores
    together = max(LEAST_CORES, min(max(chain.threads, 1), cores))
    seconds = {"read_s": chain.read_s / makers}
    seconds |= {name: getattr(chain, name) / (cores if chain.device == "cpu" else makers) for name in ("draw_s", "hand_over_s")}
    seconds |= {name: getattr(chain, name) / (cores if chain.device == "cpu" else together) for name in ("decode_s", "render_s")}
    of_update = ("copy_s", "forward_s", "backward_s", "optimizer_s", "collectives_s")
    whole = sum(getattr(chain, name) for name in of_update)
    scale = chain.update_s / whole / chain.batch if whole else 0.0
    seconds |= {name: getattr(chain, name) * scale for name in of_update}
    return seconds | {"log_s": chain.log_s / chain.batch}


def limit_of(chain: Chain) -> tuple[Limit, Limit | None]:
    """Return what limits a chain, and where that is a machine not all ours, what would be the limit beneath.

    A link is the limit if the rate would rise most were it free. Others on the cores, and cores that we may not use, come first where
    they cost much: to have them back changes nothing of the run.
    """
    reached = rates(chain).reached
    # what the rest of the machine would give, over what this part of it can
    outside: dict[Limit, float] = {"neighbors": rates(replace(chain, held=0.0)).reached / reached}
    if chain.cores_seen > chain.cores:
        here = rates(replace(chain, threads=_threads_on(chain, chain.cores))).reached
        outside["cores"] = rates(_on_all_cores(chain)).reached / here
    free = {link: rates(_without(chain, costs)).reached for link, costs in LINKS.items()}
    if chain.device == "cuda":
        free["training"] = rates(replace(chain, forward_s=0.0, backward_s=0.0, optimizer_s=0.0, host_s=0.0)).reached
    clock = clock_seconds(chain)
    longest = {link: sum(clock.get(cost, 0.0) for cost in costs) for link, costs in LINKS.items()}
    # where two links hold the rate alike, neither alone raises it: the longer one is named
    link = max(free, key=lambda name: (round(free[name] / reached, 3), longest[name]))
    worst = max(outside, key=lambda name: outside[name])
    if outside[worst] >= WORTH_SAYING:
        return worst, link
    return link, None


def judge(chain: Chain, changes: Sequence[Change] = (), *, reached: float | None = None) -> Verdict:
    """Return the verdict on a chain; reached: the rate that was measured, by which predictions are corrected."""
    predicted = rates(chain)
    factor = 1.0 if reached is None else reached / predicted.reached
    limit, beneath = limit_of(chain)
    valued = tuple(replace(change, rate=rates(change.chain).reached * _correction(change, chain, factor)) for change in changes)
    cores_needed = predicted.ceiling * (chain.loader_cpu_s + (chain.host_s / chain.batch if chain.device == "cuda" else 0.0))
    return Verdict(
        limit=limit,
        beneath=beneath,
        rates=predicted,
        factor=factor,
        cores_needed=cores_needed,
        changes=valued,
        first=_first(valued, predicted.reached * factor),
    )


def _correction(change: Change, chain: Chain, factor: float) -> float:
    """Return by what a prediction is multiplied: what others cost beyond their time ends with them, and ratings know nothing of us."""
    return 1.0 if change.basis == "rated" or change.chain.held < chain.held else factor


def calibrated(chain: Chain, reached: float) -> Chain:
    """Return the chain with the cost of its limit such that it gives the rate that was measured, where that is of a link which waits.

    What is left, and all that is between cores and programs, is the factor of `judge`: it holds for every change alike.
    """
    limit, _ = limit_of(chain)
    if limit not in WAITS:
        return chain
    low, high = 0.2, 5.0
    for _ in range(40):  # the rate falls with the cost
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rates(_scaled(chain, LINKS[limit], middle)).reached > reached else (low, middle)
    return _scaled(chain, LINKS[limit], low)


def thread_changes(chain: Chain) -> list[Change]:
    """Return other numbers of threads: half, double, one a core."""
    numbers = {chain.threads // 2, chain.threads * 2, round(chain.cores / chain.ranks), 2 * round(chain.cores / chain.ranks)}
    others = sorted(number for number in numbers if number >= 1 and number != chain.threads)
    return [
        Change(what=f"--runtime.threads {number}", chain=replace(chain, threads=number), basis="measured", effort="option")
        for number in others
    ]


def machine_changes(chain: Chain) -> list[Change]:
    """Return the machine all ours, and one of twice the cores."""
    changes = []
    if chain.held > 0.05:
        changes.append(Change(what="no other programs", chain=replace(chain, held=0.0), basis="estimated", effort="option"))
    if chain.cores_seen > chain.cores:
        basis: Basis = "estimated" if chain.device == "cpu" else "measured"  # how well training shares cores that it has not
        changes.append(Change(what=f"all {chain.cores_seen:g} cores", chain=_on_all_cores(chain), basis=basis, effort="option"))
    double = 2 * max(chain.cores, chain.cores_seen)
    more = replace(chain, cores=double, cores_seen=double, threads=_threads_on(chain, double))
    return [*changes, Change(what=f"{double:g} cores like these", chain=more, basis="estimated", effort="machine")]


def one_math_thread_change(chain: Chain, training_s: float) -> Change:
    """Return training in one thread of a processor; training_s: its CPU-seconds a picture there. To share tiny sums takes longer."""
    alone = replace(
        chain, copy_s=0.0, forward_s=training_s * chain.batch, backward_s=0.0, optimizer_s=0.0, collectives_s=0.0, parallel_frac=0.0
    )
    return Change(what="OMP_NUM_THREADS=1", chain=alone, basis="measured", effort="option")


def renderer_changes(chain: Chain, costs: Mapping[str, tuple[float, float]]) -> list[Change]:
    """Return other renderers; costs: by name, the seconds of decoding and rendering a picture."""
    return [
        Change(
            what=f"--runtime.renderer {name}",
            chain=replace(chain, decode_s=decode_s, render_s=render_s),
            basis="measured",
            effort="data",  # pixels differ by rounding
        )
        for name, (decode_s, render_s) in costs.items()
    ]


def order_change(chain: Chain, read_s: float) -> Change:
    """Return samples in the order in which they lie; read_s: the seconds of reading one so."""
    return Change(what="--order block", chain=replace(chain, read_s=read_s), basis="measured", effort="recipe")


def packing_change(chain: Chain, read_s: float) -> Change:
    """Return pictures in tar shards; read_s: the seconds of reading one from there."""
    return Change(what="wherefrom pack, then tars", chain=replace(chain, read_s=read_s, loose=False), basis="estimated", effort="data")


def disk_change(chain: Chain, factor: float) -> Change:
    """Return the same files on a disk that is `factor` times as fast."""
    faster = replace(chain, read_s=max(chain.read_s / factor, chain.read_cpu_s))
    return Change(what=f"a disk {factor:g} times as fast", chain=faster, basis="estimated", effort="machine")


def log_change(chain: Chain, factor: int, log_every: int) -> Change:
    """Return lines of the log, and checkpoints, `factor` times as seldom; log_every: updates between two lines now."""
    seldom = replace(chain, log_s=chain.log_s / factor)
    return Change(what=f"--runtime.log-every {log_every * factor}", chain=seldom, basis="measured", effort="option")


def picture_size_change(chain: Chain, short_side_px: int, pixels_frac: float, *, per_byte_frac: float = 1.0) -> Change:
    """Return pictures packed anew; pixels_frac: of their pixels that are left, to which bytes and decoding are taken to go in proportion.

    per_byte_frac: of the time of reading, what goes by the bytes: the rest is waiting for a file's first one.
    """
    read_frac = 1 - per_byte_frac * (1 - pixels_frac)
    smaller = replace(
        chain, read_s=chain.read_s * read_frac, read_cpu_s=chain.read_cpu_s * read_frac, decode_s=chain.decode_s * pixels_frac
    )
    return Change(what=f"wherefrom pack --short-side {short_side_px}", chain=smaller, basis="estimated", effort="recipe")


def _with_update_of(chain: Chain, factor: float, fixed_s: float) -> Chain:
    """Return a chain whose updates are given `factor` times as many pixels, all of forward and backward told as forward."""
    of_pixels = max(chain.forward_s + chain.backward_s - fixed_s, 0.0)
    return replace(chain, copy_s=chain.copy_s * factor, forward_s=fixed_s + of_pixels * factor, backward_s=0.0)


def views_change(chain: Chain, what: str, views_frac: float, fixed_s: float = 0.0) -> Change:
    """Return fewer views; views_frac: of the pixels of all views that are left, to which rendering and training go in proportion.

    fixed_s: of an update's forward and backward, what does not depend on how much it is given.
    """
    fewer = replace(_with_update_of(chain, views_frac, fixed_s), render_s=chain.render_s * views_frac)
    return Change(what=what, chain=fewer, basis="estimated", effort="method")


def batch_change(chain: Chain, factor: int, fixed_s: float) -> Change:
    """Return a batch `factor` times as large; fixed_s: of forward and backward, what an update of any size takes."""
    larger = replace(_with_update_of(chain, factor, fixed_s), batch=chain.batch * factor)
    return Change(what=f"batches of {larger.batch}", chain=larger, basis="measured", effort="recipe")


def gpu_changes(chain: Chain, flop: float, *, now_tflops: float | None = None) -> list[Change]:
    """Return training on other GPUs, by rated figures; flop: of an update; now_tflops: what the GPU here is rated at."""
    changes = []
    for name, tflops in RATED_TFLOPS.items():
        if chain.device == "cuda" and now_tflops:
            forward_s, backward_s = ((seconds * now_tflops / tflops) for seconds in (chain.forward_s, chain.backward_s))
        else:
            forward_s, backward_s = flop / (tflops * 1e12 * RATED_SHARE), 0.0
        other = replace(
            chain,
            device="cuda",
            forward_s=forward_s,
            backward_s=backward_s,
            copy_s=chain.copy_s if chain.device == "cuda" else 0.0,
            optimizer_s=chain.optimizer_s if chain.device == "cuda" else 0.0,
            collectives_s=chain.collectives_s if chain.device == "cuda" else 0.0,
        )
        changes.append(Change(what=f"training on one {name}", chain=other, basis="rated", effort="machine"))
    return changes


def _first(changes: Sequence[Change], rate: float) -> Change | None:
    """Return the change that is advised: of those that leave the run the run that it is the easiest one that gives half of what the best
    does; where they give nothing, numbers of the recipe; then another machine. What is learned is not ours to change."""

    def best_of(efforts: Sequence[Effort]) -> Change | None:
        best = max((change for change in changes if change.effort in efforts), key=lambda change: change.rate, default=None)
        return best if best is not None and best.rate >= WORTH_DOING * rate else None

    option, same_run = best_of(["option"]), best_of(["option", "data"])
    if option is not None and same_run is not None and option.rate - rate >= (same_run.rate - rate) / 2:
        return option
    return same_run or best_of(["recipe"]) or best_of(["machine"])


def _without(chain: Chain, costs: Sequence[str]) -> Chain:
    return _scaled(chain, costs, 0.0)


def _scaled(chain: Chain, costs: Sequence[str], factor: float) -> Chain:
    changed: dict[str, Any] = {cost: getattr(chain, cost) * factor for cost in costs}
    return replace(chain, **changed)


def _on_all_cores(chain: Chain) -> Chain:
    held = chain.held * chain.cores_seen / chain.cores  # others are taken to use all cores alike
    return replace(chain, cores=chain.cores_seen, held=held, threads=_threads_on(chain, chain.cores_seen))


def _threads_on(chain: Chain, cores: float) -> int:
    return 0 if chain.threads == 0 else max(chain.threads, round(cores / chain.ranks))


def _over(seconds: float) -> float:
    return 1 / seconds if seconds > 0 else math.inf


assert set(LINKS) == set(get_args(Limit)) - {"cores", "neighbors"}
