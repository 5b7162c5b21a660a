"""A run's folder: what lies where in it, who may write into it, and its log of plain lines.

Here: the names of all files, claiming a folder, metrics.jsonl, evaluation.json.
Not here: checkpoints (checkpoint.py); the encoder written out for others (export.py); pictures and terminals (tools).
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wherefrom.pipeline.files import write_aside
from wherefrom.train.disk import writing
from wherefrom.train.plain_data import Plain
from wherefrom.train.run_lock import LOCK

RUNS = Path("runs")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The places of a run's files."""

    path: Path

    @property
    def settings(self) -> Path:
        """The resolved settings; `--config` takes it."""
        return self.path / "settings.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: losses at every logging step, results at every evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The metrics as a picture."""
        return self.path / "curves.png"

    @property
    def views(self) -> Path:
        """Some sources with their boxes and views."""
        return self.path / "views.png"

    @property
    def evaluation(self) -> Path:
        """The last full evaluation."""
        return self.path / "evaluation.json"

    @property
    def classes(self) -> Path:
        """The number of every class of the training pictures by its name; not there where labels are numbers of the data's own."""
        return self.path / "classes.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def encoder(self) -> Path:
        """The encoder's weights, named as in the bare timm model."""
        return self.path / "encoder.safetensors"

    @property
    def model(self) -> Path:
        """The folder that `timm.create_model("local-dir:...")` loads."""
        return self.path / "encoder"


def claim(out: Path | None, recipe: str, *, resume: bool) -> RunFolder:
    """Make the folder of a run, or take up that of an earlier one; without `out`, the next free runs/RECIPE-NUMBER.

    Raises: ValueError if it holds anything and is not to be resumed; OSError if it cannot be made.
    """
    if out is not None and not resume:
        refuse_if_taken(out)
    try:
        if out is None:
            return RunFolder(_next_free(recipe))
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        path = out or RUNS.absolute()
        raise OSError(f"{path}: the run's folder cannot be made there ({problem.strerror}); name another by --out") from problem
    return RunFolder(out)


def refuse_if_absent(out: Path) -> None:
    """Raise ValueError if there is no folder to go on in; an empty one is what a run leaves that was killed before its first file."""
    if not out.is_dir():
        raise ValueError(f"{out}: there is no run to go on with; look at the name, or leave out --resume to start one")


def refuse_if_taken(out: Path) -> None:
    """Raise ValueError if a new run may not write into `out`; what a kill leaves of a first write is nothing."""
    if out.is_dir() and any(path.name != LOCK and not path.match(".*.writing") for path in out.iterdir()):
        if RunFolder(out).settings.is_file():
            raise ValueError(f"{out}: holds another run; go on with it by --resume, or take another --out")
        raise ValueError(f"{out}: is not empty; take another --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; take another --out")


def _next_free(recipe: str) -> Path:
    RUNS.mkdir(exist_ok=True)
    for number in itertools.count():
        path = RUNS / f"{recipe}-{number}"
        try:
            path.mkdir()  # of two that try at once, one succeeds
        except FileExistsError:
            continue
        return path
    raise AssertionError("count() does not end")


def append_metrics(folder: RunFolder, record: Mapping[str, Plain]) -> None:
    """Append one line to metrics.jsonl."""
    with writing(folder.metrics), folder.metrics.open("a", encoding="utf-8") as log:
        log.write(json.dumps(_finite(record), allow_nan=False) + "\n")


def _finite(plain: Plain) -> Plain:
    """Return the same with null for numbers that JSON does not know."""
    if isinstance(plain, Mapping):
        return {name: _finite(value) for name, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_finite(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def read_metrics(folder: RunFolder, kind: str | None = None) -> list[dict[str, Plain]]:
    """Return the whole lines of metrics.jsonl, of one kind (start, train, evaluation) if it is named; one torn by a kill is left out."""
    if not folder.metrics.is_file():
        return []
    records = []
    for line in folder.metrics.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [record for record in records if kind is None or record["kind"] == kind]


def start_of(folder: RunFolder, update: int) -> dict[str, Plain]:
    """Return the metrics' line of the start after which the `update`-th update was made; empty where none is kept.

    Of updates that a kill took away and that were made again, it is the last making that counts.
    """
    starts = [record for record in read_metrics(folder, "start") if record["update"] < update]
    return starts[-1] if starts else {}


def cut_metrics(folder: RunFolder, update: int) -> None:
    """Forget what was logged after `update`: it will be logged again."""
    lines = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["update"] <= update]
    replace_text(folder.metrics, "".join(lines))


def write_evaluation(folder: RunFolder, report: Mapping[str, Plain]) -> None:
    """Write evaluation.json, whole or not at all."""
    replace_text(folder.evaluation, json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")


def write_classes(folder: RunFolder, classes: Sequence[str]) -> None:
    """Write classes.json, whole or not at all."""
    replace_text(folder.classes, json.dumps({name: number for number, name in enumerate(classes)}, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
