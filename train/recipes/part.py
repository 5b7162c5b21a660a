"""Runs of PART.

Here: `part`, which needs no data of yours; `imagenette_part`, on photographs and a processor; `imagenet_part_vitb16`, as published.
Not here: what the settings mean (settings.py, objectives/part.py).
"""

from dataclasses import replace

from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives import PARTSettings
from wherefrom.train.recipes.sizes import SMALL_VIT, small_on_imagenette
from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings

PATCHES_OF_96_PX = replace(SMALL_VIT, view_size_px=96, patch_size_px=12, summary="mean")  # the class token is not learned


def part() -> TrainSettings:
    """PART of a small ViT on drawn scenes, all pairs of 64 patches of a window: minutes on two cores.

    Neither mirror nor color change: in these scenes left and right, and the light, belong to what is to be learned.
    """
    return TrainSettings(
        recipe="part",
        global_batch=16,
        updates=3500,
        model=PATCHES_OF_96_PX,
        objectives={"part": PARTSettings(size_px=96, patch_px=12, patches=64, area_frac=(0.6, 1.0), mirror="none", color=None)},
        optim=OptimSettings(lr=1.5e-3),
        evaluation=EvaluationSettings(view_px=48),
    )


def imagenette_part() -> TrainSettings:
    """PART of a small ViT on photographs: minutes on two cores."""
    learned = PARTSettings(size_px=96, patch_px=12, patches=64, area_frac=(0.3, 1.0))
    return small_on_imagenette("imagenette_part", "part", learned, model=PATCHES_OF_96_PX, updates=3000)


def imagenet_part_vitb16() -> TrainSettings:
    """PART on ImageNet-1k: ViT-B/16, 400 epochs at batch 1024, rates as its authors' code has them; here all pairs are learned."""
    return TrainSettings(
        recipe="imagenet_part_vitb16",
        needs_data=True,
        global_batch=1024,
        epochs=400,
        precision="bfloat16",
        model=ModelSettings(name="vit_base_patch16_224", view_size_px=224, drop_path=0.1, summary="mean"),
        objectives={"part": PARTSettings()},
        optim=OptimSettings(lr=0.625e-4 * 1024 / 512, weight_decay=0.05, warmup_frac=20 / 400),
        evaluation=EvaluationSettings(every=12500, knn_pictures=50000, pictures=500),
        runtime=RuntimeSettings(log_every=50, checkpoint_every=1250, prefetch=3),
    )
