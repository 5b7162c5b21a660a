"""Settings that change results: which views are cut from every picture, how, and how their color changes.

Here: what a crop law is and the table of those that there are; frozen dataclasses that check themselves once; the fingerprint that a saved
position carries.
Not here: anything that only changes speed (loader.py), the laws (laws.py), drawing (records.py).
"""

import dataclasses
import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.crops import Boxes, Snap
from wherefrom.pipeline.draws import Keys, check_family_names
from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.pipeline.literals import check_literals

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Mirror = Literal["none", "view", "picture"]
PixelType = Literal["uint8", "float16", "float32"]
Earlier = Mapping[str, NDArray[np.float64]]  # family name -> its boxes (B, V, 4)


def check_range(name: str, bounds: tuple[float, float], top: float = math.inf) -> None:
    """Raise ValueError unless 0 < low <= high <= top."""
    low, high = bounds
    if not 0 < low <= high <= top:
        raise ValueError(f"{name}={bounds}: needs 0 < low <= high" + (f" <= {top:g}" if math.isfinite(top) else ""))


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetMoments:
    """What is known of (x, y, ln s) of a law's two views, whatever the picture: the second as seen from the first.

    x, y: of its center, in sides of the first; mean 0 and one deviation, so that neither mirror nor turn changes them.
    ln s: half the log of the ratio of areas; both views have one aspect ratio.
    """

    position_std: float
    log_scale_std: float
    log_scale_mean: float = 0.0


