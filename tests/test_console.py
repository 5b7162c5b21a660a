"""What commands print with: on a terminal, and where a file or a pipe takes the words. Compared with lines written out by hand."""

import io

import pytest
from rich.console import Console

from wherefrom.tools import console as printing
from wherefrom.tools.console import ProgressLines, columns, print_line, print_table, progress

pytestmark = pytest.mark.core
ROWS = [("law", "points", ""), ("grid", "12", "holds"), ("paired", "7", "RED")]


def console_of(stream: io.StringIO, *, terminal: bool) -> Console:
    return Console(file=stream, force_terminal=terminal, width=40, color_system="standard" if terminal else None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only the test lets pass."""
    now = [100.0]
    monkeypatch.setattr(printing.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("terminal", [False, True])
def test_words_are_printed_as_they_are_and_long_lines_stay_one(terminal: bool) -> None:
    stream, words = io.StringIO(), "[bold]not bold[/bold] " + "far " * 19 + "away"
    print_line(console_of(stream, terminal=terminal), words)
    assert stream.getvalue() == words + "\n"


def test_a_table_is_aligned_for_grep_and_ruled_and_colored_for_eyes() -> None:
    plain, seen = io.StringIO(), io.StringIO()
    print_table(console_of(plain, terminal=False), ROWS, "a title")
    assert plain.getvalue() == "a title\nlaw     points\ngrid        12  holds\npaired       7  RED\n"
    print_table(console_of(seen, terminal=True), ROWS, "a title")
    assert "\x1b[31mRED" in seen.getvalue() and "─" in seen.getvalue()


def test_columns_put_numbers_to_the_right() -> None:
    assert columns([("name", "x"), ("a longer name", "0.123")]) == "name               x\na longer name  0.123"
    assert columns([("R2", "x", "expected"), ("a longer name", "-0.123", "at most 0"), ("a", "1.000", "")]) == (
        "R2                  x  expected\na longer name  -0.123  at most 0\na               1.000"
    )


def test_progress_is_a_line_now_and_then_and_none_for_short_work(clock: list[float]) -> None:
    lines: list[str] = []
    show = ProgressLines(lines.append)
    for second in range(13):
        clock[0] = 100.0 + second
        show("indexing", second, 12)
    assert lines == ["indexing: 6 of 12", "indexing: 12 of 12"]
    show("other work", 1, 2)
    assert len(lines) == 2


def test_work_that_begins_before_its_first_sign_is_timed_from_its_beginning(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress(console_of(stream, terminal=False), "proof") as show:
        clock[0] += 6
        show(1, 8)
    assert stream.getvalue() == "proof: 1 of 8\n"


def test_on_a_terminal_progress_is_a_bar() -> None:
    stream = io.StringIO()
    with progress(console_of(stream, terminal=True), "proof") as show:
        show(1, 8)
    assert "proof" in stream.getvalue() and "1/8" in stream.getvalue()
