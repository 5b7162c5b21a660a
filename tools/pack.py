"""The command `wherefrom pack`: any source of pictures -> tar shards.

Here: its options, how far it is while it runs, what it has done.
Not here: packing itself (pipeline/packing/pack.py), parsing the command line (cli.py).
"""

import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import arg

from wherefrom.pipeline.packing.folder import LEFT_OUT
from wherefrom.pipeline.packing.pack import PackProgress, PackReport, pack
from wherefrom.pipeline.packing.shard import PackSettings
from wherefrom.pipeline.shards.store import printable
from wherefrom.tools.console import QUIET_S, print_line
from wherefrom.tools.terminal import duration

__all__ = ["pack_command", "pack_progress"]

_MAX_CLASSES_BYTES = 2**26


def pack_command(
    source: Annotated[str, arg(metavar="SOURCE")],
    out: Annotated[Path, arg(metavar="OUT")],
    *,
    samples: Annotated[int | None, arg(metavar="N")] = None,
    mib: Annotated[int | None, arg(metavar="MIB")] = None,
    shuffle: Annotated[int | None, arg(metavar="SEED")] = None,
    short_side: Annotated[int | None, arg(metavar="PX")] = None,
    quality: int = 90,
    orientation: Literal["keep", "bake"] = "keep",
    name: Annotated[str | None, arg(metavar="NAME")] = None,
    labels: Annotated[str | None, arg(metavar="RULE")] = None,
    classes: Annotated[Path | None, arg(metavar="FILE")] = None,
    image_column: Annotated[str | None, arg(metavar="NAME")] = None,
    label_column: Annotated[str | None, arg(metavar="NAME")] = None,
    part: Annotated[str, arg(metavar="I/N")] = "0/1",
    workers: Annotated[int | None, arg(metavar="N")] = None,
) -> int:
    """Pack the pictures of SOURCE into tar shards in the folder OUT.

    The shards are for wherefrom, WebDataset, timm and DALI alike. Stopped at any moment, the same command goes on where it was.

    Args:
        source: whatever --data takes (a folder of pictures, tars, a pattern), or parquet files: one, a folder, 'data/train-*.parquet'.
        out: a folder that is new or empty, or in which the same was begun.
        samples: how many a shard; default: 1000.
        mib: the largest size of a shard, in place of --samples; for bytes that stay as they are.
        shuffle: a seed, for another order than the source's.
        short_side: shrink pictures whose short side is longer, to this many pixels, and encode them as JPEG; all others stay as they are.
        quality: of JPEGs that are encoded anew (4:2:0).
        orientation: keep the EXIF tag and the pixels as stored, or bake: turn them upright and encode anew what has to turn.
        name: of the shards, NAME-000000.tar; default: the name of OUT.
        labels: how tars name classes: cls, json.FIELD, tar, none; default: found by itself.
        classes: a classes.json whose numbers are kept, such as the train set's.
        image_column: of parquet files; default: the one that holds pictures.
        label_column: of parquet files; default: the one that names classes.
        part: i/n writes shards i, i + n, ... alone, for array jobs: 0/4 to 3/4.
        workers: threads; default: one a processor.
    Returns: the exit code, 0.
    Raises: OSError or ValueError of one line for what cannot be packed.
    """
    settings = PackSettings(samples=samples, mib=mib, shuffle=shuffle, short_side_px=short_side, quality=quality, orientation=orientation)
    numbered = _classes(classes) if classes is not None else ()
    console = Console(highlight=False)
    with pack_progress(console) as show:
        report = pack(
            source,
            out,
            settings=settings,
            name=name,
            labels=labels,
            classes=numbered,
            image_column=image_column,
            label_column=label_column,
            part=_part(part),
            workers=workers,
            progress=show,
        )
    for line in _summary(report, part):
        print_line(console, line)
    return 0


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal():
        raise ValueError(f"--part {printable(text)}: needs i/n, such as 0/4, 1/4, 2/4 and 3/4")
    return int(number), int(count)


def _classes(path: Path) -> Sequence[str]:
    """Return the names of a classes.json, {name: number}, by number. Raises: ValueError if it is none; OSError."""
    with path.open("rb") as file:
        text = file.read(_MAX_CLASSES_BYTES)
    try:
        number_of = dict(json.loads(text))
        if sorted(number_of.values()) == list(range(len(number_of))):
            return sorted(number_of, key=number_of.__getitem__)
    except (ValueError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path}: is no classes.json, which gives every name of a class its number, from 0 on")


def _summary(report: PackReport, part: str) -> Iterator[str]:
    """Say what lies in the folder, what does not, and how to go on."""
    rate = report.written / max(report.seconds, 1e-9)
    wrote = (
        f"{report.written} samples written in {duration(report.seconds)}, {rate:.0f}/s" if report.written else "nothing was left to write"
    )
    yield f"{report.folder}: {report.samples} samples in {_counted(report.shards, 'shard')}, {_size(report.bytes)}; {wrote}"
    if report.left_out:
        listed = f", listed in {report.folder / LEFT_OUT}" if not report.missing else ""
        yield f"left out: {_counted(report.left_out, 'invalid sample')}{listed}"
    if 0 < report.unlabeled < report.samples:
        yield f"{report.unlabeled} of {report.samples} samples have no label, and no .cls"
    if report.missing:
        yield f"part {part} is done; {_counted(report.missing, 'shard')} left for other parts, the last of which completes the folder"
    else:
        yield f"train on them: wherefrom train --data {shlex.quote(str(report.folder))}"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count != 1 else ''}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class _Lines:
    """Lines of progress for where nobody watches: how far, how fast, how long still."""

    def __init__(self, print_words: Callable[[str], None]) -> None:
        self._print = print_words
        self._work, self._begun, self._first, self._printed = "", 0.0, 0, 0.0

    def __call__(self, work: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if work != self._work:
            self._work, self._begun, self._first, self._printed = work, now, done, now
        elif now - self._printed > QUIET_S:
            self._printed = now
            rate = (done - self._first) / (now - self._begun)
            left = f", {duration((total - done) / rate)} left" if total is not None and rate else ""
            self._print(f"{work}: {done}{f' of {total}' if total is not None else ''}, {rate:.0f}/s{left}")


@contextmanager
def pack_progress(console: Console) -> Iterator[PackProgress]:
    """Give a function that shows how far each piece of work is: by a bar on a terminal, else by lines."""
    if not console.is_terminal:
        yield _Lines(partial(print_line, console))
        return
    rate = TextColumn("{task.fields[rate]}")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        tasks = {}

        def show(work: str, done: int, total: int | None) -> None:
            if work not in tasks:
                tasks[work] = bar.add_task(work, total=total, completed=done, rate="")
            task = bar.tasks[tasks[work]]
            bar.update(tasks[work], completed=done, total=total, rate=f"{task.speed or 0:.0f}/s")

        yield show
