"""Dense protocols: their mathematics against the authors' figures, NumPy and worked values; whole protocols on pictures of colored cells.

Each cell of such a picture shows one class by its color, and lies at its class's depth: what a protocol must find follows from that, and
what it may not find where masks belong to other pictures.
"""

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.evaluation import dense, dense_linear, features
from wherefrom.train.evaluation.dense import confusion, mean_iou, patch_labels, raw_patches
from wherefrom.train.evaluation.dense_linear import LinearDepth, LinearSegmentation, depth_errors, mean_of_bins, sig_loss
from wherefrom.train.evaluation.dense_pictures import IGNORED, FilesOfMasks, open_masks
from wherefrom.train.evaluation.features import RAW, Evaluation
from wherefrom.train.evaluation.hummingbird import Hummingbird, enlarged, largest, rare_patches, retrieve
from wherefrom.train.evaluation.network import Network
from wherefrom.train.evaluation.protocols import NotMeasuredError, Score, protocols_named
from wherefrom.train.objective import random_scope
from wherefrom.train.ranks import Ranks

FIGURES = json.loads((Path(__file__).parent / "data" / "evaluation" / "hummingbird.json").read_text(encoding="utf-8"))
CLASSES, WIDTH, PX, PATCH = 5, 16, 32, 4  # of the figures


