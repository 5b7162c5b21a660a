"""A profile as a page for a browser: the verdict, a bar for each stage, when which thread did what, what would change it.

Here: the page, one file that needs no other. Not here: what is measured (measuring.py), the terminal's lines (report.py).
"""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from wherefrom.pipeline.files import write_aside
from wherefrom.tools.evaluation_page import STYLE
from wherefrom.tools.throughput.measuring import Profile
from wherefrom.tools.throughput.report import about, advice, headline, number, rate, shown_changes, slowest, stage_rows
from wherefrom.tools.throughput.watching import Stretch

COLORS = {  # one a stage, apart for eyes that see fewer colors too
    "read": "#56b4e9",
    "draw": "#999999",
    "decode": "#0072b2",
    "render": "#009e73",
    "hand over": "#cc79a7",
    "copy": "#f0e442",
    "forward": "#e69f00",
    "backward": "#d55e00",
    "optimizer": "#8c564b",
    "collectives": "#aa3377",
    "log": "#666666",
    "wait": "#c03028",
}
OF_THREADS = ("read", "draw", "render", "hand over")  # in the timeline: what makers do; rendering there is decoding too
WIDTH, LABELS, ROW = 940, 190, 26  # px
MORE_STYLE = """
svg { display: block; max-width: 100%; height: auto; margin: .8rem 0; } svg text { font: 12.5px system-ui, sans-serif; fill: currentColor; }
.limit { font-size: 1.15rem; font-weight: 600; margin: 1.4rem 0 .3rem; } .first { border-left: 4px solid #009e73; padding-left: .8rem; }
.legend span { display: inline-block; margin-right: 1rem; } 
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
td:last-child { color: gray; }
"""


def write_page(path: Path, profile: Profile) -> None:
    """Write the page of a profile, whole or not at all."""
    title = f"Why is it slow: {profile.facts['recipe']}"
    parts = [f"<h1>{html.escape(title)}</h1>", *(f'<p class="about">{html.escape(line)}</p>' for line in about(profile))]
    parts += [*_verdict(profile), "<h2>Stages</h2>", *_bars(profile), "<h2>When who did what</h2>", *_timeline(profile.timeline)]
    parts += ["<h2>The loader alone</h2>", *_loader(profile), "<h2>What if</h2>", *_changes(profile), "<h2>All measurements</h2>"]
    parts += _all_stages(profile)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    with write_aside(path) as whole:
        whole.write_text(f"{head}<style>{STYLE}{MORE_STYLE}</style>\n" + "\n".join(parts) + "\n", encoding="utf-8")


def _verdict(profile: Profile) -> Iterator[str]:
    together, words = profile.together, headline(profile).capitalize()
    yield f'<p class="limit">{html.escape(words)}</p>'
    waiting = f"of the time {together.waiting_frac:.0%} waits for data"
    yield f"<p>Reached: {rate(together.reached)}; the ceiling, one batch again and again: {rate(together.ceiling)}; {waiting}.</p>"
    yield f'<p class="first">First: {html.escape(advice(profile.verdict, together.reached.median))}</p>'


def _bars(profile: Profile) -> Iterator[str]:
    """Yield a bar for each stage: its share of the time that a picture takes."""
    rows, most = stage_rows(profile), slowest(profile)
    longest = max(1.0, *(share for _, _, share in rows))
    scale, height = (WIDTH - LABELS - 150) / longest, ROW * len(rows) + 24
    yield f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="share of the time that a picture takes, by stage">'
    whole = LABELS + scale
    yield f'<line x1="{whole:.1f}" x2="{whole:.1f}" y1="0" y2="{height - 20}" stroke="currentColor" stroke-dasharray="3 3" opacity=".5"/>'
    yield f'<text x="{whole:.1f}" y="{height - 5}" text-anchor="middle">the whole time</text>'
    for place, (stage, spread, share) in enumerate(rows):
        y, width = place * ROW, share * scale
        yield f'<text x="0" y="{y + 16}">{stage}</text>'
        yield f'<text x="{LABELS - 10}" y="{y + 16}" text-anchor="end">{spread.median:.2f} ms</text>'
        yield f'<rect x="{LABELS}" y="{y + 4}" width="{max(width, 0.5):.1f}" height="{ROW - 9}" rx="2" fill="{COLORS[stage]}"/>'
        words = f"{share:.0%}" + (", the slowest" if stage == most else "")
        yield f'<text x="{LABELS + width + 6:.1f}" y="{y + 16}">{words}</text>'
    yield "</svg>"
    shared = " Loader and training share the cores: their shares add up." if profile.chain.device == "cpu" else ""
    yield (
        '<p class="about">Milliseconds of one picture, each stage measured alone; the bar: how long a picture holds its part of the '
        f"machine, of the time that a picture takes in training.{shared}</p>"
    )


