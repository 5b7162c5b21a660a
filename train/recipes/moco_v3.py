"""Runs of MoCo v3.

Here: `imagenette_mocov3`, on photographs and a processor; `imagenet_mocov3_vits16`, the authors' shortest of a ViT.
Not here: what the settings mean (settings.py, objectives/moco_v3.py).
"""

from dataclasses import replace

from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives import MoCoV3Settings
from wherefrom.train.recipes.sizes import SMALL_FIRST_COLOR, SMALL_SECOND_COLOR, SMALL_VIT, small_on_imagenette
from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings


def imagenette_mocov3() -> TrainSettings:
    """MoCo v3 of a small ViT on photographs: a quarter of an hour on two cores."""
    learned = MoCoV3Settings(
        size_px=64, area_frac=(0.2, 1.0), color=SMALL_FIRST_COLOR, second_color=SMALL_SECOND_COLOR, hidden=512, out=128
    )
    model = replace(SMALL_VIT, positions="sincos", frozen=("patch_embed",))
    optim = OptimSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, warmup_frac=0.1, clip_norm=None)
    return small_on_imagenette("imagenette_mocov3", "moco_v3", learned, model=model, updates=2400, optim=optim)


def imagenet_mocov3_vits16() -> TrainSettings:
    """MoCo v3 on ImageNet-1k: ViT-S/16 of 12 heads, 300 epochs at batch 4096, its authors' shortest of a ViT; they report linear 73.2."""
    return TrainSettings(
        recipe="imagenet_mocov3_vits16",
        needs_data=True,
        global_batch=4096,
        epochs=300,
        precision="bfloat16",
        model=ModelSettings(name="vit_small_patch16_224", view_size_px=224, heads=12, positions="sincos", frozen=("patch_embed",)),
        objectives={"moco_v3": MoCoV3Settings()},
        optim=OptimSettings(lr=1.5e-4 * 4096 / 256, betas=(0.9, 0.999), weight_decay=0.1, warmup_frac=40 / 300, clip_norm=None),
        evaluation=EvaluationSettings(every=3120, knn_pictures=50000, pictures=2000),
        runtime=RuntimeSettings(log_every=50, checkpoint_every=312, prefetch=3),
    )
