"""Settings that change results: which views are cut from every picture, how, and how their color changes.

Here: frozen dataclasses that check themselves once, and the fingerprint that a saved position carries.
Not here: anything that only changes speed (loader.py), drawing (draws.py, crops.py, color.py).
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.draws import check_family_names
from wherefrom.pipeline.literals import check_literals

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Snap = Literal["pixel", "none"]
Mirror = Literal["none", "view", "picture"]
PixelType = Literal["uint8", "float16", "float32"]


def _check_range(name: str, bounds: tuple[float, float], top: float = math.inf) -> None:
    low, high = bounds
    if not 0 < low <= high <= top:
        raise ValueError(f"{name}={bounds}: needs 0 < low <= high" + (f" <= {top:g}" if math.isfinite(top) else ""))


def _smallest_side_px(area_frac: float, aspect: tuple[float, float], source_size: NDArray) -> NDArray:
    return np.sqrt(area_frac * source_size.prod(-1, dtype=np.float64) * min(aspect[0], 1 / aspect[1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Independent:
    """RandomResizedCrop's law: uniform in area, log-uniform in aspect, then an offset uniform over all valid ones.

    Source: Inception crop, arXiv:1409.4842; ten tries and the centered fallback as torchvision 0.29 RandomResizedCrop.
    """

    area_frac: tuple[float, float] = (0.08, 1.0)  # of the source's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, in the source
    tries: int = 10

    def __post_init__(self) -> None:
        check_literals(self)
        _check_range("area_frac", self.area_frac, 1)
        _check_range("aspect", self.aspect)
        if self.tries < 1:
            raise ValueError(f"tries={self.tries}: needs at least 1")

    def smallest_side_px(self, source_size: NDArray) -> NDArray:
        """Return the shortest side that this law asks for: source_size (..., 2) (height, width) -> (...) float64, pixels."""
        return _smallest_side_px(self.area_frac[0], self.aspect, source_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Pairs (2 views: reference, target) whose relative position and scale are uniform by construction.

    p, in reference sides, is uniform on the square of half side `position_max` less the center of half side `position_min`;
    ln s is uniform in +-`log_scale_max`; the reference's side, a fraction of the short side, is log-uniform in `side_frac`.
    Raises: ValueError if some draw would not fit: the upper side must not exceed (1 - 2 border) / (a + s_max j / 2 + 1/2), nor
            (1 - 2 border) / (s_max j).
    Source: the law is ours; the paper's rejection sampler is known from secondary descriptions only (arXiv:2605.09963).
    """

    position_max: float = 1.5
    position_min: float = 0.5
    log_scale_max: float = math.log(2)
    side_frac: tuple[float, float] | None = None  # None: (0.10, the smaller of 0.33 and the largest that always fits)
    aspect_jitter: float = 1.0  # the target's width is stretched by up to this factor and its height shrunk by it, or the other way
    border_frac: float = 0.0  # of the short side, kept free on every side

    def __post_init__(self) -> None:
        check_literals(self)
        if not 0 <= self.position_min < self.position_max:
            raise ValueError(f"position_min={self.position_min}, position_max={self.position_max}: needs 0 <= min < max")
        if self.log_scale_max < 0 or self.aspect_jitter < 1 or not 0 <= self.border_frac < 0.5:
            raise ValueError(
                f"log_scale_max={self.log_scale_max}, aspect_jitter={self.aspect_jitter}, border_frac={self.border_frac}: "
                "needs log_scale_max >= 0, aspect_jitter >= 1 and 0 <= border_frac < 0.5"
            )
        low, high = self.side_bounds
        _check_range("side_frac", (low, high), 1)
        if high > self.largest_side_frac + 1e-12:
            raise ValueError(
                f"side_frac={(low, high)}: some pairs would not fit; the upper bound must be at most {self.largest_side_frac:.4f}"
            )

    @property
    def largest_side_frac(self) -> float:
        """The largest reference side, as a fraction of the short side, with which every draw of (p, s) fits."""
        largest_target = math.exp(self.log_scale_max) * self.aspect_jitter
        reach = max(self.position_max + largest_target / 2 + 0.5, largest_target)  # the second: it sticks out of the reference both ways
        return (1 - 2 * self.border_frac) / reach

    @property
    def side_bounds(self) -> tuple[float, float]:
        """The resolved `side_frac`."""
        return self.side_frac or (min(0.10, self.largest_side_frac), min(0.33, self.largest_side_frac))

    @property
    def position_std(self) -> float:
        """Standard deviation of each axis of p: sqrt((a^2 + d^2) / 3)."""
        return math.sqrt((self.position_max**2 + self.position_min**2) / 3)

    @property
    def log_scale_std(self) -> float:
        """Standard deviation of ln s: its half range over sqrt(3)."""
        return self.log_scale_max / math.sqrt(3)

    def smallest_side_px(self, source_size: NDArray) -> NDArray:
        """Return the shortest reference side asked for: source_size (..., 2) (height, width) -> (...) float64, pixels."""
        return source_size.min(-1) * self.side_bounds[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Disjoint:
    """Views that do not overlap: each is redrawn up to `tries` times, then the least overlapping draw is taken.

    Uniform in area and log-uniform in aspect, as `Independent`; how many sets were free of overlap is counted.
    """

    area_frac: tuple[float, float] = (0.05, 0.12)  # of the source's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, in the source
    min_gap_frac: float = 0.0  # of the short side, between any two boxes
    tries: int = 24

    def __post_init__(self) -> None:
        check_literals(self)
        _check_range("area_frac", self.area_frac, 1)
        _check_range("aspect", self.aspect)
        if self.tries < 1 or self.min_gap_frac < 0:
            raise ValueError(f"tries={self.tries}, min_gap_frac={self.min_gap_frac}: needs tries >= 1 and min_gap_frac >= 0")

    def smallest_side_px(self, source_size: NDArray) -> NDArray:
        """Return the shortest side that this law asks for: source_size (..., 2) (height, width) -> (...) float64, pixels."""
        return _smallest_side_px(self.area_frac[0], self.aspect, source_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlapping:
    """Views that share at least `min_shared_frac` of the picture's area with every view of the family `of`.

    `of` may be the family itself: then each view meets the earlier ones. After `tries` the best draw stands if it keeps the
    bound, else the box of the first view of `of`; where even that does not keep it the view is marked invalid.
    Source: the 1 % and 2 % bounds of GTSA, arXiv:2304.08014.
    """

    of: str
    area_frac: tuple[float, float] = (0.1, 0.3)  # of the source's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, in the source
    min_shared_frac: float = 0.01  # of the source's area
    tries: int = 32

    def __post_init__(self) -> None:
        check_literals(self)
        _check_range("area_frac", self.area_frac, 1)
        _check_range("aspect", self.aspect)
        if self.tries < 1 or not 0 < self.min_shared_frac <= 1:
            raise ValueError(f"tries={self.tries}, min_shared_frac={self.min_shared_frac}: needs tries >= 1 and 0 < min_shared_frac <= 1")

    def smallest_side_px(self, source_size: NDArray) -> NDArray:
        """Return the shortest side that this law asks for: source_size (..., 2) (height, width) -> (...) float64, pixels."""
        return _smallest_side_px(self.area_frac[0], self.aspect, source_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inside:
    """Views contained in the views of the family `of`: view v lies inside view v modulo their number.

    Uniform in area (a fraction of the containing box) and log-uniform in aspect, then anywhere inside.
    """

    of: str
    area_frac: tuple[float, float] = (0.1, 0.5)  # of the containing box's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, in the source
    tries: int = 10

    def __post_init__(self) -> None:
        check_literals(self)
        _check_range("area_frac", self.area_frac, 1)
        _check_range("aspect", self.aspect)
        if self.tries < 1:
            raise ValueError(f"tries={self.tries}: needs at least 1")

    def smallest_side_px(self, containing: NDArray) -> NDArray:
        """Return the shortest side asked for in boxes of these sizes: containing (..., 2) (height, width) -> (...) float64, pixels."""
        return _smallest_side_px(self.area_frac[0], self.aspect, containing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Center:
    """The whole picture, or the centered box that Resize(resize_px) + CenterCrop(crop_px) shows; for evaluation."""

    resize_px: int | None = None  # the short side after resizing; None: the whole picture
    crop_px: int | None = None

    def __post_init__(self) -> None:
        check_literals(self)
        if (self.resize_px is None) != (self.crop_px is None):
            raise ValueError(f"resize_px={self.resize_px}, crop_px={self.crop_px}: give both, or neither for the whole picture")
        if self.resize_px is not None and self.crop_px is not None and not 0 < self.crop_px <= self.resize_px:
            raise ValueError(f"resize_px={self.resize_px}, crop_px={self.crop_px}: needs 0 < crop_px <= resize_px")


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Boxes of `side_frac` of either side, spread evenly from edge to edge, row by row; for evaluation. Nothing is drawn."""

    rows: int = 3
    cols: int = 3
    side_frac: float = 0.4  # of the source's height and width

    def __post_init__(self) -> None:
        check_literals(self)
        if self.rows < 1 or self.cols < 1 or not 0 < self.side_frac <= 1:
            raise ValueError(f"rows={self.rows}, cols={self.cols}, side_frac={self.side_frac}: needs at least 1, 1 and 0 < side_frac <= 1")


DrawnLaw = Independent | Paired | Disjoint | Overlapping | Inside
Law = DrawnLaw | Center | Grid  # the last two show any picture, however small


@dataclass(frozen=True, kw_only=True, slots=True)
class ColorLaw:
    """How far each view's color is changed; the ranges are torchvision's ColorJitter ranges, the law is a matrix (color.py)."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # of a full turn, as in ColorJitter
    jitter_prob: float = 0.8
    gray_prob: float = 0.2
    blur_prob: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)  # pixels of the finished view
    solarize_prob: float = 0.0

    def __post_init__(self) -> None:
        check_literals(self)
        for name in ("jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a probability lies in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: the factor is drawn from [1 - {name}, 1 + {name}]; needs 0 to 1")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue={self.hue}: needs 0 to 0.5 of a turn")
        _check_range("blur_sigma_px", self.blur_sigma_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewFamily:
    """One family of views: how many, how large, cut by which law, mirrored, turned and colored how."""

    name: str
    views: int  # V of this family
    size_px: tuple[int, int]  # (height, width) of the finished view
    law: Law = Independent()
    mirror: Mirror = "none"  # "view": each by itself; "picture": all views of the picture together, p = 1/2 either way
    turns: bool = False  # quarter turns, uniform over four
    color: ColorLaw | None = None
    snap: Snap = "pixel"  # boxes of whole pixels, or of 1/1024 pixel
    min_side_px: int = 16  # pictures in which the law would go below this give invalid views

    def __post_init__(self) -> None:
        if not isinstance(self.law, Law):
            laws = ", ".join(law.__name__ for law in get_args(Law))
            shown = f"law={self.law!r:.60} of family {self.name!r}"
            raise ValueError(f"{shown}: needs one of {laws}, such as law=Disjoint(); others are not taken")
        check_literals(self)
        if not self.name:
            raise ValueError("name='': a family needs a name, its draws are keyed by it")
        if not 1 <= self.views <= 256:
            raise ValueError(f"views={self.views} of family {self.name!r}: needs 1 to 256")
        if min(self.size_px) < 1:
            raise ValueError(f"size_px={self.size_px} of family {self.name!r}: needs (height, width) of at least 1")
        if isinstance(self.law, Paired) and self.views != 2:
            raise ValueError(f"views={self.views} of family {self.name!r}: the paired law draws 2, reference and target")
        if isinstance(self.law, Grid) and self.views != self.law.rows * self.law.cols:
            raise ValueError(f"views={self.views} of family {self.name!r}: its grid has {self.law.rows} x {self.law.cols}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRecipe:
    """All views of a picture: the families, and how pixels are handed over."""

    families: tuple[ViewFamily, ...]
    pixels: PixelType = "float32"  # floats are normalized, uint8 is as rendered
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of values in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_literals(self)
        names = [family.name for family in self.families]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"families {names}: needs at least one, each name once")
        check_family_names(names)
        for number, family in enumerate(self.families):
            earlier = names[: number + isinstance(family.law, Overlapping)]
            if isinstance(family.law, Overlapping | Inside) and family.law.of not in earlier:
                raise ValueError(f"family {family.name!r} refers to {family.law.of!r}, which must come before it; before it come {earlier}")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std}: needs positive numbers")

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any setting here."""
        text = json.dumps(dataclasses.asdict(self) | {"laws": [type(family.law).__name__ for family in self.families]}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
