"""What a run tells whoever watches: facts at the start, one record a logging step, evaluations, a summary.

Here: `Reporter`, and the records that it gets.
Not here: terminals and pictures (tools/terminal.py, tools/curves.py); the log on disk (run_folder.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wherefrom.pipeline.loader import Loader
from wherefrom.train.objective import Objective
from wherefrom.train.plain_data import Plain


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunFacts:
    """A run as it starts."""

    recipe: str
    folder: Path
    device: str
    ranks: int
    model: str  # the encoder's timm name, and what is changed of it
    model_parameters: int  # of the encoder
    parameters: int  # that learn, heads included
    samples: int  # of the training data
    global_batch: int
    updates: int
    updates_per_epoch: int
    resumed_at: int  # completed updates; 0: a new run
    loader: Loader
    objectives: tuple[Objective, ...]  # as the settings name them, not set up


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRecord:
    """A logging step: means over the updates since the one before."""

    update: int  # completed
    updates: int
    epoch: float
    loss: float
    losses: dict[str, float]  # by "objective/term", as they come, before their weights
    meters: dict[str, float]
    gradients: dict[str, float]  # norms before clipping, by group
    lr: float
    images_per_s: float
    waiting_frac: float  # of the time: for data
    seconds_left: float

    def curves(self) -> dict[str, float]:
        """Return what is worth a curve, by a path for each."""
        grouped = {"losses": self.losses, "meters": self.meters, "gradients": self.gradients}
        paths = {f"{group}/{name}": value for group, values in grouped.items() for name, value in values.items()}
        alone = {name: getattr(self, name) for name in ("loss", "lr", "epoch", "images_per_s", "waiting_frac")}
        return alone | paths


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResults:
    """An evaluation's results."""

    update: int
    full: bool  # with every control, at the end of the run; short ones compare with one another only
    report: dict[str, Plain]  # all of it; evaluation.json holds the full one's
    curves: dict[str, float]  # of a short one: what is worth a curve, by name
    tables: tuple[tuple[tuple[str, ...], ...], ...]  # for eyes, each with its heading first


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A run as it ends."""

    folder: Path
    update: int
    updates: int
    stopped_by: str | None  # the signal's name
    seconds: Mapping[str, float]  # training, and of it waiting and writing; evaluating apart
    images_per_s: float


class Reporter:
    """Whoever watches a run: of a subclass the methods that it overrides are called, on the first rank; by itself it says nothing."""

    def started(self, facts: RunFacts) -> None:
        """The first update is about to be made."""

    def logged(self, record: LogRecord) -> None:
        """A logging step."""

    def evaluated(self, results: EvaluationResults) -> None:
        """An evaluation is done."""

    def message(self, line: str) -> None:
        """Something worth a line."""

    def progressed(self, what: str, done: int, total: int) -> None:
        """Work beside training goes on: `done` of `total`."""

    def finished(self, summary: Summary) -> None:
        """The run is over, or was stopped and saved."""

    def closed(self) -> None:
        """Nothing more will come, whatever happened."""
