"""LARS as the code of self-supervised methods has it, in its two forms.

Here: the optimizer. timm's of that name follows the paper's formula, which parts from this one where weights decay.
Not here: the choice by name (optimizer.py), what decays and at which rate (objective.py).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class LARS(torch.optim.Optimizer):
    """Scale the gradient of every weight to a fixed part of the weight's own norm, then follow it with momentum.

    g' = g + weight_decay w; g'' = trust |w| / |g'| g', or g' where a norm is 0; buffer = momentum buffer + g''; w -= lr buffer.
    One-dimensional parameters, biases and norms, are not scaled.
    rate_in_momentum: buffer = momentum buffer + lr g'', w -= buffer: another one as soon as the rate changes.
    Source: facebookresearch/vicreg, barlowtwins, dino and google-deepmind/deepmind-research's byol, which are one rule; with
    `rate_in_momentum` google-research/simclr. After arXiv 1708.03888.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        rate_in_momentum: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "rate_in_momentum": rate_in_momentum}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update of the parameters that have a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return result

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        if group["weight_decay"]:
            torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])
        _scale([(p, g) for p, g in zip(parameters, gradients, strict=True) if p.ndim > 1], group["trust"])
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        inside = group["rate_in_momentum"]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients, alpha=group["lr"] if inside else 1.0)
        torch._foreach_add_(parameters, buffers, alpha=-1.0 if inside else -group["lr"])


def _scale(weights: Iterable[tuple[Tensor, Tensor]], trust: float) -> None:
    """Scale gradients, in place, to `trust` of the norms of what they belong to: (weight, gradient) each."""
    if not (pairs := list(weights)):
        return
    parameters, gradients = (list(each) for each in zip(*pairs, strict=True))
    of_weights, of_gradients = (torch.stack(torch._foreach_norm(each)) for each in (parameters, gradients))
    both = (of_weights > 0) & (of_gradients > 0)
    factors = torch.where(both, trust * of_weights / of_gradients, 1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()))
