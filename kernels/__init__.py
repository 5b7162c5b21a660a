"""Tensors in, tensors out: pair geometry, its loss, ROI pooling and view rendering, useful without anything else of ours.

Each has a plain definition (*_reference.py), a fast path on the CPU, and Triton kernels; `backend` chooses, "auto" by the device.
"""

from wherefrom.kernels.pair_loss import PairLoss, pair_loss
from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.pair_targets_reference import PairUnits
from wherefrom.kernels.render_views import ViewPlan, ViewRequest, render_views
from wherefrom.kernels.render_views_reference import render_views_reference
from wherefrom.kernels.roi_align import roi_align
from wherefrom.kernels.roi_align_pairs import roi_align_pairs

__all__ = [  # in reading order  # noqa: RUF022
    "pair_targets",
    "PairUnits",
    "pair_loss",
    "PairLoss",
    "roi_align",
    "roi_align_pairs",
    "render_views",
    "render_views_reference",
    "ViewPlan",
    "ViewRequest",
]
