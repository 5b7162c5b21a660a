"""Three methods as one makes them of lightly's parts: its wrapped ViT, heads, losses, momentum, masks and transforms.

Here: the modules, their loss on a batch, what follows an update, weights taken over from ours; the views of their own loader.
Not here: optimizer and schedule, which are ours on both sides (updates.py); what is compared (same_batches.py, own_loaders.py).
Source: lightly 1.6.0 (MIT), by its public interface and as its examples use it; it is no dependency and is imported when it is needed.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor, nn

from wherefrom.pipeline.view_recipe import ColorLaw
from wherefrom.train.encoder import ModelSettings
from wherefrom.train.objective import ParameterRule, Progress, Step
from wherefrom.train.objectives import DINOSettings, MAESettings, SimCLRSettings
from wherefrom.train.objectives.mae import Mask
from wherefrom.train.schedule import cosine

Method = Literal["simclr", "dino", "mae"]
METHODS: tuple[Method, ...] = get_args(Method)

VERSION = "1.6.0"
INSTALL = f"pip install --no-deps lightly=={VERSION} lightning-utilities"
PLANTED_FRAC = 0.01  # by how much a planted temperature is off


def refuse_without_lightly() -> None:
    """Raise ValueError in one line if lightly is not installed, or in another version."""
    try:
        version = importlib.metadata.version("lightly")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"lightly is not installed, with which we compare; {INSTALL}") from None
    if version != VERSION:
        raise ValueError(f"lightly {version} is installed, the comparison was made for {VERSION}; {INSTALL}")


class Theirs(nn.Module):
    """A method of theirs: views in, a loss out; what is planted makes it another method by a little, to see that this is noticed."""

    backbone: Any  # lightly's wrapper of a timm ViT
    rules: Mapping[str, ParameterRule] = {}  # of parameters that do not learn as all others

    def loss(self, views: Sequence[Tensor], progress: Progress, mask: Mask | None) -> Tensor:
        """Return the loss on a batch: views (B, 3, H, W), one after the other as their transforms have them."""
        raise NotImplementedError

    def take(self, step: Step) -> None:
        """Take our weights over."""
        raise NotImplementedError

    def before_update(self, progress: Progress) -> None:
        """Do what comes before the optimizer's step."""

    def after_update(self, progress: Progress) -> None:
        """Do what follows it."""

    @property
    def exported(self) -> nn.Module:
        """The timm ViT that is evaluated."""
        return self.backbone.vit


class TheirSimCLR(Theirs):
    """Both views as one batch, as in lightly's ImageNet script; the shift of the head's last BatchNorm, which ours lacks, is held at 0."""

    def __init__(self, model: ModelSettings, settings: SimCLRSettings, *, planted: bool = False) -> None:
        super().__init__()
        heads, losses = import_module("lightly.models.modules.heads"), import_module("lightly.loss")
        self.backbone = _backbone(model, positions="learn", weights="skip")
        width = self.backbone.vit.embed_dim
        self.head = heads.SimCLRProjectionHead(width, settings.hidden or width, settings.out, num_layers=settings.layers, batch_norm=True)
        self.head.layers[-1].bias.requires_grad_(False)
        self.criterion = losses.NTXentLoss(temperature=_off(settings.temperature, planted))

    def loss(self, views: Sequence[Tensor], progress: Progress, mask: Mask | None) -> Tensor:
        z = self.head(self.backbone(torch.stack(list(views), 1).flatten(0, 1)))  # a picture's views side by side, as ours: sums round alike
        return self.criterion(z[0::2], z[1::2])

    def take(self, step: Step) -> None:
        self.backbone.vit.load_state_dict(step.encoder.model.state_dict())
        objective: Any = step.objectives["simclr"]
        ours = objective.head
        shift = {f"{len(ours) - 1}.bias": torch.zeros(ours[-1].num_features)}
        self.head.layers.load_state_dict(ours.state_dict() | shift)


