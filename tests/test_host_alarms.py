"""What every host says of a collapse, and of settings that it cannot be run with: one line each, before the first update."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import METHODS, RESNET, host_of, method_run
from torch import Tensor

from wherefrom.train import Encoder, MAESettings, MoCoV3Settings, Reporter, TrainSettings, run
from wherefrom.train.run_folder import RunFolder, read_metrics
from wherefrom.train.trainer import Trainer

PLUGINS = {"spatial", "dense"}
HOSTS = [name for name in METHODS if name not in PLUGINS]


class _Lines(Reporter):
    """A reporter that keeps its messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, line: str) -> None:
        self.lines.append(line)


# Collapse


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """A list whose one number, once it is there, is how far the features of all encoders are from all being alike."""
    planted: list[float | None] = [None]
    encode = Encoder.forward

    def forward(self: Encoder, pixels: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        summary, tokens, prefix = encode(self, pixels, **options)
        if planted[0] is not None:
            alike = 1 + planted[0] * torch.randn_like(summary)
            summary, tokens = 0 * summary + alike, 0 * tokens + alike.view(-1, *[1] * (tokens.ndim - 2), tokens.shape[-1])
        return summary, tokens, prefix

    monkeypatch.setattr(Encoder, "forward", forward)
    return planted


@pytest.mark.core
@pytest.mark.parametrize("name", HOSTS)
def test_a_collapse_is_said_at_the_next_line_of_the_log(
    name: str, noise: list[float | None], tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a window that it began in: its mean of feature_std would not show it."""
    settings = method_run(name, tiny_shards, updates=6, log_every=2)
    update, reporter = Trainer.update, _Lines()
    planted_at = {3: 0.3, 5: 1e-3}  # the fourth update, the sixth

    def update_once_planted(self: Trainer) -> None:
        noise[0] = planted_at.get(self.done, noise[0])
        update(self)

    monkeypatch.setattr(Trainer, "update", update_once_planted)
    run(settings, reporter=reporter, out=tmp_path / "run")
    host = host_of(name)
    (said,) = [line for line in reporter.lines if "collapsed" in line]
    alarm, alike_to = said.rsplit(" ", 1)
    assert alarm == f"{host}: features have collapsed at update 6, they are alike to" and 5e-4 < float(alike_to) < 2e-3
    meters = [line["meters"] for line in read_metrics(RunFolder(tmp_path / "run"), "train")]
    assert all({f"{host}/feature_std", f"{host}/feature_rank"} <= set(line) for line in meters)
    assert meters[-1][f"{host}/feature_std"] > 0.1
    assert (f"{host}/teacher_entropy" in meters[0]) == (host == "dino")


# Bad input

ALONE = {
    "simclr": "there are no others to tell it from",
    "byol": "BatchNorm has nothing to compare it with",
    "moco_v3": "there are no others to tell it from",
    "barlow": "nothing correlates",
    "vicreg": "it has no variance",
    "dino with BatchNorm": "BatchNorm has nothing to compare it with",
}


def refused(settings: TrainSettings, out: Path) -> str:
    """Return the one line with which a run is refused before anything is written."""
    with pytest.raises(ValueError, match=r".") as complaint:
        run(settings, reporter=Reporter(), out=out)
    assert not out.exists()
    message = str(complaint.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ALONE)
def test_a_picture_alone_is_refused_where_samples_see_one_another(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    told = f"objective {host_of(name)!r} with a single picture at a time: {ALONE[name]}; raise global_batch, or lower accumulation"
    for changes in ({"global_batch": 1}, {"global_batch": 4, "accumulation": 4}):
        assert refused(method_run(name, tiny_shards, **changes), tmp_path / "run") == told
    run(method_run(name, tiny_shards, global_batch=2, updates=1), reporter=Reporter(), out=tmp_path / "two")  # control


@pytest.mark.parametrize("name", ["mae", "dino", "gtsa"])
def test_a_picture_alone_is_enough_where_samples_do_not_see_one_another(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    run(method_run(name, tiny_shards, global_batch=1, updates=1), reporter=Reporter(), out=tmp_path / "run")


NOT_DIVIDED = "views are ({0}, {0}) px, patches (6, 6): patches must divide a view, e.g. {1} px"
WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {  # a row, changes of the run and of the objective, what is said
    "a ConvNet under MAE": ("mae", {"model": RESNET}, {}, "objective 'mae' with model 'test_resnet': patches are masked; take a ViT"),
    "patches that do not divide MAE's view": (
        "mae",
        {},
        {"size_px": 25},
        "objective 'mae': views of 25 px are not divided by patches of (6, 6) px; take e.g. mae.size_px=24",
    ),
    "patches that do not divide global views": ("dino", {}, {"size_px": 26}, NOT_DIVIDED.format(26, 24)),
    "patches that do not divide local views": ("dino", {}, {"local_px": 13}, NOT_DIVIDED.format(13, 12)),
    "patches that do not divide both views": ("moco_v3", {}, {"size_px": 35}, NOT_DIVIDED.format(35, 30)),
    "views smaller than a patch": ("dino", {}, {"local_px": 4}, NOT_DIVIDED.format(4, 6)),
    "a mask that keeps no patch": (
        "mae",
        {},
        {"mask_ratio": 0.95},
        "mask_ratio=0.95 of 16 patches keeps 0: some must be kept and some masked; change it, or take smaller patches",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_host_cannot_learn_from_is_refused_in_one_line(case: str, tiny_shards: Path, tmp_path: Path) -> None:
    name, of_run, of_host, told = WRONG[case]
    settings = method_run(name, tiny_shards, **of_run)
    changed: Any = replace(settings.objectives[name], **of_host)  # type: ignore[type-var]
    assert refused(settings.with_objectives(**{name: changed}), tmp_path / "run") == told


@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, -0.1, 1.5])
def test_a_mask_of_nothing_or_of_all_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"^mask_ratio={ratio}: needs 0 < mask_ratio < 1, e\.g\. 0\.75$"):
        MAESettings(mask_ratio=ratio)


@pytest.mark.core
@pytest.mark.parametrize("name", ["mae", "moco_v3"])
def test_a_plugin_that_changes_its_host_is_refused(name: str, tiny_shards: Path, tmp_path: Path) -> None:
    beside = method_run(name, tiny_shards)
    settings = replace(beside, objectives={"spatial": METHODS["spatial"].settings} | dict(beside.objectives))
    told = refused(settings, tmp_path / "run")
    assert re.fullmatch(
        rf"objective '{name}' changes the encoder's model\.\S+ in its setup: only the first objective, the host, may; name it first", told
    )
    own: Any = settings.objectives[name]
    kept = replace(own, start="timm" if isinstance(own, MoCoV3Settings) else "model")
    run(replace(settings, updates=1).with_objectives(**{name: kept}), reporter=Reporter(), out=tmp_path / "kept")  # control


@pytest.mark.core
def test_a_checkpoint_of_another_method_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    ours = method_run("byol", tiny_shards, updates=1)
    run(ours, reporter=Reporter(), out=tmp_path / "run")
    barlow = method_run("barlow", tiny_shards, updates=1)
    for other, told in (
        (barlow, "objectives=['barlow']: the run to go on with has ['byol']; take its value, or another --out"),
        (
            replace(barlow, recipe="imagenette_barlow"),
            "recipe='imagenette_barlow': the run to go on with has 'demo'; take its value, or another --out",
        ),
        (method_run("byol", tiny_shards, updates=1, seed=1), "seed=1: the run to go on with has 0; take its value, or another --out"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(told) + "$"):
            run(other, reporter=Reporter(), out=tmp_path / "run", resume=True)
    run(ours, reporter=Reporter(), out=tmp_path / "run", resume=True)  # control
