"""Runs of VICReg."""

from wherefrom.train.objectives import VICRegSettings
from wherefrom.train.recipes.sizes import SMALL_FIRST_COLOR, SMALL_RESNET, SMALL_SECOND_COLOR, resnet50_on_imagenet, small_on_imagenette
from wherefrom.train.settings import OptimSettings, TrainSettings


def imagenet_vicreg_r50() -> TrainSettings:
    """VICReg on ImageNet-1k: ResNet-50, 100 epochs of batch 512, the command of its authors' README.

    Learning rate 0.3 * 512 / 256.
    """
    optim = OptimSettings(name="ssl_lars", lr=0.6, final_lr=6e-4, weight_decay=1e-6, warmup_frac=0.1, clip_norm=None)
    return resnet50_on_imagenet("imagenet_vicreg_r50", "vicreg", VICRegSettings(), global_batch=512, epochs=100, optim=optim)


def imagenette_vicreg() -> TrainSettings:
    """VICReg of a ResNet-10 on photographs: a quarter of an hour on two cores."""
    learned = VICRegSettings(
        size_px=64, area_frac=(0.2, 1.0), color=SMALL_FIRST_COLOR, second_color=SMALL_SECOND_COLOR, hidden=1024, out=1024
    )
    return small_on_imagenette("imagenette_vicreg", "vicreg", learned, model=SMALL_RESNET, updates=900)
