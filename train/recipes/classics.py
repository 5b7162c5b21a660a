"""Runs of the spatial classics: rotation, context prediction, jigsaw, colorization.

Here: of each one that needs no data of yours, one on photographs and a processor, and one of a ResNet-50 on ImageNet.
Not here: what the settings mean (settings.py, objectives/).
"""

from dataclasses import replace

from wherefrom.pipeline.laws import Tiles
from wherefrom.pipeline.view_recipe import ColorLaw
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objective import ObjectiveSettings
from wherefrom.train.objectives import ColorizationSettings, ContextSettings, JigsawSettings, RotationSettings, TileGuards
from wherefrom.train.recipes.sizes import SMALL_VIT, resnet50_on_imagenet, small_on_imagenette
from wherefrom.train.settings import EvaluationSettings, OptimSettings, TrainSettings

SMALL_TILES = Tiles(area_frac=(0.6, 1.0), window_px=96, tile_px=24, gap_px=3)  # in cells of 30 px
VIT_OF_TILES = replace(SMALL_VIT, view_size_px=24, patch_size_px=6)  # 16 patches, as in its views of 64 px
VIT_OF_CELLS = replace(SMALL_VIT, patch_size_px=8)  # 64 patches, each of which is told a color
NORMALIZED = TileGuards(normalize=True)
SGD = OptimSettings(name="sgd", lr=0.1, weight_decay=1e-4, warmup_frac=0.0, clip_norm=None)  # VISSL's, for batches of 256


def rotation() -> TrainSettings:
    """Rotation of a small ViT on drawn scenes: minutes on two cores."""
    learned = RotationSettings(size_px=64, area_frac=(0.5, 1.0), mirror="none")
    return _on_scenes("rotation", learned, model=SMALL_VIT, updates=1500)


def context() -> TrainSettings:
    """Context prediction of a small ViT on drawn scenes: minutes on two cores; neither mirrored nor gray, for left and color tell there."""
    learned = ContextSettings(size_px=24, tiles=SMALL_TILES, hidden=256, color=None, guards=NORMALIZED)
    return _on_scenes("context", learned, model=VIT_OF_TILES, updates=1500)


def jigsaw() -> TrainSettings:
    """Jigsaw of 100 permutations, of a small ViT on drawn scenes: minutes on two cores; neither mirrored nor gray, as in context."""
    learned = JigsawSettings(size_px=24, tiles=SMALL_TILES, permutations=100, hidden=64, mirror="none", color=None, guards=NORMALIZED)
    return _on_scenes("jigsaw", learned, model=VIT_OF_TILES, updates=1500)


def colorization() -> TrainSettings:
    """Colorization of a small ViT on drawn scenes: minutes on two cores."""
    learned = ColorizationSettings(size_px=64, area_frac=(0.5, 1.0), mirror="none")
    return _on_scenes("colorization", learned, model=VIT_OF_CELLS, updates=1500)


def imagenette_rotation() -> TrainSettings:
    """Rotation of a small ViT on photographs: a quarter of an hour on two cores."""
    learned = RotationSettings(size_px=64, area_frac=(0.3, 1.0))
    return small_on_imagenette("imagenette_rotation", "rotation", learned, model=SMALL_VIT, updates=1500)


def imagenette_context() -> TrainSettings:
    """Context prediction of a small ViT on photographs: a quarter of an hour on two cores."""
    learned = ContextSettings(
        size_px=24, tiles=replace(SMALL_TILES, area_frac=(0.3, 1.0)), hidden=256, color=_gray(1 / 3), guards=NORMALIZED
    )
    return small_on_imagenette("imagenette_context", "context", learned, model=VIT_OF_TILES, updates=900)


def imagenette_jigsaw() -> TrainSettings:
    """Jigsaw of 100 permutations, of a small ViT on photographs: a quarter of an hour on two cores."""
    tiles = replace(SMALL_TILES, area_frac=(0.3, 1.0))
    learned = JigsawSettings(size_px=24, tiles=tiles, permutations=100, hidden=64, color=_gray(1 / 3), guards=NORMALIZED)
    return small_on_imagenette("imagenette_jigsaw", "jigsaw", learned, model=VIT_OF_TILES, updates=900)


def imagenette_colorization() -> TrainSettings:
    """Colorization of a small ViT on photographs: a quarter of an hour on two cores."""
    learned = ColorizationSettings(size_px=64, area_frac=(0.3, 1.0))
    return small_on_imagenette("imagenette_colorization", "colorization", learned, model=VIT_OF_CELLS, updates=1500)


def imagenet_rotation_r50() -> TrainSettings:
    """Rotation on ImageNet-1k: ResNet-50, 105 epochs of batch 256 by SGD, as VISSL's config has them (its zoo: linear 48.2).

    Its rate falls by tenths at epochs 30, 60, 90 and 100, ours by a cosine.
    """
    return resnet50_on_imagenet("imagenet_rotation_r50", "rotation", RotationSettings(size_px=224), global_batch=256, epochs=105, optim=SGD)


def imagenet_context_r50() -> TrainSettings:
    """Context prediction on ImageNet-1k: ResNet-50, 70 epochs of batch 512 by SGD, as mmselfsup's config has them (linear 40.4).

    5 epochs of warm-up; its rate falls by tenths at epochs 30 and 50, ours by a cosine, and its head decays by 5e-4.
    """
    optim = replace(SGD, lr=0.2, warmup_frac=5 / 70)
    return resnet50_on_imagenet("imagenet_context_r50", "context", ContextSettings(size_px=64), global_batch=512, epochs=70, optim=optim)


def imagenet_jigsaw_r50() -> TrainSettings:
    """Jigsaw of 2000 permutations on ImageNet-1k: ResNet-50, 105 epochs of batch 256 by SGD, as VISSL's config has them (linear 46.73).

    5 epochs of warm-up; its rate falls by tenths at epochs 30, 60, 90 and 100, ours by a cosine.
    """
    optim = replace(SGD, warmup_frac=5 / 105)
    return resnet50_on_imagenet("imagenet_jigsaw_r50", "jigsaw", JigsawSettings(size_px=64), global_batch=256, epochs=105, optim=optim)


def imagenet_colorization_r50() -> TrainSettings:
    """Colorization on ImageNet-1k: ResNet-50. VISSL's zoo has one (linear 40.11) without a config: batch, epochs, rate of its rotation."""
    learned = ColorizationSettings(size_px=224)
    return resnet50_on_imagenet("imagenet_colorization_r50", "colorization", learned, global_batch=256, epochs=105, optim=SGD)


def _gray(share: float) -> ColorLaw:
    """Return the law that makes a share of the pictures gray, and changes no color else."""
    return ColorLaw(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, jitter_prob=0.0, gray_prob=share)


def _on_scenes(name: str, learned: ObjectiveSettings, *, model: ModelSettings, updates: int) -> TrainSettings:
    """Return a run of batches of 32 on the demo's pictures, whose recipe and objective have one name."""
    return TrainSettings(
        recipe=name,
        global_batch=32,
        updates=updates,
        model=model,
        objectives={name: learned},
        optim=OptimSettings(lr=1.5e-3),
        evaluation=EvaluationSettings(view_px=48),
    )
