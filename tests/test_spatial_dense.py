"""Dense SP against what must come out: regions from their counter by hand, targets in the picture itself, pictures whose answer is known.

Coordinate pictures show where each pixel lies, so a learner reaches R2 near 1; noise shows nothing, so it must stay at 0. Each guard
of the settings (no position table, one sample a bin) has a run without it, in which noise alone is read off.
"""

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import PairUnits
from wherefrom.pipeline.draws import Purpose, family_word, random_words, uniform
from wherefrom.pipeline.geometry import map_boxes, map_points
from wherefrom.pipeline.laws import Disjoint
from wherefrom.pipeline.loader import make_loader
from wherefrom.pipeline.records import draw_records
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch, Photometric, ViewGeometry, Views
from wherefrom.tools.cli import main
from wherefrom.train.checkpoint import latest
from wherefrom.train.encoder import Encoder, Features, ModelSettings
from wherefrom.train.loop import run
from wherefrom.train.objective import Encode, Objective, Progress, Step, Terms, random_scope
from wherefrom.train.objectives import DenseSpatialPrediction, DenseSpatialSettings, SpatialSettings
from wherefrom.train.objectives.pairs import r2
from wherefrom.train.reporting import Reporter
from wherefrom.train.run_folder import RunFolder, read_metrics
from wherefrom.train.settings import EvaluationSettings, RuntimeSettings, TrainSettings

START = Progress(update=0, updates=1, updates_per_epoch=1)
MODEL = ModelSettings(view_size_px=32, patch_size_px=4, width=32, depth=2, heads=2)
PICTURE_PX = 160
SETTINGS = DenseSpatialSettings(
    size_px=32,
    regions=16,
    side_frac=(0.2, 0.45),
    mirror="none",
    color=None,
    min_side_px=8,
    weight_position=1.0,
    weight_scale=1.0,
)


def record_of(
    family: ViewFamily, ids: Sequence[int], *, seed: int = 0, epoch: int = 0, sample: Sequence[int] | None = None
) -> ViewGeometry:
    """Return the records of one family, drawn for `ids`."""
    size = np.full((len(ids), 2), PICTURE_PX, np.int32)
    shown = np.array(ids if sample is None else sample)
    (record,) = draw_records(
        ViewRecipe(families=(family,)), seed=seed, epoch=epoch, drawn_for=np.array(ids), source_size=size, sample=shown
    )
    return record.geometry


def batch_of(family: ViewFamily, ids: Sequence[int], *, epoch: int = 0, kind: str = "coordinates") -> Batch:
    """Return views of pictures `ids`: "coordinates" (red shows x, green y), or "noise" that shows nothing."""
    record, (height, width) = record_of(family, ids, epoch=epoch), family.size_px
    shape = (len(ids), family.views, 3, height, width)
    pixels = torch.from_numpy(np.random.default_rng([epoch, *ids]).standard_normal(shape, dtype=np.float32))
    if kind == "coordinates":
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        places = map_points(record.view_to_source, torch.stack([x, y], -1).flatten(0, 1)).float() / PICTURE_PX
        pixels *= 0.1
        pixels[:, :, :2] += places.mT.unflatten(-1, (height, width)) * 4 - 2
    valid, unchanged = torch.ones(shape[:2], dtype=torch.bool), Photometric.unchanged(*shape[:2])
    return Batch(
        sample=record.sample,
        drawn_for=record.drawn_for,
        label=torch.full((len(ids),), -1),
        source_size=record.source_size,
        views=(Views(pixels=pixels, geometry=record, valid=valid, photometric=unchanged),),
    )


def step_of(settings: DenseSpatialSettings = SETTINGS, model: ModelSettings = MODEL) -> Step:
    with random_scope(0, "encoder"):
        encoder = Encoder(model)
    return Step(encoder, [DenseSpatialPrediction(settings)], seed=0)


def dense(step: Step) -> DenseSpatialPrediction:
    objective = step.objectives["dense"]
    assert isinstance(objective, DenseSpatialPrediction)
    return objective


