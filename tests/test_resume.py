"""A run that is killed and goes on, against one that was never killed: the same losses and the same weights, bit for bit, on the CPU.

The killed runs are processes of their own, started by the command line; SIGKILL leaves them no moment to tidy up.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from wherefrom.pipeline.laws import Disjoint
from wherefrom.train import checkpoint
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.loop import run
from wherefrom.train.objectives.spatial import SpatialSettings
from wherefrom.train.reporting import Reporter
from wherefrom.train.run_folder import RunFolder, read_metrics
from wherefrom.train.settings import RuntimeSettings, TrainSettings, write_settings

PATIENCE_S = 120


def tiny(shards: Path, updates: int) -> TrainSettings:
    """Return a run whose drop-path, colors, epochs and teacher-free loss leave nothing to chance but what the seed decides."""
    return TrainSettings(
        recipe="demo",
        data=str(shards / "train.tar"),
        global_batch=8,
        updates=updates,
        model=ModelSettings(view_size_px=24, patch_size_px=12, width=32, depth=2, heads=2, drop_path=0.3),
        objectives={"spatial": SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16)), views=3, size_px=24, min_side_px=4)},
        runtime=RuntimeSettings(device="cpu", renderer="torch", threads=1, log_every=2, checkpoint_every=3, keep=2),
    )


def start(settings: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start `wherefrom train` in a process of its own, with as many threads as this one computes with."""
    command = [sys.executable, "-c", "import sys; from wherefrom.tools.cli import main; sys.exit(main())"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = ["train", "--config", str(settings), "--out", str(out), *(["--resume"] if out.is_dir() else [])]
    return subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_when(process: subprocess.Popen[bytes], is_ready: Callable[[], bool]) -> bool:
    """Kill the process when it is ready; return whether it lived that long.

    It is stopped before it is asked a second time, so that it cannot become unready between question and kill.
    """
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and process.poll() is None:
        if is_ready():
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if is_ready():
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.0002)
    process.kill()
    _, complaint = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), complaint.decode()
    return process.returncode != 0 and is_ready()


def logged_after(out: Path, update: int) -> Callable[[], bool]:
    """Return the question whether anything after `update` has been logged."""
    return lambda: any(record["update"] > update for record in read_metrics(RunFolder(out), "train"))


def amid_a_write(out: Path) -> Callable[[], bool]:
    """Return the question whether a checkpoint is being written right now."""
    writing = RunFolder(out).checkpoints / checkpoint.WRITING
    return writing.exists


def result(out: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Return all that was logged, without speeds, and the final weights."""
    newest = checkpoint.latest(RunFolder(out).checkpoints)
    assert newest is not None
    keys = ("update", "loss", "losses", "meters", "gradients", "lr")
    return [[record[key] for key in keys] for record in read_metrics(RunFolder(out), "train")], load_file(newest / "weights.safetensors")


def assert_same(out: Path, reference: Path) -> None:
    logged, weights = result(out)
    expected, expected_weights = result(reference)
    assert len(logged) == len(expected)
    assert [ours for ours, theirs in zip(logged, expected, strict=True) if ours != theirs] == []
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected_weights[name]), name


def go_on_from(run_folder: Path, update: int, into: Path) -> RunFolder:
    """Copy a finished run, with an earlier checkpoint as its latest."""
    shutil.copytree(run_folder, into)
    earlier = RunFolder(into).checkpoints / f"update-{update:08d}"
    (earlier.parent / checkpoint.LATEST).write_text(earlier.name)
    return RunFolder(into)


@pytest.mark.core
def test_a_run_that_goes_on_ends_bit_for_bit_where_it_would_have_and_not_without_the_optimizers_memory(
    tiny_shards: Path, tmp_path: Path
) -> None:
    settings = tiny(tiny_shards, updates=9)
    reference, resumed, forgetful = (tmp_path / name for name in ("reference", "resumed", "forgetful"))
    run(settings, reporter=Reporter(), out=reference)
    go_on_from(reference, 6, resumed)
    run(settings, reporter=Reporter(), out=resumed, resume=True)
    assert_same(resumed, reference)

    earlier = go_on_from(reference, 6, forgetful).checkpoints / "update-00000006"
    state = torch.load(earlier / "optimizer.pt", weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"].zero_()
    torch.save(state, earlier / "optimizer.pt")
    state_json = json.loads((earlier / "state.json").read_text())
    state_json["crc32"]["optimizer.pt"] = zlib.crc32((earlier / "optimizer.pt").read_bytes())
    (earlier / "state.json").write_text(json.dumps(state_json))
    run(settings, reporter=Reporter(), out=forgetful, resume=True)
    with pytest.raises(AssertionError):
        assert_same(forgetful, reference)


def test_killed_at_a_step_and_amid_a_write_a_run_goes_on_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    settings = tiny(tiny_shards, updates=100)
    write_settings(tmp_path / "settings.yaml", settings)
    reference, out = tmp_path / "reference", tmp_path / "killed"
    run(settings, reporter=Reporter(), out=reference)

    assert kill_when(start(tmp_path / "settings.yaml", out), logged_after(out, random.Random(time.time_ns()).randrange(2, 20)))
    before = len(read_metrics(RunFolder(out), "train"))
    writing = amid_a_write(out)
    assert kill_when(start(tmp_path / "settings.yaml", out), lambda: len(read_metrics(RunFolder(out), "train")) > before and writing())
    assert writing()
    assert 0 < len(read_metrics(RunFolder(out), "train")) < 50, "it was over before the second kill"

    run(settings, reporter=Reporter(), out=out, resume=True)
    assert_same(out, reference)


@pytest.mark.slow
def test_killed_again_and_again_a_run_goes_on_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    settings = tiny(tiny_shards, updates=600)
    write_settings(tmp_path / "settings.yaml", settings)
    reference, out = tmp_path / "reference", tmp_path / "killed"
    run(settings, reporter=Reporter(), out=reference)
    chance = random.Random(time.time_ns())
    amid_writes = 0
    for kill in range(12):
        before = max((record["update"] for record in read_metrics(RunFolder(out), "train")), default=0)
        later = logged_after(out, before + chance.randrange(1, 30))
        writing = amid_a_write(out)
        is_ready = (lambda later=later, writing=writing: later() and writing()) if kill % 2 else later
        if not kill_when(start(tmp_path / "settings.yaml", out), is_ready):
            break
        amid_writes += writing()
    assert amid_writes >= 3
    run(settings, reporter=Reporter(), out=out, resume=True)
    assert_same(out, reference)
