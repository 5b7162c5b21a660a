"""Runs of GTSA.

Here: `gtsa`, which needs no data of yours; `imagenette_gtsa`, on photographs and a processor; `coco_gtsa_vits16`, the author's.
Not here: what the settings mean (settings.py, objectives/gtsa.py).
"""

from dataclasses import replace

from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives import GTSASettings
from wherefrom.train.objectives.gtsa import COLOR
from wherefrom.train.recipes.sizes import SIGMA_PX, SMALL_VIT, small_on_imagenette
from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings

# patches of 8 px: 64 in a global view, 16 in a local one; the class token is never supervised, so the mean token sums a view up
SMALL = replace(SMALL_VIT, patch_size_px=8, resampling="plain", summary="mean")
SMALL_OPTIM = OptimSettings(
    lr=5e-4, betas=(0.9, 0.999), weight_decay=0.04, final_weight_decay=0.4, warmup_frac=0.1, final_lr=1e-6, clip_by="parameter"
)
SMALL_GTSA = GTSASettings(
    size_px=64,
    local_views=4,
    local_px=32,
    color=replace(COLOR, blur_sigma_px=SIGMA_PX),
    hidden=128,
    out=256,
    region_bins=6,
    local_region_bins=3,
    rotation_hidden=(256, 256, 64),
    teacher_momentum=0.99,
)


def gtsa() -> TrainSettings:
    """GTSA of a small ViT on drawn scenes, two global and four local views: minutes on two cores."""
    return TrainSettings(
        recipe="gtsa",
        global_batch=32,
        updates=600,
        model=SMALL,
        objectives={"gtsa": replace(SMALL_GTSA, patch_from_epoch=2.0)},
        optim=SMALL_OPTIM,
    )


def imagenette_gtsa() -> TrainSettings:
    """GTSA of a small ViT on photographs: a quarter of an hour on two cores."""
    learned = replace(SMALL_GTSA, patch_from_epoch=3.0)
    return small_on_imagenette("imagenette_gtsa", "gtsa", learned, model=SMALL, updates=800, optim=SMALL_OPTIM)


def coco_gtsa_vits16() -> TrainSettings:
    """GTSA on COCO train2017: ViT-S/16, 100 epochs of 8 x 64 pictures, as its author's code has them by default.

    In bfloat16, where the author's was in float16.
    """
    ten_epochs = 10 * 118287 // 512
    return TrainSettings(
        recipe="coco_gtsa_vits16",
        needs_data=True,
        global_batch=512,
        epochs=100,
        precision="bfloat16",
        model=ModelSettings(name="vit_small_patch16_224", view_size_px=224, drop_path=0.1, resampling="plain", summary="mean"),
        objectives={"gtsa": GTSASettings()},
        optim=replace(SMALL_OPTIM, lr=5e-4 * 512 / 256, clip_norm=3.0),
        evaluation=EvaluationSettings(every=ten_epochs, knn_pictures=50000),
        runtime=RuntimeSettings(log_every=50, checkpoint_every=ten_epochs // 10, prefetch=3),
    )
