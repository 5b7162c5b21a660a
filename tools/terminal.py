"""How a run looks on a terminal: a live panel where someone watches, else one line a logging step that grep understands.

Here: the reporter that the command line hands to a run; it also has the run's pictures drawn.
Not here: what is reported (train/reporting.py), how pictures are drawn (curves.py, views_picture.py).
"""

import sys
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from wherefrom.tools.console import ProgressLines, columns, print_line
from wherefrom.train.reporting import EvaluationResults, LogRecord, Reporter, RunFacts, Summary
from wherefrom.train.run_folder import RunFolder, read_metrics


class Terminal(Reporter):
    """A reporter for eyes, or for grep."""

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None) -> None:
        """Write to `stream` (default: standard output), live if it is a terminal."""
        stream = stream or sys.stdout
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live_wanted = stream.isatty() if live is None else live
        self._live: Live | None = None
        self._facts: RunFacts | None = None
        self._progress_lines = ProgressLines(self.message)

    def started(self, facts: RunFacts) -> None:
        """Print what will run; draw the views picture."""
        from wherefrom.tools.views_picture import save_views_picture  # matplotlib is slow to import

        self._facts = facts
        self._show(None)
        self.message(
            f"{facts.recipe} {'goes on' if facts.resumed_at else 'starts'} in {facts.folder}: {facts.updates} updates, "
            f"{facts.updates_per_epoch} an epoch; {facts.samples} pictures, {facts.global_batch} an update; "
            f"{facts.parameters / 1e6:.2f} million parameters, {facts.ranks} x {facts.device}, {facts.loader.renderer.name} renderer"
        )
        self.message(f"encoder: {facts.model}, {facts.model_parameters / 1e6:.2f} million parameters")
        views = RunFolder(facts.folder).views
        if not views.exists():
            save_views_picture(views, facts.loader, objectives=facts.objectives)
            self.message(f"some of the views: {views}")

    def logged(self, record: LogRecord) -> None:
        """Show a logging step."""
        if self._live_wanted:
            self._show(self._panel(record))
        else:
            self.message(line(record))

    def evaluated(self, results: EvaluationResults) -> None:
        """Print the tables of results; draw the curves again."""
        self.message(f"{'full' if results.full else 'short'} evaluation after update {results.update}")
        for table in results.tables:
            self.message(columns(table))
        self._draw_curves()

    def message(self, line: str) -> None:
        """Print a line, above the panel if there is one."""
        print_line(self._console, line)

    def progressed(self, what: str, done: int, total: int) -> None:
        """Show how far a piece of work is."""
        if self._live_wanted:
            self._show(Group(f"{what}: {done} of {total}", ProgressBar(total=total, completed=done, width=60)))
            if done == total:
                self._show(None)
        else:
            self._progress_lines(what, done, total)

    def finished(self, summary: Summary) -> None:
        """Print where everything lies and where the time went; draw the curves a last time."""
        self._show(None)
        self._draw_curves()
        seconds = summary.seconds
        shares = {name: seconds[name] / max(seconds["training"], 1e-9) for name in ("waiting", "writing")}
        self.message(
            f"time: training {duration(seconds['training'])} at {summary.images_per_s:.1f} pictures/s, of it waiting for data "
            f"{shares['waiting']:.1%}, logging and checkpoints {shares['writing']:.1%}; evaluating {duration(seconds['evaluating'])}"
        )
        if summary.stopped_by is not None:
            then = ", the last, before all was measured" if summary.update == summary.updates else f" of {summary.updates}"
            self.message(
                f"stopped by {summary.stopped_by} after update {summary.update}{then}, saved; "
                f"go on with: wherefrom train --resume --out {summary.folder}"
            )
        else:
            self.message(f"finished after update {summary.update}: {summary.folder}")

    def closed(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, panel: Table | Group | None) -> None:
        """Put a panel at the bottom of the terminal, or take it away."""
        if panel is None:
            self.closed()
        elif self._live is None:
            self._live = Live(panel, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            self._live.update(panel)

    def _panel(self, record: LogRecord) -> Table:
        table = Table(title=f"{self._facts.recipe if self._facts else 'run'}", show_header=False, title_justify="left")
        table.add_row(
            "update", f"{record.update} of {record.updates}", ProgressBar(total=record.updates, completed=record.update, width=40)
        )
        table.add_row("epoch", f"{record.epoch:.2f}", "")
        table.add_row("loss", f"{record.loss:.4f}", "  ".join(f"{name} {value:.4f}" for name, value in record.losses.items()))
        table.add_row("pictures/s", f"{record.images_per_s:.1f}", f"waiting for data {record.waiting_frac:.1%}")
        table.add_row("learning rate", f"{record.lr:.2e}", "")
        table.add_row("time left", duration(record.seconds_left), "")
        return table

    def _draw_curves(self) -> None:
        from wherefrom.tools.curves import draw_curves  # matplotlib is slow to import

        if self._facts is not None:
            folder = RunFolder(self._facts.folder)
            draw_curves(read_metrics(folder), folder.curves)


def line(record: LogRecord) -> str:
    """Return a logging step as one line of name=value."""
    losses = " ".join(f"{name}={value:.4f}" for name, value in record.losses.items())
    return (
        f"update={record.update}/{record.updates} epoch={record.epoch:.2f} loss={record.loss:.4f} {losses} lr={record.lr:.2e} "
        f"pictures/s={record.images_per_s:.1f} waiting={record.waiting_frac:.1%} left={duration(record.seconds_left)}"
    )


def duration(seconds: float) -> str:
    """Return seconds as 12s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
