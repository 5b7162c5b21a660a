"""Teachers: networks that learn by following another one.

Here: the moving average.
Not here: the copy that it begins with (Encoder.slow_copy), momentum over a run (schedule.py).
"""

import torch
from torch import nn


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, *, momentum: float) -> None:
    """Move the parameters of `slow` to momentum * slow + (1 - momentum) * fast; its statistics of BatchNorm stay its own.

    Raises: ValueError if the two do not have the same parameters.
    """
    followers, leaders = dict(slow.named_parameters()), dict(fast.named_parameters())
    for name in followers | leaders:
        shapes = [tuple(held[name].shape) if name in held else "absent" for held in (followers, leaders)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the teacher and {shapes[1]} in what it follows; make it by a copy")
    if followers:
        torch._foreach_lerp_(list(followers.values()), [leaders[name] for name in followers], 1 - momentum)
