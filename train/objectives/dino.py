"""DINO: a student says of every view what a slow teacher says of the two large ones.

Here: the settings, the head, the loss, and the objective.
Not here: prototypes (prototypes.py), the moving average (teacher.py), learning rate, weight decay and clipping (recipes.py).
Source: arXiv 2104.14294, numbers and order as its authors' code has them (facebookresearch/dino, commit 7c446df).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily, check_range
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, ParameterRule, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import full_precision, mlp, refuse_one
from wherefrom.train.objectives.prototypes import Prototypes
from wherefrom.train.objectives.teacher import follow
from wherefrom.train.objectives.view_pairs import FIRST_COLOR, SECOND_COLOR, view_pair
from wherefrom.train.schedule import cosine, ramp


@dataclass(frozen=True, kw_only=True, slots=True)
class DINOSettings:
    """Every choice of DINO; what is not named is as in the authors' shortest published run, ViT-S/16 for 100 epochs."""

    size_px: int = 224  # side of the two global views
    area_frac: tuple[float, float] = (0.4, 1.0)  # of the picture, in a global view
    local_views: int = 8  # 0: none
    local_px: int = 96
    local_area_frac: tuple[float, float] = (0.05, 0.4)
    color: ColorLaw | None = field(default_factory=lambda: FIRST_COLOR)  # of the first global view
    second_color: ColorLaw | None = field(default_factory=lambda: SECOND_COLOR)
    local_color: ColorLaw | None = field(default_factory=lambda: ColorLaw(blur_prob=0.5))

    prototypes: int = 65536
    free_prototype_norms: bool = False  # learned; False: 1, the steadier choice
    hidden: int = 2048
    bottleneck: int = 256
    head_batch_norm: bool = False

    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    first_teacher_temperature: float = 0.04  # in the first epoch, rising to the other one by the last of
    teacher_temperature_epochs: int = 0  # these epochs; 0: no rise
    center_momentum: float = 0.9  # 1: the teacher is not centered
    teacher_momentum: float = 0.996
    final_teacher_momentum: float = 1.0  # after the last update, by a cosine
    prototypes_rest_epochs: float = 1.0  # in which the prototypes stay as they started
    weight: float = 1.0  # of the whole objective

    def __post_init__(self) -> None:
        check_literals(self)
        for name in ("size_px", "local_px", "prototypes", "hidden", "bottleneck"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: needs at least 1")
        for name in ("local_views", "teacher_temperature_epochs", "prototypes_rest_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: needs at least 0")
        for name in ("student_temperature", "teacher_temperature", "first_teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: needs a positive number")
        for name in ("center_momentum", "teacher_momentum", "final_teacher_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: needs 0 to 1")
        check_range("area_frac", self.area_frac, 1)
        check_range("local_area_frac", self.local_area_frac, 1)

    def families(self, name: str) -> tuple[ViewFamily, ...]:
        """Return the views that these settings ask the loader for: two global ones, each of its own color law, and local ones."""
        colors = (self.color, self.second_color)
        large = view_pair(name, size_px=self.size_px, area_frac=self.area_frac, aspect=Independent().aspect, colors=colors)
        families = list(large)
        if self.local_views:
            families.append(
                ViewFamily(
                    name=f"{name}_local",
                    views=self.local_views,
                    size_px=(self.local_px, self.local_px),
                    law=Independent(area_frac=self.local_area_frac),
                    mirror="view",
                    color=self.local_color,
                    min_side_px=1,
                )
            )
        return tuple(families)

    def teacher_temperature_in(self, epoch: int) -> float:
        """Return the teacher's temperature in an epoch, counted from 0."""
        if epoch >= self.teacher_temperature_epochs:
            return self.teacher_temperature
        last = max(1, self.teacher_temperature_epochs - 1)
        return ramp(epoch, over=last, start=self.first_teacher_temperature, end=self.teacher_temperature)

    def objective(self, name: str) -> "DINO":
        """Return what is learned by these settings, under a name."""
        return DINO(self, name=name)


class DINO(Objective):
    """DINO as an objective: one term, the mean cross-entropy of all pairs of a teacher's view and another view of the student."""

    center: Tensor

    def __init__(self, settings: DINOSettings, *, name: str = "dino") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = settings.families(name)
        self.couples_samples = settings.head_batch_norm  # the center does as well, but as a mean over micro-batches and ranks

    def setup(self, encoder: Encoder) -> None:
        """Build the head, and the teacher as a copy of both."""
        self.head = DINOHead(encoder.width, self.settings)
        self.teacher = encoder.slow_copy()
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("center", torch.zeros(self.settings.prototypes))

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        if self.settings.head_batch_norm:
            refuse_one(batch, self.name, "BatchNorm has nothing to compare it with")
        # both global views at once, as the authors have them: a BatchNorm of the encoder sees them together
        large = torch.cat([batch.family(f"{self.name}_{number}").pixels for number in (1, 2)], 1)  # (B, 2, 3, H, W)
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher.encode(large).summary)  # (B, 2, K)
        summaries = [encode(large).summary]
        if self.settings.local_views:
            summaries.append(encode(batch.family(f"{self.name}_local")).summary)
        student = self.head(torch.cat(summaries, 1))  # (B, V, K)
        temperature = self.settings.teacher_temperature_in(int(progress.epoch))
        targets = F.softmax((full_precision(teacher) - self.center) / temperature, -1)
        loss = dino_loss(student, targets, temperature=self.settings.student_temperature)
        meters = {"teacher_entropy": torch.special.entr(targets).sum(-1).mean()} | spread(summaries[0][:, 0])
        return Terms(losses={"dino": loss}, meters=meters, seen={"teacher_mean": full_precision(teacher).mean((0, 1))})

    def rule_for(self, name: str, parameter: nn.Parameter) -> ParameterRule:
        """Let all but biases and norms decay, class token and position table too, and the prototypes rest at first."""
        rest = self.settings.prototypes_rest_epochs if name.startswith("head.prototypes.") else 0.0
        return ParameterRule(decays=parameter.ndim > 1 and not name.endswith(".bias"), rest_epochs=rest)

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        settings = self.settings
        self.center.lerp_(seen["teacher_mean"].to(self.center.dtype), 1 - settings.center_momentum)
        start, end = settings.teacher_momentum, settings.final_teacher_momentum
        momentum = cosine(progress.update, updates=progress.updates, start=start, end=end)
        follow(self.teacher, encoder, momentum=momentum)
        follow(self.teacher_head, self.head, momentum=momentum)

    def exported(self, encoder: Encoder) -> Encoder:
        """Return the teacher, which the authors evaluate."""
        return self.teacher


