"""GTSA: agree with a slow teacher on what both see of the same place, however each view was turned, and tell by how much it was.

Here: the settings, the heads, the three losses, and the objective.
Not here: which boxes two views share (ViewGeometry.common), pooling (wherefrom.kernels.roi_align), the moving average (teacher.py).
Source: arXiv 2304.08014, numbers and order as its author's code has them (bok3948/GTSA, commit c0dfe2b).
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.kernels.roi_align import roi_align
from wherefrom.pipeline.laws import Overlapping
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD, ColorLaw, ViewFamily, check_range
from wherefrom.pipeline.views import Batch, CommonBoxes, Views
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import QUARTER_TURNS, Encode, Objective, Panel, ParameterRule, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import full_precision
from wherefrom.train.objectives.teacher import follow
from wherefrom.train.over_ranks import mean_of_counted
from wherefrom.train.schedule import cosine

COLOR = ColorLaw(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur_prob=0.2)
TURNS = 4
SHOWN_BINS = 48  # a side, of common boxes in the picture of views
_BOTH_WAYS = (slice(0, 1), slice(1, 2))  # the two global views


@dataclass(frozen=True, kw_only=True, slots=True)
class GTSASettings:
    """Every choice of GTSA, as published for ViT-S/16 on COCO. Views are turned by quarters, and never mirrored."""

    weight: float = 1.0  # of the whole objective
    size_px: int = 224  # side of the two global views, which the teacher sees
    area_frac: tuple[float, float] = (0.3, 1.0)  # of the picture, in a global view
    local_views: int = 8  # 0: none
    local_px: int = 96
    local_area_frac: tuple[float, float] = (0.1, 0.3)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    min_shared_frac: float = 0.01  # of the picture: in every local view and each global one; the global ones share twice that
    color: ColorLaw | None = field(default_factory=lambda: COLOR)

    hidden: int = 384  # of the projector
    out: int = 768  # of projector and predictor
    region_bins: int = 10  # a side, that a common box is pooled to with a global view of the student
    local_region_bins: int = 4  # with a local one
    min_cells: float = 0.0  # of a common box along each axis, on both token maps, for a pair to count; 0: whatever is shared
    matched_frac: float = 0.5  # of the student's patches: so many best matches, either way; 98 and 18 of the published views
    patch_from_epoch: float = 11.0  # epochs without the patch loss: the author's ten of warm-up, and the one after
    rotation_hidden: tuple[int, int, int] = (768, 768, 128)
    weight_region: float = 1.0  # of its term, within `weight`
    weight_patch: float = 0.5  # 0: not computed; so the next
    weight_rotation: float = 0.5
    teacher_momentum: float = 0.996
    final_teacher_momentum: float = 1.0  # after the last update, by a cosine

    def __post_init__(self) -> None:
        check_literals(self)
        for name in ("size_px", "local_px", "hidden", "out", "region_bins", "local_region_bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: needs at least 1")
        for name in ("local_views", "min_cells", "patch_from_epoch", "weight", "weight_patch", "weight_rotation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: needs at least 0")
        if min(self.rotation_hidden) < 1:
            raise ValueError(f"rotation_hidden={self.rotation_hidden}: each needs at least 1")
        if not self.weight_region > 0:
            raise ValueError(f"weight_region={self.weight_region}: needs a positive number; the other two terms are beside it")
        if not 0 < self.matched_frac <= 1:
            raise ValueError(f"matched_frac={self.matched_frac}: needs 0 < matched_frac <= 1")
        for name in ("teacher_momentum", "final_teacher_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: needs 0 to 1")
        check_range("area_frac", self.area_frac, 1)
        check_range("local_area_frac", self.local_area_frac, 1)
        largest = min(self.area_frac[1] / 2, self.local_area_frac[1])
        if not 0 < self.min_shared_frac <= largest:
            raise ValueError(f"min_shared_frac={self.min_shared_frac}: views of these areas share at most {largest:g}; needs 0 to that")
        _ = self.families("gtsa")  # they check their own numbers

    def families(self, name: str) -> tuple[ViewFamily, ...]:
        """Return the views that these settings ask the loader for: two global ones that meet, and local ones that meet both."""
        kinds = [(name, 2, self.size_px, self.area_frac, 2 * self.min_shared_frac)]
        if self.local_views:
            kinds.append((f"{name}_local", self.local_views, self.local_px, self.local_area_frac, self.min_shared_frac))
        return tuple(
            ViewFamily(
                name=family,
                views=views,
                size_px=(side, side),
                law=Overlapping(of=name, area_frac=area, aspect=self.aspect, min_shared_frac=shared),
                turns=True,
                color=self.color,
                min_side_px=1,
            )
            for family, views, side, area, shared in kinds
        )

    def objective(self, name: str) -> "GTSA":
        """Return what is learned by these settings, under a name."""
        return GTSA(self, name=name)


class GTSA(Objective):
    """GTSA as an objective: three terms, of common regions, of patches that match, and of turns.

    A pair of views counts in the first two if both are valid and share enough; the meter `pairs_left_out` tells how many do not.
    """

    def __init__(self, settings: GTSASettings, *, name: str = "gtsa") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.weights = {"region": settings.weight_region, "patch": settings.weight_patch, "rotation": settings.weight_rotation}
        self.families = settings.families(name)
        self.couples_samples = settings.min_cells > 0  # pictures have more pairs and less, and all pairs weigh alike

    def setup(self, encoder: Encoder) -> None:
        """Build the heads, and the teacher as a copy of encoder and projector."""
        settings = self.settings
        self.projector = MapHead(encoder.width, settings.hidden, settings.out, layers=2, residual=True)
        self.predictor = MapHead(settings.out, settings.out, settings.out, layers=1, residual=False)
        self.rotation = _rotation_head((encoder.width, *settings.rotation_hidden)) if settings.weight_rotation else None
        self.teacher = encoder.slow_copy()
        self.teacher_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        views = [batch.family(family.name) for family in self.families]
        tokens = [encode(each).tokens for each in views]  # (B, V, h, w, D) of each family
        student = [self.predictor(self.projector(each)) for each in tokens]
        with torch.no_grad():
            teacher = self.teacher_projector(self.teacher.encode(views[0]).tokens)
        mean_tokens = torch.cat([each.mean((-3, -2)) for each in tokens], 1)  # (B, V of all families, D)

        groups = self._view_pairs(views, teacher, student)
        counted = torch.cat([group.counted.flatten(1) for group in groups], 1)  # (B, pairs)
        regions = torch.cat([group.region_similarity().flatten(1) for group in groups], 1)
        losses = {"region": mean_of_counted(-regions, counted)}
        meters = {"pairs_left_out": 1 - counted.float().mean(), "target_std": _std_over_places(teacher)} | spread(mean_tokens[:, 0])
        if self.weights["patch"] and progress.epoch >= self.settings.patch_from_epoch:
            matches = [group.patch_similarity(self.settings.matched_frac).flatten(1) for group in groups]
            losses["patch"] = mean_of_counted(-torch.cat(matches, 1), counted)
        if self.rotation is not None:
            logits = full_precision(self.rotation(mean_tokens))
            turns = torch.cat([each.geometry.quarter_turns for each in views], 1)
            valid = torch.cat([each.valid for each in views], 1)
            losses["rotation"] = mean_of_counted(F.cross_entropy(logits.flatten(0, 1), turns.flatten(), reduction="none"), valid.flatten())
            meters["rotation_accuracy"] = (logits.detach().argmax(-1) == turns).float().mean()
        return Terms(losses=losses, meters=meters)

    def rule_for(self, name: str, parameter: nn.Parameter) -> ParameterRule:
        """Let all but biases and norms decay, class token and position table too."""
        return ParameterRule(decays=parameter.ndim > 1 and not name.endswith(".bias"))

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        """Let the teacher follow, by the momentum of the next update: the author's moves before it sees that update's views."""
        start, end = self.settings.teacher_momentum, self.settings.final_teacher_momentum
        momentum = cosine(progress.update + 1, updates=progress.updates, start=start, end=end)
        follow(self.teacher, encoder, momentum=momentum)
        follow(self.teacher_projector, self.projector, momentum=momentum)

    def shown(self, batch: Batch) -> Sequence[Panel]:
        """Return what each pair of views shows in its common box, pooled as the method pools it: pixels in place of token maps.

        Two rows for each global view of the teacher: its own boxes, each turned as the other view shows it, above those of the others.
        Light and contrast are made alike, or there would be little to see of views that their color law made dark.
        """
        views = [batch.family(family.name) for family in self.families]
        maps = [full_precision(each.pixels).movedim(2, -1) for each in views]
        groups = [replace(group, bins=SHOWN_BINS) for group in self._view_pairs(views, maps[0], maps)]
        pooled = [group.pooled() for group in groups]

        def of_teacher(view: int, each: Sequence[Tensor]) -> Tensor:  # (B, G, W, ...) of each group -> (W of all, ...)
            return torch.cat([each[view][0, 0], *(one[0, view] for one in each[2:])])

        pictures, labels = [], []
        for view in range(2):
            pictures += [of_teacher(view, [teacher for teacher, _ in pooled]), of_teacher(view, [student for _, student in pooled])]
            turns = of_teacher(view, [group.common.quarter_turns for group in groups]).tolist()
            counted = of_teacher(view, [group.counted for group in groups]).tolist()
            labels += [f"[{view}] {QUARTER_TURNS[turn] if counts else 'left out'}" for turn, counts in zip(turns, counted, strict=True)]
            labels += [f"[{1 - view}]", *(f"local [{local}]" for local in range(self.settings.local_views))]
        captions = ["above: of the teacher's view, turned as the student shows it; below: of the student's"]
        captions += ["each stretched to a square, of the same light and contrast"]
        captions += [f"pairs narrower than {self.settings.min_cells:g} cells of a token map do not count"] * (self.settings.min_cells > 0)
        title = f"{self.name}: what is compared, the place that both views show"
        return [Panel(title=title, pictures=_of_one_contrast(torch.stack(pictures).movedim(-1, 2)), labels=labels, captions=captions)]

    def _view_pairs(self, views: Sequence[Views], teacher: Tensor, student: Sequence[Tensor]) -> list["ViewPairs"]:
        """Return what is compared: each global view of the teacher with every view of the student but itself."""
        settings, large = self.settings, views[0]
        groups = [
            view_pairs(large[:, a], teacher[:, a], large[:, b], student[0][:, b], bins=settings.region_bins, min_cells=settings.min_cells)
            for a, b in (_BOTH_WAYS, _BOTH_WAYS[::-1])
        ]
        if settings.local_views:
            bins = settings.local_region_bins
            groups.append(view_pairs(large, teacher, views[1], student[1], bins=bins, min_cells=settings.min_cells))
        return groups


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ViewPairs:
    """All pairs of G views of the teacher and W of the student, of the same pictures: their token maps, and which pairs count."""

    teacher: Tensor  # (B, G, h, w, D)
    student: Tensor  # (B, W, h', w', D)
    common: CommonBoxes  # (B, G, W)
    counted: Tensor  # (B, G, W) bool
    sides_px: tuple[int, int]  # of the teacher's views, of the student's
    bins: int  # a side, that common boxes are pooled to

    def region_similarity(self) -> Tensor:
        """Return the mean cosine of student and teacher over the bins of each common box, (B, G, W)."""
        teacher, student = self.pooled()
        return (_unit(student) * _unit(teacher)).sum(-1).mean((-2, -1))

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Return the teacher's and the student's features of the bins of each common box, both as the student's view shows them.

        Shapes: (B, G, W, bins, bins, D) each, 0 where a pair does not count.
        """
        samples, common, counted = len(self.teacher), self.common, self.counted
        teacher = roi_align(
            self.teacher.flatten(0, 1),
            common.boxes.float().flatten(0, 1),
            frame_hw=self.sides_px[0],
            out_hw=self.bins,
            quarter_turns=common.quarter_turns.flatten(0, 1),
            flipped=common.flipped.flatten(0, 1),
            valid=counted.flatten(0, 1),
        )  # (B G, W, bins, bins, D)
        student = roi_align(
            self.student.flatten(0, 1),
            common.other_boxes.float().transpose(1, 2).flatten(0, 1),
            frame_hw=self.sides_px[1],
            out_hw=self.bins,
            valid=counted.transpose(1, 2).flatten(0, 1),
        )  # (B W, G, bins, bins, D)
        return teacher.unflatten(0, (samples, -1)), student.unflatten(0, (samples, -1)).transpose(1, 2)

    def patch_similarity(self, matched_frac: float) -> Tensor:
        """Return the mean cosine of the best matches, (B, G, W): patches with their nearest of the other map, both ways."""
        teacher, student = _unit(self.teacher.flatten(2, 3)), _unit(self.student.flatten(2, 3))  # (B, G, N, D), (B, W, M, D)
        with torch.autocast(student.device.type, enabled=False):
            flat = teacher.flatten(1, 2) @ student.flatten(1, 2).mT
        cosines = flat.unflatten(1, teacher.shape[1:3]).unflatten(-1, student.shape[1:3])  # (B, G, N, W, M)
        matches = min(max(1, round(matched_frac * student.shape[2])), teacher.shape[2])
        of_student = cosines.max(2).values.topk(matches).values.mean(-1)
        of_teacher = cosines.max(-1).values.transpose(2, 3).topk(matches).values.mean(-1)
        return (of_student + of_teacher) / 2


