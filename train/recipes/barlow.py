"""Runs of Barlow Twins."""

from wherefrom.train.objectives import BarlowTwinsSettings
from wherefrom.train.recipes.sizes import SMALL_FIRST_COLOR, SMALL_RESNET, SMALL_SECOND_COLOR, resnet50_on_imagenet, small_on_imagenette
from wherefrom.train.settings import OptimSettings, TrainSettings

RANKS = 16  # of the published run, by the README: its gradient was 1/16 of ours


def imagenet_barlow_r50() -> TrainSettings:
    """Barlow Twins on ImageNet-1k: ResNet-50, 1000 epochs of batch 2048, the only published schedule (linear 73.5).

    Learning rate 0.2 * 2048 / 256. The published weight decay, 1e-6, and rate of biases and norms, 0.0048 * 2048 / 256, go with a
    gradient that is 1/16 of the loss's, on 16 GPUs; with ours, 16 times the one and a sixteenth of the other are the same run.
    """
    optim = OptimSettings(name="ssl_lars", lr=1.6, final_lr=1.6e-3, weight_decay=RANKS * 1e-6, warmup_frac=0.01, clip_norm=None)
    learned = BarlowTwinsSettings(bias_lr_factor=0.0048 / 0.2 / RANKS)
    return resnet50_on_imagenet("imagenet_barlow_r50", "barlow", learned, global_batch=2048, epochs=1000, optim=optim)


def imagenette_barlow() -> TrainSettings:
    """Barlow Twins of a ResNet-10 on photographs: a quarter of an hour on two cores."""
    learned = BarlowTwinsSettings(
        size_px=64, area_frac=(0.2, 1.0), color=SMALL_FIRST_COLOR, second_color=SMALL_SECOND_COLOR, hidden=1024, out=1024
    )
    return small_on_imagenette("imagenette_barlow", "barlow", learned, model=SMALL_RESNET, updates=900)
