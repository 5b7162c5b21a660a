"""Checks and times a machine with a CUDA GPU in minutes: `python -m wherefrom.tools.gpu_check [SHARDS] --out FOLDER`.

Here: stages one after another, the most important first, each in a process of its own, which is cut off when its time is over; what they
report is in FOLDER/gpu_check.json at once, what they print in FOLDER/gpu_check.log.
Not here: the stages (stages.py, whose table names them). Needs torch, Triton and pytest; what a stage lacks beyond them is printed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from wherefrom.tools.gpu_check.stages import STAGES, Options, Stage, write_json

SECONDS = 480.0  # in all; other times shorten or lengthen every stage's own
LEAST_FRAC = 0.1  # of its time that a stage must be able to have, or it is not begun
LOOK_S = 0.2  # between two looks at a stage


def run_stages(stages: Sequence[Stage], options: Options, out: Path) -> int:
    """Run stages, `options.seconds` being the time of all; return 0, or 1 if one is red, was cut off or crashed.

    Writes out/gpu_check.json whenever there is something new, and out/gpu_check.log.
    """
    out.mkdir(parents=True, exist_ok=True)
    scale, ends = options.seconds / SECONDS, time.monotonic() + options.seconds
    outcome: dict[str, Any] = {"command": sys.argv, "options": asdict(options), "stages": {}}
    stop = ""
    with tempfile.TemporaryDirectory() as scratch, (out / "gpu_check.log").open("ab") as log:
        for stage in stages:
            whole = stage.seconds * scale
            stage_options = replace(options, seconds=min(whole, ends - time.monotonic()))
            if stop or stage_options.seconds < LEAST_FRAC * whole:
                outcome["stages"][stage.name] = {"status": "left out", "left_out": [stop or "no time is left"]}
            else:
                _run(stage, stage_options, Path(scratch), log, outcome, out)
                stop = outcome["stages"][stage.name].get("stop", "")
            write_json(out / "gpu_check.json", outcome)
            _print_stage(stage.name, outcome["stages"][stage.name])
    return int(any(each["status"] in ("red", "cut off", "crashed") for each in outcome["stages"].values()))


def _run(stage: Stage, options: Options, scratch: Path, log: IO[bytes], outcome: dict[str, Any], out: Path) -> None:
    """Run one stage until it ends or its time is over, its report kept in `outcome` all the while."""
    report, started = scratch / f"{stage.name}.json", time.monotonic()
    log.write(f"\n== {stage.name}, {options.seconds:.0f} s\n".encode())
    log.flush()
    # -P: the checkout's own folders must not be found beside wherefrom
    command = [sys.executable, "-P", "-m", "wherefrom.tools.gpu_check.stages", stage.target, json.dumps(asdict(options)), str(report)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=_environment(options), process_group=0
    )
    modified_ns = 0
    try:
        while process.poll() is None and time.monotonic() - started < options.seconds:
            time.sleep(LOOK_S)
            if report.exists() and report.stat().st_mtime_ns != modified_ns:
                modified_ns = report.stat().st_mtime_ns
                outcome["stages"][stage.name] = {"status": "under way", **json.loads(report.read_bytes())}
                write_json(out / "gpu_check.json", outcome)
        code = process.poll()
    finally:
        _end_group(process)
    content = json.loads(report.read_bytes()) if report.exists() else {}
    status = "cut off" if code is None else "crashed" if code else "red" if content.get("red") else "passed"
    if status == "passed" and content.get("left_out") and not content["figures"]:
        status = "left out"
    outcome["stages"][stage.name] = {"status": status, "seconds": round(time.monotonic() - started, 1), "exit_code": code, **content}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a stage and all that it started; one that even so does not end, stuck in a driver, is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _environment(options: Options) -> dict[str, str]:
    """Return a stage's environment: Triton compiles, or, in a dry run, interprets, and there is no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if options.dry_run else {})


def _print_stage(name: str, stage: dict[str, Any]) -> None:
    print(f"{stage['status']:9} {name}" + (f", {stage['seconds']} s" if "seconds" in stage else ""))
    for line in stage.get("lines", stage.get("left_out", [])):
        print(f"          {line}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run the stages that it names."""
    names = [stage.name for stage in STAGES]
    # argparse, not tyro: this has to start where hardly anything is installed
    parser = argparse.ArgumentParser(prog="python -m wherefrom.tools.gpu_check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shards", nargs="?", default="", help="pattern of shards with photographs; without it nothing is loaded")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for gpu_check.json and gpu_check.log")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all stages together (default {SECONDS:g})")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--batch", type=int, default=256, help="pictures a batch where loading and training are timed (default 256)")
    parser.add_argument("--dry-run", action="store_true", help="every stage, tiny, on the CPU: no GPU is needed or used")
    words = parser.parse_args(arguments)
    if not words.seconds > 0 or words.batch < 1:
        parser.error(f"--seconds {words.seconds:g} --batch {words.batch}: needs seconds > 0 and a picture or more")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the stage under way too
    options = Options(seconds=words.seconds, dry_run=words.dry_run, shards=words.shards, batch=words.batch)
    return run_stages([stage for stage in STAGES if stage.name in words.only], options, words.out)
