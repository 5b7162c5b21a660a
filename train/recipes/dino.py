"""Runs of DINO.

Here: `imagenette_dino`, on photographs and a processor; `imagenet_dino_vits16`, the authors' shortest.
Not here: what the settings mean (settings.py, objectives/dino.py).
"""

from wherefrom.pipeline.view_recipe import ColorLaw
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objectives import DINOSettings
from wherefrom.train.recipes.sizes import SIGMA_PX, SMALL_FIRST_COLOR, SMALL_RESNET, SMALL_SECOND_COLOR, small_on_imagenette
from wherefrom.train.settings import EvaluationSettings, OptimSettings, RuntimeSettings, TrainSettings


def imagenette_dino() -> TrainSettings:
    """DINO of a ResNet-10 on photographs, two large views and four small ones: a quarter of an hour on two cores.

    A small ViT, which has to find by itself what convolutions bring along, learned less in as long than its pixels tell.
    """
    learned = DINOSettings(
        size_px=64,
        local_views=4,
        local_px=32,
        color=SMALL_FIRST_COLOR,
        second_color=SMALL_SECOND_COLOR,
        local_color=ColorLaw(blur_prob=0.5, blur_sigma_px=SIGMA_PX),
        prototypes=256,
        hidden=512,
        bottleneck=128,
        teacher_momentum=0.99,
    )
    optim = OptimSettings(
        lr=1e-3, betas=(0.9, 0.999), weight_decay=0.04, final_weight_decay=0.4, warmup_frac=0.1, final_lr=1e-6, clip_by="parameter"
    )
    return small_on_imagenette("imagenette_dino", "dino", learned, model=SMALL_RESNET, updates=600, optim=optim)


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
