"""Runs of SP alone, between views and between regions of one view.

Here: `demo` and `sp_dense`, which need no data of yours; `imagenette_sp`, on photographs and a processor; `imagenet_*`, the real thing.
Not here: what the settings mean (settings.py, objectives/spatial.py), how they were chosen (the closing notes name the runs).
"""

from dataclasses import replace

from wherefrom.pipeline.laws import Disjoint
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives import DenseSpatialSettings, SpatialSettings
from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings


def demo() -> TrainSettings:
    """Six disjoint views of drawn scenes, all pairs, a small ViT: minutes on two cores.

    Neither mirror nor color change: in these scenes left and right, and the light, belong to what is to be learned.
    """
    return TrainSettings(
        recipe="demo",
        global_batch=16,
        updates=3500,
        model=_small_vit(),
        objectives={"spatial": _six_disjoint_views(mirror="none")},
        optim=OptimSettings(lr=1.5e-3),
    )


def sp_dense() -> TrainSettings:
    """All pairs of 24 regions that lie apart in one view of a drawn scene, on the demo's pictures: minutes on two cores.

    The view is most of the picture; places are told without the position table. Neither mirror nor color change, as in the demo.
    Labels are judged by local views of half the side, in which things are about as large as in the views learned from.
    """
    return TrainSettings(
        recipe="sp_dense",
        global_batch=16,
        updates=1500,
        model=replace(_small_vit(), view_size_px=96, patch_size_px=8),
        objectives={"dense": DenseSpatialSettings(weight=1.0, size_px=96, area_frac=(0.6, 1.0), mirror="none", color=None)},
        optim=OptimSettings(lr=1.5e-3),
        evaluation=EvaluationSettings(view_px=48),
    )


def imagenette_sp() -> TrainSettings:
    """The demo's model on photographs, mirrored as a whole: half an hour and more on two cores."""
    return TrainSettings(
        recipe="imagenette_sp",
        needs_data=True,
        global_batch=16,
        updates=9000,
        model=_small_vit(),
        objectives={"spatial": _six_disjoint_views(mirror="picture")},
        optim=OptimSettings(lr=1e-3, warmup_frac=0.02),
        evaluation=EvaluationSettings(every=1500),
        runtime=RuntimeSettings(checkpoint_every=1000),
    )


def imagenet_sp_vits16() -> TrainSettings:
    """SP alone on ImageNet-1k: ViT-S/16, one pair of 96 px views a picture by the paired law, 100 epochs on 8 GPUs.

    Epochs and optimizer as the likeliest reading of the paper (100 epochs, AdamW, cosine); its batch of 256 is for one host's crops, while
    two small views a picture leave 8 GPUs idle: 1024, with the learning rate of ViT-S recipes at that batch (5e-4 * 1024 / 256 / 2).
    """
    return TrainSettings(
        recipe="imagenet_sp_vits16",
        needs_data=True,
        global_batch=1024,
        epochs=100,
        precision="bfloat16",
        model=ModelSettings(name="vit_small_patch16_224", view_size_px=96, drop_path=0.1),
        objectives={"spatial": SpatialSettings(weight=1.0, size_px=96, both_orders=True)},
        optim=OptimSettings(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup_frac=0.1),
        evaluation=EvaluationSettings(every=12500, knn_pictures=50000, pictures=2000),
        runtime=RuntimeSettings(log_every=50, checkpoint_every=1250, prefetch=3),
    )


def imagenet_sp_dense_vits16() -> TrainSettings:
    """Dense SP alone on ImageNet-1k: ViT-S/16, 24 regions of one 224 px view a picture, on 8 GPUs. Not run at this size yet."""
    alone = imagenet_sp_vits16()
    return replace(
        alone,
        recipe="imagenet_sp_dense_vits16",
        model=ModelSettings(name="vit_small_patch16_224", view_size_px=224, drop_path=0.1),
        objectives={"dense": DenseSpatialSettings(weight=1.0, size_px=224)},
        evaluation=replace(alone.evaluation, view_px=112),
    )


def _small_vit() -> ModelSettings:
    """Return 0.8 million parameters: 16 patches of 12 px, four blocks of width 128."""
    return ModelSettings(name="vit_small_patch16_224", view_size_px=48, patch_size_px=12, width=128, depth=4, heads=4)


def _six_disjoint_views(*, mirror: str) -> SpatialSettings:
    return SpatialSettings(
        law=Disjoint(area_frac=(0.06, 0.16), aspect=(1.15**-0.5, 1.15**0.5)),
        size_px=48,
        mirror="picture" if mirror == "picture" else "none",
        color=None,
        weight=1.0,  # 0.1 is for a plug-in beside a host's loss
    )
