"""Runs of MAE.

Here: `imagenette_mae`, on photographs and a processor; `imagenet_mae_vitb16`, the authors' shortest.
Not here: what the settings mean (settings.py, objectives/mae.py).
"""

from dataclasses import replace

from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives import MAESettings
from wherefrom.train.recipes.sizes import SMALL_VIT, small_on_imagenette
from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings


def imagenette_mae() -> TrainSettings:
    """MAE of a small ViT of 64 patches on photographs, 16 of which it sees: minutes on two cores."""
    learned = MAESettings(size_px=64, decoder_width=64, decoder_depth=2, decoder_heads=4)
    model = replace(SMALL_VIT, patch_size_px=8, positions="sincos")
    optim = OptimSettings(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_frac=0.1, clip_norm=None)
    return small_on_imagenette("imagenette_mae", "mae", learned, model=model, updates=2400, optim=optim)


def imagenet_mae_vitb16() -> TrainSettings:
    """MAE on ImageNet-1k: ViT-B/16, 800 epochs at batch 4096, the run of its authors' README."""
    return TrainSettings(
        recipe="imagenet_mae_vitb16",
        needs_data=True,
        global_batch=4096,
        epochs=800,
        precision="bfloat16",
        model=ModelSettings(name="vit_base_patch16_224", view_size_px=224, positions="sincos"),
        objectives={"mae": MAESettings()},
        optim=OptimSettings(lr=1.5e-4 * 4096 / 256, betas=(0.9, 0.95), weight_decay=0.05, warmup_frac=40 / 800, clip_norm=None),
        evaluation=EvaluationSettings(every=6240, knn_pictures=50000, pictures=2000),
        runtime=RuntimeSettings(log_every=50, checkpoint_every=312, prefetch=3),
    )