@runtime_checkable
class CropLaw(Protocol):
    """A crop law: how the boxes of a family are drawn. A frozen dataclass of plain numbers and words, none of them called `name`.

    Whatever differs from law to law is asked of the law; nothing else knows which laws there are. One that derives from this class has to
    say no more than how it draws. A package adds its own to the table LAWS by an entry point of group "wherefrom.laws".
    """

    __slots__ = ()

    @abstractmethod
    def draw(self, keys: Keys, views: int, source_size: NDArray[np.float64], snap: Snap, earlier: Earlier) -> Boxes:
        """Draw the boxes of all views of a batch. A row is a function of its key, its size and its earlier boxes, of nothing else.

        Numbers come from `keys`, for the purposes BOX and PLACE. Boxes lie within the picture, on the grid that `snap` says: `snap_boxes`
        does both. Pictures too small for the law are overwritten later; they come with another size, so that nothing fails.
        Shapes: source_size (B, 2), (height, width); earlier: name -> boxes (B, V', 4) of each family before this one -> boxes (B, V, 4).
        Units:  source pixels.
        """

    def frames(self, source_size: NDArray[np.float64], views: int, earlier: Earlier) -> NDArray[np.float64]:
        """Return the sizes of what views are cut from, (height, width) in source pixels: (B, 1, 2), the pictures, or (B, V, 2)."""
        return source_size[:, None]

    def smallest_side_px(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the shortest side that a box may get in frames of these sizes: (..., 2) (height, width) -> (...), pixels.

        Where it is below the family's `min_side_px` a view is invalid and shows the whole picture. By default, never.
        """
        return np.full(sizes.shape[:-1], np.inf)

    @property
    def refers_to(self) -> str | None:
        """The family whose boxes are asked for by `earlier`: the law's own, or one before it."""
        return None

    @property
    def fixed_views(self) -> int | None:
        """The number of views that the law draws, if no other will do; 2 are a pair, the reference first."""
        return None

    def check(self, family: "ViewFamily") -> None:
        """Raise ValueError in one line if the law cannot serve this family."""
        return None

    def target_moments(self) -> TargetMoments | None:
        """Return the moments of the pair's targets, of a law that draws pairs and has them in closed form."""
        return None

    @classmethod
    def examples(cls, of: str) -> Mapping[str, Self]:
        """Return the laws that `wherefrom prove` cuts by; `of` is a family to refer to. Several are told apart by a word, one by ""."""
        return {"": cls()}


LAWS = EntryTable(
    kind="law",
    group="wherefrom.laws",
    own={
        "independent": "wherefrom.pipeline.laws:Independent",
        "paired": "wherefrom.pipeline.laws:Paired",
        "disjoint": "wherefrom.pipeline.laws:Disjoint",
        "overlapping": "wherefrom.pipeline.laws:Overlapping",
        "inside": "wherefrom.pipeline.laws:Inside",
        "center": "wherefrom.pipeline.laws:Center",
        "grid": "wherefrom.pipeline.laws:Grid",
        "scattered": "wherefrom.pipeline.laws:Scattered",
        "tiles": "wherefrom.pipeline.laws:Tiles",
    },
)


def law_name(law: CropLaw) -> str:
    """Return a law's name in LAWS; of one that is not there, where its class is defined, as "module:class"."""
    return LAWS.name_of(type(law))


def check_law(law: object, of: str = "") -> None:
    """Raise ValueError in one line if something is no crop law; `of` tells whose it is."""
    law_text = f"law={law!r:.60}{of}"
    if isinstance(law, type) or not isinstance(law, CropLaw):
        raise ValueError(f"{law_text}: needs a crop law, such as Disjoint(); one of your own derives from CropLaw")
    if not dataclasses.is_dataclass(law) or not law.__dataclass_params__.frozen:
        raise ValueError(f"{law_text}: settings keep and compare it; make its class a dataclass(frozen=True)")
    if "name" in {field.name for field in dataclasses.fields(law)}:
        raise ValueError(f"{law_text}: in settings `name` tells which law it is; call its field of that name otherwise")
    try:
        json.dumps(dataclasses.asdict(law), allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{law_text}: settings keep it as JSON, and it is none: {problem}; use finite numbers, words and tuples") from None


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
        check_range("blur_sigma_px", self.blur_sigma_px)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewFamily:
    """One family of views: how many, how large, cut by which law, mirrored, turned and colored how."""

    name: str
    views: int  # V of this family
    size_px: tuple[int, int]  # (height, width) of the finished view; one number is a square's side
    law: CropLaw = field(default_factory=lambda: LAWS["independent"]())
    mirror: Mirror = "none"  # "view": each by itself; "picture": all views of the picture together, p = 1/2 either way
    turns: bool = False  # quarter turns, uniform over four
    color: ColorLaw | None = None
    color_per: Literal["view", "picture"] = "view"  # whether each view's color changes by itself, or that of all alike
    snap: Snap = "pixel"  # boxes of whole pixels, or of 1/1024 pixel
    min_side_px: int = 16  # pictures in which the law would go below this give invalid views

    def __post_init__(self) -> None:
        if type(self.size_px) is int:
            object.__setattr__(self, "size_px", (self.size_px, self.size_px))
        check_law(self.law, f" of family {self.name!r}")
        check_literals(self)
        if not self.name:
            raise ValueError("name='': a family needs a name, its draws are keyed by it")
        if not 1 <= self.views <= 256:
            raise ValueError(f"views={self.views} of family {self.name!r}: needs 1 to 256")
        if min(self.size_px) < 1:
            raise ValueError(f"size_px={self.size_px} of family {self.name!r}: needs (height, width) of at least 1")
        fixed, law = self.law.fixed_views, law_name(self.law)
        if fixed is not None and self.views != fixed:
            raise ValueError(f"views={self.views} of family {self.name!r}: the {law} law draws {fixed}; take views={fixed}, or another law")
        self.law.check(self)


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
            of, earlier = family.law.refers_to, names[:number]
            if of is not None and of not in (*earlier, family.name):
                raise ValueError(f"family {family.name!r} refers to {of!r}, which must come before it; before it come {earlier}")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std}: needs positive numbers")

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any setting here."""
        settings = dataclasses.asdict(self) | {"laws": [law_name(family.law) for family in self.families]}
        for family in settings["families"]:
            if family["color_per"] == "view":  # as before there was a choice: what was saved then goes on
                del family["color_per"]
        text = json.dumps(settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
