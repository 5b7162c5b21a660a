"""An update of the weights: the optimizer, clipping by groups, and a gate that a broken gradient does not pass.

Here: one of timm's optimizers, or LARS, as the settings ask, its groups; gradient norms; updates that happen or not, without asking the
device.
Not here: the learning rate (schedule.py), how a parameter learns and which gradients belong together (objective.py), when (loop.py).
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from wherefrom.train.lars import LARS
from wherefrom.train.objective import ParameterRule
from wherefrom.train.settings import OptimSettings

# beside those of timm
OWN: Mapping[str, Callable[..., torch.optim.Optimizer]] = {"ssl_lars": LARS, "simclr_lars": partial(LARS, rate_in_momentum=True)}


def make_optimizer(
    model: nn.Module, settings: OptimSettings, rules: Mapping[str, ParameterRule] = MappingProxyType({})
) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that learn, in groups of those that learn alike.

    Weights decay in matrices only, and not where a module forbids it, unless `rules`, by the parameters' names, say otherwise.
    Raises: ValueError if there is no such optimizer, or it needs what a run has not.
    """
    if settings.name in OWN:
        return OWN[settings.name](_groups(model, settings, rules), lr=settings.lr, momentum=settings.momentum)
    names = [*OWN, *(str(name) for name in timm.optim.list_optimizers())]
    if settings.name not in names:
        near = difflib.get_close_matches(settings.name, names, 3) or ["adamw", "sgd", "lamb"]
        raise ValueError(f"optim.name={settings.name!r}: timm has no such optimizer; it has {', '.join(near)}, ...")
    about = timm.optim.get_optimizer_info(settings.name)
    on_cpu = any(parameter.device.type == "cpu" for parameter in model.parameters())
    for is_so, why in (
        (about.second_order, "needs second derivatives, which a run does not compute"),
        (settings.name.startswith("kron"), "draws random numbers that no checkpoint holds, so that a run could not go on"),
        (settings.name.startswith("bnb") and on_cpu, "needs a GPU"),
    ):
        if is_so:
            raise ValueError(f"optim.name={settings.name!r}: {why}; take another, such as adamw")
    options: dict[str, Any] = {}
    if about.has_betas and about.num_betas == 2:
        options["betas"] = settings.betas
    if about.has_momentum:
        options["momentum"] = settings.momentum
    known = inspect.signature(about.opt_class).parameters if callable(about.opt_class) else {}
    if "fused" in known:
        options["fused"] = True  # fused optimizers know `found_inf`
    if "max_grad_norm" in known:
        options["max_grad_norm"] = None  # LAMB's own clipping, by one norm of all: a plug-in's head would shorten its host's step
    try:
        return timm.optim.create_optimizer_v2(_groups(model, settings, rules), settings.name, lr=settings.lr, **options)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as problem:
        why = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(f"optim.name={settings.name!r}: timm cannot build it here ({why}); take another, such as adamw") from None


def _groups(model: nn.Module, settings: OptimSettings, rules: Mapping[str, ParameterRule]) -> list[dict[str, Any]]:
    """Return the optimizer's groups, those without weight decay first."""
    undecayed, plain = set(_undecayed(model)), ParameterRule()
    groups: dict[tuple[bool, float, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = rules.get(name, plain)
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in undecayed if rule.decays is None else rule.decays
            groups.setdefault((decays, rule.lr_factor, rule.constant_lr, rule.rest_epochs), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "decays": decays,
            "lr_scale": lr_factor,
            "constant_lr": constant_lr,
            "rest_epochs": rest_epochs,
        }
        for (decays, lr_factor, constant_lr, rest_epochs), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def set_rates(optimizer: torch.optim.Optimizer, *, lr: float, peak_lr: float, weight_decay: float) -> None:
    """Give every group its learning rate and its weight decay for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = (peak_lr if group["constant_lr"] else lr) * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def drop_resting(optimizer: torch.optim.Optimizer, epoch: float) -> None:
    """Take the gradients away from parameters that rest until a later epoch, so that nothing clips, moves or decays them."""
    for group in optimizer.param_groups:
        if epoch < group["rest_epochs"]:
            for parameter in group["params"]:
                parameter.grad = None


def clip_gradients(groups: Mapping[str, Sequence[nn.Parameter]], largest: float | None, *, each: bool = False) -> dict[str, Tensor]:
    """Scale every group's gradients down to a norm of at most `largest`, or each gradient by itself; return the groups' norms before.

    Source: each by itself as DINO's authors' code has it, commit 7c446df.
    """
    norms = {}
    for name, parameters in groups.items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms[name] = nn.utils.get_total_norm(gradients) if gradients else parameters[0].new_zeros(())  # on the device in any case
        if largest is not None and each:
            _clip_each(gradients, largest)
        elif largest is not None:
            nn.utils.clip_grads_with_norm_(parameters, largest, norms[name])
    return norms


def _clip_each(gradients: list[Tensor], largest: float) -> None:
    if gradients:
        factors = torch.stack(torch._foreach_norm(gradients)).add_(1e-6).reciprocal_().mul_(largest).clamp_(max=1)
        torch._foreach_mul_(gradients, list(factors.unbind()))


def gated_step(optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
    """Take an optimizer step if `is_finite` (a bool scalar on the device) is true; weights and state stay as they are if it is not.

    Fused optimizers ask the device themselves; for the others the host has to, and waits for it.
    Source: `found_inf` as torch.amp.GradScaler hands it to them.
    """
    if isinstance(optimizer, torch.optim.SGD):
        _begin_late_momenta(optimizer)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(is_finite):
        optimizer.step()


def _begin_late_momenta(optimizer: torch.optim.SGD) -> None:
    """Give a momentum of 0 to parameters that get their first gradient later than others: torch's fused SGD knows all or none."""
    parameters = [p for group in optimizer.param_groups if group["momentum"] for p in group["params"] if p.grad is not None]
    late = [p for p in parameters if optimizer.state[p].get("momentum_buffer") is None]
    for parameter in late if len(late) < len(parameters) else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _undecayed(model: nn.Module) -> list[str]:
    """Return the full names of the parameters that some module wants free of weight decay (timm: class token, position table)."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if callable(forbids := getattr(module, "no_weight_decay", None))
        for name in forbids()
    ]
