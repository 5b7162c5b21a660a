"""What the commands print with: lines, tables and progress, for eyes on a terminal, for grep elsewhere.

Here: one look for all of them. Not here: what is printed, a run's live panel (terminal.py), the line that ends a command (cli.py).
Words are printed as they are, never read as markup.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

QUIET_S = 5.0  # off a terminal: no line of progress before, and at most one in this time


def print_line(console: Console, words: str, style: str = "") -> None:
    """Print a line, which is broken nowhere."""
    console.print(Text(words, style=style), soft_wrap=True)


def print_pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    """Print what is known of a thing: a line for each name and its words."""
    if not console.is_terminal:
        for name, text in pairs:
            print_line(console, f"{name:<12} {text}")
        return
    table = Table.grid(padding=(0, 2))
    for name, text in pairs:
        table.add_row(Text(name, style="bold"), Text(text))
    console.print(table)


def print_table(console: Console, rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print rows of words, the heading first: ruled on a terminal, with cells that begin with RED in red, else as aligned columns."""
    if not console.is_terminal:
        print_line(console, f"{title}\n{columns(rows)}".lstrip("\n"))
        return
    heading, *lines = rows
    table = Table(*heading, title=title or None, title_justify="left")
    for cells in lines:
        table.add_row(*(Text(cell, style="red" if cell.startswith("RED") else "") for cell in cells))
    console.print(table)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of words, the heading first, as aligned columns: numbers, and "-" for lacking ones, to the right, words to the left."""
    cells = list(zip(*rows, strict=True))
    return "\n".join("  ".join(row).rstrip() for row in zip(*map(_aligned, cells), strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    to_the_right = len(column) > 1 and all(cell == "-" or _is_number(cell) for cell in column[1:])
    return [cell.rjust(width) if to_the_right else cell.ljust(width) for cell in column]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def in_bytes(count: float) -> str:
    """Return a number of bytes in words: 1.5 KB is 1500 of them."""
    power = min(4, max(0, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


class ProgressLines:
    """Lines of progress for where nobody watches: none about work that is over soon, then one now and then."""

    def __init__(self, print_line: Callable[[str], None], work: str = "") -> None:
        self._print_line = print_line
        self._work, self._printed_at = work, time.monotonic()

    def __call__(self, work: str, done: int, total: int) -> None:
        """Take note of how far a piece of work is, and print it if it is time."""
        now = time.monotonic()
        if work != self._work:
            self._work, self._printed_at = work, now
        elif now - self._printed_at > QUIET_S:
            self._printed_at = now
            self._print_line(f"{work}: {done} of {total}")


@contextmanager
def progress(console: Console, work: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function of (done, total) that shows how far a piece of work is: by a bar on a terminal, else by lines."""
    if not console.is_terminal:
        yield partial(ProgressLines(partial(print_line, console), work), work)
        return
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*parts, console=console, transient=True) as bar:
        task = bar.add_task(work, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
