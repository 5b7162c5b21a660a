"""Protocols by labels against what scikit-learn and the authors' code of linear probes gave on the same features, float64.

tests/data/evaluation/{sklearn,linear}.json: the figures, with version or commit. Inputs: `clustered`, by the formulas of host_formulas.py.
Whole protocols: on pictures whose color tells their class (label_runs.py), with labels permuted, twice, on two ranks.
"""

import json
import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from host_formulas import tensor, wave
from host_runs import in_processes
from label_runs import CLASSES, PROTOCOLS, RESNET, ClassColors, be_an_evaluating_rank, evaluation, measured, scores
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wherefrom.train.evaluation import knn, logistic
from wherefrom.train.evaluation.features import ENCODER, RANDOM, RAW, Part
from wherefrom.train.evaluation.knn import neighbors
from wherefrom.train.evaluation.labels import vote
from wherefrom.train.evaluation.linear import (
    TOKENS,
    HeadTraining,
    Kind,
    LinearDINO,
    LinearDINOv2,
    LinearHeads,
    LinearMAE,
    LinearMoCoV3,
    tokens_of,
    train_heads,
)
from wherefrom.train.evaluation.logistic import accuracy, balanced_draw, predicted, regressions
from wherefrom.train.evaluation.protocols import PROTOCOLS as REGISTERED
from wherefrom.train.objective import random_scope

FIGURES = Path(__file__).parent / "data" / "evaluation"
SKLEARN: dict[str, Any] = json.loads((FIGURES / "sklearn.json").read_text())
LINEAR: dict[str, Any] = json.loads((FIGURES / "linear.json").read_text())


def clustered(number: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return features around the means of four classes, and their labels."""
    labels = (np.arange(number) * 7 + np.arange(number) // 4) % 4
    return tensor(wave((4, width), seed)[labels] + wave((number, width), seed + 1)), torch.tensor(labels)


BANK, LABELS = clustered(60, 5, 70)
ASKED = clustered(24, 5, 71)[1]
QUERIES = tensor(wave((4, 5), 70)[ASKED.numpy()] + 1.2 * wave((24, 5), 73))


# Neighbors


@pytest.mark.core
@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbors_and_their_votes_are_those_of_scikit_learn(k: int) -> None:
    figure = SKLEARN["knn"][str(k)]
    similarity, nearest = neighbors(BANK, QUERIES, k=k)
    told = vote(similarity, LABELS[nearest], temperature=0.07)
    assert nearest.tolist() == figure["nearest"]
    torch.testing.assert_close(similarity, tensor(figure["cosines"]), rtol=0, atol=1e-12)
    assert told.tolist() == figure["labels"]
    assert float((told == ASKED).double().mean()) == figure["accuracy"]


def test_a_vote_counts_by_cosine_and_temperature() -> None:
    similarity, labels = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[2, 1, 1]])
    assert vote(similarity, labels, temperature=0.07).tolist() == [2]  # exp(0.1 / 0.07) = 4.2 of either other
    assert vote(similarity, labels, temperature=1.0).tolist() == [1]
    assert vote(torch.tensor([[0.5, 0.5]]), torch.tensor([[3, 1]]), temperature=0.07).tolist() == [1]  # of equals, the lowest


def test_neighbors_are_those_of_brute_force_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(103, 6)), rng.normal(size=(31, 6))
    bank_unit, queries_unit = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, queries))
    cosines = queries_unit @ bank_unit.T
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :20]
    for blocks in ((1024, 65_536), (5, 7), (31, 103)):
        monkeypatch.setattr(knn, "QUERIES", blocks[0])
        monkeypatch.setattr(knn, "BANK", blocks[1])
        similarity, nearest = neighbors(tensor(bank), tensor(queries), k=20)
        assert np.array_equal(nearest.numpy(), order), blocks
        np.testing.assert_allclose(similarity.numpy(), np.take_along_axis(cosines, order, 1), rtol=0, atol=1e-14)
    assert neighbors(tensor(bank[:3]), tensor(queries), k=20)[1].shape == (31, 3)  # fewer than k: all


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor holds that is made within."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and not each._is_view():
                self.numbers = max(self.numbers, each.numel())
        return result


def test_memory_of_neighbors_is_that_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = torch.randn(5000, 3), torch.randn(300, 3)
    with Largest() as whole:
        neighbors(bank, queries, k=4)
    monkeypatch.setattr(knn, "QUERIES", 16)
    monkeypatch.setattr(knn, "BANK", 64)
    with Largest() as in_blocks:
        neighbors(bank, queries, k=4)
    assert whole.numbers == 300 * 5000  # control: one block holds them all
    assert in_blocks.numbers <= max(16 * 64, 300 * 4)  # a block of similarities, or the answer


@pytest.mark.slow
def test_a_million_rows_are_searched_in_bounded_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as ImageNet by a ViT-S: 1000 queries, k 200; the bank itself takes 1.9 GiB. Then blocks twice as large, which must show."""
    with random_scope("a million rows"):
        bank, queries = torch.randn(1_281_167, 384), torch.randn(1000, 384)

    def more(rows: Tensor) -> float:
        before = memory_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        _, nearest = neighbors(rows, queries, k=200)
        assert nearest.shape == (1000, 200)
        return memory_mib("VmHWM") - before

    counted = knn.BANK * 4 * (1000 + 384) / 2**20  # similarities and rows of unit length: 346 MiB
    found = more(bank)
    with capsys.disabled():
        print(f"\nneighbors of 1000 among 1,281,167 x 384: {found:.0f} MiB beside both, {counted:.0f} counted")
    assert counted * 0.9 < found < counted * 1.2  # sorting takes some, too
    monkeypatch.setattr(knn, "BANK", 2 * knn.BANK)
    assert more(bank[: 2 * knn.BANK]) > counted * 1.2


def memory_mib(what: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what))) / 1024


