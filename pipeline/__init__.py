"""What a view is, where it came from, how it is drawn, rendered and delivered."""

from wherefrom.pipeline.annotations import Carried, carry
from wherefrom.pipeline.color import color_matrix
from wherefrom.pipeline.crops import Boxes, Snap, snap_boxes
from wherefrom.pipeline.demo.shards import DemoShards, demo_shards
from wherefrom.pipeline.draws import Keys, Purpose, uniform
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
from wherefrom.pipeline.laws import Center, Disjoint, Grid, Independent, Inside, Overlapping, Paired, Scattered, Tiles
from wherefrom.pipeline.loader import Loader, LoaderStats, make_loader
from wherefrom.pipeline.order import KeyedSampler, Order
from wherefrom.pipeline.packing.pack import PackReport, pack
from wherefrom.pipeline.packing.shard import PackSettings
from wherefrom.pipeline.proof.prove import ProofReport, proof_cases, prove
from wherefrom.pipeline.records import draw_records, keyed_permutations, keyed_uniform
from wherefrom.pipeline.render.choose import RENDERERS, make_renderer
from wherefrom.pipeline.render.renderer import Cutter, Rendered, Renderer, RendererEntry
from wherefrom.pipeline.render.threads import in_threads
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.transform import Transformed, ViewTransform, collate
from wherefrom.pipeline.view_recipe import LAWS, ColorLaw, CropLaw, Earlier, TargetMoments, ViewFamily, ViewRecipe
from wherefrom.pipeline.views import Batch, CommonBoxes, Photometric, Record, ViewGeometry, Views

__all__ = [  # in reading order  # noqa: RUF022
    "ShardIndex",
    "pack",
    "PackSettings",
    "PackReport",
    "ViewRecipe",
    "ViewFamily",
    "ColorLaw",
    "Independent",
    "Paired",
    "Disjoint",
    "Overlapping",
    "Inside",
    "Scattered",
    "Center",
    "Grid",
    "Tiles",
    "CropLaw",
    "TargetMoments",
    "Earlier",
    "Snap",
    "LAWS",
    "Boxes",
    "Keys",
    "Purpose",
    "uniform",
    "snap_boxes",
    "make_loader",
    "Loader",
    "LoaderStats",
    "Batch",
    "Views",
    "Record",
    "ViewGeometry",
    "CommonBoxes",
    "Photometric",
    "color_matrix",
    "draw_records",
    "keyed_uniform",
    "keyed_permutations",
    "view_to_source",
    "invert",
    "compose",
    "map_points",
    "map_boxes",
    "overlap_area",
    "iou",
    "token_boxes",
    "grid_sample_theta",
    "ViewTransform",
    "Transformed",
    "Carried",
    "Order",
    "KeyedSampler",
    "carry",
    "collate",
    "RENDERERS",
    "make_renderer",
    "Renderer",
    "Rendered",
    "RendererEntry",
    "Cutter",
    "in_threads",
    "prove",
    "proof_cases",
    "ProofReport",
    "demo_shards",
    "DemoShards",
]
