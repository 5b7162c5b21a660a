"""What a profile looks like on a terminal: a verdict in one screen of 80 columns.

Here: its lines. Not here: measuring (measuring.py), the verdict itself (train/throughput.py), the page (page.py).
"""

import math
from collections.abc import Iterator

from wherefrom.tools.throughput.measuring import Profile, Spread
from wherefrom.train.throughput import WORDS, Chain, Change, Verdict, clock_seconds

COLUMNS = 80
BAR = 22  # columns of a bar that is as long as a picture takes
STAGES = {  # by cost of the chain: its stage, as measured
    "read_s": "read",
    "draw_s": "draw",
    "decode_s": "decode",
    "render_s": "render",
    "hand_over_s": "hand over",
    "copy_s": "copy",
    "forward_s": "forward",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
    "collectives_s": "collectives",
    "log_s": "log",
}
GPUS_SHOWN = ("L4", "A100", "H200")


def verdict_lines(profile: Profile) -> Iterator[str]:
    """Yield the lines of a profile's verdict, none longer than 80 columns."""
    for line in _lines(profile):
        yield line if len(line) <= COLUMNS else f"{line[: COLUMNS - 1]}…"


def headline(profile: Profile) -> str:
    """Return the limit in one line."""
    verdict = profile.verdict
    beneath = f"; without them: {WORDS[verdict.beneath]}" if verdict.beneath else ""
    return f"BOUND BY {WORDS[verdict.limit].upper()}{beneath}"


def advice(verdict: Verdict, reached: float) -> str:
    """Return the first thing to change, in one line."""
    first = verdict.first
    if first is None:
        return "nothing here gives 5 % more: it runs at the rate that it can reach"
    how = "" if first.basis == "measured" else f", {first.basis}"
    return f"{first.what}: about {number(first.rate)} pictures/s, {first.rate / reached:.2f} times as many{how}"


def about(profile: Profile) -> list[str]:
    """Return what was profiled, in three lines."""
    facts = profile.facts
    views = " + ".join(facts["views"])
    batch, measured = facts["batch"], facts["measured_batch"]
    smaller = "" if measured == batch else f", measured with {measured}"
    of_one = "" if facts["ranks"] == 1 else "; all numbers are of one rank"
    cores = f"{facts['cores']} of {facts['cores_seen']} cores, {facts['free_cores']:g} of them free of others"
    return [
        f"{facts['recipe']}: {views} of {facts['pictures']} pictures of {facts['mean_megapixels']:.2f} MP",
        f"{facts['renderer']} renderer, {facts['threads']} threads, {facts['ranks']} x {facts['device']}, batches of {batch}{smaller}",
        f"{cores}{of_one}",
    ]


def number(value: float) -> str:
    """Return a rate with three figures."""
    if not math.isfinite(value):
        return "any"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(spread: Spread) -> str:
    """Return a rate with the least and the largest that were measured."""
    return f"{number(spread.median)} pictures/s ({number(spread.low)}-{number(spread.high)})"


def stage_rows(profile: Profile) -> list[tuple[str, Spread, float]]:
    """Return every stage of the chain that costs something: its name, milliseconds a picture, share of the time a picture takes."""
    shares = {cost: seconds * profile.together.reached.median for cost, seconds in clock_seconds(profile.chain).items()}
    rows = []
    for cost, stage in STAGES.items():
        spread = profile.stages.get(_measured_as(profile, stage))
        if spread is None and cost == "log_s":
            ms = 1000 * profile.chain.log_s / profile.chain.batch
            spread = Spread(median=ms, low=ms, high=ms, n=1)
        if spread is not None:
            rows.append((stage, spread, shares[cost]))
    return rows


def shown_changes(profile: Profile) -> list[Change]:
    """Return the changes that are worth a line: of GPUs a few, of what changes nothing at all none but other threads and renderers."""
    reached = profile.together.reached.median
    shown = []
    for change in profile.verdict.changes:
        if change.basis == "rated" and not change.what.endswith(GPUS_SHOWN):
            continue
        small = abs(change.rate / reached - 1) < 0.03
        if small and not change.what.startswith(("--runtime.threads", "--runtime.renderer", "--order", "batches")):
            continue
        shown.append(change)
    return shown


def slowest(profile: Profile) -> str:
    """Return the stage that takes longest by the clock."""
    return max(stage_rows(profile), key=lambda row: row[2])[0]


def _lines(profile: Profile) -> Iterator[str]:
    verdict, together = profile.verdict, profile.together
    reached, ceiling = together.reached.median, together.ceiling.median
    yield from about(profile)
    yield ""
    yield headline(profile)
    yield f"reached  {rate(together.reached)}, {reached / ceiling:.0%} of the ceiling"
    yield f"ceiling  {rate(together.ceiling)}: training on one batch again and again"
    alone = together.loader[profile.chain.threads]
    yield f"loader   {rate(alone)} alone; {_hidden(profile.chain, verdict)}"
    yield f"waiting  {together.waiting_frac:.0%} of the time, for data; {_cores(profile.chain, verdict)}"
    yield ""
    yield f"{'stage':<12}{'ms a picture':>13}{'(low-high)':>16}  of the time that a picture takes"
    most = slowest(profile)
    for stage, spread, share in stage_rows(profile):
        between = f"({_ms(spread.low)}-{_ms(spread.high)})" if spread.n > 1 else ""
        bar = "█" * min(BAR, round(BAR * share)) or ("▏" if share > 0.002 else "")
        mark = "  slowest" if stage == most else ""
        yield f"{stage:<12}{_ms(spread.median):>13}{between:>16}  {bar:<{BAR}}{min(share, 9.99):>5.0%}{mark}"
    loaders = "  ".join(f"{threads}: {number(spread.median)}" for threads, spread in together.loader.items())
    yield f"the loader alone, pictures/s by threads: {loaders}"
    yield ""
    yield f"{'what if':<42}{'pictures/s':>11}{'times':>7}  basis"
    for change in shown_changes(profile):
        yield f"{change.what[:41]:<42}{number(change.rate):>11}{change.rate / reached:>7.2f}  {change.basis}"
    yield ""
    yield f"FIRST: {advice(verdict, reached)}"


def _hidden(chain: Chain, verdict: Verdict) -> str:
    if chain.device == "cpu":
        return "it shares the cores with training"
    return f"{verdict.rates.hidden_frac:.0%} of it hidden, {verdict.rates.exposed_frac:.0%} exposed"


def _cores(chain: Chain, verdict: Verdict) -> str:
    whom = "the GPU" if chain.device == "cuda" else "training"
    return f"{verdict.cores_needed:.1f} cores feed {whom} at its ceiling"


def _measured_as(profile: Profile, stage: str) -> str:
    """Return under which name a stage was measured: reading as it is in a run, from the disk or from memory."""
    if stage != "read" or "read, cold" not in profile.stages:
        return stage
    as_cold = abs(profile.stages["read, cold"].median / 1000 - profile.chain.read_s)
    return "read, cold" if as_cold < abs(profile.stages["read"].median / 1000 - profile.chain.read_s) else "read"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