# Logistic regression


@pytest.mark.core
@pytest.mark.parametrize("c", SKLEARN["logistic"])
def test_logistic_regression_is_that_of_scikit_learn(c: str) -> None:
    figure = SKLEARN["logistic"][c]
    unit, asked = F.normalize(BANK, dim=-1), F.normalize(QUERIES, dim=-1)
    (weights,) = regressions(unit, LABELS, (float(c),), classes=4, iterations=2000, tolerance=1e-10)
    torch.testing.assert_close(weights[:-1].mT, tensor(figure["weight"]), rtol=1e-4, atol=1e-6)
    bias, theirs = weights[-1], tensor(figure["bias"])
    torch.testing.assert_close(bias - bias.mean(), theirs - theirs.mean(), rtol=1e-4, atol=1e-6)  # a constant changes no probability
    assert predicted(weights, asked).argmax(-1).tolist() == figure["labels"]
    assert accuracy(weights, asked, ASKED) == figure["accuracy"]
    (other,) = regressions(unit, LABELS, (1.01 * float(c),), classes=4, iterations=2000, tolerance=1e-10)  # control
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other[:-1].mT, tensor(figure["weight"]), rtol=1e-4, atol=1e-6)


def test_logits_are_computed_in_blocks_and_the_regression_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, labels = F.normalize(BANK, dim=-1).repeat(50, 1), LABELS.repeat(50)  # 3000 rows of 5 features, of 40 classes

    def fitted() -> tuple[Tensor, float, int]:
        with Largest() as made:
            (weights,) = regressions(unit, labels, (1.0,), classes=40, iterations=30)
            right = accuracy(weights, unit, labels)
        return weights, right, made.numbers

    whole, right, numbers = fitted()
    assert numbers == 3000 * 40  # control: one block holds them all
    monkeypatch.setattr(logistic, "LOGITS", 8000)
    in_blocks, right_in_blocks, numbers = fitted()
    assert numbers <= 3000 * 5  # the features; blocks have 8000
    torch.testing.assert_close(in_blocks[:-1], whole[:-1], rtol=1e-6, atol=1e-8)
    assert right_in_blocks == right