class TheirDINO(Theirs):
    """Student and teacher, which starts as its copy; all but biases and norms decay, as the authors have it."""

    def __init__(self, model: ModelSettings, settings: DINOSettings, *, planted: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.backbone, self.teacher = (_backbone(model, positions="learn", weights="skip") for _ in range(2))
        self.head, self.teacher_head = (self._head(self.backbone.vit.embed_dim) for _ in range(2))
        self.teacher.requires_grad_(False)
        self.teacher_head.requires_grad_(False)
        self._begin_teacher()
        self.criterion = import_module("lightly.loss").DINOLoss(
            output_dim=settings.prototypes,
            warmup_teacher_temp=settings.first_teacher_temperature,
            teacher_temp=settings.teacher_temperature,
            warmup_teacher_temp_epochs=settings.teacher_temperature_epochs,
            student_temp=_off(settings.student_temperature, planted),
            center_momentum=settings.center_momentum,
        )
        learn = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.rules = {name: ParameterRule(decays=p.ndim > 1 and not name.endswith(".bias")) for name, p in learn.items()}

    def loss(self, views: Sequence[Tensor], progress: Progress, mask: Mask | None) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher(torch.cat(list(views[:2])))).chunk(2)
        summaries = [self.backbone(torch.cat(list(views[:2])))]
        if len(views) > 2:
            summaries.append(self.backbone(torch.cat(list(views[2:]))))
        student = self.head(torch.cat(summaries)).chunk(len(views))
        return self.criterion(list(teacher), list(student), epoch=int(progress.epoch))

    def take(self, step: Step) -> None:
        self.backbone.vit.load_state_dict(step.encoder.model.state_dict())
        objective: Any = step.objectives["dino"]
        ours = objective.head
        self.head.layers.load_state_dict(ours.mlp.state_dict())
        with torch.no_grad():
            self.head.last_layer.weight_v.copy_(ours.prototypes.weight_v)
        self._begin_teacher()

    def before_update(self, progress: Progress) -> None:
        self.head.cancel_last_layer_gradients(int(progress.epoch))

    def after_update(self, progress: Progress) -> None:
        start, end = self.settings.teacher_momentum, self.settings.final_teacher_momentum
        momentum = cosine(progress.update, updates=progress.updates, start=start, end=end)
        update_momentum = import_module("lightly.models.utils").update_momentum
        with torch.no_grad():
            update_momentum(self.backbone, self.teacher, momentum)
            update_momentum(self.head, self.teacher_head, momentum)

    @property
    def exported(self) -> nn.Module:
        return self.teacher.vit

    def _head(self, width: int) -> Any:
        settings = self.settings
        return import_module("lightly.models.modules.heads").DINOProjectionHead(
            width,
            settings.hidden,
            settings.bottleneck,
            settings.prototypes,
            batch_norm=settings.head_batch_norm,
            freeze_last_layer=int(settings.prototypes_rest_epochs),
            norm_last_layer=not settings.free_prototype_norms,
        )

    def _begin_teacher(self) -> None:
        self.teacher.load_state_dict(self.backbone.state_dict())
        self.teacher_head.load_state_dict(self.head.state_dict())


