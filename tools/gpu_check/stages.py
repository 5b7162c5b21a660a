"""What `gpu_check` does on a machine with a GPU, stage by stage, and what a stage is given: a time, options, a report on disk.

Here: the table of stages, the options, the report, its process: `python -m wherefrom.tools.gpu_check.stages`.
Not here: starting, ending and cutting stages off (command.py), what they do (the modules that the table names).
A stage is a function of (Options, Report) and a line of the table. Nothing here imports more than Python has: a stage whose libraries
are not there fails alone.
"""

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of the check, which has a process and a time of its own."""

    name: str
    seconds: float  # after which it is cut off, where `gpu_check` has its usual time in all
    target: str  # "module:function" of (Options, Report)


STAGES = (  # the most important first: together they may take longer than there is time
    Stage(name="facts", seconds=45, target="wherefrom.tools.gpu_check.kernels:facts"),
    Stage(name="kernel_tests", seconds=120, target="wherefrom.tools.gpu_check.chosen_tests:kernel_tests"),
    Stage(name="render_views", seconds=75, target="wherefrom.tools.gpu_check.views:render_views_stage"),
    Stage(name="graph", seconds=30, target="wherefrom.tools.gpu_check.views:graph_stage"),
    Stage(name="decoding", seconds=75, target="wherefrom.tools.gpu_check.decoding:without_dali"),
    Stage(name="training", seconds=75, target="wherefrom.tools.gpu_check.loading:training"),
    Stage(name="hosts", seconds=75, target="wherefrom.tools.gpu_check.hosts:hosts"),
    Stage(name="roi_align", seconds=70, target="wherefrom.tools.gpu_check.kernels:roi_align_stage"),
    Stage(name="pair_loss", seconds=110, target="wherefrom.tools.gpu_check.kernels:pair_loss_stage"),
    Stage(name="sweep", seconds=120, target="wherefrom.tools.gpu_check.sweep:sweep"),
    Stage(name="dali", seconds=75, target="wherefrom.tools.gpu_check.loading:dali"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a stage goes by."""

    seconds: float  # until it is cut off
    dry_run: bool = False  # without a GPU: Triton's interpreter on tiny CPU tensors
    shards: str = ""  # the pattern of shards with photographs, or nothing
    batch: int = 256  # pictures, where loading and training are timed

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cpu" if self.dry_run else "cuda"


class Report:
    """What a stage has to say; it lies on disk at once, for the stage may be cut off at any moment."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._ends = path, time.monotonic() + seconds
        self._content: dict[str, Any] = {"lines": [], "red": [], "left_out": [], "stop": "", "figures": {}}

    @property
    def seconds_left(self) -> float:
        """Until the stage is cut off."""
        return self._ends - time.monotonic()

    def add(self, name: str, value: Any) -> None:
        """Keep a figure: anything that JSON holds."""
        self._content["figures"][name] = value
        self._write()

    def say(self, line: str) -> None:
        """Say a line to whoever looks on."""
        print(line, flush=True)
        self._content["lines"].append(line)
        self._write()

    def fail(self, words: str) -> None:
        """Say what is wrong: the stage is red."""
        self._content["red"].append(words)
        self.say(f"RED   {words}")

    def leave_out(self, words: str) -> None:
        """Say what cannot be done here, and why."""
        self._content["left_out"].append(words)
        self.say(f"left out: {words}")

    def stop(self, words: str) -> None:
        """Say why none of the later stages can serve either."""
        self._content["stop"] = words
        self.fail(words)

    def _write(self) -> None:
        write_json(self._path, self._content)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all, onto the disk itself; by hand, since pipeline/files.py comes with the pipeline's libraries."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def main(target: str, options: str, report: str) -> None:
    """Do one stage in this process."""
    module, _, function = target.partition(":")
    stage_options = Options(**json.loads(options))
    stage_report = Report(Path(report), stage_options.seconds)
    try:
        stage = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("wherefrom"):
            raise
        stage_report.leave_out(f"{function}: {missing}")
        return
    stage(stage_options, stage_report)


if __name__ == "__main__":
    main(*sys.argv[1:])
