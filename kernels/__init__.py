"""Tensors in, tensors out: geometry targets and view rendering, useful without anything else of ours."""

from wherefrom.kernels.pair_targets import pair_targets

__all__ = ["pair_targets"]