class TheirMAE(Theirs):
    """Encoder, decoder, and patches of mean 0 and variance 1; the class token decays, as the authors have it."""

    rules: Mapping[str, ParameterRule] = {"backbone.vit.cls_token": ParameterRule(decays=True)}

    def __init__(self, model: ModelSettings, settings: MAESettings, *, planted: bool = False) -> None:
        super().__init__()
        modules = import_module("lightly.models.modules")
        self.settings, self.planted = settings, planted
        self.backbone = _backbone(model, positions="sincos", weights="")
        self.patch_px = self.backbone.vit.patch_embed.patch_size[0]
        self.embed = nn.Linear(self.backbone.vit.embed_dim, settings.decoder_width)
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            num_patches=self.backbone.vit.patch_embed.num_patches,
            embed_dim=settings.decoder_width,
            depth=settings.decoder_depth,
            num_heads=settings.decoder_heads,
            num_prefix_tokens=1,
            mlp_ratio=settings.decoder_mlp_ratio,
        )
        self.predict = nn.Linear(settings.decoder_width, self.patch_px**2 * 3)
        init_weights = import_module("lightly.models.modules.masked_vision_transformer_timm").init_weights
        self.embed.apply(init_weights)
        self.predict.apply(init_weights)
        self.criterion = nn.MSELoss()

    def loss(self, views: Sequence[Tensor], progress: Progress, mask: Mask | None) -> Tensor:
        utils = import_module("lightly.models.utils")
        (pixels,) = views
        keep, masked = self._kept_and_masked(len(pixels), mask)
        embedded = self.embed(self.backbone.encode(images=pixels, idx_keep=keep))
        places = embedded.new_zeros(len(pixels), self.backbone.sequence_length, embedded.shape[-1])
        decoded = self.decoder(utils.set_at_index(places, keep, embedded), idx_mask=masked)
        predicted = self.predict(utils.get_at_index(decoded, masked))
        targets = utils.get_at_index(utils.patchify(pixels, self.patch_px), masked - 1)  # they number the class token 0
        targets = utils.normalize_mean_var(targets)
        if self.planted:  # the variance as a mean over all numbers, which is the nearest mistake
            targets = targets * (targets.shape[-1] / (targets.shape[-1] - 1)) ** 0.5
        return self.criterion(predicted, targets)

    def take(self, step: Step) -> None:
        state = step.encoder.model.state_dict()
        self.backbone.vit.load_state_dict(state | {"pos_embed": self.backbone.vit.pos_embed})
        ours: Any = step.objectives["mae"]
        for here, there in ((self.embed, ours.embed), (self.decoder.blocks, ours.blocks), (self.predict, ours.predict)):
            here.load_state_dict(there.state_dict())
        self.decoder.norm.load_state_dict(ours.norm.state_dict())
        with torch.no_grad():
            self.decoder.mask_token.copy_(ours.mask_token)

    def _kept_and_masked(self, count: int, mask: Mask | None) -> tuple[Tensor, Tensor]:
        """Return which tokens are kept and which masked: of a stored mask, else drawn as they draw."""
        if mask is None:
            size = (count, self.backbone.sequence_length)
            return import_module("lightly.models.utils").random_token_mask(size, mask_ratio=self.settings.mask_ratio)
        masked = mask.masked.nonzero()[:, 1].unflatten(0, (count, -1))
        return torch.cat([torch.zeros(count, 1, dtype=torch.int64), mask.keep + 1], 1), masked + 1


THEIRS: Mapping[str, Callable[..., Theirs]] = {"simclr": TheirSimCLR, "dino": TheirDINO, "mae": TheirMAE}


def their_transform(settings: Any) -> Callable[[Any], list[Tensor]]:
    """Return the views of their own loader by the numbers of ours; filters, interpolation and ranges are theirs."""
    transforms = import_module("lightly.transforms")
    if isinstance(settings, MAESettings):
        return transforms.MAETransform(input_size=settings.size_px, min_scale=settings.area_frac[0])
    color = settings.color
    if isinstance(settings, SimCLRSettings):
        return transforms.SimCLRTransform(
            input_size=settings.size_px,
            min_scale=settings.area_frac[0],
            gaussian_blur=color.blur_prob,
            cj_strength=1.0,
            **_jitter(color, 1.0),
        )
    blurs = (color.blur_prob, settings.second_color.blur_prob, settings.local_color.blur_prob)
    return transforms.DINOTransform(
        global_crop_size=settings.size_px,
        global_crop_scale=settings.area_frac,
        local_crop_size=settings.local_px,
        local_crop_scale=settings.local_area_frac,
        n_local_views=settings.local_views,
        gaussian_blur=blurs,
        solarization_prob=settings.second_color.solarize_prob,
        cj_strength=0.5,  # its second global view takes no other
        **_jitter(color, 0.5),
    )


def _jitter(color: ColorLaw, strength: float) -> dict[str, Any]:
    """Return what their transforms call a color law's numbers."""
    factors = {"cj_bright": color.brightness, "cj_contrast": color.contrast, "cj_sat": color.saturation, "cj_hue": color.hue}
    return {
        "cj_prob": color.jitter_prob,
        "random_gray_scale": color.gray_prob,
        "sigmas": color.blur_sigma_px,
        **{name: value / strength for name, value in factors.items()},
    }


def _backbone(model: ModelSettings, *, positions: str, weights: str) -> Any:
    """Return their wrapper of the timm ViT that our encoder has; a token for masks, which none of these methods uses, does not learn."""
    modules = import_module("lightly.models.modules")
    vit = timm.create_model(**model.timm_arguments())
    backbone = modules.MaskedVisionTransformerTIMM(vit, weight_initialization=weights, pos_embed_initialization=positions)
    backbone.mask_token.requires_grad_(False)
    return backbone


def _off(temperature: float, planted: bool) -> float:
    return temperature * (1 + PLANTED_FRAC) if planted else temperature