def trained(settings: DenseSpatialSettings, *, steps: int, kind: str) -> Step:
    step = step_of(settings)
    optimizer = torch.optim.AdamW(step.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for update in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (update + 1) / 30, 4 * (1 - update / steps))
        ids = [(update * 16 + i) % 1000 for i in range(16)]
        loss = step(batch_of(step.families[0], ids, epoch=update * 16 // 1000, kind=kind), replace(START, update=update)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), 3.0)
        optimizer.step()
    return step.eval()


def r2_on(step: Step, *, kind: str, permuted: bool = False) -> Tensor:
    """Return R2 of every channel on pictures that were not learned from; `permuted` compares with the next picture's targets."""
    objective, views = dense(step), batch_of(step.families[0], range(3000, 3200), kind=kind).views[0]
    with torch.no_grad():
        predicted, _ = objective.predict(objective.features(views, step.encoder.encode))
    targets, mask = objective.targets(views.geometry), objective.pair_mask(views.geometry, views.valid)
    return r2(predicted, targets.roll(1, 0) if permuted else targets, mask & mask.roll(1, 0) if permuted else mask)


def test_coordinate_pictures_are_learned_on_all_channels_and_only_in_their_own_pictures() -> None:
    step = trained(SETTINGS, steps=120, kind="coordinates")
    assert r2_on(step, kind="coordinates").min() > 0.85
    assert r2_on(step, kind="coordinates", permuted=True).max() <= 0


def test_noise_teaches_nothing() -> None:
    assert r2_on(trained(SETTINGS, steps=120, kind="noise"), kind="noise").abs().max() < 0.03


def test_with_the_position_table_noise_teaches_where_regions_lie() -> None:
    step = trained(replace(SETTINGS, positions=True), steps=120, kind="noise")
    assert r2_on(step, kind="noise")[:2].min() > 0.8


@pytest.mark.parametrize("sampling", ["adaptive", "area"])
def test_averages_over_whole_bins_tell_the_size_of_a_region_of_noise(sampling: Any) -> None:
    x, y, scale = r2_on(trained(replace(SETTINGS, sampling=sampling), steps=120, kind="noise"), kind="noise").tolist()
    assert scale > 0.06
    assert max(abs(x), abs(y)) < 0.03


@pytest.mark.core
def test_regions_are_what_their_counter_says() -> None:
    """Every number by hand: one block of four words a region, its side and shape, then its place among all that there are."""
    settings = replace(SETTINGS, size_px=100, side_frac=(0.1, 0.5), region_aspect=(0.5, 1.5), regions=5)
    objective = DenseSpatialPrediction(settings)
    record = record_of(objective.families[0], [3, 2**33 + 5], seed=2**40 + 1, epoch=7)
    for row, boxes in zip(record.drawn_for.tolist(), objective.boxes(record).tolist(), strict=True):
        for region, box in enumerate(boxes):
            words = random_words(2**40 + 1, 7, row, family_word("dense"), 0, Purpose.REGION, region)
            u = uniform(words)
            root, ratio = 100 * 0.1 * 5 ** u[0], 0.5 * 3 ** u[1]
            width, height = (round(side * 1024) for side in (root * math.sqrt(ratio), root / math.sqrt(ratio)))
            x, y = (int(word) * (100 * 1024 - side + 1) // 2**32 for word, side in zip(words[2:], (width, height), strict=True))
            assert box == [x / 1024, y / 1024, (x + width) / 1024, (y + height) / 1024]


def test_regions_belong_to_a_view_and_to_nothing_else_of_its_batch() -> None:
    objective = DenseSpatialPrediction(SETTINGS)
    family = objective.families[0]
    ids = [5, 17, 123456789012, 2]
    whole = objective.boxes(record_of(family, ids))
    alone = torch.cat([objective.boxes(record_of(family, [i])) for i in ids])
    assert torch.equal(whole, alone)
    assert torch.equal(objective.boxes(record_of(family, ids[::-1])), whole.flip(0))
    assert torch.equal(objective.boxes(record_of(family, ids, sample=[1, 1, 1, 1])), whole)  # a substitute keeps its slot's draws
    for changed in (record_of(family, ids, seed=1), record_of(family, ids, epoch=1), replace(record_of(family, ids), family="other")):
        assert not (objective.boxes(changed) == whole).all(-1).any()
    more = DenseSpatialPrediction(replace(SETTINGS, regions=20)).boxes(record_of(family, ids))
    assert torch.equal(more[:, :16], whole)


def test_ranks_and_micro_batches_see_the_same_regions(tiny_shards: Path) -> None:
    objective = DenseSpatialPrediction(SETTINGS)
    options: dict[str, Any] = {"seed": 3, "global_batch": 8, "renderer": "torch", "threads": 1}

    def regions(**changes: Any) -> dict[int, Tensor]:
        boxes_of = {}
        with make_loader(str(tiny_shards / "train.tar"), ViewRecipe(families=objective.families), **options | changes) as loader:
            for _, batch in zip(range(changes.get("accumulation", 1) * 2), loader.forever(), strict=False):
                boxes = objective.boxes(batch.views[0].geometry)
                boxes_of |= dict(zip(batch.sample.tolist(), boxes.clone(), strict=True))
        return boxes_of

    expected = regions()
    halves = [regions(ranks=2, rank=rank, accumulation=2) for rank in (0, 1)]
    assert halves[0].keys() | halves[1].keys() == expected.keys()
    assert all(torch.equal(box, expected[i]) for half in halves for i, box in half.items())


def test_regions_lie_in_the_view_log_uniform_in_side_and_uniform_in_place() -> None:
    objective = DenseSpatialPrediction(SETTINGS)
    boxes = objective.boxes(record_of(objective.families[0], range(2000))).flatten(0, 1).double().numpy()
    assert boxes.min() >= 0
    assert boxes.max() <= 32
    side = boxes[:, 2] - boxes[:, 0]
    uniforms = [np.log(side / 6.4) / np.log(0.45 / 0.2), boxes[:, 0] / (32 - side), boxes[:, 1] / (32 - side)]

    def distance(values: np.ndarray) -> float:
        """Return the largest distance to the uniform distribution function (Kolmogorov and Smirnov)."""
        return float(np.abs(np.sort(values) - (np.arange(len(values)) + 0.5) / len(values)).max())

    bound = 1.95 / math.sqrt(len(boxes))  # passed by one in a thousand; these draws are always the same
    assert max(map(distance, uniforms)) < bound
    assert distance((side - 6.4) / 8) > bound
    assert np.abs(np.corrcoef(uniforms) - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("mirror", ["none", "picture"])
@pytest.mark.parametrize("scale", ["log_sides", "log_area"])
def test_targets_hold_in_the_picture_that_the_view_was_cut_from(mirror: Any, scale: Any) -> None:
    """Regions are drawn in the view; carried into the picture, and seen from the mirrored view again, they must say the same."""
    objective = DenseSpatialPrediction(replace(SETTINGS, mirror=mirror, scale=scale, region_aspect=(0.7, 1.4), aspect=(0.5, 2.0)))
    record = record_of(objective.families[0], range(40))
    in_picture = map_boxes(record.view_to_source[:, 0], objective.boxes(record))
    flipped = record.flipped.expand(-1, SETTINGS.regions)
    expected = pair_targets(in_picture, objective.pairs, flipped=flipped, units=PairUnits(scale=scale))
    targets = objective.targets(record, standardized=False)
    torch.testing.assert_close(targets, expected, atol=2e-5, rtol=1e-5)
    if mirror == "picture":
        unmirrored = pair_targets(in_picture, objective.pairs, units=PairUnits(scale=scale))
        assert (targets - unmirrored).abs().max() > 1


@pytest.mark.core
@pytest.mark.parametrize("position", ["reference", "picture", "mean"])
def test_targets_and_which_pairs_count_are_those_by_hand(position: Any) -> None:
    objective = step_objective(replace(SETTINGS, position=position, scale="ratio", region_aspect=(0.7, 1.4)))
    record = record_of(objective.families[0], range(6))
    targets = objective.targets(record) * objective.target_std + objective.target_mean
    valid = torch.tensor([True, True, False, True, True, True]).unsqueeze(1)
    mask = objective.pair_mask(record, valid)
    boxes = objective.boxes(record).double().numpy()
    for b in range(6):
        for row, (i, j) in enumerate(objective.pairs.tolist()):
            (x0, y0, x1, y1), (u0, v0, u1, v1) = boxes[b, i], boxes[b, j]
            sides, other = np.array([x1 - x0, y1 - y0]), np.array([u1 - u0, v1 - v0])
            unit = {"reference": sides, "picture": np.array([32, 32]), "mean": np.sqrt(sides * other)}[position]
            moved = np.array([(u0 + u1 - x0 - x1) / 2, (v0 + v1 - y0 - y1) / 2])
            np.testing.assert_allclose(targets[b, row].numpy(), np.concatenate([moved / unit, other / sides]), atol=1e-5)
            apart = u1 <= x0 or x1 <= u0 or v1 <= y0 or y1 <= v0
            assert bool(mask[b, row]) == (apart and b != 2)
    assert 0.2 < mask.float().mean() < 0.8
    everything = step_objective(replace(SETTINGS, pairs="all")).pair_mask(record, valid)
    assert torch.equal(everything.all(-1), valid[:, 0])


def step_objective(settings: DenseSpatialSettings) -> DenseSpatialPrediction:
    return dense(step_of(settings))


def test_standardized_targets_of_other_draws_have_mean_0_and_variance_1() -> None:
    objective = step_objective(SETTINGS)
    record = record_of(objective.families[0], range(2000), seed=11)
    mask = objective.pair_mask(record, torch.ones(2000, 1, dtype=torch.bool))
    targets = objective.targets(record)[mask].double()
    assert targets.mean(0).abs().max() < 0.02
    assert (targets.std(0) - 1).abs().max() < 0.02
    assert (objective.targets(record).double().flatten(0, 1).std(0) - 1).abs().max() > 0.1


@pytest.mark.core
def test_losses_are_mean_squared_errors_of_the_pairs_that_count() -> None:
    step = step_of()
    objective, batch = dense(step), batch_of(step.families[0], range(4))
    views = batch.views[0]
    valid = torch.tensor([[True], [False], [True], [True]])
    masked = replace(batch, views=(replace(views, valid=valid),))
    terms = objective(masked, step.encoder.encode, START)
    predicted, _ = objective.predict(objective.features(views, step.encoder.encode))
    mask = objective.pair_mask(views.geometry, valid)
    error = (predicted - objective.targets(views.geometry))[mask].square().mean(0)
    torch.testing.assert_close(terms.losses["position"], error[:2].sum())
    torch.testing.assert_close(terms.losses["scale"], error[2:].sum())
    assert float(terms.meters["pairs_left_out"]) == 0.25
    assert float(terms.meters["pairs_a_picture"]) == pytest.approx(float(mask.sum()) / 4)
    assert not torch.equal(objective(batch, step.encoder.encode, START).losses["position"], terms.losses["position"])
    nothing = replace(batch, views=(replace(views, valid=torch.zeros(4, 1, dtype=torch.bool)),))
    assert [float(value.detach()) for value in objective(nothing, step.encoder.encode, START).losses.values()] == [0, 0]


@pytest.mark.core
def test_the_encoder_is_asked_once_for_hundreds_of_pairs_and_learns_from_them() -> None:
    step = step_of(replace(SETTINGS, regions=24))
    objective, calls = dense(step), []

    def encode(views: Views, *, keep: Tensor | None = None, positions: bool = True) -> Features:
        calls.append((tuple(views.pixels.shape[:2]), positions))
        return step.encoder.encode(views, keep=keep, positions=positions)

    terms = objective(batch_of(step.families[0], range(3)), encode, START)
    assert calls == [((3, 1), False)]
    assert terms.meters["pairs_a_picture"] > 200
    (terms.losses["position"] + terms.losses["scale"]).backward()
    silent = {name for name, parameter in step.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert silent == {"encoder.model.pos_embed"}


@pytest.mark.parametrize("positions", [False, True])
def test_the_position_table_is_left_out_unless_it_is_asked_for(positions: bool) -> None:
    step = step_of(replace(SETTINGS, positions=positions))
    batch = batch_of(step.families[0], range(3))
    before = step(batch, START).loss
    torch.nn.init.normal_(step.encoder.model.pos_embed)
    assert torch.equal(step(batch, START).loss, before) is not positions
    assert step.freeze_unreached(batch, START) == ((() if positions else ("encoder.model.pos_embed",)), ())


class Colors(Objective):
    """A host: tell the mean color of a view from its summary."""

    name = "colors"
    families = (replace(SETTINGS.family("dense"), name="colors"),)

    def setup(self, encoder: Encoder) -> None:
        self.head = torch.nn.Linear(encoder.width, 3)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        views = batch.family(self.name)
        return Terms(losses={"color": (self.head(encode(views).summary) - views.pixels.mean((-2, -1))).square().mean()})


@pytest.mark.core
@pytest.mark.parametrize("weight", [None, 0.0, 1.0])
def test_as_a_plug_in_of_weight_0_it_leaves_its_host_alone(weight: float | None) -> None:
    def after(plugged: float | None) -> dict[str, Tensor]:
        plug_in = [] if plugged is None else [DenseSpatialPrediction(replace(SETTINGS, weight=plugged))]
        with random_scope(0, "encoder"):
            encoder = Encoder(replace(MODEL, drop_path=0.5))
        step = Step(encoder, [Colors(), *plug_in], seed=0).train()
        optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2)
        for update in range(3):
            batches = [batch_of(family, range(4), epoch=update) for family in step.families]
            loss = step(replace(batches[0], views=tuple(batch.views[0] for batch in batches)), replace(START, update=update)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return encoder.state_dict()

    alone, beside = after(None), after(weight)
    same = all(torch.equal(tensor, alone[name]) for name, tensor in beside.items())
    assert same is (weight != 1.0)


def test_a_network_that_cannot_leave_its_positions_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"positions=False of 'dense' with model 'resnet10t': .*; take a ViT, or positions=True"):
        step_of(model=ModelSettings(name="resnet10t"))
    convolutional = step_of(replace(SETTINGS, positions=True, size_px=64), ModelSettings(name="resnet10t"))
    assert convolutional(batch_of(convolutional.families[0], range(2)), START).loss.isfinite()


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": 1}, "regions=1: a pair needs 2"),
        ({"side_frac": (0.5, 0.2)}, "side_frac=.*: each needs 0 < low <= high"),
        ({"region_aspect": (0.0, 1.0)}, "region_aspect=.*: each needs 0 < low <= high"),
        ({"side_frac": (0.2, 0.8), "region_aspect": (0.5, 1.0)}, "some regions would not fit; the upper bound must be at most 0.7071"),
        ({"side_frac": (0.6, 0.7)}, "such regions always overlap; lower it, or take pairs='all'"),
        ({"bins": (0, 2)}, r"bins=\(0, 2\), sampling=1: needs at least 1"),
        ({"sampling": 0}, "sampling=0: needs at least 1"),
        ({"weight_scale": -1.0}, "weights cannot be negative"),
        ({"area_frac": (0.0, 1.0)}, "area_frac="),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        replace(SETTINGS, **changes)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="objectives: there is nothing to learn; name one of spatial, dense"):
        TrainSettings(recipe="demo", objectives={})


TINY = [
    *("--updates", "4", "--global-batch", "8", "--dense.size-px", "24", "--dense.regions", "6", "--dense.min-side-px", "4"),
    *("--model.view-size-px", "24", "--model.patch-size-px", "4", "--model.width", "32", "--model.depth", "1", "--model.heads", "2"),
    *("--runtime.device", "cpu", "--runtime.threads", "1", "--runtime.log-every", "2", "--runtime.renderer", "torch"),
    *("--evaluation.every", "2", "--evaluation.pictures", "8", "--evaluation.head-pictures", "8", "--evaluation.head-steps", "3"),
    *("--evaluation.view-px", "12", "--evaluation.knn-pictures", "16", "--evaluation.short-pictures", "8"),
]


def test_a_run_by_the_command_line_names_its_law_and_its_controls(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = ["--data", str(tiny_shards / "train.tar"), "--val", str(tiny_shards / "val.tar")]
    assert main(["train", "sp_dense", *shards, *TINY]) == 0
    output = capsys.readouterr().out
    law = "regions apart, side 0.15 to 0.4 of a view"
    assert len(re.findall(rf"^dense, law {law}\nR2 +x +y +scale\nheld-out pairs ", output, re.M)) == 2
    assert re.search(rf"^dense, law {law}\n8 held-out pictures, \d+ pairs, ", output, re.M)
    assert "no objective reaches them: encoder.model.pos_embed" in output
    report = json.loads((tmp_path / "runs" / "sp_dense-0" / "evaluation.json").read_text())
    assert report["dense"]["law"] == law
    rows = [row["name"] for row in report["dense"]["rows"]]
    assert {"held-out pairs", "pairs across pictures", "reference-only head", "content-free pictures"} <= set(rows)
    assert not any("sharpness" in row for row in rows)
    assert report["dense"]["pairs"] + report["dense"]["left_out"] == 8 * 30
    assert {score["features"] for score in report["labels"]["scores"]} == {"encoder", "random encoder", "raw pixels"}


def test_a_run_beside_sp_goes_on_from_its_checkpoint_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        recipe="demo",
        data=str(tiny_shards / "train.tar"),
        global_batch=8,
        updates=6,
        model=replace(MODEL, depth=1, drop_path=0.3),
        objectives={
            "spatial": SpatialSettings(law=Disjoint(area_frac=(0.06, 0.16)), views=3, size_px=24, min_side_px=4),
            "dense": replace(SETTINGS, regions=6),
        },
        evaluation=EvaluationSettings(every=0),
        runtime=RuntimeSettings(device="cpu", renderer="torch", threads=1, log_every=1, checkpoint_every=3),
    )
    out = tmp_path / "run"
    run(settings, reporter=Reporter(), out=out)
    folder, logged = RunFolder(out), read_metrics(RunFolder(out), "train")
    final = latest(folder.checkpoints)
    assert final is not None
    weights = (final / "weights.safetensors").read_bytes()
    assert {"spatial/position", "dense/position"} <= logged[-1]["losses"].keys() | logged[-1]["meters"].keys()

    shutil.rmtree(final)
    (folder.checkpoints / "latest").write_text("update-00000003")
    run(settings, reporter=Reporter(), out=out, resume=True)
    again = read_metrics(folder, "train")
    assert [record["losses"] for record in again] == [record["losses"] for record in logged]
    assert (final / "weights.safetensors").read_bytes() == weights
