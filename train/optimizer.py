"""An update of the weights: the optimizer, clipping by groups, and a gate that a broken gradient does not pass.

Here: one of timm's optimizers as the settings ask; gradient norms; updates that happen or not without asking the device.
Not here: the learning rate (schedule.py), which gradients belong together (objective.py), when (loop.py).
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from wherefrom.train.settings import OptimSettings


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters that learn; weights decay in matrices only, and not where a module forbids it.

    Raises: ValueError if timm has no such optimizer.
    """
    names = [str(name) for name in timm.optim.list_optimizers()]
    if settings.name not in names:
        near = difflib.get_close_matches(settings.name, names, 3) or ["adamw", "sgd", "lamb"]
        raise ValueError(f"optim.name={settings.name!r}: timm has no such optimizer; it has {', '.join(near)}, ...")
    about = timm.optim.get_optimizer_info(settings.name)
    options: dict[str, Any] = {}
    if about.has_betas and about.num_betas == 2:
        options["betas"] = settings.betas
    if about.has_momentum:
        options["momentum"] = settings.momentum
    if callable(about.opt_class) and "fused" in inspect.signature(about.opt_class).parameters:
        options["fused"] = True  # fused optimizers know `found_inf`
    groups = timm.optim.param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=_undecayed(model))
    return timm.optim.create_optimizer_v2([group for group in groups if group["params"]], settings.name, lr=settings.lr, **options)


def clip_gradients(groups: Mapping[str, Sequence[nn.Parameter]], largest: float | None) -> dict[str, Tensor]:
    """Scale every group's gradients down to a norm of at most `largest`; return the norms before, on the device."""
    norms = {}
    for name, parameters in groups.items():
        norms[name] = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if largest is not None:
            nn.utils.clip_grads_with_norm_(parameters, largest, norms[name])
    return norms


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
