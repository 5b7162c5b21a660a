"""Two views of a picture that are drawn alike but for their color: what BYOL, and all that took its views over, learn from.

Here: the two color laws, and the families.
Not here: what is learned from the views.
Source: arXiv 2006.07733, table 6. Its brightness is a sum where ours is a factor; its views are cut by bicubic, ours by triangle filters.
"""

from wherefrom.pipeline.laws import Independent
from wherefrom.pipeline.view_recipe import ColorLaw, ViewFamily

FIRST_COLOR = ColorLaw(blur_prob=1.0)
SECOND_COLOR = ColorLaw(blur_prob=0.1, solarize_prob=0.2)


def view_pair(
    name: str,
    *,
    size_px: int,
    area_frac: tuple[float, float],
    aspect: tuple[float, float],
    colors: tuple[ColorLaw | None, ColorLaw | None],
) -> tuple[ViewFamily, ViewFamily]:
    """Return two families of one view each, NAME_1 and NAME_2, mirrored each by itself, with a color law each.

    Units: size_px is the side of the finished, square views; area_frac is of the picture's area.
    """
    first, second = (
        ViewFamily(
            name=f"{name}_{number}",
            views=1,
            size_px=(size_px, size_px),
            law=Independent(area_frac=area_frac, aspect=aspect),
            mirror="view",
            color=color,
            min_side_px=1,
        )
        for number, color in enumerate(colors, 1)
    )
    return first, second
