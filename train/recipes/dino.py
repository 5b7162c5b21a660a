"""Runs of DINO.

Here: `imagenette_dino`, on photographs and a processor; `imagenet_dino_vits16`, the authors' shortest.
Not here: what the settings mean (settings.py, objectives/dino.py).
"""

from wherefrom.pipeline.view_recipe import ColorLaw
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives import DINOSettings
from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings


def imagenette_dino() -> TrainSettings:
    """DINO of a small ViT on photographs, two global and four local views: a quarter of an hour on two cores."""
    blur = (0.1, 0.5)  # pixels: as for ImageNet, for views a quarter as wide
    return TrainSettings(
        recipe="imagenette_dino",
        needs_data=True,
        global_batch=64,
        updates=1200,
        model=ModelSettings(
            name="vit_small_patch16_224", view_size_px=48, patch_size_px=12, width=128, depth=4, heads=4, resampling="plain"
        ),
        objectives={
            "dino": DINOSettings(
                size_px=48,
                local_views=4,
                local_px=24,
                color=ColorLaw(blur_prob=1.0, blur_sigma_px=blur),
                second_color=ColorLaw(blur_prob=0.1, blur_sigma_px=blur, solarize_prob=0.2),
                local_color=ColorLaw(blur_prob=0.5, blur_sigma_px=blur),
                prototypes=1024,
                hidden=512,
                bottleneck=128,
            )
        },
        optim=OptimSettings(
            lr=5e-4, betas=(0.9, 0.999), weight_decay=0.04, final_weight_decay=0.4, warmup_frac=0.1, final_lr=1e-6, clip_by="parameter"
        ),
        evaluation=EvaluationSettings(every=600),
        runtime=RuntimeSettings(checkpoint_every=300),
    )


def imagenet_dino_vits16() -> TrainSettings:
    """DINO on ImageNet-1k: ViT-S/16, 100 epochs of 8 x 64 pictures, the "vanilla" run of its authors' README, who report k-NN 69.3.

    In bfloat16, where theirs was in float16.
    """
    return TrainSettings(
        recipe="imagenet_dino_vits16",
        needs_data=True,
        global_batch=512,
        epochs=100,
        precision="bfloat16",
        model=ModelSettings(name="vit_small_patch16_224", view_size_px=224, drop_path=0.1, resampling="plain"),
        objectives={"dino": DINOSettings()},
        optim=OptimSettings(
            lr=5e-4 * 512 / 256,
            betas=(0.9, 0.999),
            weight_decay=0.04,
            final_weight_decay=0.4,
            warmup_frac=0.1,
            final_lr=1e-6,
            clip_norm=3.0,
            clip_by="parameter",
        ),
        evaluation=EvaluationSettings(every=12500, knn_pictures=50000, pictures=2000),
        runtime=RuntimeSettings(log_every=50, checkpoint_every=1250, prefetch=3),
    )
