"""A run's folder: what lies where in it, who may write into it, and its log of plain lines.

Here: the names of all files, claiming a folder, metrics.jsonl, the encoder written out for others.
Not here: checkpoints (checkpoint.py); pictures and terminals (tools).
"""

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
from safetensors.torch import save_file

from wherefrom.pipeline.recipe import Recipe
from wherefrom.train.disk import writing
from wherefrom.train.encoder import Encoder
from wherefrom.train.plain import Plain
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
        wanted = out or RUNS.absolute()
        raise OSError(f"{wanted}: the run's folder cannot be made there ({problem.strerror}); name another by --out") from problem
    return RunFolder(out)


def refuse_if_taken(out: Path) -> None:
    """Raise ValueError if a new run may not write into `out`."""
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
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


def read_metrics(folder: RunFolder) -> list[dict[str, Plain]]:
    """Return the whole lines of metrics.jsonl; a last line torn by a kill is left out."""
    if not folder.metrics.is_file():
        return []
    records = []
    for line in folder.metrics.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def cut_metrics(folder: RunFolder, update: int) -> None:
    """Forget what was logged after `update`: it will be logged again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["update"] <= update]
    _replace_text(folder.metrics, "".join(kept))


def write_evaluation(folder: RunFolder, report: Mapping[str, Plain]) -> None:
    """Write evaluation.json, whole or not at all."""
    _replace_text(folder.evaluation, json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")


def _replace_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_encoder(folder: RunFolder, encoder: Encoder, recipe: Recipe) -> None:
    """Write the trained encoder for others: `timm.create_model("local-dir:RUN/encoder", pretrained=True)` loads it.

    encoder.safetensors holds the same weights by themselves.
    """
    model, settings = encoder.model, encoder.settings
    arguments = {name: value for name, value in settings.timm_arguments().items() if name not in ("model_name", "num_classes")}
    timm.models.save_for_hf(model, str(folder.model), model_args=arguments, safe_serialization=True)
    config = folder.model / "config.json"
    described = json.loads(config.read_text(encoding="utf-8"))
    seen: dict[str, Plain] = {"mean": recipe.mean, "std": recipe.std, "interpolation": "bilinear"}
    if settings.view_size_px is not None:
        seen["input_size"] = (3, settings.view_size_px, settings.view_size_px)
    described["pretrained_cfg"] |= seen  # timm says how its own weights were trained
    _replace_text(config, json.dumps(described, indent=1) + "\n")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, folder.encoder)
