"""The comparison with lightly: who judges, that equal batches give equal losses, that a planted difference is seen.

The judge is compared with a loop over pictures in float64 that deletes each one before it looks for neighbors. What needs lightly is
skipped, and says so, where it is not installed.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wherefrom.pipeline import ShardIndex, ViewRecipe
from wherefrom.tools.against_lightly.command import main
from wherefrom.tools.against_lightly.judge import judge, random_encoder, ridge_of_the_others
from wherefrom.train import ModelSettings, TrainSettings
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.labels import leave_one_out, nearest_neighbors, ridge_probe
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.export import write_encoder
from wherefrom.train.objective import united_families
from wherefrom.train.objectives import MAESettings
from wherefrom.train.run_folder import RunFolder
from wherefrom.train.settings import write_settings

TINY = ModelSettings(name="vit_tiny_patch16_224", view_size_px=32, patch_size_px=8, width=16, depth=1, heads=2)


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
