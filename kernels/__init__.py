"""Tensors in, tensors out: geometry targets and view rendering, useful without anything else of ours."""

from wherefrom.kernels.pair_targets import pair_targets
from wherefrom.kernels.render_views_reference import render_views_reference

__all__ = ["pair_targets", "render_views_reference"]
