"""The script for a lent GPU, rehearsed: every stage without a GPU, stages that hang, crash or are red, and a machine that lacks much.

Compared with: what is planted. Nothing here needs a GPU; Triton's interpreter stands in for it.
"""

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from wherefrom.kernels.render_views import native_missing
from wherefrom.pipeline.loader import Loader
from wherefrom.pipeline.render.choose import RENDERERS
from wherefrom.pipeline.render.gpu_decode import decode_by_torchvision
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.views import Batch
from wherefrom.tools import machine
from wherefrom.tools.bench_kernels.cases import CASES
from wherefrom.tools.gpu_check import chosen_tests, command, decoding, hosts, kernels, loading, sharing, sweep, views
from wherefrom.tools.gpu_check.command import run_stages
from wherefrom.tools.gpu_check.stages import STAGES, Options, Report, Stage

ROOT = Path(__file__).resolve().parents[1]
DRY = Options(seconds=60, dry_run=True)

# what a machine has not, hidden from every process that finds this on its path
HIDING = """
import importlib.machinery, importlib.metadata

find, version_of = importlib.machinery.PathFinder.find_spec, importlib.metadata.version

def find_unhidden(cls, name, path=None, target=None):
    return None if name in {hidden} else find(name, path, target)

def version(name):
    if name == "wherefrom":
        raise importlib.metadata.PackageNotFoundError(name)
    return version_of(name)

importlib.machinery.PathFinder.find_spec, importlib.metadata.version = classmethod(find_unhidden), version
"""
NOT_ON_THE_LENT_MACHINE = {"nvidia.dali", "tensorboard"}
NOT_NEEDED_BY_KERNELS = NOT_ON_THE_LENT_MACHINE | {
    *("accelerate", "braceexpand", "matplotlib", "rich", "safetensors", "simplejpeg", "timm", "tyro", "webdataset", "yaml"),
}


def lent_machine(folder: Path, hidden: set[str]) -> dict[str, str]:
    """Return the environment of a machine onto which the checkout was copied: a link is its name, nothing is installed."""
    (folder / "site").mkdir()
    (folder / "site" / "wherefrom").symlink_to(ROOT)
    (folder / "site" / "sitecustomize.py").write_text(HIDING.format(hidden=hidden))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": str(folder / "site"), "WHEREFROM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def shards(folder: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]) -> Path:
    random = np.random.Generator(np.random.Philox(0))
    pictures = [jpeg_bytes(random.integers(0, 256, (60, 80, 3), np.uint8)) for _ in range(4)]
    return make_shard(folder / "shard.tar", [(f"{n}", {"jpg": picture, "cls": b"0"}) for n, picture in enumerate(pictures)])


def outcome_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return content


