"""The loader's benchmark in miniature: checks before speed, rounds in turns, ratios of medians, CPU time of the whole process tree.

No speed is asserted anywhere; that a wrong box is found is.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wherefrom.kernels.render_views_reference import render_views_reference
from wherefrom.pipeline import ShardIndex
from wherefrom.pipeline.views import Photometric
from wherefrom.tools.bench_checks import Check, bench_recipe, checked_ids, drawn, levels_off, moved
from wherefrom.tools.bench_loader import Rate, bench_loader_command, ratios
from wherefrom.tools.process_tree import tree_cpu_s


@pytest.fixture
def shard(make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path) -> Path:
    """A dozen small pictures with structure; the second lies on its side."""
    random = np.random.default_rng(0)
    encoded = []
    for number in range(12):
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
        picture = np.asarray(coarse.resize((160, 120), Image.Resampling.BICUBIC))
        encoded.append(jpeg_bytes(picture, exif_orientation=6 if number == 1 else 1))
    return make_shard(tmp_path / "bench-000000.tar", [(f"{n:03d}", {"jpg": data}) for n, data in enumerate(encoded)])


def test_rounds_are_taken_in_turns_and_every_number_is_written(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers"
    assert bench_loader_command(data=str(shard), rounds=2, seconds=0.3, threads=2, contenders=("torch", "decode_threads"), out=out) == 0
    said = capsys.readouterr().out
    ours, other = "wherefrom, torch renderer", "decoding alone, simplejpeg in threads"
    turns = [line.partition(": ")[2] for line in said.splitlines() if line.startswith("round ")]
    assert turns == [ours, other, ours, other]

    written = json.loads((out / "bench.json").read_text())
    for name in ("torch", "decode_threads"):
        rate = written["rates"][name]
        assert len(rate["per_cpu_s"]) == len(rate["per_wall_s"]) == 2
        assert min(*rate["per_cpu_s"], *rate["per_wall_s"], rate["memory_mib"]) > 0
    assert 0 < written["rates"]["torch"]["draw_share"] < 1 and written["rates"]["decode_threads"]["draw_share"] is None
    ratio = written["ratios"]["torch / decode_threads"]["per_cpu_s"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["rounds"] == 2
    assert written["settings"] == {
        "rounds": 2, "seconds": 0.3, "batch": 32, "threads": 2, "photometrics": False, "data": str(shard)
    }  # fmt: skip
    assert written["machine"]["cores"] >= 1 and "torch" in written["machine"]["versions"]
    assert "torch / decode_threads" in said and Image.open(out / "bench.png").size[0] > 500
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]


def test_a_wrong_box_ends_it_before_any_speed_is_told(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers"
    assert bench_loader_command(data=str(shard), rounds=1, seconds=0.3, contenders=("torch", "pil"), out=out, plant=True) == 1
    said = capsys.readouterr().out
    assert "wrong, so no speed is told: wherefrom, torch renderer: levels off the float64 reference" in " ".join(said.split())
    assert "per CPU-s" not in said and not out.exists()


def test_memory_is_told_epoch_by_epoch(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers"
    assert bench_loader_command(data=str(shard), threads=1, out=out, memory=True) == 0
    said = capsys.readouterr().out
    assert "memory after each of 10 epochs" in said and "steady" in said and not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dali", "pil", "tv2", "decode_dali", "decode_threads"])
@pytest.mark.parametrize("photometrics", [False, True])
def test_every_other_contender_is_checked_and_measured(shard: Path, tmp_path: Path, name: str, photometrics: bool) -> None:
    if name in ("dali", "decode_dali"):
        pytest.importorskip("nvidia.dali")
    told = {"data": str(shard), "rounds": 1, "seconds": 0.3, "contenders": (name,), "out": tmp_path / "n", "photometrics": photometrics}
    assert bench_loader_command(**told) == 0  # type: ignore[arg-type]
    assert bench_loader_command(**told, plant=True) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("photometrics", [False, True])
def test_the_check_tells_right_views_from_moved_boxes(shard: Path, photometrics: bool) -> None:
    index = ShardIndex.open(str(shard))
    ids = checked_ids(index)
    assert 1 not in ids and len(ids) == 4
    record, photometric = (part[:1] for part in drawn(bench_recipe(photometrics), index, ids)[1])
    picture = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (120, 160, 3), np.uint8))
    plain = Photometric.unchanged(1, 8)
    views = render_views_reference(
        picture,
        record.boxes[0],
        record.flipped[0],
        record.quarter_turns[0],
        (96, 96),
        mean=torch.tensor([0.485, 0.456, 0.406]),
        std=torch.tensor([0.229, 0.224, 0.225]),
    )
    assert levels_off(views, picture, record, plain) < 1e-4
    assert levels_off(views, picture, moved(record), plain) > 5
    assert levels_off(views, picture, replace(record, flipped=~record.flipped), plain) > 5
    assert (levels_off(views, picture, record, photometric) > 5) == photometrics
    assert (moved(record).boxes != record.boxes).all()
    assert not Check(name="", value=float("nan"), limit=1).passed


def test_cpu_time_counts_children_alive_and_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.4: pass\n"
    start, own = tree_cpu_s(), time.process_time()
    subprocess.run([sys.executable, "-c", burn], check=True)
    ended = tree_cpu_s() - start - (time.process_time() - own)
    assert ended >= 0.35

    start, own = tree_cpu_s(), time.process_time()
    child = subprocess.Popen([sys.executable, "-c", f"{burn}print(flush=True)\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    alive = tree_cpu_s() - start - (time.process_time() - own)
    child.communicate(b"\n")
    assert alive >= 0.35


def test_ratios_are_of_medians_with_the_rounds_spread() -> None:
    def rate(*per_cpu_s: float) -> Rate:
        return Rate(per_cpu_s=list(per_cpu_s), per_wall_s=[1.0] * len(per_cpu_s), memory_mib=1, draw_share=None)

    found = ratios({"torch": rate(10, 40, 20), "pil": rate(10, 4, 5), "decode_dali": rate(100, 100, 100)})
    assert set(found) == {"torch / pil", "torch / decode_dali"}
    ratio = found["torch / pil"]["per_cpu_s"]
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (4, 1, 10, 3)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("rounds=0, seconds=6.0, threads=None: needs", {"rounds": 0}),
        ("threads=0: needs", {"threads": 0}),
        ("seconds=0, threads=None: needs", {"seconds": 0}),
    ],
)
def test_what_cannot_be_measured_is_refused(words: str, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=words):
        bench_loader_command(data="none.tar", **arguments)  # type: ignore[arg-type]


def test_shards_that_cannot_be_read_are_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match=r"none\.tar"):
        bench_loader_command(data=str(tmp_path / "none.tar"), out=tmp_path / "out")
    assert not capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_contender_that_fails_is_named(make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path) -> None:
    lying = jpeg_bytes(np.zeros((40, 60, 3), np.uint8), exif_orientation=6)
    shard = make_shard(tmp_path / "lying-000000.tar", [("0", {"jpg": lying})])
    with pytest.raises(OSError, match=r"contender torch ended with code 1: ValueError: .*no picture that is sound and upright"):
        bench_loader_command(data=str(shard), contenders=("torch",), rounds=1, out=tmp_path / "out")