def view_pairs(teachers: Views, teacher: Tensor, students: Views, student: Tensor, *, bins: int, min_cells: float) -> ViewPairs:
    """Return all pairs of the teacher's views (B, G) and the student's (B, W), of their token maps; shapes as `ViewPairs` has them.

    A pair counts if both views are valid and their common box is at least `min_cells` token cells wide and high on both maps.
    """
    sides = teachers.geometry.size_px[0], students.geometry.size_px[0]
    common = teachers.geometry.common(students.geometry)
    own, other = _cells_across(common.boxes, sides[0], teacher.shape[2:4]), _cells_across(common.other_boxes, sides[1], student.shape[2:4])
    counted = (common.area > 0) & (torch.minimum(own, other) >= min_cells) & teachers.valid[:, :, None] & students.valid[:, None]
    return ViewPairs(teacher=teacher, student=student, common=common, counted=counted, sides_px=sides, bins=bins)


class MapHead(nn.Module):
    """Convolutions of 3 x 3 cells, each with a LayerNorm that has no weights, GELU and, if so set, what came in added where widths agree;
    then a linear layer on every cell: token maps (B, V, h, w, width) -> (B, V, h, w, out)."""

    def __init__(self, width: int, hidden: int, out: int, *, layers: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.convs = nn.ModuleList(nn.Conv2d(width if layer == 0 else hidden, hidden, 3, padding=1) for layer in range(layers))
        self.out = nn.Linear(hidden, out)
        for module in (*self.convs, self.out):
            assert isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, maps: Tensor) -> Tensor:
        x = maps.flatten(0, 1)
        for conv in self.convs:
            y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:]))
            x = y + x if self.residual and x.shape == y.shape else y
        return self.out(x).unflatten(0, maps.shape[:2])