class DINOHead(nn.Module):
    """Three linear layers, a normalization to length 1, and prototypes: features (..., D) -> logits (..., K)."""

    def __init__(self, width: int, settings: DINOSettings) -> None:
        super().__init__()
        widths = (width, settings.hidden, settings.hidden, settings.bottleneck)
        self.mlp = mlp(widths, norm=settings.head_batch_norm, hidden_bias=True, out_bias=True, activation=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(settings.bottleneck, settings.prototypes, free_norms=settings.free_prototype_norms)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.mlp(features.flatten(0, -2))
        return self.prototypes(F.normalize(hidden, dim=-1)).unflatten(0, features.shape[:-1])


def dino_loss(student: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Return the cross-entropy of the student's views under the teacher's, but of a view under itself; the mean of samples and pairs.

    Shapes: student (B, V, K) logits, targets (B, G, K) probabilities of the first G of these views -> ().
    """
    log_shares = F.log_softmax(full_precision(student) / temperature, -1)
    with torch.autocast(student.device.type, enabled=False):  # which would round both sides of the product
        # prototypes are added up sample by sample: one sum over both rounds a thousand times as much
        pairs = -torch.einsum("bgk,bvk->bgv", targets.to(log_shares.dtype), log_shares).mean(0)
    others = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs[others].mean()
