"""MoCo v3: tell which key, made by a slow network, shows the picture of a query, among all pictures of a batch.

Here: the settings of both forms, for ViTs and for ResNets; how a ViT's weights start; the loss; the objective.
Not here: fixed positions and the frozen patch embedding (settings of the model), optimizer and schedule (recipes).
Source: arXiv 2104.02057, numbers and order as its authors' code has them (facebookresearch/moco-v3, commit c349e6e); written anew.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, ParameterRule, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import full_precision, mlp, refuse_one
from wherefrom.train.objectives.teacher import follow
from wherefrom.train.objectives.view_pairs import FIRST_COLOR, SECOND_COLOR, view_pair
from wherefrom.train.over_ranks import gathered, own_rank
from wherefrom.train.schedule import cosine


@dataclass(frozen=True, kw_only=True, slots=True)
class MoCoV3Settings:
    """Every choice of MoCo v3, as for ViTs. Beside ResNets its authors have what follows "ResNet:"."""

    size_px: int = 224  # side of both views
    area_frac: tuple[float, float] = (0.08, 1.0)  # of the picture that a view shows; ResNet: from 0.2
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    color: ColorLaw | None = field(default_factory=lambda: FIRST_COLOR)  # of the first view
    second_color: ColorLaw | None = field(default_factory=lambda: SECOND_COLOR)

    temperature: float = 0.2  # ResNet: 1
    hidden: int = 4096
    out: int = 256
    projector_layers: int = 3  # ResNet: 2
    predictor_norm: bool = True  # BatchNorm after the predictor's last layer; ResNet: none
    key_momentum: float = 0.99  # of the slow network that makes keys
    final_key_momentum: float = 1.0  # after the last update, by a cosine
    decay_all: bool = True  # biases, norms and class token decay, too; ResNet, with LARS: they do not
    start: Literal["moco_v3", "timm"] = "moco_v3"  # how a ViT's weights start, unless model.weights says
    weight: float = 1.0  # of the whole objective

    def __post_init__(self) -> None:
        check_literals(self)
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: needs a positive number")
        for name in ("hidden", "out", "projector_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: needs at least 1")
        for name in ("key_momentum", "final_key_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: needs 0 to 1")
        _ = self.families("moco_v3")  # they check their own numbers

    def families(self, name: str) -> tuple[ViewFamily, ViewFamily]:
        """Return the views that these settings ask the loader for: two, each of its own color law."""
        colors = (self.color, self.second_color)
        return view_pair(name, size_px=self.size_px, area_frac=self.area_frac, aspect=self.aspect, colors=colors)

    def objective(self, name: str) -> "MoCoV3":
        """Return what is learned by these settings, under a name."""
        return MoCoV3(self, name=name)


class MoCoV3(Objective):
    """MoCo v3 as an objective: one term, the sum of both directions. Every view passes alone, with BatchNorm statistics of its own."""

    couples_samples = True

    def __init__(self, settings: MoCoV3Settings, *, name: str = "moco_v3") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = settings.families(name)

    def setup(self, encoder: Encoder) -> None:
        """Build projector and predictor, start a ViT's weights if so set, and copy encoder and projector for the keys."""
        settings = self.settings
        if settings.start == "moco_v3" and encoder.settings.weights is None and encoder.settings.is_vit:
            _start_vit(encoder.model)
        hidden = [settings.hidden] * (settings.projector_layers - 1)
        self.projector = mlp([encoder.width, *hidden, settings.out], closing="plain")
        self.predictor = mlp([settings.out, settings.hidden, settings.out], closing="plain" if settings.predictor_norm else "none")
        self.key_encoder = encoder.slow_copy()
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the term, how often a query's nearest key is its own, and how features spread."""
        refuse_one(batch, self.name, "there are no others to tell it from")
        views = [batch.family(family.name) for family in self.families]
        features = [encode(one).summary[:, 0] for one in views]
        queries = [self.predictor(self.projector(one)) for one in features]
        with torch.no_grad():
            keys = [self.key_projector(self.key_encoder.encode(one).summary[:, 0]) for one in views]
        one_way, accuracy = contrast(queries[0], keys[1], temperature=self.settings.temperature)
        other_way, _ = contrast(queries[1], keys[0], temperature=self.settings.temperature)
        meters = {"contrast_accuracy": accuracy} | spread(features[0])
        return Terms(losses={"contrast": one_way + other_way}, meters=meters)

    def rule_for(self, name: str, parameter: nn.Parameter) -> ParameterRule:
        """Let all decay, or matrices alone."""
        return ParameterRule(decays=True if self.settings.decay_all else None)

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        """Let the slow network follow, by the momentum of the next update: the authors' moves before it makes that update's keys."""
        start, end = self.settings.key_momentum, self.settings.final_key_momentum
        momentum = cosine(progress.update + 1, updates=progress.updates, start=start, end=end)
        follow(self.key_encoder, encoder, momentum=momentum)
        follow(self.key_projector, self.projector, momentum=momentum)


def contrast(queries: Tensor, keys: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of a query's own key among those of all ranks, times twice the temperature, and how often it is the nearest.

    Shapes: queries and keys (B, D), of each rank -> scalars. Keys get no gradient.
    """
    with torch.autocast(queries.device.type, enabled=False):
        own, everyone = (F.normalize(full_precision(each), dim=-1) for each in (queries, gathered(keys.detach())))
        logits = own @ everyone.mT / temperature  # (B, ranks * B)
        counterpart = own_rank() * len(own) + torch.arange(len(own), device=own.device)
        accuracy = (logits.detach().argmax(1) == counterpart).float().mean()
        return 2 * temperature * F.cross_entropy(logits, counterpart), accuracy


@torch.no_grad()
def _start_vit(vit: VisionTransformer) -> None:
    """Start a ViT's weights as the authors do: Xavier uniform of every matrix, those of queries, keys and values apart; biases of 0."""
    for name, layer in vit.named_modules():
        if isinstance(layer, nn.Linear):
            for matrix in layer.weight.chunk(3) if name.endswith("attn.qkv") else (layer.weight,):
                nn.init.xavier_uniform_(matrix)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    patches = vit.patch_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=1e-6)