def _timeline(stretches: Sequence[Stretch]) -> Iterator[str]:
    """Yield a lane for each thread, a block for each stretch, over some updates with data."""
    shown = [stretch for stretch in stretches if stretch.stage in COLORS]
    updates = [stretch for stretch in stretches if stretch.stage == "update"]
    if not shown or not updates:
        return
    start, end = updates[len(updates) // 2 - 1].start_s, updates[-1].end_s
    shown = [stretch for stretch in shown if stretch.end_s > start and stretch.start_s < end]
    lanes = sorted({stretch.lane for stretch in shown}, key=lambda lane: (not lane.startswith("Main"), lane))
    height, scale = ROW * len(lanes) + 34, (WIDTH - LABELS) / max(end - start, 1e-9)
    yield f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" aria-label="what each thread did, by time">'
    for place, lane in enumerate(lanes):
        y = place * ROW
        name = "training" if lane.startswith("Main") else f"loader, {lane.removeprefix('wherefrom-')}"
        yield f'<text x="0" y="{y + 17}">{html.escape(name)}</text>'
        yield f'<rect x="{LABELS}" y="{y + 2}" width="{WIDTH - LABELS}" height="{ROW - 5}" fill="currentColor" opacity=".07"/>'
        for stretch in (stretch for stretch in shown if stretch.lane == lane):
            left, right = max(stretch.start_s, start) - start, min(stretch.end_s, end) - start
            x, width = LABELS + left * scale, max((right - left) * scale, 0.4)
            tip = f"{stretch.stage}: {1000 * (stretch.end_s - stretch.start_s):.1f} ms"
            yield (
                f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{ROW - 5}" fill="{COLORS[stretch.stage]}">'
                f"<title>{tip}</title></rect>"
            )
    for update in updates:
        if update.start_s >= start:
            x = LABELS + (update.start_s - start) * scale
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 30}" stroke="currentColor" opacity=".6"/>'
    base = height - 10
    yield f'<text x="{LABELS}" y="{base}">0</text><text x="{WIDTH}" y="{base}" text-anchor="end">{1000 * (end - start):.0f} ms</text></svg>'
    present = dict.fromkeys(stretch.stage for stretch in shown)
    names = {"render": "decode and render", "wait": "wait for data"}
    entries = [f'<span><i style="background:{COLORS[stage]}"></i>{names.get(stage, stage)}</span>' for stage in COLORS if stage in present]
    yield f'<p class="legend about">{"".join(entries)} Lines: an update begins.</p>'


def _loader(profile: Profile) -> Iterator[str]:
    rows = [(str(threads), number(spread.median)) for threads, spread in profile.together.loader.items()]
    yield from _table([("threads", "pictures/s", ""), *((*row, "") for row in rows)])


def _changes(profile: Profile) -> Iterator[str]:
    reached = profile.together.reached.median
    rows = [(change.what, number(change.rate), f"{change.rate / reached:.2f}", change.basis) for change in shown_changes(profile)]
    yield from _table([("change", "pictures/s", "times", "basis"), *rows])
    yield (
        f'<p class="about">Predicted by the costs above, times {profile.verdict.factor:.2f}: what was reached over what they predict of '
        "the run as it is. Rated: by the figures of data sheets, of which training is taken to reach 30 %.</p>"
    )


def _all_stages(profile: Profile) -> Iterator[str]:
    rows = [
        (name, f"{spread.median:.3f}", f"{spread.low:.3f}", f"{spread.high:.3f}", str(spread.n)) for name, spread in profile.stages.items()
    ]
    yield from _table([("stage, ms a picture", "median", "low", "high", "times"), *rows])


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    tagged = [("th", rows[0]), *(("td", row) for row in rows[1:])]
    lines = [f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>" for tag, row in tagged]
    yield f"<table>{''.join(lines)}</table>"