def seeded(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the tokens (n, 8, 8, 16) and masks (n, 32, 32) that the figures were made of."""
    rng = np.random.Generator(np.random.Philox(seed))
    y, x = np.indices((PX, PX))
    masks = np.zeros((number, PX, PX), np.int64)
    for mask in masks:
        for _ in range(4):
            center_y, center_x = rng.uniform(0, PX, 2).tolist()
            radius = rng.uniform(5, 12)
            mask[(y - center_y) ** 2 + (x - center_x) ** 2 < radius * radius] = rng.integers(0, CLASSES)
        mask[rng.random((PX, PX)) < 0.02] = IGNORED
    means = np.random.Generator(np.random.Philox(99)).normal(size=(CLASSES, WIDTH))
    centers = masks[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH] % IGNORED
    tokens = means[centers] + 1.5 * rng.normal(size=(*centers.shape, WIDTH))
    return torch.tensor(tokens, dtype=torch.float32), torch.tensor(masks)


@pytest.mark.core
@pytest.mark.parametrize("name", ["all", "some"])
def test_retrieval_gives_the_figures_of_open_hummingbird_eval(name: str) -> None:
    """Memory, labels and mIoU; of a part of the patches by the same random numbers. Ignored pixels are background there."""
    figures = FIGURES[name]
    (tokens, masks), (queries, truth) = seeded(24, 1), seeded(12, 2)
    labels = patch_labels(masks.masked_fill(masks == IGNORED, 0), (8, 8), CLASSES).flatten(1, 2)
    shares, keys = labels / PATCH**2, tokens.flatten(1, 2)
    if name == "some":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            noise = torch.cat([torch.rand(8, 64) for _ in range(3)])
        rows = rare_patches(labels, noise, 10)[..., None]
        shares, keys = (values.gather(1, rows.expand(-1, -1, values.shape[-1])) for values in (shares, keys))
    shares, keys = shares.flatten(0, 1), keys.flatten(0, 1)
    assert torch.nn.functional.normalize(keys).double().sum().item() == pytest.approx(figures["feature_sum"], rel=1e-4)
    assert shares.sum(0).tolist() == figures["label_sums"]
    assert shares[:2].tolist() == figures["first_labels"]
    told = retrieve(keys, shares, queries.flatten(0, 2), k=30, temperature=0.02).unflatten(0, (12, 64))
    assert told.double().sum((0, 1)).tolist() == pytest.approx(figures["shares_sums"], rel=1e-4)
    assert np.allclose(told[3, 10:14], figures["shares"], atol=2e-5)
    predicted = enlarged(told.unflatten(1, (8, 8)), PX).argmax(1)
    assert mean_iou(confusion(predicted, truth, CLASSES)) == pytest.approx(figures["miou"], abs=1e-3)
    for k, temperature in ((8, 0.02), (30, 0.03)):  # the nearest mistakes
        other = retrieve(keys, shares, queries[3].flatten(0, 1), k=k, temperature=temperature)[10:14]
        assert not np.allclose(other, figures["shares"], atol=2e-5)


@pytest.mark.core
def test_mean_iou_is_that_of_sets_of_pixels() -> None:
    assert mean_iou(torch.tensor([[3, 1], [2, 4]])) == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert mean_iou(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])) == pytest.approx((3 / 6 + 4 / 7) / 2)  # nobody names the third
    assert mean_iou(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 1, 0]])) == pytest.approx((3 / 6 + 4 / 8) / 3)
    rng = np.random.default_rng(0)
    truth, predicted = rng.choice([0, 1, 2, 3, IGNORED], (2, 9, 7)), rng.integers(0, 4, (2, 9, 7))
    known = truth != IGNORED
    ious = [(known & (truth == c) & (predicted == c)).sum() / (known & ((truth == c) | (predicted == c))).sum() for c in range(4)]
    assert mean_iou(confusion(torch.tensor(predicted), torch.tensor(truth), 4)) == pytest.approx(np.mean(ious))


@pytest.mark.core
def test_cells_of_a_grid_count_the_pixels_whose_centers_they_hold() -> None:
    masks = torch.tensor(np.random.default_rng(0).choice([0, 1, 2, IGNORED], (2, 10, 7)))
    counts = patch_labels(masks, (3, 2), 3)
    for n, row, col, label in np.ndindex(2, 3, 2, 3):
        inside = [masks[n, y, x] == label for y, x in np.ndindex(10, 7) if int((y + 0.5) * 3 / 10) == row and int((x + 0.5) * 2 / 7) == col]
        assert counts[n, row, col, label] == sum(inside)
    assert counts.sum() == (masks != IGNORED).sum()


@pytest.mark.core
def test_raw_patches_are_the_pixels_of_their_cells() -> None:
    pixels = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12).float()
    patches = raw_patches(pixels, (2, 3))
    assert patches.shape == (2, 2, 3, 48)
    assert patches[1, 1, 2].tolist() == pixels[1, :, 4:8, 8:12].flatten().tolist()
    large = raw_patches(torch.arange(32.0).expand(1, 3, 32, 32), (1, 2))
    assert large.shape == (1, 1, 2, 3 * 64) and large[0, 0, 1, :8].tolist() == [16.5 + 2 * step for step in range(8)]


# dinov2 at b8931f7: SigLoss(max_depth=8), its first gradient and the sum of their sizes; depth_pred's "linear" shares, of 16 bins
SIG_LOSS, SIG_GRADIENT, SIG_GRADIENTS = 1.3276838943905709, -0.05458942407562026, 0.6468662268319267
BINS = [4.855873843356112, 5.738551504397603, 3.8516056359868602, 3.882609065600997]


@pytest.mark.core
def test_sig_loss_and_bins_give_the_figures_of_dinov2() -> None:
    rng = np.random.Generator(np.random.Philox(3))
    predicted = torch.tensor(rng.uniform(0.1, 9, (2, 6, 7)), requires_grad=True)
    truth = torch.tensor(rng.uniform(0.1, 9, (2, 6, 7)) * (rng.random((2, 6, 7)) < 0.8))
    loss = sig_loss(predicted, truth * (truth <= 8))
    loss.backward()
    assert predicted.grad is not None
    assert [loss.item(), predicted.grad[0, 0, 0].item()] == pytest.approx([SIG_LOSS, SIG_GRADIENT], rel=1e-9)
    assert predicted.grad.abs().sum().item() == pytest.approx(SIG_GRADIENTS, rel=1e-9)
    assert sig_loss(predicted, truth).item() != pytest.approx(SIG_LOSS, rel=1e-3)  # the farthest depths counted
    scores = torch.tensor(rng.normal(size=(2, 16, 3, 4)))
    assert mean_of_bins(scores, torch.linspace(0.001, 10, 16, dtype=torch.float64))[1, 2].tolist() == pytest.approx(BINS, rel=1e-9)


@pytest.mark.core
def test_depth_errors_are_worked_values_and_one_factor_is_no_error_of_scale_invariant_ones() -> None:
    truth = torch.tensor([[[1.0, 2.0, 0.0, 4.0]], [[0.0, 0.0, 0.0, 0.0]]])
    root, relative, within, scale_invariant = depth_errors(2 * truth + (truth == 0), truth)[0].tolist()
    assert [root, relative, within] == pytest.approx([np.sqrt((1 + 4 + 16) / 3), 1, 0])
    assert scale_invariant == pytest.approx(0, abs=1e-7)
    assert depth_errors(truth, truth)[1].isnan().all()
    wrong = torch.tensor([[[1.0, 2.2, 9.0, 8.0]]])
    logs = np.log([1, 1.1, 2])
    expected = [np.sqrt((0.04 + 16) / 3), 1.1 / 3, 2 / 3, np.sqrt((logs**2).mean() - logs.mean() ** 2)]
    assert depth_errors(wrong, truth[:1])[0].tolist() == pytest.approx(expected, rel=1e-6)


COLORS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250]], np.uint8)
DEPTHS = np.array([1.0, 3.0, 9.0], np.float32)
CELL = 8


class Cells(FilesOfMasks):
    """Pictures of 4 x 4 cells, of a class each; by `shift`, what is said of a picture is true of another one."""

    shift, farthest = 0, 10.0

    def masks(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return super().masks((ids + self.shift) % len(self))

    def depths(self, ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        return [np.where(mask == IGNORED, 0, DEPTHS[mask % IGNORED]) for mask in self.masks(ids)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("cells"), np.random.default_rng(0)
    for side, number in (("train", 24), ("held out", 12)):
        for kind in ("pictures", "masks"):
            (root / side / kind).mkdir(parents=True)
        for name in range(number):
            cells = rng.integers(0, 3, (4, 4), dtype=np.uint8).repeat(CELL, 0).repeat(CELL, 1)
            noise = rng.integers(-15, 16, (*cells.shape, 3))
            Image.fromarray((COLORS[cells] + noise).clip(0, 255).astype(np.uint8)).save(root / side / "pictures" / f"{name:02}.png")
            cells[rng.random(cells.shape) < 0.05] = IGNORED
            Image.fromarray(cells).save(root / side / "masks" / f"{name:02}.png")
    return root


@pytest.fixture
def cells(folders: Path) -> Iterator[tuple[Cells, Cells]]:
    def opened(side: str) -> Cells:
        plain = open_masks(folders / side / "pictures", folders / side / "masks", classes=("red", "green", "blue"))
        options: dict[str, Any] = {"renderer": "torch", "threads": 1}
        values = {0: 0, 1: 1, 2: 2, IGNORED: IGNORED}
        return Cells(plain.index, plain.rows.tolist(), plain.files, values=values, classes=plain.classes, **options)

    with opened("train") as train, opened("held out") as held_out:
        yield train, held_out


def network() -> Network:
    settings = ModelSettings(view_size_px=32, patch_size_px=CELL, width=24, depth=1, heads=2)
    with random_scope(7, "network"):
        encoder = Encoder(settings).requires_grad_(False).eval()
    return Network(encoder=encoder, name="small", picture_px=32, mean=(0.5,) * 3, std=(0.5,) * 3)


PROTOCOLS = {
    "hummingbird": Hummingbird(memory=(48, 384), k=5),
    "segmentation": LinearSegmentation(batch=4, rate=0.03, mask_px=32, loss_px=16, epochs=20, drop_after=16),
    "depth": LinearDepth(depth_px=32, bins=32, rate=0.02, batch=4, epochs=12),
}


def scores(protocol: Any, pictures: tuple[Cells, Cells], ranks: Ranks | None = None) -> list[Score]:
    return list(protocol.measure(Evaluation(network(), None, pictures[1], masked=pictures, depth=pictures, ranks=ranks)))


def named(found: list[Score]) -> dict[tuple[str, str], float]:
    return {(score.row, score.features): score.value for score in found}


@pytest.mark.core
@pytest.mark.parametrize("name", ["hummingbird", "segmentation"])
def test_classes_that_pictures_show_are_found_and_those_of_other_pictures_are_chance(name: str, cells: tuple[Cells, Cells]) -> None:
    row = {"hummingbird": "mIoU, memory 384", "segmentation": "mIoU"}[name]
    right = named(scores(PROTOCOLS[name], cells))
    assert right[row, RAW] > 0.8
    assert right[row, "encoder"] > 0.6
    for pictures in cells:
        pictures.shift = 5
    permuted = named(scores(PROTOCOLS[name], cells))
    assert max(permuted[row, column] for column in (RAW, "encoder", "random encoder")) < 0.3  # a fifth is what guessing gives


@pytest.mark.core
def test_depths_that_pictures_show_are_found_and_those_of_other_pictures_are_chance(cells: tuple[Cells, Cells]) -> None:
    right = named(scores(PROTOCOLS["depth"], cells))
    spread = float(DEPTHS.std())  # RMSE of the best constant
    assert right["RMSE", RAW] < 0.6 * spread
    assert right["scale-invariant log error", RAW] < 0.5
    for pictures in cells:
        pictures.shift = 5
    permuted = named(scores(PROTOCOLS["depth"], cells))
    assert min(permuted["RMSE", column] for column in (RAW, "encoder", "random encoder")) > 0.9 * spread
    assert permuted["scale-invariant log error", RAW] > 0.75


@pytest.mark.core
def test_classes_of_enlarged_numbers_are_those_of_all_at_once() -> None:
    values = torch.randn(11, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest(values, 23), enlarged(values, 23).argmax(1))


def test_summaries_are_kept_once_a_picture(cells: tuple[Cells, Cells], monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    plain = dense_linear._with_summary

    def watched(tokens: Tensor, summaries: Tensor | None) -> Tensor:
        nonlocal most
        beside = plain(tokens, summaries)
        most = max(most, len(beside))
        return beside

    monkeypatch.setattr(dense_linear, "_with_summary", watched)
    monkeypatch.setattr(dense, "BLOCK", 8)
    scores(replace(PROTOCOLS["depth"], epochs=1), cells)
    assert most <= 8 < len(cells[0])


def test_a_network_with_registers_and_no_class_token_is_taken_at_its_own_summary() -> None:
    encoder = Encoder(ModelSettings(name="vit_wee_patch16_reg1_gap_256", depth=1)).eval()
    with torch.no_grad():
        seen = encoder.encode(torch.randn(2, 1, 3, 32, 32))
    assert seen.prefix is not None and not encoder.has_class_token
    assert torch.equal(dense._summary(encoder, seen), seen.summary[:, 0])
    with_class_token = network().encoder
    with torch.no_grad():
        seen = with_class_token.encode(torch.randn(2, 1, 3, 32, 32))
    assert seen.prefix is not None
    assert torch.equal(dense._summary(with_class_token, seen), seen.prefix[:, 0, 0])


class Turns(Ranks):
    """Ranks that are threads, of which one runs at a time: they change where they exchange rows."""

    parts: list[list[Tensor]]
    lock: threading.Lock
    barrier: threading.Barrier

    def in_turn(self, own: Sequence[Tensor]) -> Tensor:
        self.parts[self.rank] = list(own)
        self._let_others()
        parts = list(self.parts)
        self._let_others()  # before anybody brings the next rows
        return torch.cat([block for blocks in itertools.zip_longest(*parts) for block in blocks if block is not None])

    def _let_others(self) -> None:
        self.lock.release()
        self.barrier.wait(60)
        self.lock.acquire()


def of_two(measured: Callable[[Ranks], list[Score]]) -> list[list[Score]]:
    parts, lock, barrier = [torch.empty(0)] * 2, threading.Lock(), threading.Barrier(2)
    found: list[list[Score]] = [[], []]

    def run(rank: int) -> None:
        ranks = Turns(0, 1)
        ranks.rank, ranks.count, ranks.parts, ranks.lock, ranks.barrier = rank, 2, parts, lock, barrier
        with lock:
            found[rank] = measured(ranks)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.core
@pytest.mark.parametrize("name", PROTOCOLS)
def test_twice_and_on_two_ranks_the_numbers_are_the_same(name: str, cells: tuple[Cells, Cells], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dense, features):
        monkeypatch.setattr(module, "BLOCK", 8)
    short = {} if name == "hummingbird" else {"epochs": 2}
    protocol = replace(PROTOCOLS[name], **short)
    once = scores(protocol, cells)
    assert scores(protocol, cells) == once
    assert of_two(lambda ranks: scores(protocol, cells, ranks)) == [once, once]


@pytest.mark.core
@pytest.mark.parametrize("name", ["hummingbird", "linear-segmentation", "linear-depth"])
def test_what_is_missing_is_one_line(name: str, cells: tuple[Cells, Cells]) -> None:
    protocol = protocols_named([f"{name}@1"])[name]
    need = protocol.needs[0]
    missing = {"masks": "the pictures have no masks", "depth": "the pictures have no depths"}[need]
    with pytest.raises(NotMeasuredError, match=f"^{missing}$"):
        list(protocol.measure(Evaluation(network(), None, cells[1])))
    if need == "masks":
        cells[0].classes = ("red", "green")
        with pytest.raises(NotMeasuredError, match=r"^masks of 2 classes to learn from and 3 held out, of other names$"):
            list(protocol.measure(Evaluation(network(), None, cells[1], masked=cells)))


def test_masks_of_one_class_and_depths_out_of_reach_are_no_task(cells: tuple[Cells, Cells], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cells, "masks", lambda self, ids: [np.zeros((32, 32), np.uint8)] * len(ids))
    with pytest.raises(NotMeasuredError, match=r"^the masks to learn from show fewer than two classes$"):
        scores(PROTOCOLS["segmentation"], cells)
    monkeypatch.setattr(Cells, "farthest", 0.5)
    with pytest.raises(NotMeasuredError, match=r"^no picture to learn from has a depth from 0 to 0\.5$"):
        scores(PROTOCOLS["depth"], cells)
