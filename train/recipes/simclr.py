"""Runs of SimCLR."""

from wherefrom.pipeline.view_recipe import ColorLaw
from wherefrom.train.objectives import SimCLRSettings
from wherefrom.train.recipes.sizes import SIGMA_PX, SMALL_VIT, resnet50_on_imagenet, small_on_imagenette
from wherefrom.train.settings import OptimSettings, TrainSettings


def imagenet_simclr_r50() -> TrainSettings:
    """SimCLR on ImageNet-1k: ResNet-50, 100 epochs of batch 4096, the command of its authors' README (linear 64.5).

    Learning rate 0.075 sqrt(4096); weight decay 1e-4 as in that command, where the paper has 1e-6.
    """
    optim = OptimSettings(name="simclr_lars", lr=4.8, weight_decay=1e-4, warmup_frac=0.1, clip_norm=None)
    return resnet50_on_imagenet("imagenet_simclr_r50", "simclr", SimCLRSettings(), global_batch=4096, epochs=100, optim=optim)


def imagenette_simclr() -> TrainSettings:
    """SimCLR of a small ViT on photographs: a quarter of an hour on two cores."""
    color = ColorLaw(blur_prob=0.5, blur_sigma_px=SIGMA_PX)
    learned = SimCLRSettings(size_px=64, area_frac=(0.2, 1.0), color=color, temperature=0.2, layers=2, hidden=512, init_std=None)
    return small_on_imagenette("imagenette_simclr", "simclr", learned, model=SMALL_VIT, updates=2400)
