"""The loader's benchmark in miniature: checks before speed, rounds in turns, ratios of medians, CPU time of the whole process tree.

No speed is asserted anywhere; that a wrong box is found is, for every contender that is here.
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from wherefrom.pipeline import ShardIndex
from wherefrom.pipeline.proof.level_errors import reference_levels
from wherefrom.pipeline.views import Photometric, Record
from wherefrom.tools.bench_loader import checks, command, peers
from wherefrom.tools.bench_loader.checks import (
    DeliveryCheck,
    ViewsName,
    bench_recipe,
    bilinear_levels,
    draw_bench_records,
    ids_to_check,
    mean_level_error,
    move_boxes,
)
from wherefrom.tools.bench_loader.command import bench_loader_command
from wherefrom.tools.bench_loader.contenders import ON_GPU, TITLES, ContenderName, LoaderJob, make_contender, why_missing
from wherefrom.tools.bench_loader.pictures import enlarged_shard, picture_facts
from wherefrom.tools.bench_loader.plot import draw_rates
from wherefrom.tools.bench_loader.process_tree import tree_cpu_s
from wherefrom.tools.bench_loader.report import AIMS, LoaderCase, Rate, cores_for, print_case, ratios, role

IN_PROCESS: tuple[ContenderName, ...] = (
    *("native", "torch", "dali", "dataset", "pil", "tv2", "spdl", "kornia", "dali_own", "decode_threads", "decode_torchvision"),
)
PLAIN = LoaderCase(mode="geometry", views="crops", megapixels=0, threads=2)


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


def rate(*per_cpu_s: float) -> Rate:
    return Rate(per_cpu_s=list(per_cpu_s), per_wall_s=[2 * one for one in per_cpu_s], memory_mib=1)


def test_rounds_are_taken_in_turns_and_every_number_is_written(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers"
    settings = {"rounds": 2, "seconds": 0.3, "batch": 8, "feed": 100.0, "data": str(shard)}
    assert bench_loader_command(**settings, threads=(2,), contenders=("torch", "decode_threads"), out=out) == 0  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    ours, other = "wherefrom, torch renderer", "decoding alone, simplejpeg in threads"
    turns = [line.partition(": ")[2] for line in printed.splitlines() if line.startswith("round ")]
    assert turns == [ours, other, ours, other]

    written = json.loads((out / "bench.json").read_text())
    assert written["settings"] == settings
    assert written["contenders"]["torch"] == {"title": ours, "role": "ours", "on_gpu": False}
    assert written["machine"]["cores"] >= 1 and "torch" in written["machine"]["versions"]
    (case,) = written["cases"]
    assert (case["mode"], case["megapixels"], case["threads"]) == ("geometry", 0, 2)
    assert case["pictures"] == {
        "number": 12, "megapixels": 0.019, "kilobytes": pytest.approx(9.6, abs=2), "origin": "as given"
    }  # fmt: skip
    for name in ("torch", "decode_threads"):
        rates = case["rates"][name]
        assert len(rates["per_cpu_s"]) == len(rates["per_wall_s"]) == 2
        assert min(*rates["per_cpu_s"], *rates["per_wall_s"], rates["memory_mib"]) > 0
    assert 0 < case["rates"]["torch"]["draw_share"] < 1 and case["rates"]["decode_threads"]["draw_share"] is None
    ratio = case["ratios"]["torch / decode_threads"]["per_cpu_s"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["rounds"] == 2
    assert case["worth"] == {"torch": pytest.approx(100 / np.median(case["rates"]["torch"]["per_cpu_s"]), abs=0.01)}
    assert 'renderer="auto" takes' in printed and "worth: 100 pictures/s" in printed
    assert Image.open(out / "bench.png").size[0] > 500
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("views", get_args(ViewsName))
def test_views_of_methods_are_delivered_as_recorded(shard: Path, views: ViewsName) -> None:
    job = LoaderJob(contender="native", data=str(shard), seconds=0.1, threads=1, batch=4, views=views)
    contender = make_contender(job, ShardIndex.open(str(shard), decode=True))
    checks = contender.check(plant=False)
    assert all(check.passed for check in checks), checks
    assert not all(check.passed for check in contender.check(plant=True))
    assert next(contender.batches()) == 4


def test_peers_are_measured_on_the_views_that_they_cut(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"checks": [], "pictures": 10, "wall_s": 1.0, "cpu_s": 0.5, "memory_mib": 1.0}
    monkeypatch.setattr(command, "_run", lambda job: run)
    names: tuple[ContenderName, ...] = ("native", "pil", "decode_threads")
    out = tmp_path / "numbers"
    assert bench_loader_command(data=str(shard), rounds=1, views=("crops", "part"), threads=(1,), contenders=names, out=out) == 0
    written = json.loads((out / "bench.json").read_text())
    assert written["views"] == {"crops": "2 x 224 px of Independent + 8 x 96 px of Independent", "part": "196 x 16 px of Scattered"}
    assert [(case["views"], list(case["rates"])) for case in written["cases"]] == [
        ("crops", list(names)), ("part", ["native", "decode_threads"])
    ]  # fmt: skip


def test_a_wrong_box_ends_it_before_any_speed_is_told(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers"
    assert bench_loader_command(data=str(shard), rounds=1, seconds=0.3, contenders=("torch", "pil"), out=out, plant=True) == 1
    printed = capsys.readouterr().out
    assert "wrong, so no speed is told: wherefrom, torch renderer: levels off the float64 reference" in " ".join(printed.split())
    assert "per CPU-s" not in printed and not out.exists()


def test_memory_is_told_epoch_by_epoch(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers"
    assert bench_loader_command(data=str(shard), threads=(1,), out=out, memory=True) == 0
    printed = capsys.readouterr().out
    assert "memory after each of 10 epochs" in printed and "steady" in printed and not out.exists()


@pytest.fixture
def one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks look at one picture alone, which is enough to find six pixels."""
    monkeypatch.setattr(checks, "CHECKED_PICTURES", 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchvision 0.29 announces the end of its decoders
@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_contender_delivers_and_boxes_planted_elsewhere_are_found(shard: Path, name: ContenderName) -> None:
    if why := why_missing(name):
        pytest.skip(why)
    job = LoaderJob(contender=name, data=str(shard), seconds=0.1, threads=1, batch=4, photometrics=True)
    contender = make_contender(job, ShardIndex.open(str(shard)))
    checks = contender.check(plant=False)
    assert all(check.passed for check in checks), checks
    assert not all(check.passed for check in contender.check(plant=True))
    stream = contender.batches()
    assert [next(stream) for _ in range(2)] == [4, 4]
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("one_picture")
def test_what_runs_batches_on_a_gpu_is_right_on_the_cpu(shard: Path) -> None:
    if why := why_missing("kornia"):
        pytest.skip(why)
    contender = peers.BatchTransform(peers.kornia(True), ShardIndex.open(str(shard)), batch=3, device="cpu")
    assert all(check.passed for check in contender.check(plant=False))
    assert not all(check.passed for check in contender.check(plant=True))
    assert next(contender.batches()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["native", "dali", "dataset", "pil", "tv2", "spdl", "kornia", "dali_own", "decode_dali", "decode_threads"])
def test_every_contender_is_checked_and_measured_in_a_process_of_its_own(shard: Path, tmp_path: Path, name: ContenderName) -> None:
    if why := why_missing(name):
        pytest.skip(why)
    arguments = {"data": str(shard), "rounds": 1, "seconds": 0.3, "contenders": (name,), "out": tmp_path / "n"}
    assert bench_loader_command(**arguments, modes=("geometry", "photometrics"), megapixels=(0, 0.05)) == 0  # type: ignore[arg-type]
    assert bench_loader_command(**arguments, plant=True) == 1  # type: ignore[arg-type]


@pytest.mark.core
@pytest.mark.parametrize("photometrics", [False, True])
def test_the_check_tells_right_views_from_moved_boxes(shard: Path, photometrics: bool) -> None:
    index = ShardIndex.open(str(shard))
    ids = ids_to_check(index)
    assert 1 not in ids and len(ids) == 4
    record = draw_bench_records(bench_recipe(photometrics), index, ids)[1][:1]
    picture = np.random.default_rng(1).integers(0, 256, (120, 160, 3), np.uint8)
    uncolored = replace(record, photometric=Photometric.unchanged(1, 8))
    mirrored = replace(uncolored, geometry=replace(record.geometry, flipped=~record.geometry.flipped))
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    views = (reference_levels([picture], uncolored)[0] / 255 - mean) / std
    assert mean_level_error(views, picture, uncolored) < 1e-4
    assert mean_level_error(views, picture, move_boxes(uncolored)) > 5
    assert mean_level_error(views, picture, mirrored) > 5
    assert (mean_level_error(views, picture, record) > 5) == photometrics
    assert (move_boxes(record).geometry.boxes != record.geometry.boxes).all()
    assert not DeliveryCheck(name="", value=float("nan"), limit=1).passed


def test_unfiltered_views_read_between_four_pixels_and_nothing_else(shard: Path) -> None:
    geometry = draw_bench_records(bench_recipe(False), ShardIndex.open(str(shard)), np.array([0]))[1].geometry
    rows, cols = torch.meshgrid(torch.arange(120), torch.arange(160), indexing="ij")
    ramp = torch.stack([cols, rows, cols + 0 * rows], -1).to(torch.uint8)
    views = bilinear_levels(ramp, geometry)
    center = geometry.boxes[0].double().view(8, 2, 2).mean(1) - 0.5  # the level of a ramp at a box's center
    assert (views[:, :2].mean((-2, -1)) - center).abs().max() < 0.3  # boxes at the picture's edge are clamped there
    inside = views[:, :, 20:-20, 20:-20]
    assert (inside - reference_levels([ramp.numpy()], Record.of(geometry))[0, :, :, 20:-20, 20:-20]).abs().max() < 0.2

    noise = np.random.default_rng(1).integers(0, 256, (1200, 1600, 3), np.uint8)
    large = replace(geometry, boxes=geometry.boxes * 10, source_size=geometry.source_size * 10)
    filtered = reference_levels([noise], Record.of(large))[0]
    assert (bilinear_levels(torch.tensor(noise), large) - filtered).abs().mean() > 20  # shrinking is what filters are for


def test_pictures_are_enlarged_upright_once_and_never_shrunk(shard: Path, tmp_path: Path) -> None:
    index = ShardIndex.open(str(shard))
    larger = ShardIndex.open(str(enlarged_shard(index, 0.1, tmp_path)))
    assert len(larger) == len(index) and (larger.orientation == 1).all()
    megapixels = larger.source_size.prod(-1, dtype=np.int64) / 1e6
    np.testing.assert_allclose(megapixels, 0.1, rtol=0.01)
    aspect = larger.source_size[:, 1] / larger.source_size[:, 0]
    np.testing.assert_allclose(aspect, index.source_size[:, 1] / index.source_size[:, 0], rtol=0.01)  # the second stands upright
    assert aspect[1] < 1 < aspect[0]
    assert "enlarged (bicubic) to 0.1 MP, JPEG quality 90, 4:2:0" in picture_facts(larger, 0.1).origin
    same = ShardIndex.open(str(enlarged_shard(index, 0.001, tmp_path)))
    np.testing.assert_array_equal(same.source_size, index.source_size)


@pytest.mark.core
def test_who_cannot_run_here_is_left_out_in_a_line_that_says_why(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = dict.fromkeys(get_args(ContenderName), "not installed") | {"pil": "stolen", "decode_threads": None}
    monkeypatch.setattr(command, "why_missing", reasons.get)
    run = {"checks": [], "pictures": 10, "wall_s": 1.0, "cpu_s": 0.5, "memory_mib": 1.0}
    monkeypatch.setattr(command, "_run", lambda job: run)
    out = tmp_path / "numbers"
    assert bench_loader_command(data=str(shard), rounds=1, seconds=0.2, threads=(1,), out=out) == 0
    printed = " ".join(capsys.readouterr().out.split())
    others = ", ".join(name for name in get_args(ContenderName) if reasons[name] == "not installed")
    assert f"left out: {others}: not installed left out: pil: stolen FFCV is left out: " in printed
    written = json.loads((out / "bench.json").read_text())
    assert list(written["contenders"]) == ["decode_threads"] and "left out: pil: stolen" in written["left_out"]
    with pytest.raises(ValueError, match="contenders: nobody to measure; left out: pil: stolen"):
        bench_loader_command(data=str(shard), contenders=("pil",), out=tmp_path / "none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nobody_is_measured_on_one() -> None:
    assert {why_missing(name) for name in ON_GPU} == {"torch sees no CUDA GPU here"}


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


@pytest.mark.core
def test_ratios_are_of_medians_with_the_range_of_the_rounds() -> None:
    of_pairs = ratios({"torch": rate(10, 40, 20), "pil": rate(10, 4, 5), "decode_dali": rate(100, 100, 100)})
    assert set(of_pairs) == {"torch / pil", "torch / decode_dali"}
    ratio = of_pairs["torch / pil"]["per_cpu_s"]
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (4, 1, 10, 3)


def printed_lines(case: LoaderCase, rates: dict[ContenderName, Rate], feed: float = 2000) -> str:
    """Return what is printed of a case, in one line."""
    console = Console(width=300)
    with console.capture() as captured:
        print_case(console, case, rates, feed)
    return " ".join(captured.get().split())


@pytest.mark.core
def test_worth_is_the_feed_over_pictures_per_cpu_second() -> None:
    assert cores_for(2000, rate(400, 500, 900)) == 4
    printed = printed_lines(PLAIN, {"native": rate(500), "pil": rate(80), "tv2": rate(100)}, feed=1000)
    assert "worth: 1000 pictures/s take so many cores like these: 2.0 with native, 12.5 with pil" in printed


def test_aims_are_told_where_they_belong_against_the_faster_decoder() -> None:
    rates: dict[ContenderName, Rate] = {
        "native": rate(420),
        "dataset": rate(270),
        "pil": rate(60),
        "tv2": rate(100),
        "decode_dali": rate(500),
        "decode_threads": rate(600),
    }
    printed = printed_lines(PLAIN, rates)
    assert "native / pil: 7.00 (7.00-7.00), aim 6.5: reached" in printed
    assert "native / tv2: 4.20 (4.20-4.20), aim 4.2: reached" in printed
    assert "native / decode_threads: 0.70 (0.70-0.70), aim 0.7: reached" in printed and "decode_dali: 0.84 (0.84-0.84), aim" not in printed
    assert "dataset / tv2: 2.70 (2.70-2.70), aim 3.8: MISSED" in printed
    assert "torch / " not in printed
    colored, large = replace(PLAIN, mode="photometrics"), replace(PLAIN, megapixels=1.5)
    assert "aim 8: MISSED" in printed_lines(colored, rates) and "aim 6.5" not in printed_lines(colored, rates)
    assert "decode_threads: 0.70 (0.70-0.70), aim 0.6: reached" in printed_lines(large, rates)
    named = {part for by in AIMS.values() for pair in by for part in pair.split(" / ")} - {"decode"}
    assert named <= set(get_args(ContenderName))


def test_those_on_a_gpu_are_compared_by_the_clock() -> None:
    printed = printed_lines(PLAIN, {"native": rate(300), "triton": rate(4000), "pil": rate(60)})
    by_cpu, by_clock = printed.split("per second, on the GPU")
    assert "triton" not in by_cpu.split("per CPU-second, over")[1]
    assert "66.67 (66.67-66.67)" in by_clock


def test_the_plot_has_a_panel_for_every_case_and_place(tmp_path: Path) -> None:
    def drawn_size(
        names: tuple[ContenderName, ...], modes: tuple[str, ...], sizes: tuple[float, ...], views: str = "crops"
    ) -> tuple[int, int]:
        cases = [
            {
                "mode": mode,
                "views": views,
                "megapixels": size,
                "threads": threads,
                "pictures": {"megapixels": 0.2, "origin": "as given"},
                "rates": {
                    name: {"per_cpu_s": [100.0, 120.0], "per_wall_s": [200.0, 240.0]}
                    for name in names
                    if views == "crops" or role(name) != "peer"
                },
            }
            for mode, size, threads in itertools.product(modes, sizes, (1, 2))
        ]
        result = {
            "machine": {"cpu": "a processor", "cores": 2},
            "views": {views: "2 x 224 px"},
            "settings": {"rounds": 2},
            "contenders": {name: {"title": TITLES[name], "role": role(name), "on_gpu": name in ON_GPU} for name in names},
            "cases": cases,
        }
        draw_rates(result, tmp_path / "plot.png")
        return Image.open(tmp_path / "plot.png").size

    one = drawn_size(("native", "pil", "decode_dali"), ("geometry",), (0,))
    four = drawn_size(("native", "pil", "decode_dali"), ("geometry", "photometrics"), (0, 1.5))
    assert four[0] > 1.4 * one[0] and four[1] > 1.4 * one[1]
    on_gpu = drawn_size(("native", "triton"), ("geometry",), (0,))
    assert on_gpu[0] == one[0] and on_gpu[1] > one[1]
    assert drawn_size(("triton",), ("geometry",), (0,))[1] < on_gpu[1]
    assert drawn_size(("native", "pil", "decode_dali"), ("geometry",), (0,), "mae") == one  # whoever cuts no such views has an empty place


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (r"rounds=0, seconds=6.0, threads=\(\d+,\): needs", {"rounds": 0}),
        (r"threads=\(2, 0\): needs", {"threads": (2, 0)}),
        (r"seconds=0, threads=\(\d+,\): needs", {"seconds": 0}),
        (r"megapixels=\(0, -1\): needs", {"megapixels": (0, -1)}),
        ("batch=0, feed=2000.0: needs", {"batch": 0}),
        ("batch=32, feed=0: needs", {"feed": 0}),
    ],
)
def test_what_cannot_be_measured_is_refused(words: str, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=words):
        bench_loader_command(data="none.tar", **arguments)  # type: ignore[arg-type]


@pytest.mark.core
def test_shards_that_cannot_be_read_are_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match=r"none\.tar"):
        bench_loader_command(data=str(tmp_path / "none.tar"), out=tmp_path / "out")
    assert not capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_contender_that_fails_is_named(make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], tmp_path: Path) -> None:
    lying = jpeg_bytes(np.zeros((40, 60, 3), np.uint8), exif_orientation=6)
    shard = make_shard(tmp_path / "lying-000000.tar", [("0", {"jpg": lying})])
    with pytest.raises(OSError, match=r"contender torch ended with code 1: ValueError: .*no picture that is valid and upright"):
        bench_loader_command(data=str(shard), contenders=("torch",), rounds=1, out=tmp_path / "out")
