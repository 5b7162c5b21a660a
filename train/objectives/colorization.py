"""Colorization: tell the colors of a gray picture, as a distribution over bins of hue, at every token.

Here: the settings, soft targets, weights of rare colors, the objective.
Not here: CIELAB and the bins (lab.py).
Source: arXiv 1603.08511; what differs is listed in docs/methods/colorization.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.literals import check_literals
from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD, ColorLaw, Mirror, ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.train.encoder import Encoder
from wherefrom.train.objective import Encode, Objective, Panel, Progress, Terms
from wherefrom.train.objectives.collapse import spread
from wherefrom.train.objectives.heads import full_precision
from wherefrom.train.objectives.lab import color_bins, gray_from_lightness, lab_from_rgb, rgb_from_lab

NEAREST = 5  # bins of a soft target
SHOWN_LIGHTNESS = 65  # of colors without their lightness: where most can be shown
SIGMA = 5.0  # of its Gaussian, and of that which smooths the prior, in a and b


@dataclass(frozen=True, kw_only=True, slots=True)
class ColorizationSettings:
    """Every choice of colorization, as for ImageNet but for the side of its views, which is of a plug-in's.

    Raises: ValueError in one line if the color law takes away the colors that are to be told.
    """

    weight: float = 1.0  # of the whole objective
    size_px: int = 96  # side of the finished, square view; 224 in the recipe for ImageNet
    area_frac: tuple[float, float] = (0.08, 1.0)  # of the picture that a view shows
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    mirror: Mirror = "view"
    color: ColorLaw | None = None  # before the picture is made gray

    uniform_share: float = 0.5  # lambda: of a uniform prior, mixed into that of the pictures; 1: all colors weigh alike
    prior_momentum: float = 0.99  # at which the prior follows the pictures, once it has seen a hundred updates

    def __post_init__(self) -> None:
        check_literals(self)
        if self.color is not None and (self.color.gray_prob > 0 or self.color.solarize_prob > 0):
            raise ValueError(
                f"color: gray_prob={self.color.gray_prob}, solarize_prob={self.color.solarize_prob}: colors are to be told; set both to 0"
            )
        if not 0 < self.uniform_share <= 1 or not 0 <= self.prior_momentum < 1:
            raise ValueError(
                f"uniform_share={self.uniform_share}, prior_momentum={self.prior_momentum}: needs 0 < share <= 1 and 0 <= momentum < 1"
            )
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight}: cannot be negative")
        _ = self.family("colorization")  # it checks its own numbers

    def family(self, name: str) -> ViewFamily:
        """Return the one view that these settings ask the loader for."""
        return ViewFamily(
            name=name,
            views=1,
            size_px=(self.size_px, self.size_px),
            law=Independent(area_frac=self.area_frac, aspect=self.aspect),
            mirror=self.mirror,
            color=self.color,
            min_side_px=1,
        )

    def objective(self, name: str) -> "Colorization":
        """Return what is learned by these settings, under a name."""
        return Colorization(self, name=name)


class Colorization(Objective):
    """Colorization as an objective: one term, the weighted cross-entropy of color bins over the cells of the token map.

    Rare colors weigh more, by a prior that follows the run's own pictures: a buffer, so that a checkpoint holds it.
    Chance is the meter `commonest`: the accuracy of always telling the batch's commonest bin.
    """

    bins: Tensor
    smoothing: Tensor
    prior: Tensor

    def __init__(self, settings: ColorizationSettings, *, name: str = "colorization") -> None:
        super().__init__()
        self.settings = settings
        self.name = name
        self.weight = settings.weight
        self.families = (settings.family(name),)
        bins = color_bins()
        self.chance = 1 / len(bins)
        self.register_buffer("bins", bins, persistent=False)
        kernel = (-(torch.cdist(bins, bins) ** 2) / (2 * SIGMA**2)).exp()
        self.register_buffer("smoothing", kernel / kernel.sum(0), persistent=False)  # of each bin's share, none is lost
        self.register_buffer("prior", torch.full((len(bins),), 1 / len(bins)))

    def setup(self, encoder: Encoder) -> None:
        """Build the head, a linear layer at every token."""
        self.head = nn.Linear(encoder.width, len(self.bins))

    def forward(self, batch: Batch, encode: Encode, progress: Progress) -> Terms:
        """Return the term, how often the nearest bin is told, how often the commonest would be it, and how summaries spread."""
        pixels = batch.family(self.name).pixels[:, 0]
        with torch.autocast(pixels.device.type, enabled=False):
            gray, hues = gray_and_hues(pixels)
        features = encode(gray.unsqueeze(1))
        logits = self.head(features.tokens[:, 0])  # (B, h, w, Q)
        with torch.autocast(pixels.device.type, enabled=False):
            cells = F.adaptive_avg_pool2d(hues, logits.shape[1:3]).permute(0, 2, 3, 1)  # (B, h, w, 2)
            targets, nearest = soft_targets(cells, self.bins)
            error = -(targets * full_precision(logits).log_softmax(-1)).sum(-1)
            loss = (self.weights_of_bins()[nearest] * error).mean()
        shares = F.one_hot(nearest, len(self.bins)).to(error.dtype).mean((0, 1, 2))
        accuracy = (logits.detach().argmax(-1) == nearest).float().mean()
        meters = {"accuracy": accuracy, "commonest": shares.max()} | spread(features.summary)
        return Terms(losses={"color": loss}, meters=meters, seen={"shares": shares})

    def after_step(self, encoder: Encoder, progress: Progress, seen: Mapping[str, Tensor]) -> None:
        """Let the prior follow: at first the mean of what was seen, then a moving average of it."""
        share = max(1 / (progress.update + 1), 1 - self.settings.prior_momentum)
        self.prior.lerp_(seen["shares"].to(self.prior), share)

    def shown(self, batch: Batch) -> Sequence[Panel]:
        """Return the gray picture, and the colors that are to be told, all as light as each other."""
        gray, hues = gray_and_hues(batch.family(self.name).pixels[:, 0])
        lightness = torch.full_like(hues[:, :1], SHOWN_LIGHTNESS)
        colors = _normalized(rgb_from_lab(torch.cat([lightness, hues], 1)).clamp(0, 1).unbind(1))
        return [
            Panel(
                title=f"{self.name}: what the network is given, and what it is to tell",
                pictures=torch.stack([gray, colors.to(gray)], 1),
                labels=("in gray", f"a and b, at lightness {SHOWN_LIGHTNESS}"),
                captions=["told for each token, the mean of its pixels"],
            )
        ]

    def weights_of_bins(self) -> Tensor:
        """Return how much a cell of each nearest bin weighs, (Q,): 1 on average over the smoothed prior."""
        smoothed = self.smoothing @ self.prior
        share = self.settings.uniform_share
        weights = 1 / ((1 - share) * smoothed + share / len(smoothed))
        return weights / (weights * smoothed).sum()


def gray_and_hues(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return pictures in gray, normalized as they were, and their (a, b) in CIELAB.

    Shapes: pixels (B, 3, H, W), normalized as by default -> (B, 3, H, W) with three channels of one level, (B, 2, H, W).
    """
    channels = full_precision(pixels).unbind(1)
    rgb = torch.stack([channel * std + mean for channel, mean, std in zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True)], 1)
    lab = lab_from_rgb(rgb.clamp(0, 1))
    level = gray_from_lightness(lab[:, 0])
    return _normalized([level] * 3).to(pixels), lab[:, 1:]


def _normalized(channels: Sequence[Tensor]) -> Tensor:
    """Return red, green and blue in [0, 1], (B, H, W) each, as one picture that is normalized as by default."""
    return torch.stack([(channel - mean) / std for channel, mean, std in zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True)], 1)


def soft_targets(hues: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Return distributions over the five bins nearest to each color, by a Gaussian of their distance, and the nearest.

    Shapes: hues (..., 2), bins (Q, 2) -> (..., Q), (...) int64.
    """
    squared = (hues[..., :1] - bins[:, 0]).square() + (hues[..., 1:] - bins[:, 1]).square()  # (..., Q)
    least, which = squared.topk(NEAREST, largest=False)
    shares = (-(least - least[..., :1]) / (2 * SIGMA**2)).exp()
    return torch.zeros_like(squared).scatter(-1, which, shares / shares.sum(-1, keepdim=True)), which[..., 0]
