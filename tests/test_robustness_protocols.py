"""Protocols of robustness: pictures with patches dropped, ImageNet-C, and -R, -A and -Sketch in small folders of their layouts.

Truths: mCE by AugMix's own code (tests/data/evaluation/mce.json), and what bethgelab/game-of-noise measured of torchvision's ResNet-50:
accuracies, the corruption errors that belong to them and their mean, whose whole percents are those of arXiv 1903.12261, table 1.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_evaluation import FormulaPictures, scores_of, small_evaluation, tiny_network

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.train.evaluation.corruptions import ALEXNET_ERRORS, corruption_errors
from wherefrom.train.evaluation.features import CHANCE, ENCODER, RANDOM, RAW, Evaluation, Labeled
from wherefrom.train.evaluation.occlusion import blackened, salience
from wherefrom.train.evaluation.other_pictures import CORRUPTIONS, FrozenClassifier, class_names, other_pictures
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.protocols import PROTOCOLS, measure

FIGURES = Path(__file__).parent / "data" / "evaluation"
RESNET_50 = {  # accuracy, corruption error in percent: bethgelab/game-of-noise, commit 2989b43, Results/clean_results.txt
    "brightness": (0.6802, 56.64),
    "contrast": (0.3906, 71.43),
    "defocus_blur": (0.3875, 74.71),
    "elastic_transform": (0.4525, 84.75),
    "fog": (0.4583, 66.11),
    "frost": (0.3814, 74.84),
    "gaussian_noise": (0.2929, 79.77),
    "glass_blur": (0.2679, 88.61),
    "impulse_noise": (0.2381, 82.58),
    "jpeg_compression": (0.5341, 76.82),
    "motion_blur": (0.3867, 78.03),
    "pixelate": (0.4479, 76.92),
    "shot_noise": (0.2703, 81.58),
    "snow": (0.3253, 77.83),
    "zoom_blur": (0.3624, 79.86),
}
RESNET_50_MCE = 76.70  # there
COLORS = {"n01": (200, 40, 40), "n02": (40, 200, 40), "n03": (40, 40, 200), "n04": (128, 128, 128)}


def _others(names: tuple[str, ...] = ("snow", "fog"), **options: Any) -> dict[str, FormulaPictures]:
    return {f"imagenet-c/{name}/{severity}": FormulaPictures(66, **options) for name in names for severity in range(1, 6)} | {
        "imagenet-r": FormulaPictures(66, first=1, classes=2, **options)
    }


SHORT: dict[str, dict[str, Any]] = {"occlusion": {"percent": (50,), "pictures": 66}, "corruptions": {}, "variants": {}}


@pytest.mark.core
@pytest.mark.parametrize("name", list(SHORT))
def test_measured_twice_numbers_are_the_same(name: str) -> None:
    first, second = (scores_of(small_evaluation(others=_others()), name, **SHORT[name]) for _ in range(2))
    assert first == second
    assert {column for _, column in first} >= {ENCODER, RANDOM, RAW}


@pytest.mark.core
@pytest.mark.parametrize("permuted", [False, True])
def test_recognition_falls_to_chance_with_the_labels_of_other_pictures(permuted: bool) -> None:
    evaluation = small_evaluation(permuted=permuted, others=_others(("snow",), permuted=permuted))
    top1 = scores_of(evaluation, "occlusion", percent=(10,))
    assert top1["random, 10 %", ENCODER] < 0.45 if permuted else top1["random, 10 %", ENCODER] > 0.9
    errors = scores_of(evaluation, "corruptions")
    assert errors["clean error, %", ENCODER] > 55 if permuted else errors["clean error, %", ENCODER] < 10
    assert errors["CE snow, %", ENCODER] > 55 / 0.87 if permuted else errors["CE snow, %", ENCODER] < 12
    variants = scores_of(evaluation, "variants")
    assert 0.3 < variants["imagenet-r", ENCODER] < 0.7 if permuted else variants["imagenet-r", ENCODER] > 0.9
    assert variants["imagenet-r", CHANCE] == 0.5


@pytest.mark.core
def test_corruption_errors_are_those_that_were_published() -> None:
    found = corruption_errors({name: [accuracy] * 5 for name, (accuracy, _) in RESNET_50.items()})
    for name, (_, error) in RESNET_50.items():
        assert found[name] == pytest.approx(error, abs=0.011)  # accuracies have two decimals
    assert sorted(found) == sorted(CORRUPTIONS)
    assert sum(found.values()) / 15 == pytest.approx(RESNET_50_MCE, abs=0.011)
    assert found["glass_blur"] != pytest.approx(RESNET_50["frost"][1], abs=1)
    figures = json.loads((FIGURES / "mce.json").read_text())
    assert figures["corruptions"] == list(CORRUPTIONS) == list(ALEXNET_ERRORS)
    errors = corruption_errors({name: [0.75 - 0.02 * i - 0.04 * s for s in range(1, 6)] for i, name in enumerate(CORRUPTIONS)})
    assert sum(errors.values()) / 15 == pytest.approx(figures["mce"], rel=1e-9)


def test_nothing_is_measured_of_pictures_that_are_not_there() -> None:
    lacking = _others(("fog",))
    del lacking["imagenet-c/fog/3"]
    for others, expected in (
        ({}, {"corruptions": "there are no corrupted pictures (--others imagenet-c)"}),
        (lacking, {"corruptions": "imagenet-c/fog lacks severity 3, and AlexNet's error is of all five"}),
        ({"imagenet-a": FormulaPictures(8, first=9)}, {"variants": "imagenet-a shows no class of the training pictures"}),
    ):
        for name, reason in expected.items():
            (measured,) = measure(small_evaluation(others=others), {name: PROTOCOLS[name]()})
            assert measured.not_measured == reason


def test_sets_that_cannot_be_measured_leave_the_others() -> None:
    others = _others(("snow", "fog", "frost"))
    del others["imagenet-c/fog/3"]
    others |= {"imagenet-c/frost/5": FormulaPictures(8, first=9), "imagenet-a": FormulaPictures(8, first=9)}
    corruptions, variants = measure(small_evaluation(others=others), {name: PROTOCOLS[name]() for name in ("corruptions", "variants")})
    assert corruptions.notes == (
        "imagenet-c/fog lacks severity 3, and AlexNet's error is of all five",
        "imagenet-c/frost/5 shows no class of the training pictures",
    )
    assert {"CE snow, %", "mean CE of 1 corruptions, %"} <= {score.row for score in corruptions.scores}
    assert variants.notes == ("imagenet-a shows no class of the training pictures",)
    assert "imagenet-r" in {score.row for score in variants.scores}


def test_answers_are_restricted_to_the_classes_of_a_set() -> None:
    """Two of four classes: half of the pictures of another set are of classes that it lacks, and its others are left out and counted."""
    others = {"imagenet-a": FormulaPictures(60, first=2, classes=4)}  # 2 to 5, of which training pictures show 2 and 3
    values = scores_of(small_evaluation(others=others), "variants")
    assert values["imagenet-a: of other classes, left out", ENCODER] == 0.5
    assert values["imagenet-a", CHANCE] == 0.5
    assert ("imagenet-a: held-out, 2 classes", RAW) in values


@pytest.mark.core
@pytest.mark.parametrize("head", ["k-NN", "linear"])
def test_a_frozen_classifier_answers_among_the_classes_that_it_may(head: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    features = torch.eye(5)[labels] + 0.1 * torch.randn(200, 5, generator=generator)
    classifier = FrozenClassifier(
        Labeled(features={ENCODER: features}, labels=labels, ids=np.arange(200)), ENCODER, head=head, k=10, temperature=0.07
    )
    queries = torch.eye(5) + torch.tensor([0.0, 0.3, 0.0, 0.0, 0.4])  # of the first: 4 is next, then 1
    assert classifier.tell(queries).tolist() == [0, 1, 2, 3, 4]
    assert classifier.tell(queries, torch.tensor([1, 3])).tolist() == [1, 1, 1, 3, 1]
    shuffled = Labeled(features={ENCODER: features}, labels=labels[torch.randperm(200, generator=generator)], ids=np.arange(200))
    told = FrozenClassifier(shuffled, ENCODER, head=head, k=10, temperature=0.07).tell(features)
    assert (told == labels).double().mean() < 0.4  # 0.2 is chance


@pytest.mark.core
def test_the_cells_that_are_not_kept_are_black_and_no_others() -> None:
    pixels = torch.randn(2, 1, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[0, 5], [2, 3]])
    black = blackened(pixels, kept, (3, 2), [-1.0, -2.0, -3.0])
    assert torch.equal(black[0, 0, :, :4, :4], pixels[0, 0, :, :4, :4]) and torch.equal(black[0, 0, :, 8:, 4:], pixels[0, 0, :, 8:, 4:])
    assert torch.equal(black[1, 0, :, 4:8], pixels[1, 0, :, 4:8])
    assert (black == torch.tensor([-1.0, -2.0, -3.0]).view(3, 1, 1)).all(2).sum() == 2 * 4 * 16


def test_salience_is_likeness_to_the_summary() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 3.0]]])
    assert salience(tokens, torch.tensor([[5.0, 0.0]]))[0].tolist() == pytest.approx([1, 0, -1, 0.5**0.5])


def test_a_network_that_nothing_is_dropped_for_tells_what_it_tells_of_whole_pictures() -> None:
    evaluation = small_evaluation()
    occlusion, knn = scores_of(evaluation, "occlusion", percent=(0, 90)), scores_of(evaluation, "knn", k=(20,))
    assert occlusion["nothing dropped", ENCODER] == occlusion["random, 0 %", ENCODER] == knn["class token, k 20", ENCODER]


@pytest.fixture
def folders(tmp_path: Path, jpeg_bytes: Callable[..., bytes]) -> Path:
    """train/CLASS, imagenet-r/CLASS, and ImageNet-C's snow and, in a folder of its kind, gaussian_noise."""
    rng = np.random.default_rng(0)

    def write(folder: Path, classes: tuple[str, ...], number: int) -> None:
        for name in classes:
            (folder / name).mkdir(parents=True)
            for picture in range(number):
                array = np.clip(np.array(COLORS[name]) + rng.normal(0, 15, (40, 40, 3)), 0, 255).astype(np.uint8)
                (folder / name / f"{picture}.JPEG").write_bytes(jpeg_bytes(array))

    write(tmp_path / "train", ("n01", "n02", "n03"), 6)
    write(tmp_path / "rendered", ("n02", "n04"), 3)
    for severity in range(1, 6):
        write(tmp_path / "corrupted" / "snow" / str(severity), ("n01", "n03"), 2)
        write(tmp_path / "corrupted" / "noise" / "gaussian_noise" / str(severity), ("n02",), 2)
    return tmp_path