def test_every_stage_is_rehearsed_without_a_gpu_as_on_a_lent_machine(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    pattern = shards(tmp_path, make_shard, jpeg_bytes)
    command = [sys.executable, "-m", "wherefrom.tools.gpu_check", pattern, "--dry-run", "--batch", "2", "--out", tmp_path / "out"]
    environment = lent_machine(tmp_path, NOT_ON_THE_LENT_MACHINE)
    # ten times the usual time: a busy machine is not a fault
    done = subprocess.run([*command, "--seconds", "4800"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    log = (tmp_path / "out" / "gpu_check.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    stages = outcome_of(tmp_path / "out")["stages"]
    assert list(stages) == [stage.name for stage in STAGES]
    assert {name: stage["status"] for name, stage in stages.items()} == {stage.name: "passed" for stage in STAGES} | {"dali": "left out"}
    figures = {name: stage["figures"] for name, stage in stages.items()}
    assert figures["facts"]["versions"]["wherefrom"] is None and figures["facts"]["there"]["nvidia.dali"] is False
    assert set(figures["kernel_tests"]["outcomes"].values()) == {"passed"}
    assert figures["render_views"]["proof"]["passed"]
    assert figures["graph"]["replays_equal_eager"] == {"as captured": True, "another batch": True, "the first again": True}
    decoding_figures = figures["decoding"]
    assert decoding_figures["torchvision, pictures"] == {"compared": 4, "of": 4, "by_library": 4, "worst_levels": pytest.approx(0, abs=0.1)}
    assert decoding_figures["torchvision, renderer"]["proven"] and decoding_figures["torchvision, pictures decoded a second"] > 0
    assert decoding_figures["unfinished batches on a consumer's stream"] == {"handed over": 0}
    assert len(figures["render_views"]) == (4 if native_missing() else 5)
    assert all(case["seconds"] for stage in ("roi_align", "pair_loss") for case in figures[stage].values())
    assert figures["sweep"].pop("not_usable") == []
    assert [len(trials) for trials in figures["sweep"].values()] == ([3, 3] if native_missing() else [3, 3, 2])
    assert figures["training"]["training demo"]["pictures_per_s"] > 0 and figures["training"]["renderer"] in RENDERERS
    beside = [figures["hosts"][name] for name in ("imagenette_mocov3", "imagenette_vicreg")]
    assert all(len(each["updates_per_s"]) == len(each["with_sp"]) == 1 for each in beside)
    assert all(f"== {stage.name}, " in log for stage in STAGES)
    assert all(f"{stages[stage.name]['status']:9} {stage.name}" in done.stdout for stage in STAGES)


def test_a_batch_norm_that_sees_its_own_rank_alone_is_red(report: Report) -> None:
    hosts.compare_batch_norms("cpu", report)
    assert content_of(report)["red"] == []
    hosts.compare_batch_norms("cpu", report, nn.BatchNorm2d)
    assert len(content_of(report)["red"]) == 8  # two types; output, gradient, mean, variance


@pytest.mark.slow
def test_the_stage_of_dali_is_rehearsed_where_dali_is(
    tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    pytest.importorskip("nvidia.dali")
    options = replace(DRY, seconds=4800, shards=str(shards(tmp_path, make_shard, jpeg_bytes)), batch=2)
    [stage] = [stage for stage in STAGES if stage.name == "dali"]
    assert run_stages([stage], options, tmp_path / "out") == 0
    stage_outcome = outcome_of(tmp_path / "out")["stages"]["dali"]
    assert stage_outcome["status"] == "passed" and all(check["passed"] for check in stage_outcome["figures"].pop("checks"))
    assert len(stage_outcome["figures"]) == 4


PLANTED = """
import os, subprocess, sys, time

def hangs(options, report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.add("child", child.pid)
    time.sleep(600)

def dies(options, report):
    report.add("before", 1)
    os.abort()

def raises(options, report):
    raise RuntimeError("planted")

def is_red(options, report):
    report.fail("something is wrong")
    report.add("seconds", options.seconds)

def lacks(options, report):
    report.leave_out("nothing of it is here")

def works(options, report):
    report.add("interpreted", os.environ.get("TRITON_INTERPRET"))
    report.say("a line")

def stops(options, report):
    report.stop("no GPU")
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def stages_of(*names: str, seconds: float = 480.0) -> list[Stage]:
    return [Stage(name=name, seconds=seconds, target=f"planted:{name}") for name in names]


def test_a_stage_that_hangs_crashes_or_is_red_costs_only_itself(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = planted / "out"
    stages = [*stages_of("hangs", seconds=6), *stages_of("dies", "raises", "is_red", "lacks", "works")]
    assert run_stages(stages, Options(seconds=480), out) == 1
    outcomes = outcome_of(out)["stages"]
    assert {name: stage["status"] for name, stage in outcomes.items()} == {
        "hangs": "cut off",
        "dies": "crashed",
        "raises": "crashed",
        "is_red": "red",
        "lacks": "left out",
        "works": "passed",
    }
    assert outcomes["dies"]["figures"] == {"before": 1} and outcomes["dies"]["exit_code"] == -signal.SIGABRT
    assert outcomes["is_red"]["red"] == ["something is wrong"]
    assert 6 <= outcomes["hangs"]["seconds"] < 60
    assert not is_alive(outcomes["hangs"]["figures"]["child"])
    assert "RuntimeError: planted" in (out / "gpu_check.log").read_text()
    assert "red       is_red" in capsys.readouterr().out


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and is not waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False


def test_all_stages_together_keep_the_time_and_what_is_left_of_it_is_told(planted: Path) -> None:
    stages = [*stages_of("hangs", seconds=320), *stages_of("is_red", seconds=240), *stages_of("hangs", "works")]
    stages = [replace(stage, name=f"{place} {stage.name}") for place, stage in enumerate(stages)]
    assert run_stages(stages, Options(seconds=12), planted / "out") == 1
    outcomes = outcome_of(planted / "out")["stages"]
    assert [stage["status"] for stage in outcomes.values()] == ["cut off", "red", "cut off", "left out"]
    assert outcomes["3 works"]["left_out"] == ["no time is left"]
    assert 8 <= outcomes["0 hangs"]["seconds"] < 11  # 320 of 480 parts of 12 s
    assert 0 < outcomes["1 is_red"]["figures"]["seconds"] <= 4  # half of it by its own time, less by what there is


def test_without_what_all_stages_need_the_others_are_not_tried(planted: Path) -> None:
    assert run_stages(stages_of("stops", "works"), Options(seconds=480), planted / "out") == 1
    outcomes = outcome_of(planted / "out")["stages"]
    assert outcomes["stops"]["status"] == "red" and outcomes["works"] == {"status": "left out", "left_out": ["no GPU"]}


def test_what_a_stage_said_is_on_disk_before_it_ends(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []

    def look(seconds: float) -> None:
        contents.append((planted / "out" / "gpu_check.json").exists() and outcome_of(planted / "out")["stages"]["hangs"])

    monkeypatch.setattr(command.time, "sleep", lambda seconds, sleep=command.time.sleep: (sleep(seconds), look(seconds)))
    run_stages(stages_of("hangs"), Options(seconds=5), planted / "out")
    assert contents[-1] and contents[-1]["status"] == "under way" and contents[-1]["figures"]["child"]


def test_on_a_gpu_triton_compiles_and_in_a_dry_run_it_interprets(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dry_run in (False, True):
        assert run_stages(stages_of("works"), Options(seconds=480, dry_run=dry_run), planted / f"{dry_run}") == 0
        outcomes = outcome_of(planted / f"{dry_run}")["stages"]["works"]
        assert outcomes["figures"] == {"interpreted": "1" if dry_run else None} and outcomes["lines"] == ["a line"]


def test_ended_from_outside_it_leaves_no_process_behind(planted: Path) -> None:
    table = "command.STAGES = (command.Stage(name='hangs', seconds=480, target='planted:hangs'),)"
    code = f"import sys; from wherefrom.tools.gpu_check import command; {table}; sys.exit(command.main(['--out', sys.argv[1]]))"
    out = planted / "out"
    with subprocess.Popen([sys.executable, "-c", code, out]) as process:
        while not ((out / "gpu_check.json").exists() and outcome_of(out)["stages"]["hangs"]["figures"]):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert not is_alive(outcome_of(out)["stages"]["hangs"]["figures"]["child"])


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "message"), [(["--seconds", "0"], "needs seconds > 0"), (["--batch", "0"], "--batch 0"), (["--only", "x"], "facts")]
)
def test_what_cannot_be_asked_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_kernels_are_checked_where_only_torch_and_triton_are(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from wherefrom.tools.gpu_check import chosen_tests, command, kernels, sweep, views
from wherefrom.tools.gpu_check.stages import Options, Report, main
report = Report(Path(sys.argv[1]), 60)
views.compare = lambda *arguments: True
views.measure_case = views._time_photometrics = lambda *arguments: None
views.render_views_stage(Options(seconds=60, dry_run=True), report)
main("wherefrom.tools.gpu_check.loading:training", '{"seconds": 60}', sys.argv[1] + "2")
"""
    environment = lent_machine(tmp_path, NOT_NEEDED_BY_KERNELS) | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-P", "-c", code, tmp_path / "report"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for report in ("report", "report2"):
        content = json.loads((tmp_path / report).read_text())
        assert content["red"] == [] and "No module named" in content["left_out"][0]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report.json", 60)


def content_of(report: Report) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(report._path.read_text())
    return content


def test_without_a_gpu_it_says_so_and_stops(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kernels.facts(Options(seconds=60), report)
    assert content_of(report)["stop"].startswith("torch sees no CUDA GPU here; wherefrom prove and wherefrom bench kernels")


def test_facts_do_without_nvidia_smi(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None if name == "nvidia-smi" else f"/usr/bin/{name}")
    monkeypatch.setattr(kernels, "copy_bytes_per_s", lambda device: 1e9)
    kernels.facts(DRY, report)
    assert content_of(report)["red"] == [] and content_of(report)["figures"]["tiny_kernel_s"] > 0


def test_a_wrong_kernel_is_red_and_not_timed(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = kernels.measure
    monkeypatch.setattr(kernels, "measure", lambda plan: measure(replace(plan, plant=True)))
    case = next(case for case in CASES if case.kernel == "roi_align" and case.quick and not case.cuda)
    kernels.measure_case(case, DRY, report)
    content = content_of(report)
    assert content["red"] and "seconds" not in content["figures"][case.name]
    assert not any(" ms " in line for line in content["lines"])


def test_a_batch_that_does_not_fit_is_halved(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measure(plan: Any) -> dict[str, Any]:
        tried.append(plan.batch)
        if plan.batch > 5:
            raise torch.OutOfMemoryError("planted")
        return {"checks": [], "seconds": {"triton": [1.0, 2.0, 3.0], "eager": [4.0, 4.0, 4.0]}, "ours": ["triton"]}

    monkeypatch.setattr(kernels, "measure", measure)
    case = next(case for case in CASES if case.cuda and case.batch == 16)
    kernels.measure_case(case, Options(seconds=60), report)
    assert tried == [16, 8, 4]
    assert content_of(report)["lines"][0].endswith(
        "B4 of it fits: triton 2e+03 ms (1.5e+03 to 2.5e+03); eager 4e+03 ms (4e+03 to 4e+03, ours x 2.00)"
    )


def test_one_kernel_that_breaks_leaves_the_others_alone(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(plan: Any) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access" if "gelu" in plan.case else "a block too large")

    monkeypatch.setattr(kernels, "measure", measure)
    with pytest.raises(RuntimeError, match="illegal"):  # but a GPU that answers nothing any more ends the stage
        kernels.pair_loss_stage(Options(seconds=60), report)
    kernels.roi_align_stage(Options(seconds=60), report)
    red = content_of(report)["red"]
    assert len(red) == 1 + sum(case.cuda and case.kernel in ("roi_align", "roi_align_pairs") for case in CASES)


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.parametrize(
    ("spoil", "red"),
    [
        (lambda picture: picture, []),
        (lambda picture: picture // 2, ["levels off, at most 4 is right"]),
        (lambda picture: picture[:, 1:], ["has size"]),
        (None, ["it decoded 0 of 4 JPEGs that it should; the CPU had to"]),
    ],
)
def test_a_decoder_that_shows_other_pictures_or_none_is_red(
    spoil: Callable[[torch.Tensor], torch.Tensor] | None,
    red: list[str],
    report: Report,
    tmp_path: Path,
    make_shard: Callable[..., Path],
    jpeg_bytes: Callable[..., bytes],
) -> None:
    def decode(files: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
        if spoil is None:
            raise RuntimeError("planted")
        return [spoil(picture) for picture in decode_by_torchvision(files, device)]

    index = ShardIndex.open(shards(tmp_path, make_shard, jpeg_bytes))
    assert decoding.check_pictures("planted", decode, index, DRY, report) == (not red)
    assert len(content_of(report)["red"]) == (4 if red and spoil else len(red))
    assert all(words in content_of(report)["red"][0] for words in red)


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
def test_damaged_files_may_be_shown_but_not_as_one_color(
    report: Report, tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes]
) -> None:
    index = ShardIndex.open(shards(tmp_path, make_shard, jpeg_bytes))
    assert decoding.check_damaged_files("library", decode_by_torchvision, index, DRY, report)
    assert set(content_of(report)["figures"]["library, damaged files"]) == set(decoding.DAMAGES)

    def gray_instead(files: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
        pictures = []
        for file in files:
            try:
                pictures += decode_by_torchvision([file], device)
            except RuntimeError:
                pictures.append(torch.full((3, 60, 80), 128, dtype=torch.uint8))
        return pictures

    assert not decoding.check_damaged_files("planted", gray_instead, index, DRY, report)
    assert "planted: a JPEG cut in half is shown as one color" in content_of(report)["red"]


@pytest.mark.core
def test_views_that_are_written_after_they_were_handed_over_are_red(
    report: Report, tmp_path: Path, make_shard: Callable[..., Path], jpeg_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, handed_over = ShardIndex.open(shards(tmp_path, make_shard, jpeg_bytes)), Loader._handed_over

    class LateTensor(torch.Tensor):
        def clone(self) -> torch.Tensor:  # type: ignore[override]
            """What is there now; then comes the rest."""
            early = torch.Tensor(self).clone()
            self += 1
            return early

    def too_early(loader: Loader, batch: Batch) -> Batch:
        batch = handed_over(loader, batch)
        return replace(batch, views=tuple(replace(views, pixels=views.pixels.as_subclass(LateTensor)) for views in batch.views))

    monkeypatch.setattr(Loader, "_handed_over", too_early)
    decoding.check_streams(index, DRY, report)
    assert content_of(report)["red"] == ["3 of 3 batches were not done on the stream of who got them"]


def test_wrong_views_are_red_and_not_timed(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def render(*pictures: Any, backend: str, **records: Any) -> Any:
        return views_of(*pictures, backend=backend, **records) + 2 * (backend == "reference")

    views_of = views.render_views
    monkeypatch.setattr(views, "render_views", render)
    monkeypatch.setattr(views, "measure_case", None)
    monkeypatch.setattr(views, "_time_photometrics", None)
    monkeypatch.setattr(views, "_prove", lambda *arguments: True)
    views.render_views_stage(DRY, report)
    assert len(content_of(report)["red"]) == 4


@pytest.mark.core
@pytest.mark.parametrize("stale", [False, True])
def test_a_graph_that_goes_by_stale_numbers_is_red(stale: bool, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[torch.Tensor] = []

    def pack_the_first(numbers: dict[str, torch.Tensor], device: str, packed: Any = views.packed) -> torch.Tensor:
        first.append(packed(numbers, device))
        return first[0 if stale else -1]

    monkeypatch.setattr(views, "packed", pack_the_first)
    views.graph_stage(DRY, report)
    content = content_of(report)
    assert content["figures"]["replays_equal_eager"] == {"as captured": True, "another batch": not stale, "the first again": True}
    assert len(content["red"]) == (2 if stale else 0)  # not the other batch's views, but the first's


def test_the_chosen_tests_are_there_and_reach_every_kernel_and_type() -> None:
    assert len(chosen_tests.CHOSEN) == len(set(chosen_tests.CHOSEN)) <= 60 and set(chosen_tests.DRY_RUN_TESTS) <= set(chosen_tests.CHOSEN)
    for kernel in ("pair_targets", "pair_loss_triton", "roi_align", "roi_align_pairs", "render_views_triton"):
        assert sum(name.startswith(f"test_{kernel}") for name in chosen_tests.CHOSEN) >= 3
    names = [f"tests/{name}" for name in chosen_tests.CHOSEN]
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert set(names) <= set(done.stdout.splitlines())


def test_without_a_checkout_the_kernels_tests_are_missed(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_tests, "__file__", str(tmp_path / "tools" / "gpu_check" / "chosen_tests.py"))
    chosen_tests.kernel_tests(DRY, report)
    assert "the kernels' tests come with a checkout, not with an installed wheel" in content_of(report)["red"][0]


def test_a_red_test_a_skipped_one_and_one_that_died_are_named(tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_planted.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 'a word' == 0\n"
        "def test_dies(): os._exit(9)\n"
        "def test_breaks(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_absent(): pass\n"
        "def test_last(): pass\n"
    )
    names = [f"test_planted.py::test_{name}" for name in ("bad", "dies", "breaks", "absent", "last", "good")]
    monkeypatch.setattr(chosen_tests, "__file__", str(tmp_path / "tools" / "gpu_check" / "chosen_tests.py"))
    monkeypatch.setattr(chosen_tests, "DRY_RUN_TESTS", names)
    chosen_tests.kernel_tests(DRY, report)
    content = content_of(report)
    outcomes = {name.rpartition("_")[2]: outcome for name, outcome in content["figures"]["outcomes"].items()}
    assert outcomes == {"bad": "failed", "dies": "died", "breaks": "failed", "absent": "skipped", "last": "passed", "good": "passed"}
    assert len(content["red"]) == 4 and "tests/test_planted.py::test_dies: died with exit code 9" in content["red"]
    assert "a word" in content["figures"]["words"]["tests/test_planted.py::test_bad"]


WORKER = """
import os, sys, time
from wherefrom.tools.gpu_check.sharing import BROKEN_GPU, add_line
for item in sys.argv[1:]:
    if item == "dies":
        os._exit(3)
    if item == "hangs":
        time.sleep(600)
    add_line(item, share=sys.argv[1:])
    if item == "breaks":
        sys.exit(BROKEN_GPU)
"""


def test_a_process_that_dies_loses_only_the_item_it_died_of(tmp_path: Path) -> None:
    def command(items: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", WORKER, *items]

    items = ["a", "b", "dies", "breaks", "c", "d", "e", "hangs", "f", "g"]
    lines = sharing.share_out(items, command, processes=2, seconds=8, folder=tmp_path)
    assert {item: line.get("died") for item, line in lines.items()} == dict.fromkeys(("a", "b", "breaks", "c", "d", "e", "f")) | {"dies": 3}
    assert lines["a"]["share"] == ["a", "dies", "c", "e", "f"] and lines["c"]["share"] == ["c", "e", "f"]
    assert lines["d"]["share"] == ["d", "hangs", "g"]


@pytest.mark.parametrize("name", sweep.TRIALS)
def test_every_trial_changes_what_its_kernel_has(name: str) -> None:
    case = sweep._case(name)
    assert case.cuda
    trials = list(sweep.TRIALS[name](name))
    assert len({trial.name for trial in trials}) == len(trials)
    for trial in trials:
        module = __import__(f"wherefrom.kernels.{trial.module}", fromlist=["*"])
        own = {constant: getattr(module, constant) for constant in trial.constants}
        if trial.kernel:
            arguments = set(inspect.signature(getattr(module, trial.kernel).fn).parameters)
            assert {*trial.only, *trial.launch} <= arguments | {"num_warps", "num_stages", "maxnreg"}
        with sweep.apply_trial(trial):
            for constant, value in trial.constants.items():
                changed = getattr(module, constant)
                assert (changed(3) if callable(changed) else changed) == value
        assert {constant: getattr(module, constant) for constant in trial.constants} == own
    with pytest.raises(AttributeError), sweep.apply_trial(replace(trials[0], constants={"NO_SUCH": 1})):
        pass


def test_a_trial_reaches_the_launches_it_names_and_leaves_results_right() -> None:
    launched: list[tuple[int, dict[str, Any]]] = []
    from wherefrom.kernels import roi_align_triton

    kernel = roi_align_triton.contract_kernel
    case = sweep.DRY_CASES[0]

    class RecordingKernel:
        def __getitem__(self, grid: Sequence[int]) -> Callable[..., Any]:
            def launch(*arguments: Any, **named: Any) -> Any:
                launched.append((grid[0], named))
                return kernel[grid](*arguments, **named)

            return launch

    trial = sweep.Trial(
        case=case.name,
        module="roi_align_triton",
        kernel="contract_kernel",
        only={"TRANSPOSED": True},
        launch={"BLOCK_ROWS": 4, "num_warps": 8},
    )
    with sweep.replace_names(roi_align_triton, {"contract_kernel": RecordingKernel()}), sweep.apply_trial(trial):
        checks = sweep.check(sweep._problem(case.name, 2, "cpu"))
    assert all(check.passed for check in checks) and {check.contender for check in checks} == {"triton", "eager"}
    [(_, forward), (programs, backward)] = launched
    assert forward["BLOCK_ROWS"] != 4 and (backward["BLOCK_ROWS"], backward["num_warps"]) == (4, 8)
    assert programs == 2 * 3  # 12 tokens of each of two pictures


def test_a_trial_that_does_not_run_or_errs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sharing.LINES, str(tmp_path / "lines"))
    good = sweep.trials_of(DRY)[1]
    monkeypatch.setattr(sweep, "trials_of", lambda options: [good, replace(good, launch={"BLOCK_ROWS": 5}), good])
    sweep.main('{"dry_run": true}', "0", "1")
    monkeypatch.setattr(sweep, "check", lambda problem, check=sweep.check: [replace(each, limit=-1.0) for each in check(problem)])
    sweep.main('{"dry_run": true}', "2")
    right, impossible, wrong = (json.loads(line)["problem"] for line in (tmp_path / "lines").read_text().splitlines())
    assert right == "" and "arange" in impossible and "errs by" in wrong


@pytest.mark.parametrize("built", [True, False])
def test_the_cpu_kernel_is_built_where_training_needs_it(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "a warning\nno Python.h\n")

    monkeypatch.setattr(loading.shutil, "which", lambda name: "/usr/bin/gcc")
    monkeypatch.setattr(loading.subprocess, "run", run)
    monkeypatch.setattr(loading, "native_missing", lambda: None if built else "it was not built")
    words = loading.build_native()
    assert words == ("the CPU view kernel was built" if built else "the CPU view kernel is not built: no Python.h")
    assert commands[0][-2:] == ["build_ext", "--inplace"]
    monkeypatch.setattr(loading.shutil, "which", lambda name: None)
    assert loading.build_native() == "the CPU view kernel is not built: no gcc, or no checkout" and len(commands) == 1


def test_a_case_that_cannot_be_timed_leaves_the_other_cases_of_the_sweep_alone(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(case: str, *_: Any) -> list[dict[str, Any]]:
        if case.startswith("roi_align"):
            raise RuntimeError("planted")
        return [{"trial": "", "median_s": 1.0}]

    monkeypatch.setattr(sweep, "share_out", lambda names, *_, **__: {name: {"problem": ""} for name in names})
    monkeypatch.setattr(sweep, "_time_case", timed)
    sweep.sweep(DRY, report)
    content = content_of(report)
    assert content["red"] == ["roi_align B1 tiny float32 cpu: RuntimeError: planted"]
    assert "pair_loss B1 tiny float32 cpu" in content["figures"]
