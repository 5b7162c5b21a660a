"""`wherefrom profile`: what it measures on a tiny run, its files, its screen of 80 columns; limits planted in real runs (slow)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from throughput_plants import PLANTS
from throughput_runs import tiny_settings

from wherefrom.tools.throughput.command import profile_command
from wherefrom.tools.throughput.measuring import Profile, Spread, Together
from wherefrom.tools.throughput.page import write_page
from wherefrom.tools.throughput.report import stage_rows, verdict_lines
from wherefrom.tools.throughput.watching import StageSeconds, Stretch, Timeline
from wherefrom.train.settings import write_settings
from wherefrom.train.throughput import Chain, judge, machine_changes, thread_changes

CHAIN = Chain(
    read_s=1e-3,
    read_cpu_s=1e-4,
    draw_s=1e-4,
    decode_s=2e-3,
    render_s=30e-3,
    batch=64,
    copy_s=0.001,
    forward_s=0.03,
    backward_s=0.06,
    optimizer_s=0.01,
    host_s=0.05,
    device="cuda",
    cores=8,
    cores_seen=8,
    threads=4,
)


def planted(chain: Chain = CHAIN, *, reached: float = 120.0) -> Profile:
    """Return a profile whose numbers were not measured."""
    stages = {"read": 1.0, "read, cold": 9.0, "draw": 0.1, "decode": 2.0, "render": 30.0, "hand over": 0.0, "copy": 0.02}
    stages |= {"forward": 0.5, "backward": 1.0, "optimizer": 0.16}
    rate = Spread(median=reached, low=reached / 1.1, high=reached * 1.1, n=3)
    return Profile(
        facts={
            "recipe": "a_recipe_of_a_name_that_is_long_enough_to_reach_over_the_edge_of_a_screen",
            "pictures": 1281167,
            "mean_megapixels": 0.2,
            "views": ["2 x 224 px", "8 x 96 px"],
            "renderer": "native",
            "threads": 4,
            "device": "NVIDIA H200",
            "ranks": 8,
            "cores": 8,
            "cores_seen": 8,
            "free_cores": 8.0,
            "batch": 64,
            "measured_batch": 16,
        },
        stages={name: Spread(median=ms, low=ms * 0.9, high=ms * 1.2, n=3) for name, ms in stages.items()},
        together=Together(ceiling=rate, reached=rate, waiting_frac=0.8, loader={1: rate, 4: rate, 8: rate}, updates=30),
        chain=chain,
        verdict=judge(chain, [*thread_changes(chain), *machine_changes(chain)], reached=reached),
        timeline=[
            Stretch(lane="MainThread", stage="update", start_s=0.0, end_s=1.0),
            Stretch(lane="MainThread", stage="forward", start_s=0.1, end_s=0.5),
            Stretch(lane="wherefrom-make_0", stage="render", start_s=0.0, end_s=0.9),
            Stretch(lane="MainThread", stage="update", start_s=1.0, end_s=2.0),
        ],
    )


@pytest.mark.core
@pytest.mark.parametrize("reached", [0.0123, 120.0, 9.9e7])
def test_the_verdict_fits_a_screen_of_80_columns(reached: float) -> None:
    lines = list(verdict_lines(planted(reached=reached)))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 45
    assert any(line.startswith("BOUND BY RENDERING VIEWS") for line in lines)
    assert any(line.startswith("render ") and line.endswith("slowest") for line in lines)
    assert lines[-1].startswith("FIRST: --runtime.threads 8")


@pytest.mark.core
def test_reading_is_shown_as_it_is_in_the_run() -> None:
    warm = {stage: spread.median for stage, spread, _ in stage_rows(planted())}
    cold = {stage: spread.median for stage, spread, _ in stage_rows(planted(replace(CHAIN, read_s=9e-3)))}
    assert (warm["read"], cold["read"]) == (1.0, 9.0)


@pytest.mark.core
def test_a_page_holds_bars_and_a_timeline_and_needs_no_other_file(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", planted())
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "render: 900.0 ms" in page
    assert "render</text>" in page and "30.00 ms" in page
    assert not re.search(r"(src|href)=", page)
    assert "NaN" not in page and "nan" not in re.sub(r"<style>.*?</style>", "", page)


@pytest.mark.core
def test_seconds_of_a_stage_are_not_those_of_the_stages_inside() -> None:
    def burn(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    watch = StageSeconds(torch.device("cpu"))
    with watch("optimizer"):
        burn(0.02)
        with watch("collectives"):
            burn(0.04)
    seconds = watch.take()
    assert seconds["optimizer"] == pytest.approx(0.02, abs=0.015)
    assert seconds["collectives"] == pytest.approx(0.04, abs=0.015)
    assert watch.take() == {}


@pytest.mark.core
def test_a_timeline_notes_a_stretch_that_fails() -> None:
    watch = Timeline()
    with pytest.raises(OSError, match="gone"), watch("read"):
        raise OSError("gone")
    assert [stretch.stage for stretch in watch.stretches] == ["read"]


@pytest.mark.core
def test_a_tiny_run_is_measured_stage_by_stage(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_settings(tmp_path / "tiny.yaml", tiny_settings(tiny_shards))
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    assert profile_command(config=tmp_path / "tiny.yaml", seconds=1, out=out, trace=trace) == 0
    assert sorted(path.name for path in out.iterdir()) == ["profile.html", "profile.json"]  # no checkpoint is left
    found = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    assert {"read", "read, cold", "draw", "decode", "render", "forward", "backward", "optimizer"} <= set(found["stages"])
    assert all(found["stages"][name]["median"] > 0 for name in ("read", "draw", "decode", "render", "forward", "backward"))
    assert set(found["together"]["loader"]) == {"1", "2"}
    assert found["facts"]["measured_batch"] <= found["facts"]["batch"] == 8
    assert {change["basis"] for change in found["verdict"]["changes"]} == {"measured", "estimated", "rated"}
    printed = capsys.readouterr().out
    assert "BOUND BY" in printed and "FIRST: " in printed
    names = {event.get("name") for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]}
    assert {"wherefrom/forward", "wherefrom/backward", "wherefrom/optimizer", "wherefrom/render"} <= names


def test_two_ranks_are_measured_together_and_the_first_tells(tiny_shards: Path, tmp_path: Path) -> None:
    write_settings(tmp_path / "tiny.yaml", tiny_settings(tiny_shards))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "wherefrom.tools.cli"]
    words = [
        "profile",
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--seconds",
        "2",
        "--out",
        str(tmp_path),
        "--trace",
        str(tmp_path / "trace"),
    ]
    done = subprocess.run(
        [*torchrun, *map(str, words)], capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("BOUND BY") == 1 and "all numbers are of one rank" in done.stdout
    found = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    assert found["stages"]["collectives"]["median"] > 0
    assert found["facts"]["ranks"] == found["chain"]["ranks"] == 2
    assert (tmp_path / "trace").stat().st_size > 0


@pytest.mark.core
def test_what_cannot_be_profiled_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^seconds=0: needs 1 to 3600$"):
        profile_command("demo", seconds=0)
    with pytest.raises(ValueError, match=r"there is no folder .*; make it, or take another --trace$"):
        profile_command("demo", trace=tmp_path / "none" / "trace.json")
    with pytest.raises(ValueError, match="without data"):
        profile_command("imagenette_simclr", out=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS)
def test_the_limit_that_was_planted_is_named(plant: str, tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_shards / "train.tar", tmp_path)
    script = Path(__file__).with_name("throughput_plants.py")
    command = [sys.executable, str(script), plant, str(tmp_path), "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(script.parent)})
    found = json.loads(done.stdout.splitlines()[-1])
    # where others use the machine besides, that comes first
    assert PLANTS[plant].limit in (found["limit"], found["beneath"]), found
    assert found["predicted"] > 1.05 * found["reached"], found