def test_a_path_of_penalties_ends_where_each_alone_does() -> None:
    unit = F.normalize(BANK, dim=-1)
    path = regressions(unit, LABELS, (0.01, 1.0, 100.0), classes=4, iterations=2000, tolerance=1e-9)
    for c, weights in zip((0.01, 1.0, 100.0), path, strict=True):
        (alone,) = regressions(unit, LABELS, (c,), classes=4, iterations=2000, tolerance=1e-9)
        torch.testing.assert_close(weights[:-1], alone[:-1], rtol=0, atol=1e-4)


@pytest.mark.core
def test_a_balanced_draw_gives_every_class_as_many_pictures() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 17 + [5] * 3)
    with random_scope("draws"):
        draws = [balanced_draw(labels, 0.2) for _ in range(3)]
    for rows in draws:
        assert labels[rows].bincount().tolist() == [5, 5, 5, 0, 0, 3]  # 0.2 of 100 for four classes; one has no more
        assert len(rows.unique()) == len(rows)
    assert len({tuple(sorted(rows.tolist())) for rows in draws}) == 3
    with random_scope("draws"):
        assert balanced_draw(labels, 0.001).shape == (4,)  # at least one each


# Linear heads


def head_of(training: HeadTraining, *, width: int, seed: int) -> LinearHeads:
    """Return one head of four classes that starts as the figures' did, for every rate of a training."""
    heads = LinearHeads(width, 4, heads=len(training.lr), normalize=training.normalize).double()
    start = tensor(0.1 * wave((4, width), seed))
    heads.linear.weight.data = start.repeat(len(training.lr), 1)
    return heads


