"""The two sizes in which hosts come: a ResNet-50 on ImageNet, as their papers have it, and what two cores train on imagenette.

Here: what such runs share.
Not here: what is learned, and how weights follow (one file a method beside this one).
"""

from wherefrom.pipeline.view_recipe import ColorLaw
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objective import ObjectiveSettings
from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings

SIGMA_PX = (0.1, 0.6)  # of blur, in views of 64 px: 0.1 to 2 in those of 224
# 0.9 million parameters, 16 patches in views of 64 px; and 4.9 million, of which an update takes seven times as long
SMALL_VIT = ModelSettings(name="vit_small_patch16_224", view_size_px=64, patch_size_px=16, width=128, depth=4, heads=4)
SMALL_RESNET = ModelSettings(name="resnet10t")
SMALL_FIRST_COLOR = ColorLaw(blur_prob=1.0, blur_sigma_px=SIGMA_PX)
SMALL_OPTIM = OptimSettings(lr=1e-3, warmup_frac=0.1)
SMALL_SECOND_COLOR = ColorLaw(blur_prob=0.1, blur_sigma_px=SIGMA_PX, solarize_prob=0.2)


def resnet50_on_imagenet(
    recipe: str, host: str, learned: ObjectiveSettings, *, global_batch: int, epochs: int, optim: OptimSettings
) -> TrainSettings:
    """Return a run in bfloat16 on 8 GPUs, evaluated every ten epochs."""
    ten_epochs = 10 * 1281167 // global_batch
    return TrainSettings(
        recipe=recipe,
        needs_data=True,
        global_batch=global_batch,
        epochs=epochs,
        precision="bfloat16",
        model=ModelSettings(name="resnet50"),
        objectives={host: learned},
        optim=optim,
        evaluation=EvaluationSettings(every=ten_epochs, knn_pictures=50000),
        runtime=RuntimeSettings(log_every=50, checkpoint_every=ten_epochs // 10, prefetch=3),
    )


def small_on_imagenette(
    recipe: str,
    host: str,
    learned: ObjectiveSettings,
    *,
    model: ModelSettings,
    updates: int,
    optim: OptimSettings = SMALL_OPTIM,
) -> TrainSettings:
    """Return a run of batches of 64, by AdamW if nothing else is said."""
    return TrainSettings(
        recipe=recipe,
        needs_data=True,
        global_batch=64,
        updates=updates,
        model=model,
        objectives={host: learned},
        optim=optim,
        evaluation=EvaluationSettings(every=updates // 2),
        runtime=RuntimeSettings(checkpoint_every=updates // 6),
    )
