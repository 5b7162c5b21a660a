"""The comparison with lightly: who judges, that equal batches give equal losses, that a planted difference is seen.

The judge is compared with a loop over pictures in float64 that deletes each one before it looks for neighbors. What needs lightly is
skipped, and says so, where it is not installed.
"""

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_runs import trainer_of
from numpy.typing import NDArray

from wherefrom.pipeline import ShardIndex, ViewRecipe
from wherefrom.tools.against_lightly import own_loaders
from wherefrom.tools.against_lightly.command import main
from wherefrom.tools.against_lightly.judge import judge, random_encoder, ridge_of_the_others
from wherefrom.tools.against_lightly.same_batches import common_settings, same_batches
from wherefrom.tools.against_lightly.theirs import METHODS, Method, refuse_without_lightly
from wherefrom.train import ModelSettings, TrainSettings
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.labels import leave_one_out, nearest_neighbors, ridge_probe
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.export import write_encoder
from wherefrom.train.objective import united_families
from wherefrom.train.objectives import DINOSettings, MAESettings, SimCLRSettings
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.settings import write_settings

TINY = ModelSettings(name="vit_tiny_patch16_224", view_size_px=32, patch_size_px=8, width=16, depth=1, heads=2)


def write_folder(folder: Path, jpeg_bytes: Callable[..., bytes], *, classes: int, pictures: int) -> Path:
    """Write a folder of small pictures with a folder a class."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(pictures):
            (folder / f"class{label}" / f"{number}.jpg").write_bytes(jpeg_bytes(rng.integers(0, 256, (64, 80, 3), np.uint8)))
    return folder


def crowd(count: int, classes: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features in clouds around a mean a class, and labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    features = rng.normal(size=(classes, 6))[labels] + noise * rng.normal(size=(count, 6))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def one_by_one(features: NDArray[np.float64], labels: NDArray[np.int64], *, k: int, temperature: float, delete: bool) -> list[int]:
    """Vote for every picture, among all of them but itself if it is deleted."""
    predicted = []
    for number, feature in enumerate(features):
        others = np.delete(np.arange(len(features)), number) if delete else np.arange(len(features))
        cosines = features[others] @ feature / np.linalg.norm(features[others], axis=1) / np.linalg.norm(feature)
        nearest = np.argsort(-cosines)[:k]
        votes = np.zeros(labels.max() + 1)
        for cosine, label in zip(cosines[nearest], labels[others][nearest], strict=True):
            votes[label] += np.exp(cosine / temperature)
        predicted.append(int(votes.argmax()))
    return predicted


@pytest.mark.core
def test_leaving_one_out_is_deleting_it() -> None:
    features, labels = crowd(1100, 5, noise=1.0)  # more than are looked up at once
    arrays = features.double().numpy(), labels.numpy()
    predicted = leave_one_out(features, labels, classes=5, k=7, temperature=0.1)
    assert predicted.tolist() == one_by_one(*arrays, k=7, temperature=0.1, delete=True)
    kept = one_by_one(*arrays, k=7, temperature=0.1, delete=False)
    assert (torch.tensor(kept) != predicted).float().mean() > 0.1  # else a picture that votes for itself would go unseen
    assert nearest_neighbors(features, labels, features, classes=5, k=7, temperature=0.1).tolist() == kept


@pytest.mark.core
def test_a_picture_never_votes_for_itself_even_where_all_are_neighbors() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1]])
    assert leave_one_out(features, torch.tensor([0, 1, 1]), classes=2, k=20).tolist()[0] == 1
    assert leave_one_out(features[:2], torch.tensor([0, 1]), classes=2).tolist() == [1, 0]


@pytest.mark.core
def test_ridge_regression_is_fitted_to_the_others() -> None:
    _, labels = crowd(200, 4, noise=1.0)
    identity = torch.eye(200)  # tells each picture from all others, and nothing about these
    assert (ridge_of_the_others(identity, labels, classes=4) == labels).float().mean() < 0.4
    assert (ridge_probe(identity, labels, identity, classes=4) == labels).float().mean() > 0.9  # asked about what it has learned
    features, labels = crowd(200, 4, noise=0.2)
    assert (ridge_of_the_others(features, labels, classes=4) == labels).float().mean() > 0.95


def test_folders_of_runs_are_judged_with_what_they_started_from(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TrainSettings(recipe="mine", model=TINY, objectives={"mae": MAESettings(size_px=32, decoder_width=16, decoder_heads=2)})
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    data = [str(tiny_shards / "train.tar"), str(tiny_shards / "val.tar")]
    with ShardPictures(ShardIndex.open(data)) as pictures:
        torch.manual_seed(1)
        encoder = Encoder(TINY)
        expected = judge(encoder, pictures, picture_px=32)
        started = judge(random_encoder(settings), pictures, picture_px=32)
    assert set(expected) == {f"{part} token {asked}" for part in ("class", "mean") for asked in ("knn", "ridge")}
    write_settings(run.settings, settings)
    write_encoder(run, encoder, ViewRecipe(families=united_families(settings.make_objectives())), settings=settings, data="")
    assert main(["judge", str(run.path), "--data", *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(": ")[-1].split("  ")[0]: line.split()[-4:] for line in lines}
    names = ["class token knn", "class token ridge", "mean token knn", "mean token ridge"]
    assert rows["encoder"] == [f"{expected[name]:.3f}" for name in names]
    assert rows["random encoder"] == [f"{started[name]:.3f}" for name in names]
    assert lines[-1] == "56 pictures; loo-knn20-cosine-t0.07 / ridge-5fold, center0.875 @1"


HOSTS = {
    "simclr": SimCLRSettings(size_px=32, hidden=16, out=8, layers=2, init_std=None, weight=0.5),
    "dino": DINOSettings(
        size_px=32,
        local_px=16,
        local_views=2,
        prototypes=32,
        hidden=16,
        bottleneck=8,
        first_teacher_temperature=0.04,
        teacher_temperature=0.07,
        teacher_temperature_epochs=2,
    ),
    "mae": MAESettings(size_px=32, decoder_width=16, decoder_depth=1, decoder_heads=2),
}


def settings_of(method: Method, data: Path) -> TrainSettings:
    """A run of few small updates, six epochs of two each: prototypes rest in the first."""
    model = replace(TINY, positions="sincos" if method == "mae" else "learned")
    optim = replace(common_settings(method).optim, lr=1e-4)
    settings = replace(common_settings(method), data=str(data), updates=12, global_batch=16, model=model, optim=optim)
    return replace(settings, objectives={method: HOSTS[method]})


@pytest.fixture
def lightly() -> None:
    try:
        refuse_without_lightly()
    except ValueError as missing:
        pytest.skip(str(missing))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch announces the end of the weight normalization that lightly's DINO has
@pytest.mark.usefixtures("lightly")
@pytest.mark.parametrize("method", METHODS)
def test_equal_weights_and_batches_give_equal_losses_and_a_planted_difference_is_seen(method: Method, tiny_shards: Path) -> None:
    data = tiny_shards / "train.tar"
    result = same_batches(settings_of(method, data), ShardIndex.open(str(data)), updates=6, float64=True)
    assert len(result.ours) == 6 and result.difference < 1e-5 and result.agrees
    assert result.planted_difference > 1e-3
    assert abs(result.ours[0] - result.ours[-1]) > 1e-4  # something is learned


@pytest.mark.usefixtures("lightly")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_of_either_side_is_made_once_and_reported(
    tmp_path: Path, jpeg_bytes: Callable[..., bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "pictures", jpeg_bytes, classes=2, pictures=6)
    monkeypatch.setattr(own_loaders, "common_settings", lambda method: settings_of(method, folder))
    words = ["own-loaders", str(folder), "--only", "mae", "--seed", "0", "--updates", "3", "--batch", "4", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 0
    assert capsys.readouterr().out.count("is there") == 2
    held = json.loads((tmp_path / "out" / "mae-theirs-0.json").read_text())
    assert len(held["losses"]) == 1 and set(held["scores"]) >= {"class token knn"} and str(tmp_path) not in json.dumps(held)
    main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "losses.svg")])
    assert "<svg" in (tmp_path / "losses.svg").read_text()


def run_of(side: str, seed: int, score: float) -> dict[str, Any]:
    named = {"method": "dino", "side": side, "seed": seed, "updates": 20}
    judged = {"protocol": "p", "network": "teacher"}
    scores = {"class token knn": score, "mean token knn": 0.5}
    return {
        "run": named,
        "losses": [2.0, 1.0],
        "log_every": 10,
        "scores": scores,
        "judged": judged,
        "machine": {"cpu": "c", "versions": {}},
    }


@pytest.mark.core
@pytest.mark.parametrize(("theirs", "code", "word"), [((0.30, 0.36), 0, "agrees"), ((0.30, 0.33), 1, "DIFFERS")])
def test_means_over_common_seeds_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], theirs: tuple[float, float], code: int, word: str
) -> None:
    runs = [run_of("ours", seed, score) for seed, score in enumerate((0.35, 0.37, 0.9))]  # the third has no counterpart
    runs += [run_of("theirs", seed, score) for seed, score in enumerate(theirs)]
    for number, each in enumerate(runs):
        (tmp_path / f"{number}.json").write_text(json.dumps(each))
    assert main(["report", str(tmp_path)]) == code
    printed = capsys.readouterr().out
    assert f"{word} dino: class token knn, means of 2 seeds" in printed
    assert f"0.360  {sum(theirs) / 2:.3f}" in printed


@pytest.mark.core
def test_without_lightly_one_line_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert main(["same-batches", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "pip install --no-deps lightly==1.6.0 lightning-utilities" in line
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no runs" in capsys.readouterr().err


@pytest.mark.core
def test_the_random_encoder_is_the_one_that_a_run_starts_with(tiny_shards: Path) -> None:
    settings = settings_of("mae", tiny_shards / "train.tar")
    with trainer_of(settings) as trainer:
        state = trainer.step.encoder.state_dict()
    random = random_encoder(settings).state_dict()
    assert all(torch.equal(random[name], tensor) for name, tensor in state.items())
    other = random_encoder(replace(settings, seed=1)).state_dict()
    assert not torch.equal(other["model.cls_token"], state["model.cls_token"])
