"""The evidence's runs at a size that takes a second: hosts, SP and protocols in miniature.

A module of its own, which other processes can import.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from wherefrom.tools.evidence import metrics, plan
from wherefrom.train import (
    DINOSettings,
    MAESettings,
    MoCoV3Settings,
    ModelSettings,
    ObjectiveSettings,
    OptimSettings,
    SimCLRSettings,
    TrainSettings,
)

VIT = ModelSettings(name="vit_tiny_patch16_224", view_size_px=32, patch_size_px=8, width=16, depth=1, heads=2)
LEARNED: dict[str, ObjectiveSettings] = {
    "simclr": SimCLRSettings(size_px=32, hidden=16, out=8, layers=2, init_std=None),
    "moco_v3": MoCoV3Settings(size_px=32, hidden=16, out=8),
    "dino": DINOSettings(size_px=32, local_px=16, local_views=2, prototypes=32, hidden=16, bottleneck=8, prototypes_rest_epochs=0.0),
    "mae": MAESettings(size_px=32, decoder_width=16, decoder_depth=1, decoder_heads=2),
}
SP = replace(plan.LAWS["four"], size_px=16, min_side_px=4, weight=1.0)


def tiny_host(host: str) -> TrainSettings:
    """Return a host's settings in miniature: 8 pictures an update, 5 updates an epoch."""
    model = replace(VIT, positions="sincos" if host in ("mae", "moco_v3") else "learned")
    return TrainSettings(recipe="demo", global_batch=8, model=model, objectives={host: LEARNED[host]}, optim=OptimSettings(lr=1e-3))


def shrink(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Make hosts, their lengths, SP and protocols small, by `setattr` or a patch that is undone."""
    set_attribute(plan, "host_settings", tiny_host)
    set_attribute(plan, "UPDATES", dict.fromkeys(plan.HOSTS, 20))
    set_attribute(plan, "CANDIDATES", {**plan.CANDIDATES, "sp-four-1": SP})
    set_attribute(plan, "CHOSEN", dict.fromkeys(plan.HOSTS, "sp-four-1"))
    set_attribute(metrics, "ON_PICTURES", ("knn",))
    set_attribute(metrics, "ON_SCENES", ())
