"""What a view is, where it came from, how it is drawn, rendered and delivered."""

from wherefrom.pipeline.crops import draw_geometry
from wherefrom.pipeline.geometry import (
    compose,
    grid_sample_theta,
    invert,
    iou,
    map_boxes,
    map_points,
    overlap_area,
    token_boxes,
    view_to_source,
)
from wherefrom.pipeline.loader import Loader, LoaderStats, make_loader
from wherefrom.pipeline.recipe import Centre, ColourLaw, Disjoint, Grid, Independent, Inside, Overlapping, Paired, Recipe, ViewFamily
from wherefrom.pipeline.shards import ShardIndex
from wherefrom.pipeline.views import Batch, Photometric, ViewGeometry, Views

__all__ = [
    "Batch",
    "Centre",
    "ColourLaw",
    "Disjoint",
    "Grid",
    "Independent",
    "Inside",
    "Loader",
    "LoaderStats",
    "Overlapping",
    "Paired",
    "Photometric",
    "Recipe",
    "ShardIndex",
    "ViewFamily",
    "ViewGeometry",
    "Views",
    "compose",
    "draw_geometry",
    "grid_sample_theta",
    "invert",
    "iou",
    "make_loader",
    "map_boxes",
    "map_points",
    "overlap_area",
    "token_boxes",
    "view_to_source",
]