def in_order(features: Tensor, labels: Tensor, training: HeadTraining) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield the passes that the figures were made of: batches as the pictures come."""
    for _ in range(training.epochs):
        batches = list(zip(features.split(training.batch), labels.split(training.batch), strict=True))
        yield [batch for batch in batches if len(batch[1]) == training.batch or not training.whole_batches]


def assert_is(figure: dict[str, Any], losses: Tensor, heads: LinearHeads, head: int = 0) -> None:
    """Hold the losses before each update, and the weights behind the last, to what the authors' code gave."""
    weight = heads.linear.weight.unflatten(0, (heads.heads, -1))[head]
    bias = heads.linear.bias.unflatten(0, (heads.heads, -1))[head]
    for ours, name in ((losses[:, head], "losses"), (weight, "weight"), (bias, "bias")):
        torch.testing.assert_close(
            ours.detach(), tensor(figure[name]), rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.core
def test_dinos_head_learns_as_in_its_authors_code() -> None:
    figure, data = LINEAR["dino"], clustered(30, 6, 10)
    training = HeadTraining(lr=(figure["lr"],), batch=figure["batch"], epochs=figure["epochs"])
    heads = head_of(training, width=6, seed=12)
    assert_is(figure, train_heads(heads, training, in_order(*data, training), number=figure["epochs"]), heads)
    for other in (replace(training, by="update"), replace(training, whole_batches=True), replace(training, lr=(3.001,))):  # controls
        heads = head_of(other, width=6, seed=12)
        with pytest.raises(AssertionError):
            assert_is(figure, train_heads(heads, other, in_order(*data, other), number=figure["epochs"]), heads)


@pytest.mark.core
def test_maes_head_learns_as_in_its_authors_code() -> None:
    figure, data = LINEAR["mae"], clustered(35, 6, 20)
    training = HeadTraining(
        optimizer="lars",
        lr=(figure["lr"],),
        batch=figure["batch"],
        epochs=figure["epochs"],
        warmup_frac=figure["warmup_epochs"] / figure["epochs"],
        by="update",
        whole_batches=True,
        normalize=True,
    )
    heads = head_of(training, width=6, seed=22)
    assert_is(figure, train_heads(heads, training, in_order(*data, training), number=figure["epochs"]), heads)
    held_out, logits = clustered(5, 6, 25)[0], tensor(figure["held_out_logits"])
    torch.testing.assert_close(heads(held_out)[:, 0], logits, rtol=1e-9, atol=1e-11)  # by the running mean and variance
    assert (heads.train()(held_out)[:, 0] - logits).abs().max() > 0.01  # control: by those of the batch
    for other in (replace(training, optimizer="sgd"), replace(training, normalize=False), replace(training, warmup_frac=0.3)):
        heads = head_of(other, width=6, seed=22)
        with pytest.raises(AssertionError):
            assert_is(figure, train_heads(heads, other, in_order(*data, other), number=figure["epochs"]), heads)


@pytest.mark.core
def test_all_heads_of_dinov2_learn_at_once_as_in_its_authors_code() -> None:
    figure, width = LINEAR["dinov2"], 3
    classes = [clustered(28, width, 30 + 3 * layer) for layer in range(4)]
    patches = tensor(wave((28, 5, width), 32 + 3 * 3)) + classes[-1][0][:, None]
    tokens = torch.cat([*(token for token, _ in classes), patches.mean(1)], -1)
    training = HeadTraining(lr=tuple(figure["lr"]), batch=figure["batch"], epochs=figure["epochs"], by="update", whole_batches=True)
    kinds: tuple[Kind, ...] = ("class", "class and mean", "classes", "classes and mean")
    slices = {(1, False): slice(9, 12), (1, True): slice(9, 15), (4, False): slice(0, 12), (4, True): slice(0, 15)}
    of_code = tokens_of(Stub(width), kinds)[1]  # type: ignore[arg-type]
    assert [tokens[:, each].shape for each in of_code.values()] == [tokens[:, each].shape for each in slices.values()]
    assert all(torch.equal(tokens[:, one], tokens[:, other]) for one, other in zip(of_code.values(), slices.values(), strict=True))
    found = iter(figure["heads"])
    for (blocks, mean), chosen in slices.items():
        features = tokens[:, chosen]
        heads = head_of(training, width=features.shape[1], seed=50 + features.shape[1])
        losses = train_heads(heads, training, in_order(features, classes[0][1], training), number=figure["epochs"])
        for number in range(len(training.lr)):
            theirs = next(found)
            assert (theirs["blocks"], theirs["mean"]) == (blocks, mean)
            assert_is(theirs, losses, heads, number)


class Stub:
    """What `tokens_of` asks of an encoder."""

    has_class_token, layers = True, 12

    def __init__(self, width: int) -> None:
        self.width = width


@pytest.mark.core
def test_imagenet_is_passed_as_often_as_published_and_small_sets_more_often() -> None:
    training = HeadTraining(lr=(0.1,), batch=1024, epochs=100, least_updates=2000)
    assert training.passes(1_281_167) == 100
    assert training.passes(3000) == math.ceil(2000 / 3)
    assert replace(training, whole_batches=True).passes(3000) == 1000
    assert training.passes(40) == 2000  # the batch is the set
    assert [training.factor(done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    warm = replace(training, warmup_frac=0.25)
    assert [warm.factor(done) for done in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    published = ((LinearDINO(), 0.001, 1024, 100), (LinearMAE(), 0.1, 16_384, 90), (LinearMoCoV3(), 3.0, 1024, 90))
    for protocol, lr, batch, epochs in published:
        rate = protocol.lr_vit if isinstance(protocol, LinearMoCoV3) else protocol.lr
        assert (rate, protocol.batch, protocol.epochs) == (lr, batch, epochs)
    assert len(LinearDINOv2().lr) == 13


# Whole protocols


@pytest.fixture(scope="module")
def plain_scores() -> dict[str, float]:
    return scores(evaluation(ClassColors(150), ClassColors(60)))


def test_every_protocol_reads_colors_and_none_reads_permuted_labels(plain_scores: dict[str, float]) -> None:
    """The encoders are random, and see color as well as raw pixels show it. Chance is 1/4, of 200 pictures within 0.03 or so."""
    assert PROTOCOLS.keys() <= set(REGISTERED)
    top = {name: value for name, value in plain_scores.items() if "deviation" not in name}
    for protocol in PROTOCOLS:
        assert max(value for name, value in top.items() if name.startswith(f"{protocol}:")) > 0.8, protocol
    # both sides permuted: of labels that follow color on one of them, a network that takes four colors for four classes may hit one or two
    chance = scores(evaluation(ClassColors(150, permuted=True), ClassColors(200, permuted=True)))
    assert chance.keys() == plain_scores.keys()
    for name, value in chance.items():
        if "deviation" not in name:
            assert value < (0.45 if "best" in name else 0.37), (name, value)  # the best of many heads on these pictures flatters


@pytest.mark.core
def test_every_number_has_its_floors_beside_it(plain_scores: dict[str, float]) -> None:
    rows = {name.rpartition(", ")[0] for name in plain_scores}
    assert {f"{row}, {column}" for row in rows for column in (ENCODER, RANDOM, RAW)} == set(plain_scores)


def test_evaluating_twice_gives_the_same_numbers_bit_for_bit(plain_scores: dict[str, float]) -> None:
    torch.manual_seed(5)  # whatever was drawn before
    again = scores(evaluation(ClassColors(150), ClassColors(60)))
    assert again == plain_scores
    other = scores(evaluation(ClassColors(150), ClassColors(60), seed=1), "linear-dino")  # control
    assert all(plain_scores[name] != value for name, value in other.items() if name.endswith("random encoder"))


def test_two_ranks_find_what_one_finds(plain_scores: dict[str, float], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    assert in_processes(be_an_evaluating_rank, [(tmp_path, rank, port) for rank in (0, 1)]) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank.{rank}").read_text()) for rank in (0, 1))
    assert first["scores"] == second["scores"] == plain_scores
    assert 0 < second["looked"] < first["looked"]  # the first had two blocks of three, and the only one


@pytest.mark.core
def test_linear_protocols_encode_each_epoch_of_crops_once_for_all_of_them() -> None:
    train, held_out = ClassColors(40), ClassColors(20)
    of = evaluation(train, held_out)
    measured(of, "linear-dino")
    once = list(train.asked)
    measured(of, "linear-mocov3", "linear-mae", "linear-dinov2")
    assert train.asked == once
    assert [epoch for epoch, _ in once].count(1) == 1
    part = tokens_of(of.network.encoder, ())[0]
    first, second = (of.crops(part, epoch)[ENCODER] for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert first.shape == (40, 3 * 16)  # two blocks are all there are, and the mean token


@pytest.mark.core
def test_heads_see_the_tokens_that_their_names_say() -> None:
    of = evaluation(ClassColors(20), ClassColors(10))
    kinds: tuple[Kind, ...] = ("class", "mean", "classes")
    part, slices = tokens_of(of.network.encoder, kinds)
    tokens = of.labeled("train", part).features[ENCODER]
    for chosen, expected in zip(slices.values(), (Part(token="class"), Part(token="mean"), Part(token="class", layers=2)), strict=True):
        assert torch.equal(tokens[:, chosen], of.labeled("train", expected).features[ENCODER])
    assert set(of.labeled("train", TOKENS).features) == {RAW}  # four blocks it has not


# What does not allow it


def test_convolutional_networks_are_measured_by_what_they_say_themselves() -> None:
    found = measured(evaluation(ClassColors(40), ClassColors(20), RESNET))
    assert {name for name, each in found.items() if each.not_measured} == {"linear-dinov2"}
    assert found["linear-dinov2"].not_measured == "the network has no class token"
    assert {score.row for score in found["linear-dino"].scores} == {"summary"}
    assert {score.row for score in found["logistic"].scores} == {"mean token"}


@pytest.mark.core
@pytest.mark.parametrize(("classes", "reason"), [(0, "the pictures have no labels"), (1, "the training pictures show one class alone")])
def test_pictures_without_labels_or_of_one_class_are_told_of_in_one_line(classes: int, reason: str) -> None:
    found = measured(evaluation(ClassColors(20, classes=classes), ClassColors(10, classes=classes)))
    assert {each.not_measured for each in found.values()} == {reason}


def test_held_out_classes_that_no_training_picture_shows_are_told_wrong() -> None:
    found = scores(evaluation(ClassColors(80), ClassColors(40, classes=CLASSES + 4)))
    assert all(value <= 0.5 for name, value in found.items() if "deviation" not in name)