def _rotation_head(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers of `widths`, the input's first, each with LayerNorm and, but for the last, GELU; then one to the four turns."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1], nn.Linear(widths[-1], TURNS))


def _unit(features: Tensor) -> Tensor:
    """Return features of length 1 in full precision, or 0 where they are 0."""
    return F.normalize(full_precision(features), dim=-1)


def _cells_across(boxes: Tensor, side_px: int, grid: Sequence[int]) -> Tensor:
    """Return how many cells of a map (rows, columns) boxes (..., 4) of view pixels span along the axis where they span least: (...)."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return torch.minimum(width * grid[1], height * grid[0]) / side_px


def _of_one_contrast(pictures: Tensor) -> Tensor:
    """Return pictures (..., 3, H, W), normalized as by default, with levels of mean 1/2 and deviation 1/4 each: gray stays gray."""
    mean, std = (pictures.new_tensor(numbers)[:, None, None] for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    levels = pictures * std + mean
    deviation, middle = torch.std_mean(levels, dim=(-3, -2, -1), keepdim=True)
    return (0.5 + (levels - middle) / (4 * deviation + 1e-3) - mean) / std


@torch.no_grad()
def _std_over_places(maps: Tensor) -> Tensor:
    """Return the standard deviation of unit features over all places of all views (B, V, h, w, D): 0 where all are alike."""
    mean = _unit(maps).flatten(0, -2).mean(0)
    return (1 - mean.square().sum()).clamp(min=0).sqrt()
