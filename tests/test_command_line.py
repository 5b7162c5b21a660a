"""The command `wherefrom` from outside: exit codes, one line for what went wrong, nothing written half; and a whole run that went well."""

import io
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from wherefrom.pipeline import LAWS, Grid, Overlapping, Paired
from wherefrom.tools import training
from wherefrom.tools.cli import COMMANDS, main
from wherefrom.tools.terminal import Terminal, duration, line
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives import DenseSpatialSettings, SpatialSettings
from wherefrom.train.recipes import RECIPES, recipe
from wherefrom.train.reporting import LogRecord, Summary
from wherefrom.train.run_folder import RunFolder, read_metrics
from wherefrom.train.settings import TrainSettings

TINY = [
    *("--updates", "4", "--global-batch", "8"),
    *("--model.view-size-px", "24", "--model.patch-size-px", "12", "--model.width", "32", "--model.depth", "1", "--model.heads", "2"),
    *("--spatial.views", "3", "--spatial.size-px", "24", "--spatial.min-side-px", "4"),
    *("--runtime.device", "cpu", "--runtime.threads", "1", "--runtime.log-every", "2", "--runtime.renderer", "torch"),
    *("--evaluation.every", "0", "--evaluation.pictures", "8", "--evaluation.head-pictures", "8", "--evaluation.head-steps", "3"),
    *("--evaluation.knn-pictures", "0", "--evaluation.short-pictures", "8", "--evaluation.short-knn-pictures", "0"),
]


def exit_code_of(words: list[str]) -> int:
    """Return the exit code of `wherefrom WORDS`, however it leaves."""
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with a cache of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WHEREFROM_CACHE", str(tmp_path / "cache"))
    return folder


LIBRARIES = ("torch", "numpy", "rich", "tyro", "matplotlib")
IMPORTS_OF = f"""
import sys
{{statement}}
from wherefrom.tools.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("imports:", *(name for name in {LIBRARIES} if name in sys.modules))
"""


