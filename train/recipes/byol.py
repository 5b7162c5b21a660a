"""Runs of BYOL."""

from wherefrom.train.objectives import BYOLSettings
from wherefrom.train.recipes.sizes import SMALL_FIRST_COLOR, SMALL_RESNET, SMALL_SECOND_COLOR, resnet50_on_imagenet, small_on_imagenette
from wherefrom.train.settings import OptimSettings, TrainSettings


def imagenet_byol_r50() -> TrainSettings:
    """BYOL on ImageNet-1k: ResNet-50, 40 epochs of batch 4096, the shortest preset of its authors' code.

    Learning rate 0.45 * 4096 / 256. Its preset of 100 epochs: --epochs 100 --optim.warmup-frac 0.1 --byol.momentum 0.99.
    """
    optim = OptimSettings(name="ssl_lars", lr=7.2, weight_decay=1e-6, warmup_frac=0.25, clip_norm=None)
    return resnet50_on_imagenet("imagenet_byol_r50", "byol", BYOLSettings(momentum=0.97), global_batch=4096, epochs=40, optim=optim)


def imagenette_byol() -> TrainSettings:
    """BYOL of a ResNet-10 on photographs: a quarter of an hour on two cores."""
    learned = BYOLSettings(size_px=64, area_frac=(0.2, 1.0), color=SMALL_FIRST_COLOR, second_color=SMALL_SECOND_COLOR, hidden=1024, out=256)
    return small_on_imagenette("imagenette_byol", "byol", learned, model=SMALL_RESNET, updates=900)
