"""What `wherefrom doctor` finds: one thing that was looked at, good or with what mends it, and how it is printed.

Here: findings, lines of at most 80 columns, the line at the end.
Not here: looking (software_findings.py, machine_findings.py).
"""

import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.console import Console
from rich.text import Text

Mark = Literal["good", "absent", "mend", "FAILS"]  # absent: not here, and nothing needs it; FAILS: what was asked for cannot work
STYLES: dict[Mark, str] = {"good": "green", "absent": "dim", "mend": "yellow", "FAILS": "bold red"}
WIDTH, MARK_WIDTH, NAME_WIDTH = 80, 8, 17  # columns

FAULTS = (  # what libraries raise that are broken, or do not belong together
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    subprocess.SubprocessError,
)


class Finding(NamedTuple):
    """One thing that was looked at."""

    mark: Mark
    name: str
    text: str
    mend: str = ""  # what to do; nothing if it is good


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What must work."""

    data: str | None = None
    labels: str | None = None
    renderer: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


def summary(findings: Sequence[Finding]) -> str:
    """Return the last line: what fails, what is to be mended."""
    failing, mending = ([finding.name for finding in findings if finding.mark == mark] for mark in ("FAILS", "mend"))
    line = f"FAILS: {', '.join(failing)}" if failing else "all that was asked for works"
    return f"{line}; to mend: {', '.join(mending)}" if mending else line


def print_finding(console: Console, finding: Finding) -> None:
    """Print a finding in at most 80 columns, unless a word has more; what mends it begins a line of its own."""
    width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    indent = " " * (MARK_WIDTH + NAME_WIDTH)
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
    lines = wrap.wrap(f"{finding.mark:<{MARK_WIDTH}}{finding.name:<{NAME_WIDTH - 1}} {finding.text}")
    wrap.initial_indent, wrap.subsequent_indent = f"{indent}-> ", f"{indent}   "
    lines += wrap.wrap(finding.mend)
    text = Text("\n".join(lines))
    text.stylize(STYLES[finding.mark], 0, len(finding.mark))
    console.print(text, soft_wrap=True)


def first_line(problem: BaseException) -> str:
    """Return the first line of a failure."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def from_reason(mark: Mark, name: str, reason: str, mend: str = "") -> Finding:
    """Return a finding from a message of ours, `the thing, what it was; the mend`; one without a mend takes `mend`."""
    text, separator, told = reason.rpartition("; ")
    return Finding(mark, name, text, told) if separator else Finding(mark, name, told, mend)


def good_unless(short: bool, name: str, text: str, mend: str) -> Finding:
    """Return a finding that is good, or to be mended."""
    return Finding("mend", name, text, mend) if short else Finding("good", name, text)