@pytest.mark.core
@pytest.mark.parametrize("words", ["", "--help", "--version", "bench", "bench --help", "tarin"])
def test_asking_what_there_is_imports_no_library(words: str) -> None:
    command = [sys.executable, "-c", IMPORTS_OF.format(statement=""), *words.split()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "imports:"


@pytest.mark.core
def test_a_library_that_is_imported_is_noticed() -> None:
    command = [sys.executable, "-c", IMPORTS_OF.format(statement="import numpy, rich"), "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "imports: numpy rich"


@pytest.mark.core
def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(["--version"]) == 0
    assert re.fullmatch(r"wherefrom \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def _not_a_tar(folder: Path) -> Path:
    path = folder / "words.tar"
    path.write_bytes(b"these are words, not members" * 100)
    return path


def _empty_tar(folder: Path) -> Path:
    path = folder / "empty.tar"
    tarfile.open(path, "w").close()
    return path


def _tar_without_pictures(folder: Path) -> Path:
    path = folder / "texts.tar"
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo("a.txt")
        header.size = 2
        tar.addfile(header, io.BytesIO(b"hi"))
    return path


def _one_picture(folder: Path) -> Path:
    path = folder / "one.tar"
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "JPEG")
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo("a.jpg")
        header.size = len(picture.getvalue())
        tar.addfile(header, io.BytesIO(picture.getvalue()))
    return path


def _file(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text)
    return path


def _folder_with_another_run(folder: Path) -> Path:
    (folder / "run").mkdir()
    (folder / "run" / "settings.yaml").write_text("recipe: demo\n")
    return folder / "run"


BAD: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "two lengths": (
        lambda t, s: ["train", "--epochs", "3", "--updates", "5"],
        "--epochs 3 --updates 5: a run has one length; leave one of them out",
    ),
    "unknown command": (lambda t, s: ["tarin"], "no command 'tarin'"),
    "unknown bench": (lambda t, s: ["bench", "everything"], "no command 'bench everything'"),
    "unknown recipe": (lambda t, s: ["train", "imagenete_sp"], "no recipe 'imagenete_sp'; did you mean 'imagenette_sp'"),
    "unknown recipe behind a law's options": (
        lambda t, s: ["train", "--spatial.law.aspect", "1", "1", "imagenete_sp"],
        "no recipe 'imagenete_sp'; did you mean",
    ),
    "recipe behind a law's options, one too many": (
        lambda t, s: ["train", "--spatial.law", "paired", "--spatial.law.border-frac", "0.1", "imagenet_sp_vits16"],
        "without data: it is meant for pictures of yours",
    ),
    "unknown option": (lambda t, s: ["train", "--optim.lrr", "1"], "optim.lrr"),
    "value out of range": (lambda t, s: ["train", "--optim.lr", "-1"], "lr=-1.0"),
    "value of another type": (lambda t, s: ["train", "--seed", "many"], "seed"),
    "choice that is none": (lambda t, s: ["train", "--runtime.renderer", "magic"], "magic"),
    "model that is none": (lambda t, s: ["train", "--model.name", "vit_of_dreams"], "vit_of_dreams"),
    "no such file": (lambda t, s: ["train", "--data", str(t / "none.tar")], "none.tar"),
    "pattern without match": (lambda t, s: ["train", "--data", str(t / "no-*.tar")], r"no-\*\.tar"),
    "recipe for data without any": (lambda t, s: ["train", "imagenet_sp_vits16"], "without data: it is meant for pictures of yours"),
    "resume of nothing": (lambda t, s: ["train", "--resume", "--out", str(t / "typo")], r"/typo: there is no run to go on with"),
    "objective that is none": (lambda t, s: ["train", "sp_dense", "--spatail.views", "4"], "spatail.views"),
    "setting that an objective lacks": (lambda t, s: ["train", "sp_dense", "--spatial.veiws", "4"], "spatial.veiws"),
    "law that is none": (lambda t, s: ["train", "--spatial.law", "pared"], r"--spatial\.law: no law 'pared'; did you mean 'paired'\?"),
    "option of another law": (
        lambda t, s: ["train", "--spatial.law", "paired", "--spatial.law.area-frac", "0.1", "0.2"],
        r"--spatial\.law\.area-frac: the paired law has no area_frac; it has position_max, .*; --spatial\.law names another law",
    ),
    "law that draws another number of views": (
        lambda t, s: ["train", "--spatial.law=paired", "--spatial.views", "4"],
        "views=4 of family 'spatial': the paired law draws 2; take views=2",
    ),
    "law that refers to no family before it": (
        lambda t, s: ["train", "--data", str(s / "train.tar"), *TINY, "--spatial.law", "inside", "--spatial.law.of", "dense"],
        r"family 'spatial' refers to 'dense', which must come before it; before it come \[\]",
    ),
    "objective that is switched on by a value": (lambda t, s: ["train", "sp_dense", "--spatial=4"], "spatial"),
    "part of one that it lacks": (
        lambda t, s: ["train", "--spatial.color.gray_prob=0.1"],
        r"--spatial\.color\.gray-prob: demo has no spatial\.color; .* spatial: \{color: \{gray_prob: \.\.\.\}\}",
    ),
    "file of a recipe of one's own": (
        lambda t, s: ["train", "--config", str(_file(t, "recipe: mine"))],
        r"some\.yaml: recipe='mine': a file changes one of demo, .*; name that, or leave it out for demo",
    ),
    "file of a value out of range": (
        lambda t, s: ["train", "--config", str(_file(t, "optim: {lr: -1}"))],
        r"some\.yaml and the command line: optim: lr=-1\.0",
    ),
    "unknown recipe behind an objective": (lambda t, s: ["train", "--dense", "imagenete_sp"], "no recipe 'imagenete_sp'; did you mean"),
    "weight below nothing": (lambda t, s: ["train", "--dense.weight", "-1"], "dense: weight=-1.0, .*: weights cannot be negative"),
    "width of a convolutional network": (
        lambda t, s: ["train", "--model.name", "resnet18", "--model.width", "64"],
        "width=64 of model 'resnet18'",
    ),
    "held-out pictures alone": (lambda t, s: ["train", "--val", str(s / "val.tar")], "without data"),
    "not a tar": (lambda t, s: ["train", "--data", str(_not_a_tar(t))], "words.tar"),
    "empty tar": (lambda t, s: ["train", "--data", str(_empty_tar(t))], "empty.tar"),
    "tar without pictures": (lambda t, s: ["train", "--data", str(_tar_without_pictures(t))], "texts.tar"),
    "micro-batches that do not divide": (
        lambda t, s: ["train", "--data", str(s / "train.tar"), *TINY, "--runtime.accumulation", "3"],
        "global_batch=8",
    ),
    "fewer samples than a batch": (lambda t, s: ["train", "--data", str(s / "train.tar"), *TINY, "--global-batch", "64"], "64"),
    "folder of another run": (
        lambda t, s: ["train", "--data", str(s / "train.tar"), *TINY, "--out", str(_folder_with_another_run(t))],
        "holds another run",
    ),
    "folder below a file": (
        lambda t, s: ["train", "--data", str(s / "train.tar"), *TINY, "--out", str(_not_a_tar(t) / "run")],
        r"words\.tar/run: the run's folder cannot be made there .*--out",
    ),
    "one held-out picture": (
        lambda t, s: ["train", "--data", str(s / "train.tar"), "--val", str(_one_picture(t)), *TINY],
        r"one\.tar'?: 1 valid picture or none, R2 needs at least 2",
    ),
    "quarantine in no folder": (
        lambda t, s: ["index", str(s / "train.tar"), "--quarantine", str(t / "none" / "bad.jsonl")],
        "there is no folder .*none; make it",
    ),
    "key of no sample": (
        lambda t, s: ["show", str(s / "train.tar"), "train01"],
        "no sample has the key 'train01'; the nearest keys are train0",
    ),
    "picture into no folder": (
        lambda t, s: ["show", str(s / "train.tar"), "3", "--out", str(t / "none" / "a.png")],
        "there is no folder .*none; make it",
    ),
    "replay of nothing": (lambda t, s: ["replay", str(t / "typo"), "--update", "3"], r"typo: holds no settings\.yaml"),
    "replay of no update": (lambda t, s: ["replay", str(t / "typo")], r"typo: which update\? e\.g\. --update 1"),
    "no settings file": (lambda t, s: ["train", "--config", str(t / "none.yaml")], r"none\.yaml: no settings file \(.*settings\.yaml"),
    "folder as a settings file": (lambda t, s: ["train", "--config", str(t)], r": no settings file \(.*settings\.yaml"),
    "settings file of something else": (lambda t, s: ["train", "--config", str(_not_a_tar(t))], "words.tar"),
    "resume without out": (lambda t, s: ["train", "--data", str(s / "train.tar"), *TINY, "--resume"], "--out"),
    "another recipe than the run's": (
        lambda t, s: ["train", "imagenette_sp", "--resume", "--out", str(_folder_with_another_run(t))],
        "is of recipe 'demo'",
    ),
}


ERRORS_OF_THE_PARSER = {
    "unknown command",
    "unknown bench",
    "unknown option",
    "value of another type",
    "choice that is none",
    "objective that is none",
    "setting that an objective lacks",
    "objective that is switched on by a value",
}


def files_in(folder: Path) -> list[Path]:
    """Return all that lies in a folder, but caches and the indexes of shards, which are whole and of use."""
    return sorted(path for path in folder.rglob("*") if "cache" not in path.parts and ".wherefrom" not in path.parts)


@pytest.mark.core
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_leaves_nothing_behind(
    case: str, tiny_shards: Path, tmp_path: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = BAD[case]
    arguments = words(tmp_path, tiny_shards)
    before = files_in(tmp_path)
    code = exit_code_of(arguments)
    printed = capsys.readouterr().err
    assert code == 2
    assert re.search(message, re.sub(r"\s*│\s*", " ", printed))  # the parser puts its own in a box
    assert "Traceback" not in printed
    if case not in ERRORS_OF_THE_PARSER:
        assert printed.startswith("wherefrom: ")
        assert printed.count("\n") == 1
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_under_torchrun_the_one_line_is_said_once_and_stands_in_the_summary_of_every_rank(
    rank: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", rank)
    before = int(time.time())
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    failure = ProcessFailure(local_rank=int(rank), pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message.startswith("wherefrom: ")
    assert "none.yaml" in failure.message
    assert failure.timestamp >= before  # the summary calls the earliest failure the cause
    assert capsys.readouterr().err == f"{failure.message}\n" * lines


def test_a_whole_run_by_the_command_line(tiny_shards: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = ["--data", str(tiny_shards / "train.tar"), "--val", str(tiny_shards / "val.tar")]
    assert exit_code_of(["train", *shards, *TINY, "--optim.lr", "2e-3"]) == 0
    printed = capsys.readouterr().out
    folder = elsewhere / "runs" / "demo-0"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"settings.yaml", "metrics.jsonl", "views.png", "curves.png", "evaluation.json", "encoder.safetensors", "encoder"}
    for picture in ("views.png", "curves.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    # lines for grep, the share of time for data and for writing, the table with its controls
    assert (
        len(re.findall(r"^update=\d+/4 epoch=.* loss=[\d.]+ spatial/position=.* lr=.* pictures/s=.* waiting=.* left=", printed, re.M)) == 2
    )
    assert re.search(r"waiting for data [\d.]+%, logging and checkpoints [\d.]+%", printed)
    changed = "view_size_px 24, patch_size_px 12, width 32, depth 1, heads 2"
    assert re.search(rf"^encoder: vit_small_patch16_224 \({changed}\), 0\.0[23] million parameters$", printed, re.M)
    assert all(row in printed for row in ("held-out pairs", "targets of the next picture", "pairs across pictures", "additive head"))
    assert yaml.safe_load((folder / "settings.yaml").read_text())["optim"]["lr"] == 2e-3
    start = read_metrics(RunFolder(folder))[0]
    assert (start["kind"], start["threads"], start["omp_wait_policy"]) == ("start", torch.get_num_threads(), "PASSIVE")

    # the resolved settings give the run back; beside them the command line still changes what it says
    assert exit_code_of(["train", "--config", str(folder / "settings.yaml"), "--out", "again", "--runtime.keep", "1"]) == 0
    again = yaml.safe_load((elsewhere / "again" / "settings.yaml").read_text())
    assert again.pop("runtime")["keep"] == 1
    first = yaml.safe_load((folder / "settings.yaml").read_text())
    del first["runtime"]
    assert again == first
    losses = [re.findall(r'"loss": ([\d.]+)', (path / "metrics.jsonl").read_text()) for path in (folder, elsewhere / "again")]
    assert losses[0] == losses[1] != []

    # a checkpoint that does not fit is refused by the field
    capsys.readouterr()
    assert exit_code_of(["train", "--resume", "--out", "again", "--optim.lr", "1e-3"]) == 2
    assert "optim.lr=0.001: the run to go on with has 0.002" in capsys.readouterr().err
    # what is finished is only measured and written again
    assert exit_code_of(["train", "--resume", "--out", "again"]) == 0
    assert "goes on at update 4 of 4" in capsys.readouterr().out


WAITS = """
import os, sys, types
from wherefrom.tools import cli

def module(name):
    def train_command(words):
        print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
        return 0

    return types.SimpleNamespace(train_command=train_command)

cli.importlib.import_module = module
cli.main(["train"])
"""


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, ["None", "2000"]), ({"GOMP_SPINCOUNT": "7"}, ["None", "7"]), ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"])],
)
def test_training_lets_openmp_spin_briefly_and_says_so_before_torch_loads_it(own: dict[str, str], expected: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | own
    done = subprocess.run([sys.executable, "-c", WAITS], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*expected, "False"]


@pytest.mark.core
def test_a_loss_that_breaks_ends_the_run_with_one_line_and_exit_code_1(
    tiny_shards: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(["train", "--data", str(tiny_shards / "train.tar"), *TINY, "--optim.lr", "1e37"]) == 1
    printed = capsys.readouterr().err
    assert re.fullmatch(r"wherefrom: update 2: spatial/position is (nan|inf).* on rank 0, samples \d+.*\n", printed)
    assert not (elsewhere / "runs" / "demo-0" / "checkpoints").exists()


@pytest.mark.core
def test_asking_for_nothing_or_for_a_group_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, names in (
        ([], 2, list(COMMANDS)),
        (["bench"], 2, ["bench loader", "bench kernels"]),
        (["bench", "--help"], 0, ["bench loader", "bench kernels"]),
        (["bench", "-h"], 0, ["bench loader", "bench kernels"]),
    ):
        assert exit_code_of(words) == code
        printed = capsys.readouterr()
        assert [name for name in COMMANDS if f"\n  {name} " in printed.out] == names
        assert printed.err == ""


DEMO_SP = recipe("demo").objectives["spatial"]

FINAL: dict[str, tuple[str, list[str], dict[str, object]]] = {  # a file beside, words, the run's settings
    "a file's data, held-out pictures of the command line": ("data: x.tar", ["--val", "y.tar"], {"data": "x.tar", "val": "y.tar"}),
    "the other way round": ("val: y.tar", ["--data", "x.tar"], {"data": "x.tar", "val": "y.tar"}),
    "a file that only fits with the command line": ("{seed: 3, optim: {lr: 1.0, final_lr: 2.0}}", ["--optim.final-lr", "0"], {"seed": 3}),
    "another model and what it lacks, of a recipe": (
        "{recipe: imagenet_sp_vits16, data: x.tar}",
        ["--model.name", "resnet50", "--model.view-size-px", "None"],
        {"model": ModelSettings(name="resnet50", drop_path=0.1)},
    ),
    "a convolutional network on the demo": ("{}", ["--model.name", "resnet18"], {"model": ModelSettings(name="resnet18")}),
    "another ViT on the demo": (
        "{}",
        ["--model.name", "vit_base_patch16_224", "--spatial.size-px", "64"],
        {"model": ModelSettings(name="vit_base_patch16_224", view_size_px=64)},
    ),
    "another ViT, and some of its shape": (
        "{}",
        ["--model.name", "vit_base_patch16_224", "--model.view_size_px=32", "--model.depth", "4"],  # the recipe's depth, said
        {"model": ModelSettings(name="vit_base_patch16_224", view_size_px=32, depth=4)},
    ),
    "another model than the file's": (
        "model: {name: vit_tiny_patch16_224, depth: 3}",
        ["--model.name", "vit_base_patch16_224"],
        {"model": ModelSettings(name="vit_base_patch16_224", view_size_px=48)},
    ),
    "a flag that the recipe has on": (
        "{recipe: imagenet_sp_vits16, data: x.tar}",
        ["--spatial.no-both-orders"],
        {"objectives": {"spatial": replace(recipe("imagenet_sp_vits16").objectives["spatial"], both_orders=False)}},
    ),
    "an objective that the file adds": (
        "{recipe: sp_dense, spatial: {views: 2}}",
        ["--spatial.size-px", "48"],
        {"objectives": {"dense": recipe("sp_dense").objectives["dense"], "spatial": SpatialSettings(views=2, size_px=48)}},
    ),
    "an objective that the command line adds": (
        "recipe: sp_dense",
        ["--spatial.views", "9", "--spatial.law", "grid", "--spatial.turns"],
        {"objectives": recipe("sp_dense").with_objectives(spatial=SpatialSettings(views=9, law=Grid(), turns=True)).objectives},
    ),
    "an objective by its name alone": (
        "recipe: sp_dense",
        ["--spatial"],
        {"objectives": recipe("sp_dense").with_objectives(spatial=SpatialSettings()).objectives},
    ),
    "an objective that is there already, by its name": ("recipe: demo", ["--spatial"], {"objectives": recipe("demo").objectives}),
    "an objective that the file leaves out": (
        "{recipe: demo, spatial: null}",
        ["--dense.weight", "1"],
        {"objectives": {"dense": DenseSpatialSettings(weight=1.0)}},
    ),
    "objectives that a file lists": (
        "objectives: {dense: {regions: 5}, spatial: {}}",
        [],
        {"objectives": {"dense": DenseSpatialSettings(regions=5), "spatial": DEMO_SP}},
    ),
    "another law, and some of its numbers": (
        "{}",
        ["--spatial.law", "paired", "--spatial.law.position-max", "1.2", "--spatial.law.side-frac", "0.1", "0.3"],
        {"objectives": {"spatial": replace(DEMO_SP, law=Paired(position_max=1.2, side_frac=(0.1, 0.3)))}},
    ),
    "the recipe's law, named": (
        "{}",
        ["--spatial.law=disjoint", "--spatial.law.tries=3"],
        {"objectives": {"spatial": replace(DEMO_SP, law=replace(DEMO_SP.law, tries=3))}},
    ),
    "a law of the file": (
        "spatial: {law: {name: grid, cols: 2}}",
        ["--spatial.law.rows", "2", "--spatial.law.side-frac", "0.3"],
        {"objectives": {"spatial": replace(DEMO_SP, law=Grid(rows=2, cols=2, side_frac=0.3))}},
    ),
    "a law that only fits with the command line": (
        "spatial: {law: {name: paired, side_frac: [0.1, 0.47]}}",
        ["--spatial.law.position-max", "0.6"],
        {"objectives": {"spatial": replace(DEMO_SP, law=Paired(position_max=0.6, side_frac=(0.1, 0.47)))}},
    ),
    "epochs over a recipe's updates": ("{}", ["--epochs", "3"], {"epochs": 3, "updates": None}),
    "a file's epochs over a recipe's updates": ("epochs: 3", [], {"epochs": 3, "updates": None}),
    "updates over a file's epochs": ("epochs: 3", ["--updates", "5"], {"updates": 5}),
    "a whole file, which has both": ("{epochs: 3, updates: 5}", [], {"updates": 5}),
    "epochs over a whole file's updates": ("{epochs: 1, updates: 5}", ["--epochs", "3"], {"epochs": 3, "updates": None}),
    "a law without all defaults": (
        "{}",
        ["--spatial.law", "overlapping", "--spatial.law.of", "spatial"],
        {"objectives": {"spatial": replace(DEMO_SP, law=Overlapping(of="spatial"))}},
    ),
}


@pytest.mark.core
@pytest.mark.parametrize("case", FINAL)
def test_only_the_final_result_is_checked_and_no_stage_on_the_way(
    case: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words, expected = FINAL[case]
    runs = []

    def run(settings: TrainSettings, **_: object) -> Summary:
        runs.append(settings)
        return Summary(folder=elsewhere, update=0, updates=0, stopped_by=None, seconds={}, images_per_s=0.0)

    monkeypatch.setattr(training, "run", run)
    (elsewhere / "some.yaml").write_text(text)
    (elsewhere / "run").mkdir()
    (elsewhere / "run" / "settings.yaml").write_text(text)
    for start in (["--config", "some.yaml"], ["--resume", "--out", "run"]):
        assert exit_code_of(["train", *start, *words]) == 0, capsys.readouterr().err
    for settings in runs:
        assert type(settings) is TrainSettings
        assert {name: getattr(settings, name) for name in expected} == expected
        if "objectives" in expected:
            assert list(settings.objectives) == list(expected["objectives"])
    assert runs[0] == runs[1]


@pytest.mark.core
def test_help_shows_the_options_of_the_recipes_law_and_what_others_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for words, option, other in (
        (["train"], "min-gap-frac", "position-max"),
        (["train", "--spatial.law", "paired"], "position-max", "min-gap-frac"),
    ):
        assert exit_code_of([*words, "--help"]) == 0
        said = " ".join(re.sub(r"[│\n]", " ", capsys.readouterr().out).split())
        assert f"--spatial.law.{option} " in said and f"--spatial.law.{other} " not in said
        assert f"--spatial.law NAME one of {', '.join(LAWS)}" in said


@pytest.mark.core
@pytest.mark.parametrize("words", [["sp_dense", "--help"], ["--help", "sp_dense"], ["-h", "sp_dense", "--spatial"]])
def test_help_shows_the_options_of_a_recipe_and_of_the_objectives_beside_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(["train", *words]) == 0
    said = " ".join(re.sub(r"[│\n]", " ", capsys.readouterr().out).split())
    assert "--dense.regions INT" in said and "(default: 1500)" in said  # updates of the recipe
    assert ("--spatial.views" in said) == ("--spatial" in words)


@pytest.mark.core
def test_recipes_are_listed_with_a_line_each(install: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs.py").write_text(
        "from wherefrom.train import recipe\n\ndef mine():\n    'A run of theirs.\\n\\nMore.'\n    return recipe('demo')\n"
    )
    install("their-runs", {"wherefrom.recipes": {"mine": "theirs:mine", "lost": "nowhere:lost"}}, version="0.3", modules=tmp_path)
    assert exit_code_of(["recipes"]) == 0
    lines = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == list(RECIPES)
    assert lines["mine"] == "A run of theirs. (their-runs 0.3)"
    assert lines["lost"].startswith("recipe 'lost' of their-runs 0.3 cannot be imported: ")
    assert lines["demo"] == "Six disjoint views of drawn scenes, all pairs, a small ViT: minutes on two cores."


@pytest.mark.core
def test_a_run_of_0_1_0_is_not_gone_on_with_and_its_settings_begin_another(
    tiny_shards: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(elsewhere / "old")
    saved = folder.checkpoints / "update-00000500"
    saved.mkdir(parents=True)
    settings = Path(__file__).parent / "data" / "settings_0_1" / "demo.yaml"
    folder.settings.write_text(settings.read_text())
    (folder.checkpoints / "latest").write_text(saved.name + "\n")
    (saved / "state.json").write_text('{"format": 2, "crc32": {}, "update": 500}')
    before = files_in(elsewhere)
    assert exit_code_of(["train", "--resume", "--out", "old"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(
        r"state\.json: was written by wherefrom 0\.1\.0, .*; go on with the version that wrote it, or begin anew by --config", said
    )
    assert files_in(elsewhere) == before


RECORD = LogRecord(
    update=20,
    updates=100,
    epoch=0.5,
    loss=1.25,
    losses={"spatial/position": 1.0},
    meters={},
    gradients={},
    lr=1e-3,
    images_per_s=80.0,
    waiting_frac=0.012,
    seconds_left=185,
)


@pytest.mark.core
def test_where_nobody_watches_a_logging_step_is_one_line() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    terminal.logged(RECORD)
    terminal.progressed("indexing", 1, 1000)  # short work says nothing
    terminal.closed()
    assert stream.getvalue() == line(RECORD) + "\n"
    assert line(RECORD) == (
        "update=20/100 epoch=0.50 loss=1.2500 spatial/position=1.0000 lr=1.00e-03 pictures/s=80.0 waiting=1.2% left=3m05s"
    )


@pytest.mark.core
def test_on_a_terminal_a_panel_shows_the_same_and_goes_away() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream, live=True)
    for done in (1, 2):
        terminal.progressed("indexing", done, 2)
    terminal.logged(RECORD)
    terminal.logged(RECORD)
    terminal.message("a line above it")
    terminal.closed()
    terminal.closed()
    assert "a line above it" in stream.getvalue()


@pytest.mark.parametrize(("update", "point"), [(4, "update 4 of 6, saved"), (6, "update 6, the last, before all was measured, saved")])
def test_a_stopped_run_says_what_is_kept_and_how_to_go_on(update: int, point: str) -> None:
    stream = io.StringIO()
    seconds = dict.fromkeys(("training", "waiting", "writing", "evaluating"), 1.0)
    run = Summary(folder=Path("runs/demo-0"), update=update, updates=6, stopped_by="SIGINT", seconds=seconds, images_per_s=1.0)
    Terminal(stream, live=False).finished(run)
    assert f"stopped by SIGINT after {point}; go on with: wherefrom train --resume --out runs/demo-0" in stream.getvalue()


@pytest.mark.core
def test_times_are_easy_to_read() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 185, 7620)] == ["0s", "59s", "3m05s", "2h07m"]