@pytest.mark.core
def test_folders_in_the_public_layouts_are_read_with_the_classes_of_training_pictures(folders: Path) -> None:
    index = ShardIndex.open(folders / "train")
    others = other_pictures({"imagenet-c": folders / "corrupted", "imagenet-r": folders / "rendered"}, index, threads=1)
    names = {f"imagenet-c/{name}/{severity}" for name in ("snow", "gaussian_noise") for severity in range(1, 6)}
    assert set(others) == names | {"imagenet-r"}
    with ShardPictures(index, threads=1) as train:
        evaluation = Evaluation(tiny_network(), train, train, others=others)
        variants, errors = scores_of(evaluation, "variants", k=3), scores_of(evaluation, "corruptions", k=3)
    assert variants["imagenet-r: of other classes, left out", ENCODER] == 0.5
    assert variants["imagenet-r", RAW] == 1  # among one class
    assert errors["mean CE of 2 corruptions, %", RAW] == errors["CE snow, %", RAW] == errors["CE gaussian_noise, %", RAW] == 0


def test_folders_that_cannot_be_read_are_refused_in_one_line(folders: Path) -> None:
    index = ShardIndex.open(folders / "train")
    for wrong, message in (
        ({"imagenet-x": folders}, "pictures named 'imagenet-x': there are imagenet-c, imagenet-r, imagenet-a, imagenet-sketch"),
        ({"imagenet-r": folders / "no"}, "imagenet-r: .* is no folder; name the one that its classes or corruptions lie in"),
        ({"imagenet-c": folders / "rendered"}, "imagenet-c: .* has no folder such as gaussian_noise/1"),
    ):
        with pytest.raises(ValueError, match=message):
            other_pictures(wrong, index)
    numbered = SimpleNamespace(classes=(), label=np.array([0, 5, -1]), paths=("a.tar",))
    with pytest.raises(ValueError, match=r"a.tar numbers its 2 classes, and folders name theirs"):
        class_names(numbered)  # type: ignore[arg-type]
    numbered.label = np.arange(1000)
    assert class_names(numbered)[:2] == ["n01440764", "n01443537"]  # type: ignore[arg-type]
